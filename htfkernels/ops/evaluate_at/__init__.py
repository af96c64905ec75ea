"""``evaluate_at``: entries of a tree's end tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.ops.evaluate_at import planned_reference, reference
from htfkernels.runtime import autograd
from htfkernels.runtime.graphs import register_in_graphs
from htfkernels.runtime.operations import (
    CPP_MATHS,
    CUDA_MATHS,
    FLOATS,
    NO_FLOAT16,
    TRITON_MATHS,
    Family,
    Operation,
    Runs,
    register,
)
from htfkernels.runtime.plan import Plan
from htfkernels.schedule.index_plan import IndexPlan

__all__ = ["EVALUATE_AT", "EVALUATE_AT_PLANNED", "evaluate_at", "evaluate_at_planned"]

_TRITON = Runs(
    FLOATS,
    module="htfkernels.ops.evaluate_at.triton",
    family=Family("triton", "gather", TRITON_MATHS),
)
EVALUATE_AT = register(
    Operation(
        "evaluate_at",
        backends={
            "cpp": Runs(NO_FLOAT16, family=Family("cpp", "entries", CPP_MATHS)),
            "cuda": Runs(
                NO_FLOAT16,
                module="htfkernels.ops.evaluate_at.cuda",
                limit="htfkernels.cuda.whole_tree.tree:why_not_at",
                family=Family("cuda", "tree", CUDA_MATHS),
            ),
            "triton": _TRITON,
        },
        data="indices",
        traced=("cpp", "cuda", "triton"),
        faster="htfkernels.cuda.whole_tree.estimate:chosen",
    )
)
EVALUATE_AT_PLANNED = register(
    Operation(
        "evaluate_at_planned",
        backends={
            "cpp": Runs(NO_FLOAT16, family=Family("cpp", "entries", CPP_MATHS)),
            "cuda": Runs(
                NO_FLOAT16,
                module="htfkernels.ops.evaluate_at.cuda",
                limit="htfkernels.cuda.planned:why_not",
                family=Family("cuda", "planned", CUDA_MATHS),
            ),
            "triton": _TRITON,
        },
        traced=("cpp", "cuda", "triton"),
    )
)
register_in_graphs(EVALUATE_AT)
register_in_graphs(EVALUATE_AT_PLANNED)


def evaluate_at(plan: Plan, weights: Sequence[Tensor], indices: Tensor) -> Tensor:
    """``indices [B, N] -> [B, out_features]``, or ``[B]``, on the plan's backend."""
    layout = plan.layout

    def formula(*tensors: Tensor) -> Tensor:
        *weights, indices = tensors
        return autograd.squeeze(layout, reference.evaluate_at(layout, weights, indices))

    fixed = (layout.program, layout.out_features)
    return autograd.run(EVALUATE_AT, plan, weights, [indices], fixed, formula)


def evaluate_at_planned(plan: Plan, weights: Sequence[Tensor], indices: IndexPlan) -> Tensor:
    """``-> [B, out_features]``, or ``[B]``, each node once per distinct sub-tuple where the index
    plan says so."""
    layout = plan.layout

    def formula(*weights: Tensor) -> Tensor:
        found = planned_reference.evaluate_at_planned(layout, weights, indices)
        return autograd.squeeze(layout, found)

    fixed = (
        layout.program, indices.table, indices.lists, indices.batch, layout.out_features,
    )  # fmt: skip
    return autograd.run(EVALUATE_AT_PLANNED, plan, weights, (), fixed, formula)
