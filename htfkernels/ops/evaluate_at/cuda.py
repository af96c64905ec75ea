"""``evaluate_at`` in CUDA C++: functions with the names, arguments and results of the operators in
:mod:`htfkernels.runtime.operations`, and the float32 precision.

At indices, the whole tree is one launch. By an index plan, each level is one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.cuda.planned import schedule
from htfkernels.cuda.whole_tree import run as tree_run
from htfkernels.runtime import cuda_module

__all__ = [
    "evaluate_at",
    "evaluate_at_backward",
    "evaluate_at_keeping",
    "evaluate_at_planned",
    "evaluate_at_planned_backward",
    "evaluate_at_planned_keeping",
]


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


def evaluate_at_planned(
    weights: Sequence[Tensor],
    program: Tensor,
    table: Tensor,
    lists: Tensor,
    batch: int,
    out_features: int,
    *,
    precision: str,
) -> Tensor:
    """``[B]``, or ``[B, out_features]``."""
    return evaluate_at_planned_keeping(
        weights, program, table, lists, batch, out_features, precision=precision
    )[0]


def evaluate_at_planned_keeping(
    weights: Sequence[Tensor],
    program: Tensor,
    table: Tensor,
    lists: Tensor,
    batch: int,
    out_features: int,
    *,
    precision: str,
) -> list[Tensor]:
    """The result, and frames for the backward pass."""
    made = schedule(program, table, lists, weights[0], precision)
    found: list[Tensor] = cuda_module.call("evaluate_at_planned", _pieces(weights), *made)
    return found


def evaluate_at_planned_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    kept: Tensor,
    program: Tensor,
    table: Tensor,
    lists: Tensor,
    needs: Sequence[bool],
    *,
    precision: str,
) -> list[Tensor]:
    """Gradients of the weights, ``[0]`` where not needed."""
    if not any(needs):
        return [grad.new_empty(0) for _ in weights]
    pieces = _pieces(weights)
    made = schedule(program, table, lists, weights[0], precision, needs)
    if kept.numel() == 0:
        kept = cuda_module.call("evaluate_at_planned", pieces, *made)[1]
    wanted = [int(n) for n in needs]
    found: list[Tensor] = cuda_module.call(
        "evaluate_at_planned_backward", grad.contiguous(), pieces, kept, *made, wanted, False
    )
    return found


def _pieces(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.contiguous() for w in weights]
