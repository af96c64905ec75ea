"""A layout's tree as tasks of the CUDA kernels of the spectra, level by level (csrc/spectra/)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from htfkernels.cuda.spectra_tasks import (
    FIELDS,
    WIDEST,
    Memory,
    Side,
    Steps,
    TooWide,
    check_width,
    row_of,
    widest,
)
from htfkernels.tree.layout import Layout

__all__ = ["DTYPES", "WIDEST", "Program", "Shape", "program", "why_not"]

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Of the weights; all is computed in float64."""

_MOST_ENTRIES = 2**24  # of a Khatri-Rao product that is stored


def why_not(layout: Layout, dtype: torch.dtype) -> str | None:
    """Why the spectra of a layout are left to others, or None."""
    return _why_not(layout)


@lru_cache(maxsize=256)
def _why_not(layout: Layout) -> str | None:
    try:
        for gram in (False, True):
            _Builder(layout, range(len(layout.tree.nodes)), gram, 1)
    except TooWide as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Shape:
    """Nodes with like frames and like environments.

    Attributes:
        nodes: their positions among the program's.
        rows, columns: of a frame and of an environment; of both.
        at, exponents: int64 ``[2, nodes]`` on the device, where frames and environments begin and
            their exponents do.
    """

    nodes: list[int]
    rows: tuple[int, int]
    columns: int
    at: Tensor
    exponents: Tensor


@dataclass(frozen=True)
class Program:
    """A layout's tree as tasks.

    Attributes:
        table: int64 ``[tasks, 16]`` on the device.
        launches, sizes: what ``spectra_factors`` takes.
        value_table, value_launches, value_sizes: what ``spectra_values`` takes.
        counts: of each node how many singular values.
        shapes: nodes whose frames and whose environments have one shape, together.
    """

    table: Tensor
    launches: list[int]
    sizes: list[int]
    value_table: Tensor
    value_launches: list[int]
    value_sizes: list[int]
    counts: list[int]
    shapes: list[Shape]


