"""``evaluate_at``: entries of a tree's end tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.index_plan import IndexPlan
from htfkernels.ops import autograd
from htfkernels.ops.evaluate_at import planned_reference, reference
from htfkernels.plan import Plan

__all__ = ["evaluate_at", "evaluate_at_planned"]


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

    def forward_keeping(self, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        from htfkernels.ops.library import call, ops

        *weights, indices = tensors
        layout = self.layout
        result, kept = call(
            ops.evaluate_at_keeping.default, weights, indices, layout.program, layout.out_features
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

        mask = [int(n) for n in needs[:-1]]
        *weights, indices = tensors
        kept = grad.new_empty(0) if kept is None else kept
        program = self.layout.program
        grads = call(ops.evaluate_at_backward.default, grad, weights, indices, kept, program, mask)
        return [*grads, grad.new_empty(0)]

    def reference(self, *tensors: Tensor) -> Tensor:
        return reference.evaluate_at(self.layout, tensors[:-1], tensors[-1])


class _EvaluateAtPlanned(autograd.Kernel):
    def __init__(self, indices: IndexPlan) -> None:
        super().__init__(indices.layout)
        self.indices = indices

    def _fixed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layout.program, self.indices.table, self.indices.lists

    def forward(self, *tensors: Tensor) -> Tensor:
        from htfkernels.ops.library import call, ops

        sizes = (len(self.indices), self.layout.out_features)
        return call(ops.evaluate_at_planned.default, list(tensors), *self._fixed(), *sizes)

    def forward_keeping(self, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        from htfkernels.ops.library import call, ops

        sizes = (len(self.indices), self.layout.out_features)
        result, kept = call(
            ops.evaluate_at_planned_keeping.default, list(tensors), *self._fixed(), *sizes
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
        kept = grad.new_empty(0) if kept is None else kept
        return call(
            ops.evaluate_at_planned_backward.default,
            grad,
            list(tensors),
            kept,
            *self._fixed(),
            mask,
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        return planned_reference.evaluate_at_planned(self.layout, tensors, self.indices)


def evaluate_at(plan: Plan, weights: Sequence[Tensor], indices: Tensor) -> Tensor:
    """``indices [B, N] -> [B, out_features]``, or ``[B]``, on the plan's backend."""
    layout = plan.layout
    if plan.backend == "reference":
        return autograd.squeeze(layout, reference.evaluate_at(layout, weights, indices))
    if torch.compiler.is_compiling():
        out = torch.ops.htfkernels.evaluate_at(
            list(weights), indices, layout.program, layout.out_features
        )
        return autograd.squeeze(layout, out)
    return autograd.apply(_EvaluateAt(layout), *weights, indices)


def evaluate_at_planned(plan: Plan, weights: Sequence[Tensor], indices: IndexPlan) -> Tensor:
    """``-> [B, out_features]``, or ``[B]``, each node once per distinct sub-tuple where the plan
    says so."""
    layout = plan.layout
    if plan.backend == "reference":
        out = planned_reference.evaluate_at_planned(layout, weights, indices)
        return autograd.squeeze(layout, out)
    if torch.compiler.is_compiling():
        out = torch.ops.htfkernels.evaluate_at_planned(
            list(weights),
            layout.program,
            indices.table,
            indices.lists,
            indices.batch,
            layout.out_features,
        )
        return autograd.squeeze(layout, out)
    return autograd.apply(_EvaluateAtPlanned(indices), *weights)
