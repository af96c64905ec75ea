"""How an index plan is built: its rows, and which nodes of the tree become framed.

The format is described in :mod:`htfkernels.schedule.index_plan`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from htfkernels.tree.layout import Layout

__all__ = [
    "BILINEAR",
    "FRAMED_ROOT",
    "NO_OPERAND",
    "WALK",
    "Builder",
    "CutRow",
    "FramedRow",
    "Loops",
    "OnCpu",
    "Pairs",
    "PlanTable",
    "Request",
    "as_array",
    "fingerprint",
    "native",
    "read_table",
]

VERSION = 1
NO_OPERAND = -(2**31)
WALK, BILINEAR, FRAMED_ROOT = range(3)


class FramedRow(NamedTuple):
    """A node, or a part of one, that is evaluated once per distinct sub-tuple."""

    step: int
    left: int
    right: int
    rows: int
    left_ids: int = -1
    right_ids: int = -1
    left_start: int = -1
    right_start: int = -1
    right_order: int = -1
    level: int = 1


class CutRow(NamedTuple):
    """An operand of a node that is walked per sample; in a framed root's plan the root's frame."""

    operand: int
    parent: int
    ids: int
    start: int
    order: int
    rows: int


class PlanTable(NamedTuple):
    """A plan's table, read.

    Attributes:
        batch: number of samples.
        form: ``WALK``, ``BILINEAR`` or ``FRAMED_ROOT``.
        length: of the lists.
        framed, cuts: the rows.
    """

    batch: int
    form: int
    length: int
    framed: tuple[FramedRow, ...]
    cuts: tuple[CutRow, ...]


_HEADER = 8  # numbers in front of the rows


def read_table(table: Tensor) -> PlanTable:
    """Takes a plan's table apart."""
    _, batch, count, _, form, length, _, _ = table[:_HEADER].tolist()
    split = _HEADER + count * len(FramedRow._fields)
    framed = table[_HEADER:split].view(-1, len(FramedRow._fields)).tolist()
    cuts = table[split:].view(-1, len(CutRow._fields)).tolist()
    return PlanTable(
        batch, form, length, tuple(FramedRow(*r) for r in framed), tuple(CutRow(*r) for r in cuts)
    )


class Request(NamedTuple):
    """Two operands to combine: each sample's row of them, and how many rows these have."""

    left_ids: Any
    left_rows: int
    right_ids: Any
    right_rows: int


class Pairs(NamedTuple):
    """The distinct pairs of two operands' rows, sorted, and the lists of a framed row."""

    ids: Any
    """[B], each sample's pair."""
    left_ids: Any
    right_ids: Any
    left_start: Any
    right_start: Any
    right_order: Any


class Loops(Protocol):
    """The loops over samples, by a compiled module. Lists of ids are whatever it works on: int32,
    one-dimensional, sliced and measured by ``len``."""

    together: bool
    """Whether many requests at once are cheaper than one after the other."""

    def __init__(self, layout: Layout, indices: Tensor) -> None: ...

    def column(self, mode: int) -> Any:
        """Each sample's index of a mode, asked for once. Whether all indices are in range is known
        after the first :meth:`distinct_pairs` or :meth:`joined`, which raise IndexError."""

    def distinct_pairs(self, requests: Sequence[Request], limit: int) -> list[Pairs | None]:
        """The distinct pairs of each request, or None where there are more than the limit."""

    def group(self, ids: Any, buckets: int) -> tuple[Any, Any]:
        """``(start [buckets + 1], order [n])``: the positions of id k, ascending, are
        ``order[start[k]:start[k + 1]]``."""

    def joined(self, pieces: list[Any]) -> Tensor:
        """All the lists one after the other, on the indices' device. Takes the pieces away."""


@cache
def native() -> Any:
    """The compiled loops.

    Raises:
        RuntimeError: they cannot be loaded.
    """
    try:
        return import_module("htfkernels._plan")
    except ImportError as error:
        raise RuntimeError(
            f"IndexPlan: the compiled module htfkernels._plan cannot be loaded ({error}); "
            "reinstall htfkernels for this Python"
        ) from error


