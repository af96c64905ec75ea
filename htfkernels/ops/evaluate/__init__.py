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
        *weights, x = tensors
        layout = self.layout
        return self.run("evaluate", weights, x, layout.program, layout.out_features)

    def forward_keeping(self, *tensors: Tensor) -> Sequence[Tensor]:
        *weights, x = tensors
        layout = self.layout
        return self.run("evaluate_keeping", weights, x, layout.program, layout.out_features)

    def backward(
        self,
        grad: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        *kept: Tensor,
    ) -> list[Tensor]:
        *weights, x = tensors
        messages = kept[0] if kept else grad.new_empty(0)
        return self.run("evaluate_backward", grad, weights, x, messages, self.layout.program, needs)

    def reference(self, *tensors: Tensor) -> Tensor:
        result = reference.evaluate(self.layout, tensors[:-1], tensors[-1])
        return autograd.squeeze(self.layout, result)


def evaluate(plan: Plan, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """``x [B, sum D_n] -> [B, out_features]``, or ``[B]``, on the plan's backend."""
    layout = plan.layout
    if plan.backend == "reference":
        return autograd.squeeze(layout, reference.evaluate(layout, weights, x))
    if torch.compiler.is_compiling():
        return autograd.traced("evaluate", plan.backend)(
            list(weights), x, layout.program, layout.out_features
        )
    kernel = _Evaluate(layout, autograd.runner("evaluate", plan.backend))
    return autograd.apply(kernel, *weights, x)
