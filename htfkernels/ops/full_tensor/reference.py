"""The end tensor: the formula, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from torch import Tensor

from htfkernels.tree.layout import Layout


def full_tensor(layout: Layout, weights: Sequence[Tensor]) -> Tensor:
    """``[prod D_n, out_features]``, rows in the tree's depth-first mode order.

    The frame of a leaf is its weight; the frame of an interior node is the row-wise Khatri-Rao
    product of its children's frames times its weight.
    """
    children = layout.tree._children
    frames: dict[int, Tensor] = {}
    for group, weight in zip(layout.groups, weights, strict=True):
        slots = weight.expand(len(group.nodes), -1, -1).unbind(0)
        for v, w in zip(group.nodes, slots, strict=True):
            frames[v] = w if group.level == 0 else _khatri_rao(frames, children[v]) @ w
    if layout.root == "sum":
        return _khatri_rao(frames, children[-1]).sum(-1, keepdim=True)
    return frames[len(children) - 1]


def _khatri_rao(frames: dict[int, Tensor], children: tuple[int, ...]) -> Tensor:
    def pair(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None, :] * b[None, :, :]).flatten(0, 1)

    return reduce(pair, [frames[c] for c in children])


def natural_order(layout: Layout, flat: Tensor) -> Tensor:
    """``[prod D_n, out_features]`` in depth-first mode order -> ``[D_0, ..., D_{N-1}(,
    out_features)]``."""
    order = layout.tree.root.modes
    tensor = flat.reshape([layout.mode_dims[n] for n in order] + [layout.out_features])
    place = sorted(range(len(order)), key=order.__getitem__)
    tensor = tensor.permute(*place, len(order))
    return tensor.squeeze(-1) if layout.out_features == 1 else tensor
