"""``slog``: sign and log-magnitude of a tree's value, on any device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from htfkernels.layout import Layout
from htfkernels.ops import autograd
from htfkernels.ops.slog import reference
from htfkernels.plan import Plan

__all__ = ["slog"]

_log = logging.getLogger("htfkernels")


class _Slog(autograd.Kernel):
    """With one result ``[B, out_features, 2]``: sign and log-magnitude."""

    def forward(self, *tensors: Tensor) -> Tensor:
        *weights, x = tensors
        return self.run("slog", weights, x, self.layout.program, self.layout.out_features)

    def forward_keeping(self, *tensors: Tensor) -> Sequence[Tensor]:
        *weights, x = tensors
        return self.run("slog_keeping", weights, x, self.layout.program, self.layout.out_features)

    def backward(
        self,
        grad: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        *kept: Tensor,
    ) -> list[Tensor]:
        *weights, x = tensors
        return self.run("slog_backward", grad, weights, x, kept, self.layout.program, needs)

    def reference(self, *tensors: Tensor) -> Tensor:
        return torch.stack(reference.slog(self.layout, tensors[:-1], tensors[-1]), -1)


def slog(
    plan: Plan | None, layout: Layout, weights: Sequence[Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    """``x [B, sum D_n] -> (sign, log |value|)``, each ``[B, out_features]``, on the plan's backend;
    without a plan, in PyTorch operations."""
    if plan is None or _settled(plan).backend != "triton":
        return reference.slog(layout, weights, x)
    kernel = _Slog(layout, autograd.runner("slog", plan.backend))
    # Autocast may give vectors in another dtype; what is a logarithm in the end stays exact.
    both = autograd.apply(kernel, *weights, x.to(plan.dtype))
    return both[..., 0].detach(), both[..., 1]


@lru_cache(maxsize=1024)
def _settled(plan: Plan) -> Plan:
    """The plan, on the reference where the kernels cannot run the tree."""
    if plan.backend != "triton":
        return plan
    reason = import_module("htfkernels.ops.slog.triton").why_not(plan.layout)
    if reason is None:
        return plan
    settled = replace(plan, backend="reference", why=reason)
    _log.info("%s", settled)
    return settled
