"""``completion_step``: forward, loss, gradients and :mod:`group_rmsprop
<htfkernels.ops.group_rmsprop>` of a tensor completion in one operator."""

from __future__ import annotations

import torch

from htfkernels.runtime.operations import Family, Operation, Runs, register

__all__ = ["COMPLETION_STEP"]

COMPLETION_STEP = register(
    Operation(
        "completion_step",
        backends={
            "cuda": Runs(
                frozenset({torch.float32, torch.float64}),
                module="htfkernels.ops.completion_step.cuda",
                limit="htfkernels.cuda.planned:why_not",
                family=Family("cuda", "training step", ("ieee", "tf32", "tf32x3", "float64")),
            )
        },
    )
)
