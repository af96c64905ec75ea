"""Training on the device: the optimizer's step, and whole steps of a tensor completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from htfkernels.cuda import module
from htfkernels.cuda.planned import schedule
from htfkernels.layout import Layout

__all__ = ["LOSSES", "completion_step_", "group_rmsprop_"]

LOSSES = ("l2", "l1", "huber")
"""Mean squared error, mean absolute error, and the Huber loss with ``delta = 1``."""


class PlanTensors(Protocol):
    """What is read of an index plan (:mod:`htfkernels.index_plan`)."""

    @property
    def table(self) -> Tensor: ...

    @property
    def lists(self) -> Tensor: ...


def group_rmsprop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    average: Tensor,
    count: Tensor,
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    alpha: float,
    eps: float,
) -> None:
    """A step of RMSprop with one adaptive step size for all parameters, in place::

        d = g + weight_decay p
        v <- alpha v + (1 - alpha) sum of |d|^2,  t <- t + 1
        p <- p - lr / (sqrt(v / (1 - alpha^t)) + eps) d

    Two launches for up to 48 parameters; nothing waits for the device.

    Args:
        params: contiguous, of one dtype: float32, float64 or bfloat16.
        grads: of the same shapes and dtype, contiguous.
        average: ``v``, ``[]``, float64 with float64 parameters, else float32.
        count: ``t``, ``[]``, float64.
        lr: for each parameter; a tensor (``[]``, float32 or float64, on the device) is read when
            the kernel runs.
        weight_decay: for each parameter.
        alpha: smoothing constant of the average, in [0, 1).
        eps: added to the denominator.

    Raises:
        RuntimeError: dtypes, sizes or devices that do not fit.
    """
    module.call(
        "group_rmsprop_",
        list(params),
        list(grads),
        average,
        count,
        *step_sizes(lr, average),
        list(weight_decay),
        alpha,
        eps,
    )


def step_sizes(lr: Sequence[float | Tensor], like: Tensor) -> tuple[list[float], list[Tensor]]:
    """Numbers, and what they are multiplied by on the device, where there is such."""
    numbers = [1.0 if isinstance(x, Tensor) else float(x) for x in lr]
    if not any(isinstance(x, Tensor) for x in lr):
        return numbers, []
    none = like.new_empty(0)
    return numbers, [x if isinstance(x, Tensor) else none for x in lr]


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
    result: Tensor = module.call(
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
