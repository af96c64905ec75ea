"""The tables that tell the whole-tree kernels what to do: int32, in the records of tree_parts.cuh.

A table is ``[begin, ints, steps]`` for each task, then the tasks' parts: a task's steps of
``FIELDS`` numbers, then the lists that its steps point into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from htfkernels.cuda.whole_tree.tree import FIELDS, OWN_SLOTS, Cut, Tree
from htfkernels.tree.program import Step

__all__ = ["Gradients", "backward_table", "forward_table", "messages"]

UP, PATH, DOWN = range(3)
WEIGHT_GRADIENT, OPERAND_GRADIENT, LOAD_GRADIENT = 1, 2, 4
PATH_SLOT = 1  # where the cotangent on the path is


class _Record(NamedTuple):
    """That of tree_parts.cuh, its fields in their order."""

    group: int
    weight: int
    rows: int
    cols: int
    vectors: int
    source: int = 0
    target: int = -1
    kind: int = 0
    message: int = -1
    children: int = 0
    list_at: int = 0
    arrival: int = 0
    flags: int = 0
    on_path: int = -1
    partial: int = 0
    spare: int = 0


def _record(tree: Tree, node: Step, **fields: int) -> _Record:
    first = (node.group, node.slot * node.rows, node.rows, node.cols, tree.vectors(node))
    return _Record(*first, **fields)


@dataclass
class _Part:
    """One task's part of a table."""

    steps: list[_Record] = field(default_factory=list)
    lists: list[Sequence[int]] = field(default_factory=list)

    def add(self, step: _Record, listed: Sequence[int] = ()) -> None:
        self.steps.append(step)
        self.lists.append(listed)

    def numbers(self) -> list[int]:
        at = len(self.steps) * FIELDS
        numbers: list[int] = []
        for step, listed in zip(self.steps, self.lists, strict=True):
            numbers += step._replace(list_at=at)
            at += len(listed)
        return numbers + [i for listed in self.lists for i in listed]


def _table(parts: Sequence[_Part]) -> Tensor:
    heads: list[int] = []
    numbers: list[int] = []
    for part in parts:
        own = part.numbers()
        heads += [3 * len(parts) + len(numbers), len(own), len(part.steps)]
        numbers += own
    return torch.tensor(heads + numbers, dtype=torch.int32)


def messages(cut: Cut) -> tuple[dict[int, int], int]:
    """The first column of each message that goes through global memory, those at the cut and above
    it but the root's, and how many columns there are."""
    first: dict[int, int] = {}
    columns = 0
    for i in sorted({*cut.roots, *cut.above}):
        node = cut.tree.nodes[i]
        if node.parent >= 0:
            first[i] = columns
            columns += node.cols
    return first, columns


def forward_table(cut: Cut) -> Tensor:
    """The table of a forward pass."""
    tree, (message, _) = cut.tree, messages(cut)
    counter = {v: i for i, v in enumerate(cut.above)}
    parts = []
    for root in cut.roots:
        part, (buffer, _) = _Part(), tree.products(root)
        begun: set[int] = set()
        for i in tree.subtree(root):
            node, inside = tree.nodes[i], i != root
            step = _record(
                tree,
                node,
                source=0 if node.is_leaf else buffer[i],
                target=buffer[node.parent] if inside else -1,
                kind=int(inside and node.parent not in begun),
                message=-1 if inside else message.get(i, -1),
            )
            begun.add(node.parent)
            part.add(step)
        for v in tree.path(root):
            children = tree.nodes[v].children
            step = _record(
                tree,
                tree.nodes[v],
                message=message.get(v, -1),
                children=len(children),
                arrival=counter[v],
            )
            part.add(step, [message[c] for c in children])
        parts.append(part)
    return _table(parts)