@lru_cache(maxsize=64)
def program(layout: Layout, nodes: tuple[int, ...], gram: bool, device: torch.device) -> Program:
    """The tasks for the singular values of some nodes (no repetitions), in their order."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    built = _Builder(layout, nodes, gram, processors)
    memory = built.memory
    rows, launches, counts = _values(built.sides)
    return Program(
        _table([memory.settled(row) for row in built.rows], device),
        built.launches,
        [memory.kept + memory.most_scratch, memory.exponents],
        _table(rows, device),
        launches,
        [sum(counts), len(counts)],
        counts,
        _shapes(built.sides, device),
    )


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, FIELDS).to(device)


def _values(sides: list[tuple[Side, Side]]) -> tuple[list[list[int]], list[int], list[int]]:
    """Of ``spectra_values`` rows and launches, matrices of like size together, and how many values
    each node has."""
    classes: dict[int, list[int]] = {}
    counts: list[int] = []
    rows: list[list[int]] = []
    for i, (frame, environment) in enumerate(sides):
        longer = max(frame.rows, environment.rows)
        classes.setdefault(next(k for k in (16, 32, 64, WIDEST) if longer <= k), []).append(i)
        out = Side(sum(counts), 0, frame.columns, i, False)
        rows.append(row_of(frame, environment, 0, out))
        counts.append(min(frame.rows, environment.rows))
    launches: list[int] = []
    order: list[int] = []
    for longest, nodes in classes.items():
        widest = max(sides[i][0].columns for i in nodes)
        shorter = max(counts[i] for i in nodes)
        launches += [len(order), len(nodes), shorter, longest, widest]
        order += nodes
    return [rows[i] for i in order], launches, counts


def _shapes(sides: list[tuple[Side, Side]], device: torch.device) -> list[Shape]:
    alike: dict[tuple[int, int, int], list[int]] = {}
    for i, (frame, environment) in enumerate(sides):
        key = (frame.rows, environment.rows, frame.columns)
        alike.setdefault(key, []).append(i)

    def tensor(numbers: list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(device)

    return [
        Shape(
            nodes,
            (frame_rows, environment_rows),
            columns,
            tensor([[sides[i][side].at for i in nodes] for side in (0, 1)]),
            tensor([[sides[i][side].exponents for i in nodes] for side in (0, 1)]),
        )
        for (frame_rows, environment_rows, columns), nodes in alike.items()
    ]


@dataclass
class _Place:
    """A node, or the product of two children of one that has many (``node`` is None)."""

    node: int | None
    rows: int
    columns: int
    children: list[int]
    parent: int | None = None
    height: int = 0
    depth: int = 0
    wanted: bool = False  # the environment is, here or below
    needed: bool = False  # the frame is
    frame: Side | None = None
    environment: Side | None = None


class _Builder:
    """Goes up and down the tree once.

    Attributes:
        launches, rows: of ``spectra_factors``.
        memory: where their results are.
        sides: of the nodes, in their order, frame and environment.

    Raises:
        TooWide: a matrix is wider than what there are kernels for.
    """

    def __init__(self, layout: Layout, nodes: Iterable[int], gram: bool, processors: int) -> None:
        self.layout, self.gram, self.processors = layout, gram, processors
        self.places: list[_Place] = []  # children first
        self.place_of: dict[int, int] = {}
        self.rows: list[list[int]] = []
        self.launches: list[int] = []
        self.memory = Memory()
        self.weight_at = [0]
        for group in layout.groups:
            self.weight_at.append(self.weight_at[-1] + group.count * group.rows * group.cols)
        nodes = list(nodes)
        self._set_places()
        self._set_needs(set(nodes))
        self._up()
        self._down(layout.tree.root.index in nodes)
        self.sides = [
            (self._frame(i), self._environment(i)) for i in (self.place_of[n] for n in nodes)
        ]
        for frame, environment in self.sides:
            rows = max(frame.rows, environment.rows)
            check_width("matricizations of factors with a number of rows", rows)

    def _set_places(self) -> None:
        for node in self.layout.tree.nodes:
            rows, columns = self.layout.shape(node)
            children = [self.place_of[c.index] for c in node.children]
            while len(children) > 2:
                # Neighbours first, so that a node of C children is log2(C) deep.
                pairs = [children[i : i + 2] for i in range(0, len(children), 2)]
                children = [self._add(None, rows, rows, p) if len(p) == 2 else p[0] for p in pairs]
            self.place_of[node.index] = self._add(node.index, rows, columns, children)

    def _add(self, node: int | None, rows: int, columns: int, children: list[int]) -> int:
        place = _Place(node, rows, columns, children)
        for c in children:
            self.places[c].parent = len(self.places)
            place.height = max(place.height, self.places[c].height + 1)
        self.places.append(place)
        return len(self.places) - 1

    def _set_needs(self, asked: set[int]) -> None:
        for place in self.places:
            place.wanted |= place.node in asked
            if place.wanted and place.parent is not None:
                self.places[place.parent].wanted = True
        for i in reversed(range(len(self.places))):
            place = self.places[i]
            place.needed = place.node in asked
            if place.parent is None:
                continue
            above, sibling = self.places[place.parent], self._other(i)
            place.depth = above.depth + 1
            place.needed |= above.needed
            place.needed |= sibling is not None and self.places[sibling].wanted

    def _other(self, child: int) -> int | None:
        parent = self.places[child].parent
        assert parent is not None
        return next((c for c in self.places[parent].children if c != child), None)

    def _frame(self, place: int) -> Side:
        side = self.places[place].frame
        assert side is not None
        return side

    def _environment(self, place: int) -> Side:
        side = self.places[place].environment
        assert side is not None
        return side

    def _up(self) -> None:
        """Frames, children before parents."""
        for wave in _waves((p.height, i) for i, p in enumerate(self.places) if p.needed):
            steps = Steps(self.memory, self.gram, downwards=False)
            for i in wave:
                place = self.places[i]
                factors = [self._frame(c) for c in place.children]
                if place.node is None:
                    place.frame = steps.khatri_rao(factors[0], factors[1], kept=True)
                    continue
                product = factors[0] if factors else None
                if len(factors) == 2:
                    x, y = factors
                    # Of few outputs, wide products need not shrink before the weight.
                    few = x.rows * y.rows * place.rows <= _MOST_ENTRIES
                    stored = place.columns <= widest() < place.rows and few
                    product = steps.khatri_rao(x, y, kept=False, stored=stored)
                through = steps.multiply(product, *self._weight(place.node), turned=False)
                place.frame = steps.shrink(through, kept=True)
            self._take(steps)

    def _down(self, root_too: bool) -> None:
        """Environments, parents before children."""
        for wave in _waves((p.depth, i) for i, p in enumerate(self.places) if p.wanted):
            steps = Steps(self.memory, self.gram, downwards=True)
            for i in wave:
                place = self.places[i]
                if place.parent is None and root_too:
                    place.environment = steps.identity(place.columns)
                below = [c for c in place.children if self.places[c].wanted]
                if not below:
                    continue
                if place.node is None:
                    above = self._environment(i)
                else:
                    outer = None if place.parent is None else self._environment(i)
                    through = steps.multiply(outer, *self._weight(place.node), turned=True)
                    above = steps.shrink(through, kept=len(place.children) == 1)
                for c in below:
                    sibling = self._other(c)
                    self.places[c].environment = (
                        above
                        if sibling is None
                        else steps.khatri_rao(above, self._frame(sibling), kept=True)
                    )
            self._take(steps)

    def _take(self, steps: Steps) -> None:
        launches, rows = steps.launches(len(self.rows), self.processors)
        self.launches += launches
        self.rows += rows

    def _weight(self, node: int) -> tuple[int, tuple[int, int]]:
        """Where a node's weight begins (-1: ones) and its shape."""
        shape = self.layout.shape(self.layout.tree.nodes[node])
        if node not in self.layout.location:
            return -1, shape
        group, slot = self.layout.location[node]
        return self.weight_at[group] + slot * shape[0] * shape[1], shape


def _waves(places: Iterable[tuple[int, int]]) -> list[list[int]]:
    waves: dict[int, list[int]] = {}
    for at, i in places:
        waves.setdefault(at, []).append(i)
    return [waves[at] for at in sorted(waves)]
