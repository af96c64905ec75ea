"""RMSprop with one adaptive step size, in CUDA C++."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.runtime import cuda_module

__all__ = ["group_rmsprop_", "step_sizes"]


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
    cuda_module.call(
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
