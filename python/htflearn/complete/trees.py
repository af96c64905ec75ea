"""Which modes merge first, and how many local components a node gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import htfkernels as hk
from htflearn.complete.files import existing
from htflearn.complete.quantize import Split
from htflearn.errors import UserError, reason
from htflearn.options import shown, whole_numbers

__all__ = ["LARGEST_MODEL", "TREES", "automatic_ranks", "automatic_tree", "make_ranks", "make_tree"]

TREES = ("auto", "balanced", "halves", "flat")

_BLOCK = 8  # Side of the blocks within which a picture is told by few patterns.
_LARGEST_LEAF_GROUP = 64
_LARGEST_RANK = 1024
LARGEST_MODEL = 2**28
"""Weights at most."""

Ranks = dict[hk.Node, int]


def make_tree(name: str, split: Split) -> hk.ModeTree:
    """The tree that ``--tree`` asks for, over the modes of the split tensor.

    Args:
        name: one of :data:`TREES`, or the path of a JSON file written by ``ModeTree.to_json``.
        split: the tensor's modes.

    Raises:
        UserError: there is no such tree, the file cannot be read, or the tree is of another order.
    """
    order = len(split.shape)
    if order < 2:
        raise UserError(
            f"expected a tensor of order 2 or more, got the shape {list(split.dims)}; --quantize "
            "splits a long mode into several"
        )
    if name == "auto":
        return automatic_tree(split)
    if name in TREES:
        return getattr(hk.ModeTree, name)(order)
    if not name.endswith(".json"):
        raise UserError(
            f"--tree expects {', '.join(TREES)} or a .json file made by ModeTree.to_json, got "
            f"{name!r}"
        )
    path = existing(Path(name), "of the tree")
    try:
        tree = hk.ModeTree.from_json(path.read_text())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        detail = "no JSON" if isinstance(error, json.JSONDecodeError) else reason(error)
        raise UserError(f"expected a mode tree in {path}, got {detail}") from error
    if tree.order != order:
        raise UserError(
            f"the tree in {path} is of order {tree.order}, but the tensor has {order} modes of the "
            f"lengths {list(split.shape)}"
        )
    return tree


def automatic_tree(split: Split) -> hk.ModeTree:
    """A tree chosen from the shape.

    Without split modes the two smallest nodes merge, again and again (as in a Huffman code): the
    largest mode meets the others last, which makes the matricizations as square as can be. With
    them the root joins two sides: the scales within blocks of 8 positions a side with all modes
    that stay whole, and the coarser scales. On each side neighbouring scales merge first, those of
    up to 64 positions at once.
    """
    shape, scales = split.shape, split.num_scales
    if scales < 2:
        return hk.ModeTree.from_nested(_smallest_first([(d, n) for n, d in enumerate(shape)]))
    fine = [n for n in range(scales) if split.digit_side(n) <= _BLOCK] or [scales - 1]
    coarse = [n for n in range(scales) if n not in fine]
    whole = [(shape[n], n) for n in range(scales, len(shape))]
    if not coarse:
        coarse, fine = fine[:1], fine[1:]
    block: Any = _neighbours_first(fine, shape)
    if whole:
        inner = (prod(shape[n] for n in fine), block)
        block = _smallest_first([inner, *whole])
    return hk.ModeTree.from_nested((_neighbours_first(coarse, shape), block))


def _smallest_first(nodes: list[tuple[int, Any]]) -> Any:
    """Nested pairs of ``(size, node)``; of equal sizes the first merge first."""
    waiting = list(nodes)
    while len(waiting) > 1:
        first, second = sorted(range(len(waiting)), key=lambda i: waiting[i][0])[:2]
        pair = [waiting[i] for i in sorted((first, second))]
        waiting = [w for i, w in enumerate(waiting) if i not in (first, second)]
        waiting.append((pair[0][0] * pair[1][0], (pair[0][1], pair[1][1])))
    return waiting[0][1]


def _neighbours_first(modes: Sequence[int], shape: Sequence[int]) -> Any:
    groups: list[list[int]] = [[]]
    for n in modes:
        if groups[-1] and prod(shape[m] for m in groups[-1]) * shape[n] > _LARGEST_LEAF_GROUP:
            groups.append([])
        groups[-1].append(n)
    level: list[Any] = [g[0] if len(g) == 1 else tuple(g) for g in groups]
    while len(level) > 1:
        pairs = [tuple(level[i : i + 2]) for i in range(0, len(level), 2)]
        level = [p if len(p) == 2 else p[0] for p in pairs]
    return level[0]


def make_ranks(text: str | None, tree: hk.ModeTree, dims: Sequence[int], budget: int) -> Ranks:
    """The local ranks that ``--ranks`` asks for, by default :func:`automatic_ranks`.

    Args:
        text: one number, or one for each interior level, the root's last.
        tree, dims: the modes.
        budget: number of parameters that the automatic choice may use.

    Raises:
        UserError: the text is no such list, or of another length.
    """
    if text is None:
        return automatic_ranks(tree, dims, budget)
    ranks = whole_numbers(text, LARGEST_MODEL)
    if ranks is None or not all(ranks):
        raise UserError(
            "--ranks expects positive whole numbers such as 32 or 64,32, at most "
            f"{LARGEST_MODEL:,}, got {shown(text)}"
        )
    if len(ranks) not in (1, tree.depth):
        raise UserError(
            f"--ranks expects 1 number or {tree.depth} (one for each interior level of the tree, "
            f"the root's last), got {len(ranks)}"
        )
    levels = ranks * tree.depth if len(ranks) == 1 else ranks
    return {node: levels[node.level - 1] for node in tree.interior}


def automatic_ranks(tree: hk.ModeTree, dims: Sequence[int], budget: int) -> Ranks:
    """As many local components as fit into a number of parameters.

    The root gets R. Another node gets what a generic tensor needs whose matricizations all have
    rank R (or their lesser side): the node's weights hold, as a CP factorization, a transfer tensor
    of its children's ranks and its own, ``[k_1, ..., k_C, k]``, which takes about
    ``k_1 ... k_C k / (k_1 + ... + k_C + k - C)`` components.

    Args:
        tree, dims: the modes.
        budget: number of parameters at most (where R = 1 needs more, it is R = 1).
    """
    total = prod(dims)
    sizes = {node: prod(dims[n] for n in node.modes) for node in tree.nodes}

    def ranks(r: int) -> Ranks:
        bound = {node: min(size, total // size, r) for node, size in sizes.items()}
        chosen = {
            node: _components([bound[n] for n in (*node.children, node)]) for node in tree.interior
        }
        children = [sizes[c] for c in tree.root.children]
        chosen[tree.root] = max(1, min(r, prod(children) // max(children)))
        return chosen

    low, high = 1, _LARGEST_RANK
    while low < high:  # the largest R within the budget
        middle = (low + high + 1) // 2
        count = hk.Layout.make(tree, tuple(dims), ranks(middle), root="sum").num_parameters
        low, high = (middle, high) if count <= budget else (low, middle - 1)
    return ranks(low)


def _components(sides: list[int]) -> int:
    """The rank of a generic tensor with these sides, about: never below that of a matricization."""
    size = prod(sides)
    matricizations = max(min(k, size // k) for k in sides)
    return max(matricizations, -(-size // (sum(sides) - len(sides) + 1)))