class _Lent:
    """A CPU tensor's memory as NumPy takes it. ``Tensor.numpy`` would keep the tensor from ever
    being resized again."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        size = tensor.element_size()
        sign = "i" if tensor.dtype.is_signed else "u"
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"={sign}{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(size * s for s in tensor.stride()),
            "data": (tensor.data_ptr(), True),
        }


def as_array(tensor: Tensor) -> Any:
    """NumPy's read-only view of a CPU tensor of integers.

    Raises:
        ValueError: the tensor has no memory of its own, as some subclasses have none.
    """
    lent = _Lent(tensor)
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"IndexPlan: {type(tensor).__name__} indices have no values in memory")
    return numpy.asarray(lent)


def fingerprint(indices: Tensor) -> int:
    """64 bits of the contents of a CPU tensor: one changed index is always noticed, several are but
    for a chance of ``2^-64``."""
    array = as_array(indices.detach().contiguous())
    found: int = native().fingerprint(array, torch.get_num_threads())
    return found


class OnCpu:
    """The loops of ``htfkernels._plan``, on NumPy arrays.

    Raises:
        RuntimeError: the compiled module cannot be loaded.
    """

    together = False

    def __init__(self, layout: Layout, indices: Tensor) -> None:
        self.native = native()
        self.dims = layout.mode_dims
        self.indices: Any = as_array(indices.detach().cpu())
        self.device = indices.device
        self.threads = torch.get_num_threads()
        self.columns: dict[int, Any] = {}

    def column(self, mode: int) -> Any:
        """Eight neighbours are read at once: they share the cache lines of a sample, and to read
        these is what it costs."""
        if mode not in self.columns:
            first = mode - mode % 8
            modes = range(first, min(first + 8, len(self.dims)))
            dims = [self.dims[m] for m in modes]
            found = self.native.columns(self.indices, list(modes), dims, self.threads)
            self.columns.update(zip(modes, found, strict=True))
        return self.columns.pop(mode)

    def distinct_pairs(self, requests: Sequence[Request], limit: int) -> list[Pairs | None]:
        return [self.combined(request, limit) for request in requests]

    def combined(self, request: Request, limit: int) -> Pairs | None:
        found = self.native.distinct_pairs(*request, limit, self.threads)
        if found is None:
            return None
        ids, left_ids, right_ids = found
        start, order = self.group(right_ids, request.right_rows)
        left_start = self.native.starts(left_ids, request.left_rows, self.threads)
        return Pairs(ids, left_ids, right_ids, left_start, start, order)

    def group(self, ids: Any, buckets: int) -> tuple[Any, Any]:
        start, order = self.native.group(ids, buckets, self.threads)
        return start, order

    def joined(self, pieces: list[Any]) -> Tensor:
        end = sum(map(len, pieces))
        lists = numpy.empty(end, dtype=numpy.int32)
        while pieces:  # from the back: each piece's memory is free before the next is copied
            piece = pieces.pop()
            lists[end - len(piece) : end] = piece
            end -= len(piece)
        return torch.from_numpy(lists).to(self.device)


@dataclass
class _Operand:
    code: int
    rows: int
    level: int
    key: int  # its first program step: the order of operands
    ids: Any = None  # each sample's row, int32 [B]; a leaf's are read when they are needed


class Builder:
    """Builds the table and lists of a plan.

    Nodes are worked on one after the other in the program's order, or, where the loops take
    requests together, all nodes of a height side by side. Rows and lists are noted with the node
    they are of, by the number they came with, and put into the program's order at the end: both
    ways give the same plan.
    """

    def __init__(self, layout: Layout, indices: Tensor, loops: type[Loops] = OnCpu) -> None:
        self.layout = layout
        self.steps = layout.steps
        self.batch = len(indices)
        if self.batch >= 2**31 or max(layout.mode_dims) >= 2**31:
            raise ValueError("IndexPlan: more than 2^31 - 1 samples, or indices of a mode")
        self.loops = loops(layout, indices)
        self.limit = self.batch // 2
        self.form = WALK
        self.made: list[_Operand | None] = [None] * len(self.steps)  # None: walked, or used up
        # Each with the step of its node; codes and lists are numbers in these.
        self.pieces: list[tuple[int, Any]] = []
        self.framed: list[tuple[int, FramedRow]] = []
        self.cuts: list[tuple[int, CutRow]] = []

    def build(
        self,
    ) -> tuple[Tensor, Tensor, int, tuple[FramedRow, ...], tuple[CutRow, ...]]:
        """``(table, lists, form, framed, cuts)``."""
        for steps in self.waves():
            running = [self.node(s) for s in steps]
            answers: list[Pairs | None] = [None] * len(running)
            while running:
                requests = [n.send(a) for n, a in zip(running, answers, strict=True)]
                running = [n for n, r in zip(running, requests, strict=True) if r is not None]
                asked = [request for request in requests if request is not None]
                answers = self.loops.distinct_pairs(asked, self.limit) if asked else []
        framed, cuts, pieces = self.in_order()
        length = sum(map(len, pieces))
        header = [
            VERSION, self.batch, len(framed), len(cuts), self.form,
            length, self.layout.tree.order, len(self.steps),
        ]  # fmt: skip
        rows = [field for row in (*framed, *cuts) for field in row]
        table = torch.tensor([*header, *rows], dtype=torch.int64)
        return table, self.loops.joined(pieces), self.form, tuple(framed), tuple(cuts)

    def waves(self) -> Iterator[list[int]]:
        """Program steps whose children are in earlier waves."""
        if not self.loops.together:
            yield from ([s] for s in range(len(self.steps)))
            return
        for level in range(self.steps[-1].level + 1):
            yield [step.index for step in self.steps if step.level == level]

    def node(self, s: int) -> Generator[Request | None, Pairs | None, None]:
        """Works on a node whose children are done: asks for operands to be combined, and is sent
        the answers; asks for None when it is done."""
        step = self.steps[s]
        if step.mode >= 0:
            self.made[s] = _Operand(-(s + 1), step.rows, 0, s)
            yield None
            return
        below = [self.made[c] for c in step.children]
        for c in step.children:
            self.made[c] = None  # ids that have been combined are given back
        operands = [operand for operand in below if operand is not None]
        whole = len(operands) == len(below)
        del below
        result = yield from self.frame(s, operands, whole)
        self.made[s] = result
        bilinear = (
            step.parent < 0 and whole and len(operands) == 2 and self.layout.out_features == 1
        )
        if result is None:
            if bilinear:
                self.form = BILINEAR
            for operand in operands:
                self.cut(s, operand, s, grouped=bilinear)
        elif step.parent < 0:
            self.form = FRAMED_ROOT
            self.cut(s, result, -1, grouped=True)
        yield None

    def frame(
        self, s: int, operands: list[_Operand], whole: bool
    ) -> Generator[Request, Pairs | None, _Operand | None]:
        """Combines a node's operands, in place, as far as that saves rows; the node's own frame,
        where all of them came together."""
        if whole and len(operands) == 1:
            (only,) = operands
            if only.rows > self.limit:
                return None
            level = only.level + 1
            row = FramedRow(s, only.code, NO_OPERAND, only.rows, level=level)
            return replace(only, code=self.note(s, row), level=level, ids=self.ids_of(only))
        # Without a pair of samples there is nothing to share, and no row would be saved.
        while len(operands) > 1 and self.limit:
            pair = sorted(operands, key=lambda o: (o.rows, o.key))[:2]
            left, right = sorted(pair, key=lambda o: o.key)
            last = whole and len(operands) == 2
            found = yield Request(self.ids_of(left), left.rows, self.ids_of(right), right.rows)
            if found is None:
                return None
            row = FramedRow(
                s if last else -1,
                left.code,
                right.code,
                len(found.left_ids),
                self.add(s, found.left_ids),
                self.add(s, found.right_ids),
                self.add(s, found.left_start),
                self.add(s, found.right_start),
                self.add(s, found.right_order),
                1 + max(left.level, right.level),
            )
            made = _Operand(self.note(s, row), row.rows, row.level, left.key, found.ids)
            del found
            if last:
                return made
            operands[:] = sorted(
                [o for o in operands if o is not left and o is not right] + [made],
                key=lambda o: o.key,
            )
        return None

    def cut(self, s: int, operand: _Operand, parent: int, grouped: bool) -> None:
        ids = self.ids_of(operand)
        operand.ids = None
        start = order = -1
        if grouped:
            starts, orders = self.loops.group(ids, operand.rows)
            start, order = self.add(s, starts), self.add(s, orders)
        row = CutRow(operand.code, parent, self.add(s, ids), start, order, operand.rows)
        self.cuts.append((s, row))

    def ids_of(self, operand: _Operand) -> Any:
        if operand.ids is None:
            operand.ids = self.loops.column(self.steps[-(operand.code + 1)].mode)
        return operand.ids

    def add(self, s: int, piece: Any) -> int:
        self.pieces.append((s, piece))
        return len(self.pieces) - 1

    def note(self, s: int, row: FramedRow) -> int:
        self.framed.append((s, row))
        return len(self.framed) - 1

    def in_order(self) -> tuple[list[FramedRow], list[CutRow], list[Any]]:
        """Rows and lists in the program's order, and with the numbers they have there. Takes the
        lists away."""

        def places(made: list[tuple[int, Any]]) -> tuple[list[int], list[int]]:
            """Which come first, second, ...; and where each of them comes."""
            order = sorted(range(len(made)), key=lambda i: made[i][0])
            return order, sorted(range(len(made)), key=lambda i: order[i])

        in_lists, _ = places(self.pieces)
        offsets = {-1: -1}
        end = 0
        for i in in_lists:
            offsets[i] = end
            end += len(self.pieces[i][1])
        in_rows, place = places(self.framed)

        def code(operand: int) -> int:
            return place[operand] if operand >= 0 else operand

        framed = [
            row._replace(
                left=code(row.left),
                right=code(row.right),
                left_ids=offsets[row.left_ids],
                right_ids=offsets[row.right_ids],
                left_start=offsets[row.left_start],
                right_start=offsets[row.right_start],
                right_order=offsets[row.right_order],
            )
            for row in (self.framed[i][1] for i in in_rows)
        ]
        cuts = [
            row._replace(
                operand=code(row.operand),
                ids=offsets[row.ids],
                start=offsets[row.start],
                order=offsets[row.order],
            )
            for _, row in sorted(self.cuts, key=lambda cut: cut[0])
        ]
        pieces = [self.pieces[i][1] for i in in_lists]
        self.pieces.clear()
        return framed, cuts, pieces
