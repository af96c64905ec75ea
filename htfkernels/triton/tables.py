"""A tree as the Triton kernels read it: which nodes go into which launch, and where messages lie.

The message of a node is a block ``[B, R_out]`` of one flat buffer; a node's *column* is the sum of
the widths ``R_out`` of the nodes before it, so its block starts at ``column * B`` and nothing here
depends on the batch. The nodes of a launch are neighbours there. The root has no column: its
message is the result.

Launches, in the order of the forward pass:

- :class:`Fused`: nodes of one group whose children are leaves of one group; the leaves' messages
  are formed in the kernel and never stored.
- :class:`Uniform`: nodes of one group, all leaves or all interior.
- :class:`Ragged`: nodes of any shapes. Its programs each take a *part*: a run of nodes, walked
  one after the other for one tile of the batch. A level of many shapes has a part for each node;
  the top of a tree, where a level no longer fills a GPU, is one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from htfkernels.runtime.memory import Kept
from htfkernels.tree.program import Step, read
from htfkernels.triton.configs import STATIC_ARITY, fuses
from htfkernels.triton.launch import check_size

__all__ = ["Fused", "Launch", "Ragged", "Tables", "Uniform", "Visit", "tables_of"]

_GROUPS_ALONE = 2  # a level of more groups takes one launch for all of them
_WALKED_PER_LEVEL, _WALKED_SIZE = 3, 64 * 64  # of the top: nodes, and entries of a weight


@dataclass
class Uniform:
    """Nodes of one group. ``table`` has a row ``[slot, place, operand, operand, ...]`` for each; an
    operand is a child's column, or for a leaf its first column of ``x``."""

    nodes: tuple[Step, ...]
    column: int
    rows: list[list[int]]
    table: Tensor

    @property
    def first(self) -> Step:
        return self.nodes[0]

    @cached_property
    def aligned(self) -> bool:
        """Whether every operand starts at a multiple of 16 numbers."""
        return all(n % 16 == 0 for row in self.rows for n in row[2:])

    def fits_backward(self, widest: int) -> bool:
        """Whether :func:`htfkernels.triton.uniform.backward` takes them: all columns of a weight in
        one tile of that width, and the operands together in registers."""
        return self.first.cols <= widest and self.first.operands <= STATIC_ARITY

    @cached_property
    def as_ragged(self) -> Ragged:
        """The same nodes as a launch of parts, for a backward pass that does not fit."""
        parts = tuple((i, i + 1) for i in range(len(self.nodes)))
        return Ragged(self.nodes, self.column, parts)


@dataclass
class Fused:
    """Nodes of one group over leaves of one group. ``table`` has a row ``[slot, place]`` for each,
    and behind it ``[column of x, slot, place]`` for each of its leaves. ``leaves`` and ``parents``
    are the same as two launches, with the leaves' messages in a buffer of their own, ``width``
    columns wide: what the gradients of vectors take."""

    nodes: tuple[Step, ...]
    column: int
    leaf: Step
    rows: list[list[int]]
    table: Tensor
    leaves: Uniform
    parents: Uniform
    width: int

    @property
    def first(self) -> Step:
        return self.nodes[0]

    @cached_property
    def aligned(self) -> bool:
        """Whether every leaf's vectors start at a multiple of 16 numbers."""
        return all(n % 16 == 0 for row in self.rows for n in row[2::3])


@dataclass
class Ragged:
    """Nodes of any shapes; see :mod:`htfkernels.triton.ragged` for the tables."""

    nodes: tuple[Step, ...]
    column: int
    parts: tuple[tuple[int, int], ...]
    cache: dict[object, object] = field(default_factory=dict)


Launch = Uniform | Fused | Ragged
Fuse = tuple[torch.dtype, str]


class Visit(NamedTuple):
    """A launch of the forward pass that a backward pass comes by: the nodes of whose weights, and
    whether of anything below them, gradients are needed."""

    launched: Launch
    weights: tuple[Step, ...]
    deeper: bool


