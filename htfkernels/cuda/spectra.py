"""The tasks that the CUDA kernels of the spectra go through, level by level (csrc/spectra/)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from htfkernels.layout import Layout

__all__ = ["DTYPES", "WIDEST", "Program", "Shape", "program", "why_not"]

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Of the weights; all is computed in float64."""

WIDEST = 128
"""Columns of a factor at most: what shared memory holds of it."""

_TRIANGLES, _GRAMS, _PRODUCTS = range(3)
_KEEP, _TRIANGLE, _IDENTITY = range(3)
_FIELDS = 16
_CHUNK = 128  # rows that a block takes in at a time
_MOST_PARTS = 16


def why_not(layout: Layout, dtype: torch.dtype) -> str | None:
    """Why the spectra of a layout are left to others, or None."""
    widest = max(*layout.ranks, layout.out_features)
    if widest <= WIDEST:
        return None
    what = "a local rank" if max(layout.ranks) > WIDEST else "a number of outputs"
    return (
        f"cuda decomposes matrices of at most {WIDEST} columns, and {what} of this layout is "
        f"{widest}"
    )


@dataclass(frozen=True)
class _Side:
    """Where a frame or an environment is.

    Attributes:
        at: its first element in the memory.
        rows, columns: its shape, row after row.
        exponents: its columns' first exponent.
        triangular: whether it has as many rows as columns, with zeros below the diagonal.
    """

    at: int
    rows: int
    columns: int
    exponents: int
    triangular: bool


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


