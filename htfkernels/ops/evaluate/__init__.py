"""``evaluate``: a tree on vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.ops import autograd
from htfkernels.ops.evaluate import reference
from htfkernels.plan import Plan

__all__ = ["evaluate"]


class _Evaluate(autograd.Kernel):
    def forward(self, *tensors: Tensor) -> Tensor:
        from htfkernels.ops.library import call, ops

        layout = self.layout
        return call(
            ops.evaluate.default,
            list(tensors[:-1]),
            tensors[-1],
            layout.program,
            layout.out_features,
        )

    def backward(
        self, grad: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        from htfkernels.ops.library import call, ops

        mask = [int(n) for n in needs]
        return call(
            ops.evaluate_backward.default,
            grad,
            list(tensors[:-1]),
            tensors[-1],
            self.layout.program,
            mask,
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        return reference.evaluate(self.layout, tensors[:-1], tensors[-1])


def evaluate(plan: Plan, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """``x [B, sum D_n] -> [B, out_features]`` on the plan's backend."""
    layout = plan.layout
    if plan.backend == "reference":
        return reference.evaluate(layout, weights, x)
    if torch.compiler.is_compiling():
        return torch.ops.htfkernels.evaluate(list(weights), x, layout.program, layout.out_features)
    return autograd.apply(_Evaluate(layout), *weights, x)
