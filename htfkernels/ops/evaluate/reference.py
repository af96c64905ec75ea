"""Evaluation of a tree on vectors: the formula, in plain PyTorch, folded by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from htfkernels.tree.layout import Group, Layout

LeafMessages = Callable[[Group, Tensor], Tensor]


def evaluate(layout: Layout, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """``x [B, sum D_n] -> [B, out_features]``; leaf ``n`` sends ``x_n W_n``."""
    columns = layout.offsets

    def leaf_messages(group: Group, weight: Tensor) -> Tensor:
        return torch.stack([x[:, columns[n] : columns[n + 1]] for n in group.nodes]) @ weight

    return walk(layout, weights, leaf_messages)


def walk(layout: Layout, weights: Sequence[Tensor], leaf_messages: LeafMessages) -> Tensor:
    """Interior node: ``p_v`` = Hadamard product of the children's messages, ``m_v = p_v W_v``.

    Args:
        layout: the tree and its shapes.
        weights: one ``[F, R_in, R_out]`` for each group.
        leaf_messages: ``(group, weight) -> [F, B, R_out]``.
    """
    children = layout.tree._children
    messages: dict[int, Tensor] = {}
    for group, weight in zip(layout.groups, weights, strict=True):
        if group.level == 0:
            m = leaf_messages(group, weight)
        else:
            m = torch.stack([_product(messages, children[v]) for v in group.nodes]) @ weight
        messages.update(zip(group.nodes, m.unbind(0), strict=True))
    if layout.root == "sum":
        return _product(messages, children[-1]).sum(-1, keepdim=True)
    return messages[len(children) - 1]


def _product(messages: dict[int, Tensor], children: tuple[int, ...]) -> Tensor:
    return reduce(torch.mul, [messages[c] for c in children])
