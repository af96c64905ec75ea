"""``slog``: sign and log-magnitude of a tree's value, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.ops.slog import reference
from htfkernels.runtime import autograd
from htfkernels.runtime.operations import FLOATS, TRITON_MATHS, Family, Operation, Runs, register
from htfkernels.runtime.plan import Plan
from htfkernels.tree.layout import Layout

__all__ = ["SLOG", "slog"]

SLOG = register(
    Operation(
        "slog",
        backends={
            "triton": Runs(
                FLOATS,
                module="htfkernels.ops.slog.triton",
                limit="htfkernels.ops.slog.triton:why_not",
                family=Family("triton", "slog", TRITON_MATHS),
            )
        },
        data="differentiable",
        keeps=3,
        reference_stands_in=True,
    )
)


def slog(
    plan: Plan | None, layout: Layout, weights: Sequence[Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    """``x [B, sum D_n] -> (sign, log |value|)``, each ``[B, out_features]``, on the plan's backend;
    without a plan, in PyTorch operations."""
    if plan is None or plan.backend == "reference":
        return reference.slog(layout, weights, x)

    def formula(*tensors: Tensor) -> Tensor:
        *weights, x = tensors
        return torch.stack(reference.slog(layout, weights, x), -1)

    # Autocast may give vectors in another dtype; what is a logarithm in the end stays exact.
    fixed = (layout.program, layout.out_features)
    both = autograd.run(SLOG, plan, weights, [x.to(plan.dtype)], fixed, formula)
    return both[..., 0].detach(), both[..., 1]
