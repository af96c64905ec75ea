"""``index_plan``: the loops over samples that build an index plan
(:class:`htfkernels.schedule.index_build.Loops`)."""

from __future__ import annotations

import torch

from htfkernels.runtime.operations import Family, Operation, Runs, register

__all__ = ["INDEX_PLAN"]

INDEX_PLAN = register(
    Operation(
        "index_plan",
        backends={
            "cuda": Runs(
                frozenset({torch.int64}),
                module="htfkernels.ops.index_plan.cuda",
                family=Family("cuda", "index plan", ("int64",)),
            )
        },
    )
)
