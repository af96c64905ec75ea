"""What the fuzzers draw: layouts, weights, inputs; and the end tensor, formed the plain way."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

import htfkernels as hk
from htfkernels import testing

DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)
MOST_ENTRIES = 3000
"""Of an end tensor that is formed."""


def draw_tree(draw: random.Random) -> hk.ModeTree:
    """Any kind of mode tree, of 2 to 7 modes."""
    order = draw.choice((2, 2, 3, 3, 4, 4, 5, 6, 7))
    kind = draw.randrange(6)
    if kind == 0:
        return hk.ModeTree.balanced(order, draw.choice((2, 3)))
    if kind == 1:
        return hk.ModeTree.flat(order)
    if kind == 2:
        return hk.ModeTree.chain(draw.randint(2, 5))
    if kind == 3:
        return hk.ModeTree.halves(order)
    return testing.random_tree(order, draw.randrange(10**6))


def draw_layout(draw: random.Random) -> hk.Layout:
    """A layout of such a tree, whose end tensor is small enough to form."""
    tree = draw_tree(draw)
    root = draw.choice(("linear", "linear", "sum"))
    outputs = 1 if root == "sum" else draw.choice((1, 1, 2, 3))
    while True:
        dims = [draw.choice((1, 2, 2, 3, 3, 4, 5, 17)) for _ in range(tree.order)]
        if draw.random() < 0.5:
            dims = dims[:1] * tree.order
        if math.prod(dims) * outputs <= MOST_ENTRIES:
            break
    ranks = {node: draw.choice((1, 2, 3, 5, 8, 9, 17)) for node in tree.interior}
    if draw.random() < 0.5:
        ranks = dict.fromkeys(tree.interior, draw.choice((1, 2, 4, 7, 16)))
    return hk.Layout.make(tree, dims, ranks, outputs, root, draw.random() < 0.2)


def draw_tensor(draw: random.Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal numbers; some all zero, some a constant, some of another scale."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    kind = draw.random()
    if kind < 0.03:
        values = values * 0
    elif kind < 0.06:
        values = torch.ones_like(values)
    elif kind < 0.15:
        values = values * 10.0 ** draw.randint(-3, 3)
    return values.to(dtype)


def restride(draw: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers in the same shape, laid out in one of several ways."""
    kind = draw.randrange(5)
    between = torch.nan if tensor.is_floating_point() else -1
    if kind == 0 and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1 and tensor.dim() >= 1:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), between, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if kind == 2:
        flat = torch.full((tensor.numel() + 3,), between, dtype=tensor.dtype)
        flat[3:] = tensor.reshape(-1)
        return flat[3:].view(tensor.shape)
    return tensor


def model_of(layout: hk.Layout, weights: Sequence[Tensor]) -> hk.HTF:
    """A model with copies of these folded weights."""
    return hk.HTF.from_weights(layout.tree, list(weights), layout)


def node_weights(layout: hk.Layout, weights: Sequence[Tensor]) -> list[Tensor]:
    """Each node's matrix, in the order of ``tree.nodes``."""
    matrices = []
    for node in layout.tree.nodes:
        if node.index in layout.location:
            group, slot = layout.location[node.index]
            matrices.append(weights[group][slot])
        else:
            matrices.append(torch.ones(layout.shape(node), dtype=weights[0].dtype))
    return matrices


def end_tensor(layout: hk.Layout, weights: Sequence[Tensor]) -> Tensor:
    """``[D_0, ..., D_{N-1}, outputs]``: a node's frame is the Khatri-Rao product of its children's,
    times its weight."""
    matrices = node_weights(layout, weights)

    def frame(node: hk.Node) -> tuple[list[int], Tensor]:
        if node.is_leaf:
            return [node.index], matrices[node.index]
        modes, product = frame(node.children[0])
        for child in node.children[1:]:
            more, other = frame(child)
            product = (product[:, None] * other[None]).flatten(0, 1)
            modes = modes + more
        return modes, product @ matrices[node.index]

    modes, tensor = frame(layout.tree.root)
    tensor = tensor.reshape([*(layout.mode_dims[m] for m in modes), layout.out_features])
    return tensor.permute([*(modes.index(n) for n in range(len(modes))), len(modes)])


def contracted(tensor: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """``[B, outputs]``: the end tensor with ``[B, D_n]`` vectors in every mode."""
    result = torch.tensordot(vectors[0], tensor, dims=1)
    for x in vectors[1:]:
        result = torch.einsum("bi,bi...->b...", x, result)
    return result


def matricization(tensor: Tensor, modes: Sequence[int]) -> Tensor:
    """Rows the modes, columns all others and the outputs."""
    rest = [n for n in range(tensor.dim()) if n not in modes]
    rows = math.prod(tensor.shape[n] for n in modes)
    return tensor.permute(*modes, *rest).reshape(rows, -1)
