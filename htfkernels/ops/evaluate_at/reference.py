"""Entries of the end tensor: the formula, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.ops.evaluate.reference import walk
from htfkernels.tree.layout import Group, Layout


def evaluate_at(layout: Layout, weights: Sequence[Tensor], indices: Tensor) -> Tensor:
    """``indices [B, N] -> [B, out_features]``; leaf ``n`` sends row ``indices[:, n]`` of
    ``W_n``."""

    def leaf_messages(group: Group, weight: Tensor) -> Tensor:
        slots = weight.expand(len(group.nodes), -1, -1).unbind(0)
        return torch.stack([w[indices[:, n]] for n, w in zip(group.nodes, slots, strict=True)])

    return walk(layout, weights, leaf_messages)