class Gradients:
    """Where the gradients of weights are.

    Attributes:
        places: for each group with a gradient its first number among all gradients and its shape.
        total: how many numbers they are.
        numbers: of a split's partials, where every node has its own.
        sums: what sum_partials adds: a row for each group with a gradient.
        shared: whether nodes share a weight that has a gradient.
    """

    def __init__(self, tree: Tree, needs: Sequence[bool]) -> None:
        of: dict[int, list[int]] = {}
        for i, node in enumerate(tree.nodes):
            if node.group >= 0 and needs[node.group]:
                of.setdefault(node.group, []).append(i)
        self.places: dict[int, tuple[int, tuple[int, int, int]]] = {}
        self.total = self.numbers = self.largest = 0
        self.shared = False
        self._direct: dict[int, int] = {}
        self._partial: dict[int, int] = {}
        rows: list[int] = []
        for g, nodes in sorted(of.items()):
            first = tree.nodes[nodes[0]]
            each = first.rows * first.cols
            count = 1 + max(tree.nodes[i].slot for i in nodes)
            copies = len(nodes) // count
            self.shared |= copies > 1
            seen = [0] * count
            for i in nodes:
                slot = tree.nodes[i].slot
                self._direct[i] = self.total + slot * each
                self._partial[i] = self.numbers + (seen[slot] * count + slot) * each
                seen[slot] += 1
            size = count * each
            self.places[g] = (self.total, (count, first.rows, first.cols))
            rows += [self.total, size, self.numbers, copies]
            self.largest = max(self.largest, size)
            # Each at a multiple of 16 bytes.
            self.total += -(-size // 16) * 16
            self.numbers += -(-copies * size // 16) * 16
        self.sums = torch.tensor(rows, dtype=torch.int32).view(-1, 4)

    def first(self, node: int, direct: bool) -> int:
        """The first number of a node's gradient in a split's partials, or among the gradients."""
        return (self._direct if direct else self._partial).get(node, 0)


def _owner(tree: Tree, node: int) -> int:
    """The first leaf of the task that computes the gradient of a weight above the cut: that of the
    second child, which in a binary tree is another for every node."""
    children = tree.nodes[node].children
    return tree.nodes[children[min(1, len(children) - 1)]].begin


def _wanted(tree: Tree, needs: Sequence[bool]) -> list[int]:
    """For each node whether its weight's gradient and its operand's cotangent are wanted."""
    flags = [0] * len(tree.nodes)
    for i, node in enumerate(tree.nodes):  # children come first
        if node.group >= 0 and needs[node.group]:
            flags[i] |= WEIGHT_GRADIENT
        if needs[-1] if node.is_leaf else any(flags[c] for c in node.children):
            flags[i] |= OPERAND_GRADIENT
    return flags


def backward_table(cut: Cut, needs: Sequence[bool], gradients: Gradients, direct: bool) -> Tensor:
    """The table of a backward pass.

    Args:
        cut: that of the forward pass.
        needs: for each group, and then for the vectors, whether a gradient is wanted.
        gradients: where they are.
        direct: whether they are written there, and not to partials.
    """
    message, _ = messages(cut)
    wanted = _wanted(cut.tree, needs)
    return _table([
        _backward_part(cut.tree, root, message, wanted, gradients, direct) for root in cut.roots
    ])  # fmt: skip


def _backward_part(
    tree: Tree, root: int, message: dict[int, int], wanted: Sequence[int], gradients: Gradients,
    direct: bool,
) -> _Part:  # fmt: skip
    part, inside = _Part(), tree.subtree(root)
    slot = {i: OWN_SLOTS + i - inside.start for i in inside[:-1]}

    def listed(i: int) -> list[int]:
        return [slot[c] for c in tree.nodes[i].children]

    if wanted[root]:
        for i in inside[:-1]:
            node = tree.nodes[i]
            step = _record(tree, node, target=slot[i], kind=UP, children=len(node.children))
            part.add(step, listed(i))
    steps: list[tuple[_Record, list[int]]] = []
    below = wanted[root]
    for child, v in pairwise([root, *tree.path(root)]):
        node = tree.nodes[v]
        own = WEIGHT_GRADIENT if _owner(tree, v) == inside.start else 0
        flags = (wanted[v] & own) | (OPERAND_GRADIENT if below else 0)
        below = flags
        if flags:
            step = _record(
                tree, node, source=PATH_SLOT, kind=PATH, children=len(node.children), flags=flags,
                on_path=node.children.index(child), partial=gradients.first(v, direct),
            )  # fmt: skip
            steps.append((step, [message[c] for c in node.children]))
    steps.reverse()
    for i in reversed(inside):
        if wanted[i]:
            step = _record(
                tree, tree.nodes[i], source=slot.get(i, PATH_SLOT), kind=DOWN,
                children=len(tree.nodes[i].children), flags=wanted[i],
                partial=gradients.first(i, direct),
            )  # fmt: skip
            steps.append((step, listed(i)))
    for n, (step, children) in enumerate(steps):
        part.add(step._replace(flags=step.flags | (0 if n else LOAD_GRADIENT)), children)
    return part
