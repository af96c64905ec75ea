"""Whole steps of a tensor completion in CUDA C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from htfkernels.cuda.planned import schedule
from htfkernels.ops.group_rmsprop.cuda import step_sizes
from htfkernels.runtime import cuda_module
from htfkernels.tree.layout import Layout

__all__ = ["LOSSES", "completion_step_"]

LOSSES = ("l2", "l1", "huber")
"""Mean squared error, mean absolute error, and the Huber loss with ``delta = 1``."""


class PlanTensors(Protocol):
    """What is read of an index plan (:mod:`htfkernels.schedule.index_plan`)."""

    @property
    def table(self) -> Tensor: ...

    @property
    def lists(self) -> Tensor: ...


def completion_step_(
    layout: Layout,
    plan: PlanTensors,
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    targets: Tensor,
    loss: str,
    average: Tensor,
    count: Tensor,
    arrived: Tensor,
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    alpha: float,
    eps: float,
    *,
    precision: str,
) -> Tensor:
    """One step of a tensor completion in place, from the weights to the weights: the entries at the
    plan's indices, their mean loss, its gradients, and :func:`group_rmsprop_` with these.

    In the paper's setting 7 launches; nothing waits for the device.

    Args:
        layout: tree and shapes, with one output.
        plan: of B index tuples, its lists on the device.
        weights: folded, contiguous, float32 or float64.
        needs: for each weight whether it is moved.
        targets: ``[B]``, contiguous, of the weights' dtype.
        loss: one of :data:`LOSSES`.
        average, count, alpha, eps: as in :func:`group_rmsprop_`.
        arrived: int32, ``[1]``, 0 before and after.
        lr, weight_decay: for each weight.
        precision: of float32 products.

    Returns:
        the loss before the step, ``[]``, on the device.

    Raises:
        RuntimeError: dtypes, sizes or devices that do not fit.
    """
    made, lists = schedule(
        layout.program, plan.table, plan.lists, weights[0], precision, tuple(needs)
    )
    result: Tensor = cuda_module.call(
        "completion_step_",
        list(weights),
        list(needs),
        made,
        lists,
        targets,
        LOSSES.index(loss),
        average,
        count,
        arrived,
        *step_sizes(lr, average),
        list(weight_decay),
        alpha,
        eps,
    )
    return result
