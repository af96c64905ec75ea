"""``evaluate_at`` by an index plan on CUDA C++ kernels: functions with the names, arguments and
results of the operators in :mod:`htfkernels.ops.library`, and the float32 precision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.cuda import module
from htfkernels.cuda.planned import schedule

__all__ = [
    "evaluate_at_planned",
    "evaluate_at_planned_backward",
    "evaluate_at_planned_keeping",
]


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
    found: list[Tensor] = module.call("evaluate_at_planned", _pieces(weights), *made)
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
        kept = module.call("evaluate_at_planned", pieces, *made)[1]
    wanted = [int(n) for n in needs]
    found: list[Tensor] = module.call(
        "evaluate_at_planned_backward", grad.contiguous(), pieces, kept, *made, wanted, False
    )
    return found


def _pieces(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.contiguous() for w in weights]