class Needed(NamedTuple):
    """What a backward pass has to do.

    Attributes:
        needs: for each group, and at the end for the vectors, whether gradients are needed.
        below: for each node, whether one is needed of anything strictly below it; for a leaf, of
            its vectors.
        visits: the launches of the forward pass in reverse, those with nothing to do left out.
    """

    needs: tuple[bool, ...]
    below: tuple[bool, ...]
    visits: tuple[Visit, ...]


class Tables:
    """Everything about a tree that its launches read, on one device.

    Args:
        program: :attr:`htfkernels.tree.layout.Layout.program`.
        device: where the launches run.
        fuse: dtype and precision in which leaves may be formed in their parents' kernels, where
            :func:`htfkernels.triton.configs.fuses` says so; None: nowhere.
        levels: whether each level is one :class:`Ragged` launch, a part for each node.

    Attributes:
        nodes: in execution order.
        groups: number of weights.
        width: columns of the message buffer.
        launches: in the order of the forward pass.
        cache: what is derived from all this when it is first asked for.
        column: node index -> column; none for the root and for leaves that are formed in kernels.
        of_group: the nodes of each group, by slot.
        place: node index -> its place there. Without shared weights, its slot.

    Raises:
        ValueError: a weight has more rows or columns than kernels can number.
    """

    def __init__(
        self, program: Tensor, device: torch.device, fuse: Fuse | None, levels: bool = False
    ) -> None:
        self.device = device
        tree = read(program)
        self.groups, self.x_width = tree.groups, tree.x_width
        self.nodes = tree.steps
        for node in self.nodes:
            check_size("htfkernels", max(node.rows, node.cols), "rows or columns of a weight")
        self.root = self.nodes[-1]
        self.of_group: list[list[Step]] = [[] for _ in range(self.groups)]
        for node in sorted(self.nodes, key=lambda n: (n.slot, n.index)):
            if node.group >= 0:
                self.of_group[node.group].append(node)
        self.place = {n.index: i for of in self.of_group for i, n in enumerate(of)}
        self.cache: dict[object, object] = {}
        self.column: dict[int, int] = {}
        self.width = 0
        self.launches: list[Launch] = []
        walked = set() if levels else self._top()
        fused = self._fused(walked, fuse) if fuse else []
        inside = {c for nodes in fused for node in nodes for c in node.children}
        below = [n for n in self.nodes if n.index not in walked and n.index not in inside]
        for level in range(self.root.level + 1):
            here = [n for n in below if n.level == level]
            together = [nodes for nodes in fused if nodes[0].level == level]
            for nodes in together:
                self._add_fused(nodes)
            done = {n.index for nodes in together for n in nodes}
            groups = _by_shape([n for n in here if n.index not in done])
            alone = len(groups) <= _GROUPS_ALONE and not any(_is_sum(g[0]) for g in groups)
            if levels or not alone:
                nodes = [n for g in groups for n in g]
                self._add_ragged(nodes, [(i, i + 1) for i in range(len(nodes))])
            else:
                for nodes in groups:
                    self._add_uniform(nodes)
        if walked:
            nodes = [self.nodes[i] for i in sorted(walked)]
            self._add_ragged(nodes, [(0, len(nodes))])

    def needed(self, needs: Sequence[bool]) -> Needed:
        """What a backward pass for these gradients (of each group's weights, then of the vectors)
        has to do; found out once."""
        key = ("needed", tuple(map(bool, needs)))
        if key not in self.cache:
            self.cache[key] = self._needed(key[1])
        return self.cache[key]

    def _needed(self, needs: tuple[bool, ...]) -> Needed:
        below: list[bool] = []
        for node in self.nodes:
            kids = node.children
            deeper = any(below[c] or needs[self.nodes[c].group] for c in kids)
            below.append(needs[-1] if node.is_leaf else deeper)
        visits = []
        for launched in reversed(self.launches):
            weights = tuple(n for n in launched.nodes if n.group >= 0 and needs[n.group])
            deeper = any(below[n.index] for n in launched.nodes)
            if weights or deeper:
                visits.append(Visit(launched, weights, deeper))
        return Needed(needs, tuple(below), tuple(visits))

    def tensor(self, rows: list[list[int]]) -> Tensor:
        """A table of int64 on the device."""
        made = torch.tensor(rows, dtype=torch.int64)
        return made if self.device.type == "cpu" else made.to(self.device)

    def _top(self) -> set[int]:
        """The nodes of the levels at the top that are walked in one launch: few and small, so that
        the launches cost more than the work. Empty where no two levels are."""
        best: set[int] = set()
        taken: list[Step] = []
        for levels in range(1, self.root.level + 1):
            taken += [n for n in self.nodes if n.level == self.root.level + 1 - levels]
            if any(n.rows * n.cols > _WALKED_SIZE for n in taken):
                break
            if levels > 1 and len(taken) <= _WALKED_PER_LEVEL * levels:
                best = {n.index for n in taken}
        return best

    def _fused(self, walked: set[int], fuse: Fuse) -> list[list[Step]]:
        def fits(node: Step) -> bool:
            kids = [self.nodes[c] for c in node.children]
            return (
                node.index not in walked
                and not node.is_leaf
                and node.group >= 0
                and all(k.is_leaf for k in kids)
                and len({k.group for k in kids}) == 1
                and fuses(self.device, *fuse, len(kids), kids[0].rows, node.rows, node.cols)
            )

        return _by_shape(
            [n for n in self.nodes if fits(n)],
            lambda n: self.nodes[n.children[0]].group if n.children else -1,
        )

    def _add_uniform(self, nodes: list[Step]) -> None:
        self.launches.append(self._uniform(nodes, self._place(nodes), self.column))

    def _uniform(self, nodes: list[Step], column: int, columns: dict[int, int]) -> Uniform:
        rows = [
            [
                n.slot,
                self.place[n.index],
                *([n.offset] if n.is_leaf else [columns[c] for c in n.children]),
            ]
            for n in nodes
        ]
        return Uniform(tuple(nodes), column, rows, self.tensor(rows))

    def _add_fused(self, nodes: list[Step]) -> None:
        kids = [self.nodes[c] for n in nodes for c in n.children]
        rows = []
        for node in nodes:
            row = [node.slot, self.place[node.index]]
            for c in node.children:
                row += [self.nodes[c].offset, self.nodes[c].slot, self.place[c]]
            rows.append(row)
        local = {kid.index: i * kid.cols for i, kid in enumerate(kids)}
        column = self._place(nodes)
        self.launches.append(
            Fused(
                tuple(nodes), column, kids[0], rows, self.tensor(rows),
                self._uniform(kids, 0, local), self._uniform(nodes, column, local),
                len(kids) * kids[0].cols,
            )
        )  # fmt: skip

    def _add_ragged(self, nodes: list[Step], parts: list[tuple[int, int]]) -> None:
        self.launches.append(Ragged(tuple(nodes), self._place(nodes), tuple(parts)))

    def _place(self, nodes: list[Step]) -> int:
        """Gives nodes their columns; the first one's."""
        first = self.width
        for node in nodes:
            if node.parent >= 0:
                self.column[node.index] = self.width
                self.width += node.cols
        return first


def _is_sum(node: Step) -> bool:
    return node.group < 0


def _by_shape(nodes: list[Step], more=lambda node: 0) -> list[list[Step]]:
    """Nodes of one group with as many operands each, in the order of the groups and slots."""
    found: dict[tuple[int, ...], list[Step]] = {}
    for node in sorted(nodes, key=lambda n: (n.group, n.slot, n.index)):
        key = (node.group, node.level, node.operands, more(node))
        found.setdefault(key, []).append(node)
    return list(found.values())


_tables: Kept[Tables] = Kept()


def tables_of(program: Tensor, like: Tensor, fuse: Fuse | None, levels: bool = False) -> Tables:
    """The tables of a program on the device of a tensor, made at the first call; the arguments are
    those of :class:`Tables`."""
    device = like.device
    return _tables.of(
        program, (device, fuse, levels), lambda: Tables(program, device, fuse, levels), like
    )
