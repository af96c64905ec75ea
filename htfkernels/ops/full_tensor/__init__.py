"""``full_tensor``: a tree's end tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.ops.full_tensor import reference
from htfkernels.runtime import autograd
from htfkernels.runtime.graphs import register_in_graphs
from htfkernels.runtime.operations import (
    CPP_MATHS,
    FLOATS,
    NO_FLOAT16,
    TRITON_MATHS,
    Family,
    Operation,
    Runs,
    register,
)
from htfkernels.runtime.plan import Plan

__all__ = ["FULL_TENSOR", "full_tensor"]

FULL_TENSOR = register(
    Operation(
        "full_tensor",
        backends={
            "cpp": Runs(NO_FLOAT16, family=Family("cpp", "entries", CPP_MATHS)),
            "triton": Runs(
                FLOATS,
                module="htfkernels.ops.full_tensor.triton",
                family=Family("triton", "gather", TRITON_MATHS),
            ),
        },
        keeps=0,
        traced=("cpp", "triton"),
    )
)
register_in_graphs(FULL_TENSOR)


def full_tensor(plan: Plan, weights: Sequence[Tensor]) -> Tensor:
    """``-> [D_0, ..., D_{N-1}]``, with ``out_features`` behind where there are several."""
    layout = plan.layout

    def formula(*weights: Tensor) -> Tensor:
        return autograd.squeeze(layout, reference.full_tensor(layout, weights))

    entries = layout.num_entries // layout.out_features
    fixed = (layout.program, entries, layout.out_features)
    flat = autograd.run(FULL_TENSOR, plan, weights, (), fixed, formula)
    return reference.natural_order(layout, flat)
