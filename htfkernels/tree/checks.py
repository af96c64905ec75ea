"""What :class:`~htfkernels.tree.ModeTree` checks and computes when it is built, on plain lists."""

from __future__ import annotations

import reprlib
from operator import index
from typing import Any

__all__ = ["analyse", "as_int", "depth_first", "format_modes", "partition_owners"]


def as_int(what: str, value: Any) -> int:
    """An integer, also of NumPy or PyTorch, that fits into 64 bits."""
    try:
        found = None if isinstance(value, bool) else index(value)
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"{what} must be an integer, got {reprlib.repr(value)}")
    if not -(2**63) <= found < 2**63:
        raise ValueError(f"{what} must fit into 64 bits, got one of {found.bit_length()}")
    return found


def format_modes(modes: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` as ``{0-2,5}``, cut after a few runs."""
    runs: list[list[int]] = []
    for m in modes:
        if runs and m == runs[-1][1] + 1:
            runs[-1][1] = m
        else:
            runs.append([m, m])
    text = [f"{a}" if a == b else f"{a}-{b}" if b > a + 1 else f"{a},{b}" for a, b in runs[:8]]
    return "{" + ",".join(text) + (f",... {len(modes)} modes" if len(runs) > 8 else "") + "}"


def partition_owners(number: int, level: list[tuple[int, ...]], order: int) -> list[int]:
    """For each mode the position of its node in the level; checks that the level is a partition."""
    owner = [-1] * order
    for position, node in enumerate(level):
        if not node:
            raise ValueError(f"from_levels: level {number} has an empty node (position {position})")
        for mode in node:
            if not 0 <= mode < order:
                raise ValueError(
                    f"from_levels: level {number} names mode {mode}, but level 0 has {order} modes "
                    f"(0..{order - 1})"
                )
            if owner[mode] >= 0:
                raise ValueError(f"from_levels: mode {mode} appears twice in level {number}")
            owner[mode] = position
    if -1 in owner:
        raise ValueError(f"from_levels: mode {owner.index(-1)} is missing from level {number}")
    return owner


def analyse(order: int, parents: list[int]) -> tuple[list[list[int]], list[int], list[int]]:
    """Children, heights and smallest modes; checks that ``parents`` is a tree over ``order``
    leaves."""
    count = len(parents)
    if order < 2:
        raise ValueError(f"a mode tree needs at least 2 modes, got order {order}")
    if count <= order:
        raise ValueError(
            f"a mode tree of order {order} needs a root above its leaves, got {count} nodes"
        )
    children: list[list[int]] = [[] for _ in range(count)]
    for i, p in enumerate(parents):
        if not -1 <= p < count or p == i:
            raise ValueError(
                f"node {i} has the parent {p}: expected -1 or another of {count} nodes"
            )
        if p >= 0:
            if p < order:
                raise ValueError(f"node {i} has the leaf {p} as its parent")
            children[p].append(i)
    roots = [i for i, p in enumerate(parents) if p == -1]
    if len(roots) != 1:
        raise ValueError(
            f"a mode tree has one root, got {len(roots)} nodes without a parent: {roots[:8]}"
        )
    for i in range(order, count):
        if not children[i]:
            raise ValueError(f"node {i} is empty: it has no children and is not a leaf")
    heights = [0] * count
    smallest = [*range(order)] + [order] * (count - order)
    waiting = [len(c) for c in children]
    ready = list(range(order))
    done = 0
    while ready:
        i = ready.pop()
        done += 1
        p = parents[i]
        if p < 0:
            continue
        heights[p] = max(heights[p], heights[i] + 1)
        smallest[p] = min(smallest[p], smallest[i])
        waiting[p] -= 1
        if waiting[p] == 0:
            ready.append(p)
    if done != count:
        raise ValueError(f"the parents form a cycle: {count - done} nodes are not below the root")
    return children, heights, smallest


def depth_first(
    order: int, parents: tuple[int, ...], children: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The modes in depth-first order, and each node's span in it."""
    sizes = [1] * order + [0] * (len(parents) - order)
    for i, p in enumerate(parents):
        if p >= 0:
            sizes[p] += sizes[i]
    starts = [0] * len(parents)
    leaf_order = [0] * order
    for i in range(len(parents) - 1, -1, -1):  # parents come after their children
        if i < order:
            leaf_order[starts[i]] = i
        at = starts[i]
        for c in children[i]:
            starts[c] = at
            at += sizes[c]
    return tuple(leaf_order), tuple((s, s + n) for s, n in zip(starts, sizes, strict=True))
