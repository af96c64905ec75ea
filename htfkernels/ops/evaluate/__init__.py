"""``evaluate``: a tree on vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.ops.evaluate import reference
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

__all__ = ["EVALUATE", "evaluate"]

EVALUATE = register(
    Operation(
        "evaluate",
        backends={
            "cpp": Runs(NO_FLOAT16, family=Family("cpp", "evaluate", CPP_MATHS)),
            "cuda": Runs(
                NO_FLOAT16,
                module="htfkernels.ops.evaluate.cuda",
                limit="htfkernels.cuda.whole_tree.tree:why_not",
                family=Family("cuda", "tree", CUDA_MATHS),
            ),
            "triton": Runs(
                FLOATS,
                module="htfkernels.ops.evaluate.triton",
                family=Family("triton", "evaluate", TRITON_MATHS),
            ),
        },
        data="differentiable",
        traced=("cpp", "cuda", "triton"),
        faster="htfkernels.cuda.whole_tree.estimate:chosen",
    )
)
register_in_graphs(EVALUATE)


def evaluate(plan: Plan, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """``x [B, sum D_n] -> [B, out_features]``, or ``[B]``, on the plan's backend."""
    layout = plan.layout

    def formula(*tensors: Tensor) -> Tensor:
        *weights, x = tensors
        return autograd.squeeze(layout, reference.evaluate(layout, weights, x))

    fixed = (layout.program, layout.out_features)
    return autograd.run(EVALUATE, plan, weights, [x], fixed, formula)
