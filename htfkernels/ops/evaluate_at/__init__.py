"""``evaluate_at``: entries of a tree's end tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.ops import autograd
from htfkernels.ops.evaluate_at import reference
from htfkernels.plan import Plan

__all__ = ["evaluate_at"]


class _EvaluateAt(autograd.Kernel):
    def forward(self, *tensors: Tensor) -> Tensor:
        from htfkernels.ops.library import call, ops

        layout = self.layout
        return call(
            ops.evaluate_at.default,
            list(tensors[:-1]),
            tensors[-1],
            layout.program,
            layout.out_features,
        )

    def backward(
        self, grad: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        from htfkernels.ops.library import call, ops

        mask = [int(n) for n in needs[:-1]]
        *weights, indices = tensors
        grads = call(
            ops.evaluate_at_backward.default, grad, weights, indices, self.layout.program, mask
        )
        return [*grads, grad.new_empty(0)]

    def reference(self, *tensors: Tensor) -> Tensor:
        return reference.evaluate_at(self.layout, tensors[:-1], tensors[-1])


def evaluate_at(plan: Plan, weights: Sequence[Tensor], indices: Tensor) -> Tensor:
    """``indices [B, N] -> [B, out_features]`` on the plan's backend."""
    layout = plan.layout
    if plan.backend == "reference":
        return reference.evaluate_at(layout, weights, indices)
    if torch.compiler.is_compiling():
        return torch.ops.htfkernels.evaluate_at(
            list(weights), indices, layout.program, layout.out_features
        )
    return autograd.apply(_EvaluateAt(layout), *weights, indices)
