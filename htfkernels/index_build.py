"""How an index plan is built: its rows, and which nodes of the tree become framed.

The format is described in :mod:`htfkernels.index_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from htfkernels.layout import PROGRAM_FIELDS, PROGRAM_HEADER, Layout

__all__ = [
    "BILINEAR",
    "FRAMED_ROOT",
    "NO_OPERAND",
    "WALK",
    "Builder",
    "CutRow",
    "FramedRow",
    "Step",
    "program_steps",
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


class Step(NamedTuple):
    """A row of ``Layout.program``."""

    group: int
    slot: int
    rows: int
    cols: int
    mode: int
    offset: int
    parent: int
    first: int
    buffer: int
    children: int
    node: int


@lru_cache(maxsize=256)
def program_steps(layout: Layout) -> tuple[Step, ...]:
    """The rows of the layout's program, for Python's use."""
    rows = layout.program[len(PROGRAM_HEADER) :].view(-1, len(PROGRAM_FIELDS)).tolist()
    return tuple(Step(*row) for row in rows)


def _native() -> Any:
    try:
        return import_module("htfkernels._plan")
    except ImportError as error:
        raise RuntimeError(
            f"IndexPlan: the compiled module htfkernels._plan cannot be loaded ({error}); "
            "reinstall htfkernels for this Python"
        ) from error


@dataclass
class _Operand:
    code: int
    rows: int
    level: int
    key: int  # its first program step: the order of operands
    ids: Any = None  # each sample's row, int32 [B]; a leaf's are read when they are needed


class Builder:
    def __init__(self, layout: Layout, indices: Tensor) -> None:
        self.native = _native()
        self.layout = layout
        self.steps = program_steps(layout)
        self.indices: Any = indices.detach().cpu().numpy()
        self.device = indices.device
        self.batch = len(indices)
        if self.batch >= 2**31 or max(layout.mode_dims) >= 2**31:
            raise ValueError("IndexPlan: more than 2^31 - 1 samples, or indices of a mode")
        self.limit = self.batch // 2
        self.threads = torch.get_num_threads()
        self.columns: dict[int, Any] = {}
        self.pieces: list[Any] = []
        self.length = 0
        self.framed: list[FramedRow] = []
        self.cuts: list[CutRow] = []

    def build(
        self,
    ) -> tuple[Tensor, Tensor, int, tuple[FramedRow, ...], tuple[CutRow, ...]]:
        """``(table, lists, form, framed, cuts)``."""
        below: list[list[_Operand | None]] = [[] for _ in self.steps]  # children; None: walked
        form = WALK
        for s, step in enumerate(self.steps):
            if step.mode >= 0:
                result: _Operand | None = _Operand(-(s + 1), step.rows, 0, s)
            else:
                operands = [c for c in below[s] if c is not None]
                whole = len(operands) == len(below[s])
                below[s] = []  # ids that have been combined are given back
                result = self.frame(s, operands, whole)
                bilinear = (
                    step.parent < 0
                    and whole
                    and len(operands) == 2
                    and self.layout.out_features == 1
                )
                if result is None:
                    form = BILINEAR if bilinear else WALK
                    for operand in operands:
                        self.cut(operand, s, grouped=bilinear)
                elif step.parent < 0:
                    form = FRAMED_ROOT
                    self.cut(result, -1, grouped=True)
            if step.parent >= 0:
                below[step.parent].append(result)
        lists = self.joined()
        header = [
            VERSION, self.batch, len(self.framed), len(self.cuts), form,
            self.length, self.layout.tree.order, len(self.steps),
        ]  # fmt: skip
        rows = [field for row in (*self.framed, *self.cuts) for field in row]
        table = torch.tensor([*header, *rows], dtype=torch.int64)
        return table, lists, form, tuple(self.framed), tuple(self.cuts)

    def frame(self, s: int, operands: list[_Operand], whole: bool) -> _Operand | None:
        """Combines a node's operands, in place, as far as that saves rows; the node's own frame,
        where all of them came together."""
        if whole and len(operands) == 1:
            (only,) = operands
            if only.rows > self.limit:
                return None
            level = only.level + 1
            self.framed.append(FramedRow(s, only.code, NO_OPERAND, only.rows, level=level))
            return replace(only, code=len(self.framed) - 1, level=level, ids=self.ids_of(only))
        # Without a pair of samples there is nothing to share, and no row would be saved.
        while len(operands) > 1 and self.limit:
            pair = sorted(operands, key=lambda o: (o.rows, o.key))[:2]
            left, right = sorted(pair, key=lambda o: o.key)
            last = whole and len(operands) == 2
            found = self.native.distinct_pairs(
                self.ids_of(left), left.rows, self.ids_of(right), right.rows,
                self.limit, self.threads,
            )  # fmt: skip
            if found is None:
                return None
            ids, left_ids, right_ids = found
            start, order = self.native.group(right_ids, right.rows, self.threads)
            row = FramedRow(
                s if last else -1,
                left.code,
                right.code,
                len(left_ids),
                self.add(left_ids),
                self.add(right_ids),
                self.add(self.native.starts(left_ids, left.rows, self.threads)),
                self.add(start),
                self.add(order),
                1 + max(left.level, right.level),
            )
            self.framed.append(row)
            made = _Operand(len(self.framed) - 1, row.rows, row.level, left.key, ids)
            if last:
                return made
            operands[:] = sorted(
                [o for o in operands if o is not left and o is not right] + [made],
                key=lambda o: o.key,
            )
        return None

    def cut(self, operand: _Operand, parent: int, grouped: bool) -> None:
        ids = self.ids_of(operand)
        operand.ids = None
        start = order = -1
        if grouped:
            starts, orders = self.native.group(ids, operand.rows, self.threads)
            start, order = self.add(starts), self.add(orders)
        self.cuts.append(CutRow(operand.code, parent, self.add(ids), start, order, operand.rows))

    def ids_of(self, operand: _Operand) -> Any:
        if operand.ids is None:
            operand.ids = self.column(self.steps[-(operand.code + 1)].mode)
        return operand.ids

    def column(self, mode: int) -> Any:
        """The indices of a mode, int32. Eight neighbours are read at once: they share the cache
        lines of a sample, and to read these is what it costs."""
        if mode not in self.columns:
            first = mode - mode % 8
            modes = range(first, min(first + 8, self.layout.tree.order))
            dims = [self.layout.mode_dims[m] for m in modes]
            try:
                found = self.native.columns(self.indices, list(modes), dims, self.threads)
            except IndexError as error:
                raise IndexError(f"IndexPlan: {error}") from None
            self.columns.update(zip(modes, found, strict=True))
        return self.columns.pop(mode)

    def add(self, piece: Any) -> int:
        self.pieces.append(piece)
        self.length += len(piece)
        return self.length - len(piece)

    def joined(self) -> Tensor:
        lists = numpy.empty(self.length, dtype=numpy.int32)
        end = self.length
        while self.pieces:  # from the back: each piece's memory is free before the next is copied
            piece = self.pieces.pop()
            lists[end - len(piece) : end] = piece
            end -= len(piece)
        return torch.from_numpy(lists).to(self.device)
