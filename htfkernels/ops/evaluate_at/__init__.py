"""``evaluate_at``: entries of a tree's end tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from htfkernels.index_plan import IndexPlan
from htfkernels.ops import autograd
from htfkernels.ops.evaluate_at import planned_reference, reference
from htfkernels.plan import Plan

__all__ = ["evaluate_at", "evaluate_at_planned"]


class _EvaluateAt(autograd.Kernel):
    def forward(self, *tensors: Tensor) -> Tensor:
        *weights, indices = tensors
        layout = self.layout
        return self.run("evaluate_at", weights, indices, layout.program, layout.out_features)

    def forward_keeping(self, *tensors: Tensor) -> Sequence[Tensor]:
        *weights, indices = tensors
        layout = self.layout
        return self.run(
            "evaluate_at_keeping", weights, indices, layout.program, layout.out_features
        )

    def backward(
        self,
        grad: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        *kept: Tensor,
    ) -> list[Tensor]:
        *weights, indices = tensors
        messages = kept[0] if kept else grad.new_empty(0)
        program = self.layout.program
        grads = self.run(
            "evaluate_at_backward", grad, weights, indices, messages, program, needs[:-1]
        )
        return [*grads, grad.new_empty(0)]

    def reference(self, *tensors: Tensor) -> Tensor:
        result = reference.evaluate_at(self.layout, tensors[:-1], tensors[-1])
        return autograd.squeeze(self.layout, result)


class _EvaluateAtPlanned(autograd.Kernel):
    def __init__(self, indices: IndexPlan, run: Callable[..., Any]) -> None:
        super().__init__(indices.layout, run)
        self.indices = indices

    def _fixed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layout.program, self.indices.table, self.indices.lists

    def forward(self, *tensors: Tensor) -> Tensor:
        sizes = (len(self.indices), self.layout.out_features)
        return self.run("evaluate_at_planned", tensors, *self._fixed(), *sizes)

    def forward_keeping(self, *tensors: Tensor) -> Sequence[Tensor]:
        sizes = (len(self.indices), self.layout.out_features)
        return self.run("evaluate_at_planned_keeping", tensors, *self._fixed(), *sizes)

    def backward(
        self,
        grad: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        *kept: Tensor,
    ) -> list[Tensor]:
        messages = kept[0] if kept else grad.new_empty(0)
        fixed = self._fixed()
        return self.run("evaluate_at_planned_backward", grad, tensors, messages, *fixed, needs)

    def reference(self, *tensors: Tensor) -> Tensor:
        result = planned_reference.evaluate_at_planned(self.layout, tensors, self.indices)
        return autograd.squeeze(self.layout, result)


def evaluate_at(plan: Plan, weights: Sequence[Tensor], indices: Tensor) -> Tensor:
    """``indices [B, N] -> [B, out_features]``, or ``[B]``, on the plan's backend."""
    layout = plan.layout
    if plan.backend == "reference":
        return autograd.squeeze(layout, reference.evaluate_at(layout, weights, indices))
    if torch.compiler.is_compiling():
        return autograd.traced("evaluate_at", plan.backend)(
            list(weights), indices, layout.program, layout.out_features
        )
    kernel = _EvaluateAt(layout, autograd.runner("evaluate_at", plan.backend))
    return autograd.apply(kernel, *weights, indices)


def evaluate_at_planned(plan: Plan, weights: Sequence[Tensor], indices: IndexPlan) -> Tensor:
    """``-> [B, out_features]``, or ``[B]``, each node once per distinct sub-tuple where the plan
    says so."""
    layout = plan.layout
    if plan.backend == "reference":
        out = planned_reference.evaluate_at_planned(layout, weights, indices)
        return autograd.squeeze(layout, out)
    if torch.compiler.is_compiling():
        return autograd.traced("evaluate_at_planned", plan.backend)(
            list(weights),
            layout.program,
            indices.table,
            indices.lists,
            indices.batch,
            layout.out_features,
        )
    kernel = _EvaluateAtPlanned(indices, autograd.runner("evaluate_at", plan.backend))
    return autograd.apply(kernel, *weights)
