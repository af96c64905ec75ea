"""``evaluate_at`` on Triton: functions with the names, arguments and results of the operators in
:mod:`htfkernels.runtime.operations`, and the float32 precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.schedule.frames import planned_frames, sample_frames, with_orders
from htfkernels.triton import gather_run
from htfkernels.triton.gather_run import Evaluation, Lists
from htfkernels.triton.memory import empty

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
    return evaluate_at_keeping(weights, indices, program, out_features, precision=precision)[0]


def evaluate_at_keeping(
    weights: Sequence[Tensor],
    indices: Tensor,
    program: Tensor,
    out_features: int,
    *,
    precision: str,
) -> list[Tensor]:
    """The result, and weights and messages for the backward pass."""
    made = _per_sample(weights, indices, program, precision)
    _check(made, indices)
    result = _result(weights[0], len(indices), out_features)
    return [result, gather_run.forward(made, weights, result, Lists(indices, *indices.stride()))]


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
    made = _per_sample(weights, indices, program, precision)
    lists = Lists(indices, *indices.stride())
    if made.backward(needs).gathers:
        longest = 1 + max(step.rows for step in made.frames.steps if step.mode >= 0)
        starts, orders = gather_run.orders(indices, longest)
        lists = lists._replace(starts=starts, orders=orders)
    if kept.numel() == 0:
        kept = gather_run.forward(made, weights, empty(grad.shape, weights[0]), lists)
    return gather_run.backward(made, grad, kept, lists, needs)


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
    """The result, and weights and frames for the backward pass."""
    made = _planned(weights, program, table, precision)
    result = _result(weights[0], batch, out_features)
    return [result, gather_run.forward(made, weights, result, Lists(lists))]


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
    made = _planned(weights, program, table, precision)
    if made.backward(needs).gathers:
        lists = with_orders(made.frames, len(grad), lists)
    given = Lists(lists, starts=lists, orders=lists)
    if kept.numel() == 0:
        kept = gather_run.forward(made, weights, empty(grad.shape, weights[0]), given)
    return gather_run.backward(made, grad, kept, given, needs)


def _per_sample(
    weights: Sequence[Tensor], indices: Tensor, program: Tensor, precision: str
) -> Evaluation:
    batch = len(indices)
    return gather_run.evaluation(
        program, weights[0], batch, precision, lambda: sample_frames(program, batch)
    )


def _planned(
    weights: Sequence[Tensor], program: Tensor, table: Tensor, precision: str
) -> Evaluation:
    return gather_run.evaluation(
        table, weights[0], 0, precision, lambda: planned_frames(program, table)
    )


def _result(like: Tensor, batch: int, out_features: int) -> Tensor:
    return empty((batch,) if out_features == 1 else (batch, out_features), like)


def _check(made: Evaluation, indices: Tensor) -> None:
    """Values that nobody has looked at before, as under a transform, must not be followed out of
    the weights. The check runs on the device; the host does not wait for it."""
    inside = (indices >= 0) & (indices < made.mode_dims)
    torch._assert_async(inside.all(), "evaluate_at: an index is out of range")