@lru_cache(maxsize=64)
def program(layout: Layout, nodes: tuple[int, ...], gram: bool, device: torch.device) -> Program:
    """The tasks for the singular values of some nodes (no repetitions), in their order."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    builder = _Builder(layout, set(nodes), gram, processors)
    builder.up()
    builder.down()
    places = [builder.place_of[n] for n in nodes]
    sides = [(builder.frame(i), builder.environment(i)) for i in places]
    return builder.finished(sides, device)


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
    frame: _Side | None = None
    environment: _Side | None = None


@dataclass
class _Builder:
    layout: Layout
    wanted: set[int]
    gram: bool
    processors: int
    places: list[_Place] = field(default_factory=list)  # children first
    place_of: dict[int, int] = field(default_factory=dict)
    rows: list[list[int]] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)
    memory: int = 0
    exponents: int = 0
    scratch: int = 0  # in use by a wave, behind the memory that is kept
    most_scratch: int = 0

    def __post_init__(self) -> None:
        tree = self.layout.tree
        for node in tree.nodes:
            rows, columns = self.layout.shape(node)
            children = [self.place_of[c.index] for c in node.children]
            while len(children) > 2:
                # Neighbours first, so that a node of C children is log2(C) deep.
                pairs = [children[i : i + 2] for i in range(0, len(children), 2)]
                children = [self._add(None, rows, rows, p) if len(p) == 2 else p[0] for p in pairs]
            self.place_of[node.index] = self._add(node.index, rows, columns, children)
        self.weight_at = [0]
        for group in self.layout.groups:
            self.weight_at.append(self.weight_at[-1] + group.count * group.rows * group.cols)
        for place in reversed(self.places):
            above = None if place.parent is None else self.places[place.parent]
            if above is not None:
                place.depth = above.depth + 1
        for place in self.places:
            place.wanted |= place.node in self.wanted
            if place.wanted and place.parent is not None:
                self.places[place.parent].wanted = True
        for i in reversed(range(len(self.places))):
            place = self.places[i]
            place.needed = place.node in self.wanted
            if place.parent is not None:
                sibling = self._other(i)
                place.needed |= self.places[place.parent].needed
                place.needed |= sibling is not None and self.places[sibling].wanted

    def _add(self, node: int | None, rows: int, columns: int, children: list[int]) -> int:
        place = _Place(node, rows, columns, children)
        for c in children:
            self.places[c].parent = len(self.places)
            place.height = max(place.height, self.places[c].height + 1)
        self.places.append(place)
        return len(self.places) - 1

    def _other(self, child: int) -> int | None:
        parent = self.places[child].parent
        assert parent is not None
        return next((c for c in self.places[parent].children if c != child), None)

    def frame(self, place: int) -> _Side:
        side = self.places[place].frame
        assert side is not None
        return side

    def environment(self, place: int) -> _Side:
        side = self.places[place].environment
        assert side is not None
        return side

    def up(self) -> None:
        """Frames, children before parents."""
        for wave in _waves(((p.height, i) for i, p in enumerate(self.places) if p.needed)):
            steps = _Steps(self)
            for i in wave:
                place = self.places[i]
                factors = [self.frame(c) for c in place.children]
                kept = place.node is None
                product = steps.khatri_rao(factors, place.rows, kept) if factors else None
                if kept:
                    place.frame = product
                else:
                    through = steps.multiply(product, place, transposed=False)
                    place.frame = steps.shrink(through, kept=True)
            steps.launch()

    def down(self) -> None:
        """Environments, parents before children."""
        for wave in _waves(((p.depth, i) for i, p in enumerate(self.places) if p.wanted)):
            steps = _Steps(self, downwards=True)
            for i in wave:
                place = self.places[i]
                if place.parent is None and place.node in self.wanted:
                    place.environment = steps.identity(place.columns)
                below = [c for c in place.children if self.places[c].wanted]
                if not below:
                    continue
                if place.node is None:
                    above = self.environment(i)
                else:
                    outer = None if place.parent is None else self.environment(i)
                    through = steps.multiply(outer, place, transposed=True)
                    above = steps.shrink(through, kept=len(place.children) == 1)
                for c in below:
                    sibling = self._other(c)
                    factors = [above] if sibling is None else [above, self.frame(sibling)]
                    self.places[c].environment = steps.khatri_rao(factors, place.rows, True)
            steps.launch()

    def make(self, rows: int, columns: int, triangular: bool, kept: bool) -> _Side:
        """What is not kept is over with its wave: other waves have theirs in its place, behind
        what is kept (until that is known, counted backwards from -2)."""
        at = self.memory if kept else -2 - self.scratch
        side = _Side(at, rows, columns, self.exponents, triangular)
        if kept:
            self.memory += rows * columns
        else:
            self.scratch += rows * columns
            self.most_scratch = max(self.most_scratch, self.scratch)
        self.exponents += columns
        return side

    def weight(self, node: int) -> int:
        if node not in self.layout.location:
            return -1
        group, slot = self.layout.location[node]
        g = self.layout.groups[group]
        return self.weight_at[group] + slot * g.rows * g.cols

    def add_launch(self, kind: int, tasks: Sequence[_Task]) -> None:
        if not tasks:
            return
        columns, rows = max(t.columns for t in tasks), max(t.rows for t in tasks)
        parts = _parts(tasks, self.processors) if kind == _TRIANGLES else 1
        self.launches += [kind, len(self.rows), len(tasks), parts, columns, rows]
        self.rows += [t.fields for t in tasks]

    def finished(self, sides: list[tuple[_Side, _Side]], device: torch.device) -> Program:
        classes: dict[int, list[list[int]]] = {}
        widest: dict[int, int] = {}
        at, counts = 0, []
        for i, (frame, environment) in enumerate(sides):
            shorter, longer = sorted((frame.rows, environment.rows))
            fields = _fields(frame, environment, frame.columns, 0, at)
            fields[11] = i
            kind = next(k for k in (16, 32, 64, WIDEST) if longer <= k)
            classes.setdefault(kind, []).append(fields)
            widest[kind] = max(widest.get(kind, 0), shorter)
            counts.append(shorter)
            at += shorter
        rows: list[list[int]] = []
        launches: list[int] = []
        for kind, tasks in classes.items():
            launches += [len(rows), len(tasks), widest[kind], kind]
            rows += tasks

        def table(rows: list[list[int]]) -> Tensor:
            return torch.tensor(rows, dtype=torch.int64).reshape(-1, _FIELDS).to(device)

        for row in self.rows:
            for operand in (0, 3, 8):
                if row[operand] < -1:
                    row[operand] = self.memory - 2 - row[operand]
        return Program(
            table(self.rows),
            self.launches,
            [self.memory + self.most_scratch, self.exponents],
            table(rows),
            launches,
            [at, len(sides)],
            counts,
            _shapes(sides, device),
        )


def _shapes(sides: list[tuple[_Side, _Side]], device: torch.device) -> list[Shape]:
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


@dataclass(frozen=True)
class _Task:
    fields: list[int]
    columns: int
    rows: int
    work: int  # chunks times strips of a triangle


class _Steps:
    """The tasks of a wave, kind by kind."""

    def __init__(self, builder: _Builder, downwards: bool = False) -> None:
        self.builder, self.downwards = builder, downwards
        builder.scratch = 0
        self.products: list[_Task] = []
        self.grams: list[_Task] = []
        self.khatri_raos: list[_Task] = []
        self.shrunk: list[_Task] = []

    def launch(self) -> None:
        add = self.builder.add_launch
        joined = [(_TRIANGLES, self.khatri_raos), (_GRAMS, self.grams)]
        weighed = [(_PRODUCTS, self.products), (_TRIANGLES, self.shrunk)]
        for kind, tasks in weighed + joined if self.downwards else joined + weighed:
            add(kind, tasks)

    def khatri_rao(self, factors: list[_Side], columns: int, kept: bool) -> _Side:
        """Two factors' product, of at most as many rows as columns; one factor as it is."""
        if len(factors) == 1:
            return factors[0]
        x, y = factors
        rows = x.rows * y.rows
        if rows > columns and self.builder.gram:
            out = self.builder.make(columns, columns, False, kept)
            fields = _fields(x, y, columns, 0, out.at)
            fields[11] = out.exponents
            self.grams.append(_Task(fields, columns, rows, 0))
            return out
        return self._triangle(self.khatri_raos, x, y, rows > columns, kept)

    def shrink(self, x: _Side, kept: bool) -> _Side:
        """Square factors are made triangular too: products of such have structure."""
        tall = x.rows > x.columns or (x.rows == x.columns and not self.builder.gram)
        return self._triangle(self.shrunk, x, None, tall, kept)

    def _triangle(
        self, to: list[_Task], x: _Side, y: _Side | None, reduced: bool, kept: bool
    ) -> _Side:
        rows, n = x.rows * (1 if y is None else y.rows), x.columns
        out = self.builder.make(n if reduced else rows, n, reduced, kept)
        fields = _fields(x, y, n, _TRIANGLE if reduced else _KEEP, out.at)
        fields[11] = out.exponents
        to.append(_Task(fields, n, rows, _work(x, y) if reduced else 0))
        return out

    def multiply(self, x: _Side | None, place: _Place, transposed: bool) -> _Side:
        """A factor, or the identity, through a place's weight."""
        assert place.node is not None
        inner, n = (place.columns, place.rows) if transposed else (place.rows, place.columns)
        out = self.builder.make(inner if x is None else x.rows, n, False, kept=False)
        fields = _fields(x, None, n, int(transposed), out.at)
        fields[11:14] = [out.exponents, self.builder.weight(place.node), inner]
        self.products.append(_Task(fields, n, 1 if x is None else inner, 0))
        return out

    def identity(self, columns: int) -> _Side:
        out = self.builder.make(columns, columns, not self.builder.gram, kept=True)
        fields = _fields(None, None, columns, _IDENTITY, out.at)
        fields[11] = out.exponents
        self.khatri_raos.append(_Task(fields, columns, columns, 0))
        return out


