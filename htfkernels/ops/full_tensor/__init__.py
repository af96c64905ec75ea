"""``full_tensor``: a tree's end tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.ops import autograd
from htfkernels.ops.full_tensor import reference
from htfkernels.plan import Plan

__all__ = ["full_tensor"]


class _FullTensor(autograd.Kernel):
    def forward(self, *tensors: Tensor) -> Tensor:
        layout = self.layout
        entries = layout.num_entries // layout.out_features
        return self.run("full_tensor", tensors, layout.program, entries, layout.out_features)

    def backward(
        self,
        grad: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        *kept: Tensor,
    ) -> list[Tensor]:
        return self.run("full_tensor_backward", grad, tensors, self.layout.program, needs)

    def reference(self, *tensors: Tensor) -> Tensor:
        return autograd.squeeze(self.layout, reference.full_tensor(self.layout, tensors))


def full_tensor(plan: Plan, weights: Sequence[Tensor]) -> Tensor:
    """``-> [D_0, ..., D_{N-1}]``, with ``out_features`` behind where there are several."""
    layout = plan.layout
    if plan.backend == "reference":
        flat = reference.full_tensor(layout, weights)
    elif torch.compiler.is_compiling():
        entries = layout.num_entries // layout.out_features
        flat = torch.ops.htfkernels.full_tensor(
            list(weights), layout.program, entries, layout.out_features
        )
    else:
        kernel = _FullTensor(layout, autograd.runner("full_tensor", plan.backend))
        flat = autograd.apply(kernel, *weights)
    return reference.natural_order(layout, flat)
