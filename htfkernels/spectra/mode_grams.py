"""The Gram matrix ``M M^T`` of a matricization with any set of modes as rows, or ``M^T M``.

It is the network times itself, joined at the modes of the other side. Whole subtrees are contracted
first: those of the side that stays open to frames ``[a, R]`` (triangular factors of what they stand
for), those of the side that is joined to Gram matrices ``[R, R]``. For the nodes above them
opt_einsum finds an order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import opt_einsum
import torch
from torch import Tensor

from htfkernels.spectra.mode_cores import Sizes, Tensors, joined, upward
from htfkernels.tree import ModeTree, Node

__all__ = ["MOST_ROWS", "Doubled", "gram_flops", "gram_matrix", "plan_gram"]

MOST_ROWS = 2**30
"""Gram matrices with more rows fit nowhere: no order is sought, and they alone are counted."""


@dataclass(frozen=True)
class Doubled:
    """A network times itself.

    Attributes:
        tree: the mode tree.
        open, joined: the modes of the side that stays open, and of the other one.
        operands: what (``"frame"``, ``"gram"`` or ``"weight"``) at which node, one for each term.
        equation, path: as opt_einsum takes them.
        size: rows of the Gram matrix.
        flops: of the whole contraction.
        largest: number of elements of the largest tensor on the way.
    """

    tree: ModeTree
    open: frozenset[int]
    joined: frozenset[int]
    operands: tuple[tuple[str, int], ...]
    equation: str
    path: tuple[tuple[int, ...], ...]
    size: int
    flops: int
    largest: int


def plan_gram(tree: ModeTree, rows: frozenset[int], shapes: Sequence[tuple[int, int]]) -> Doubled:
    """Plans the Gram matrix of the rows, or of the columns and the outputs: of those whose
    subtrees' ranks have the smaller product.

    Args:
        tree: the mode tree.
        rows: the rows' modes.
        shapes: ``(R_in, R_out)`` for each node of ``tree.nodes``.
    """
    columns = frozenset(range(tree.order)) - rows
    row_frames, column_frames = (_frames(tree, side, Sizes(shapes)) for side in (rows, columns))
    row_size = math.prod(frame.a for frame in row_frames.values())
    column_size = math.prod(frame.a for frame in column_frames.values()) * shapes[-1][1]
    by_rows = row_size <= column_size
    opened, closed = (rows, columns) if by_rows else (columns, rows)
    frames = row_frames if by_rows else column_frames
    open_nodes, closed_nodes = _inside(tree, opened), _inside(tree, closed)
    outputs = _above(tree, tree.root)

    def letter(i: int, layer: int) -> str:
        """The index below node ``i``, in the network or in its copy; where outputs are columns to
        be joined, the same in both."""
        return opt_einsum.get_symbol(2 * i + (0 if by_rows and i == outputs else layer))

    operands: list[tuple[str, int]] = []
    terms: list[tuple[str, tuple[int, ...]]] = []
    result = ["", ""] if by_rows else [letter(outputs, 0), letter(outputs, 1)]
    for i, frame in frames.items():
        for layer in (0, 1):
            # An index of one value would only use up one of the few dimensions of a tensor.
            own = letter(outputs + 1 + i, layer) if frame.a > 1 else ""
            operands.append(("frame", i))
            terms.append((own + letter(i, layer), (frame.a, frame.r) if own else (frame.r,)))
            result[layer] += own
    between = set(tree.nodes).difference(open_nodes, closed_nodes)
    for i in _met(tree, {n: None for n in closed_nodes if n.parent in between}):
        operands.append(("gram", i))
        terms.append((letter(i, 0) + letter(i, 1), (shapes[i][0],) * 2))
    for node in sorted(between, key=lambda n: n.index):
        for layer in (0, 1):
            operands.append(("weight", node.index))
            edge = letter(node.index, layer) + letter(_above(tree, node), layer)
            terms.append((edge, shapes[node.index]))
    letters, term_shapes = zip(*terms, strict=True)
    equation = ",".join(letters) + "->" + "".join(result)
    size = row_size if by_rows else column_size
    flops = gram_flops(closed_nodes, shapes) + sum(frame.flops for frame in frames.values())
    largest = max(size * size, *(frame.largest for frame in frames.values()))
    path: tuple[tuple[int, ...], ...] = ()
    if size <= MOST_ROWS:
        found, info = opt_einsum.contract_path(
            equation, *term_shapes, shapes=True, optimize="greedy"
        )
        path = tuple(found)
        flops += int(info.opt_cost)
        largest = max(largest, int(info.largest_intermediate))
    return Doubled(tree, opened, closed, tuple(operands), equation, path, size, flops, largest)


def gram_matrix(plan: Doubled, weights: Sequence[Tensor]) -> Tensor:
    """``[size, size]``."""
    frames = _frames(plan.tree, plan.open, Tensors(weights))
    grams = _grams(plan.tree, plan.joined, weights)
    tensors: list[Tensor] = []
    for what, i in plan.operands:
        if what == "frame":
            frame = frames[i].squeeze(1)
            tensors.append(frame if len(frame) > 1 else frame[0])
        else:
            tensors.append(grams[i] if what == "gram" else weights[i])
    gram: Tensor = opt_einsum.contract(plan.equation, *tensors, optimize=plan.path, backend="torch")
    return gram.reshape(plan.size, plan.size)


def gram_flops(nodes: Iterable[Node], shapes: Sequence[tuple[int, int]]) -> int:
    """Of the nodes' Gram matrices ``W^T G W``, from their children's."""
    flops = 0
    for node in nodes:
        d, r = shapes[node.index]
        flops += 2 * d * r * (r if node.is_leaf else d + r)
    return flops


def _inside(tree: ModeTree, modes: frozenset[int]) -> list[Node]:
    """The nodes all of whose modes are in the set, children first."""
    inside: dict[Node, bool] = {}
    for node in tree.nodes:
        inside[node] = (
            node.index in modes if node.is_leaf else all(inside[c] for c in node.children)
        )
    return [node for node, is_inside in inside.items() if is_inside]


def _above(tree: ModeTree, node: Node) -> int:
    """Where a node is joined to: its parent, or the outputs, which are one more than the root."""
    return len(tree.nodes) if node.is_root else tree.parents[node.index]


def _met(tree: ModeTree, tops: Mapping[Node, Any]) -> dict[int, list[Any]]:
    """What comes up from nodes, by where they are joined to."""
    met: dict[int, list[Any]] = {}
    for node, top in tops.items():
        met.setdefault(_above(tree, node), []).append(top)
    return met


def _frames(tree: ModeTree, modes: frozenset[int], run: Any) -> dict[int, Any]:
    """Frames ``[a, 1, R]`` of the modes of one side, by where they are joined to."""
    tops = upward(modes, run, _inside(tree, modes))
    met = _met(tree, {tree.nodes[i]: core for i, core in tops.items()})
    return {i: joined(run, cores)[0] for i, cores in met.items()}


def _grams(tree: ModeTree, modes: frozenset[int], weights: Sequence[Tensor]) -> dict[int, Tensor]:
    """Gram matrices ``[R, R]`` of the modes of one side, by where they are joined to."""
    tops: dict[Node, Tensor] = {}
    for node in _inside(tree, modes):
        w = weights[node.index]
        inner = [tops.pop(c) for c in node.children]
        tops[node] = w.T @ (reduce(torch.mul, inner) @ w if inner else w)
    return {i: reduce(torch.mul, grams) for i, grams in _met(tree, tops).items()}