def _fields(x: _Side | None, y: _Side | None, columns: int, mode: int, out: int) -> list[int]:
    """A row of the table, see SpectraTask; out_exponents, weight and inner are not set."""
    one = [-1, 1, 0]
    a = one if x is None else [x.at, x.rows, int(x.triangular)]
    b = one if y is None else [y.at, y.rows, int(y.triangular)]
    exponents = [-1 if s is None else s.exponents for s in (x, y)]
    return [*a, *b, columns, mode, out, *exponents, -1, -1, columns, 0, 0]


def _waves(places: Iterable[tuple[int, int]]) -> list[list[int]]:
    waves: dict[int, list[int]] = {}
    for at, i in places:
        waves.setdefault(at, []).append(i)
    return [waves[at] for at in sorted(waves)]


def _work(x: _Side, y: _Side | None) -> int:
    """Strips that the chunks of a product have (of a plain matrix it is dense)."""
    n, strip = x.columns, 8
    rows = x.rows * (1 if y is None else y.rows)
    both = y is not None and x.triangular and y.triangular
    steps = -(-n // strip) * -(-rows // _CHUNK)
    return -(-steps // 3) if both else steps


def _parts(tasks: Sequence[_Task], processors: int) -> int:
    """Blocks for each task: its own strips and those of putting the triangles together, where
    multiprocessors are idle otherwise."""
    most = max(tasks, key=lambda t: t.work)
    strips = -(-most.columns // 8)

    def time(parts: int) -> float:
        together = -(-((parts - 1) * most.columns) // _CHUNK) * strips
        return most.work / parts + together

    allowed = min(_MOST_PARTS, max(1, 2 * processors // len(tasks)))
    return min(range(1, allowed + 1), key=time)
