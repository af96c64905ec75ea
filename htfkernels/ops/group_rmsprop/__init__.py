"""``group_rmsprop``: a step of RMSprop with one adaptive step size for all parameters.

The formula is :class:`htflearn.GroupRMSprop`, which takes these operators where they can run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.runtime import compiled
from htfkernels.runtime.graphs import fake
from htfkernels.runtime.operations import CPP_MATHS, NO_FLOAT16, Family, Operation, Runs, register

__all__ = ["GROUP_RMSPROP", "group_rmsprop_on_cpu_"]

GROUP_RMSPROP = register(
    Operation(
        "group_rmsprop",
        backends={
            "cpp": Runs(NO_FLOAT16, family=Family("cpp", "group rmsprop", CPP_MATHS)),
            "cuda": Runs(
                NO_FLOAT16,
                module="htfkernels.ops.group_rmsprop.cuda",
                family=Family("cuda", "group rmsprop", ("ieee", "bfloat16", "float64")),
            ),
        },
    )
)


@fake("group_rmsprop_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    average: Tensor,
    lr: list[float],
    weight_decay: list[float],
    alpha: float,
    eps: float,
    step: int,
) -> Tensor:
    return torch.empty_like(average)


def group_rmsprop_on_cpu_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    average: Tensor,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    alpha: float,
    eps: float,
    step: int,
) -> Tensor:
    """Step number ``step`` of :func:`htfkernels.ops.group_rmsprop.cuda.group_rmsprop_` on the CPU:
    moves the parameters, and returns the new average."""
    moved: Tensor = compiled.call(
        "group_rmsprop_", params, grads, average, lr, weight_decay, alpha, eps, step
    )
    return moved
