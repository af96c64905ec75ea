"""``full_tensor`` on Triton: functions with the names, arguments and results of the operators in
:mod:`htfkernels.runtime.operations`, and the float32 precision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.schedule.frames import grid_frames
from htfkernels.triton import gather_run
from htfkernels.triton.gather_run import Evaluation
from htfkernels.triton.memory import empty

__all__ = ["full_tensor", "full_tensor_backward"]

_GRID = -1  # in place of a batch size


def full_tensor(
    weights: Sequence[Tensor], program: Tensor, entries: int, out_features: int, *, precision: str
) -> Tensor:
    """``[entries]``, or ``[entries, out_features]``, in depth-first mode order."""
    made = _evaluation(weights, program, precision)
    result = empty((entries,) if out_features == 1 else (entries, out_features), weights[0])
    gather_run.forward(made, _stored(made, weights), result, None)
    return result


def full_tensor_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    program: Tensor,
    needs: Sequence[bool],
    *,
    precision: str,
) -> list[Tensor]:
    """Gradients of the weights, ``[0]`` where not needed."""
    made = _evaluation(weights, program, precision)
    buffer = gather_run.forward(made, _stored(made, weights), empty(grad.shape, grad), None)
    grads = gather_run.backward(made, grad, buffer, None, needs)
    root = made.frames.steps[-1]
    if root.group >= 0 and needs[root.group]:
        transposed = grads[root.group].view(1, root.cols, root.rows)
        grads[root.group] = transposed.transpose(1, 2).contiguous()
    return grads


def _evaluation(weights: Sequence[Tensor], program: Tensor, precision: str) -> Evaluation:
    return gather_run.evaluation(
        program, weights[0], _GRID, precision, lambda: grid_frames(program)
    )


def _stored(made: Evaluation, weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights, the root's transposed: there it is an operand like others."""
    root = made.frames.steps[-1]
    return [w.transpose(1, 2) if g == root.group else w for g, w in enumerate(weights)]
