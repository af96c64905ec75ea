"""``evaluate_at`` in CUDA C++: functions with the names, arguments and results of the operators in
:mod:`htfkernels.ops.library`, and the float32 precision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.cuda import tree_run

__all__ = ["evaluate_at", "evaluate_at_backward", "evaluate_at_keeping"]


def evaluate_at(
    weights: Sequence[Tensor],
    indices: Tensor,
    program: Tensor,
    out_features: int,
    *,
    precision: str,
) -> Tensor:
    """``[B]``, or ``[B, out_features]``."""
    made = tree_run.evaluation(program, weights[0], indices, precision)
    result, _ = tree_run.forward(made, weights, indices, False)
    return result.squeeze(-1) if out_features == 1 else result


def evaluate_at_keeping(
    weights: Sequence[Tensor],
    indices: Tensor,
    program: Tensor,
    out_features: int,
    *,
    precision: str,
) -> list[Tensor]:
    """The result, and the messages."""
    made = tree_run.evaluation(program, weights[0], indices, precision)
    result, kept = tree_run.forward(made, weights, indices, True)
    return [result.squeeze(-1) if out_features == 1 else result, kept]


def evaluate_at_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    indices: Tensor,
    kept: Tensor,
    program: Tensor,
    needs: Sequence[bool],
    *,
    precision: str,
) -> list[Tensor]:
    """Gradients of the weights, ``[0]`` where not needed."""
    made = tree_run.evaluation(program, weights[0], indices, precision)
    return tree_run.backward(made, grad, weights, indices, kept, [*needs, False])[:-1]
