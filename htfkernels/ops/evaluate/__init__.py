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

    def forward_keeping(self, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        from htfkernels.ops.library import call, ops

        *weights, x = tensors
        layout = self.layout
        result, kept = call(
            ops.evaluate_keeping.default, weights, x, layout.program, layout.out_features
        )
        return result, kept

    def backward(
        self,
        grad: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        kept: Tensor | None = None,
    ) -> list[Tensor]:
        from htfkernels.ops.library import call, ops

        mask = [int(n) for n in needs]
        return call(
            ops.evaluate_backward.default,
            grad,
            list(tensors[:-1]),
            tensors[-1],
            grad.new_empty(0) if kept is None else kept,
            self.layout.program,
            mask,
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        return reference.evaluate(self.layout, tensors[:-1], tensors[-1])


def evaluate(plan: Plan, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """``x [B, sum D_n] -> [B, out_features]``, or ``[B]``, on the plan's backend."""
    layout = plan.layout
    if plan.backend == "reference":
        return autograd.squeeze(layout, reference.evaluate(layout, weights, x))
    if torch.compiler.is_compiling():
        out = torch.ops.htfkernels.evaluate(list(weights), x, layout.program, layout.out_features)
        return autograd.squeeze(layout, out)
    return autograd.apply(_Evaluate(layout), *weights, x)
