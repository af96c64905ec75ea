"""Which frames an operation over indices computes, and which rows of their operands they read.

The frame of a node is its message for a list of rows: for every sample, for every distinct
sub-tuple, or for every index tuple. The three operations over indices are one computation (see
:mod:`htfkernels.triton.gather`) on three lists of frames: every node per sample
(:func:`sample_frames`), what an index plan says (:func:`planned_frames`), and full grids
(:func:`grid_frames`). Nothing here knows of a backend or of a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from htfkernels.runtime.memory import capturing
from htfkernels.schedule.index_build import FRAMED_ROOT, NO_OPERAND, read_table
from htfkernels.tree.program import Program, Step, read

__all__ = [
    "Frame",
    "FrameList",
    "Read",
    "Rows",
    "grid_frames",
    "planned_frames",
    "sample_frames",
    "with_orders",
]


class Rows(NamedTuple):
    """Which row of an operand row ``i`` of a frame reads: ``i``, ``ids[i]``, or on a grid ``(i //
    div) % mod``. The rows that read row ``j`` are number ``start[j]`` to ``start[j + 1] - 1``, of
    ``order`` where there is one."""

    ids: int = -1
    div: int = 1
    mod: int = 0
    start: int = -1
    order: int = -1

    @property
    def one_by_one(self) -> bool:
        """Row ``i`` reads row ``i``."""
        return self.ids < 0 and self.mod == 0


class Read(NamedTuple):
    """An operand: ``source >= 0`` is a frame of the list, ``-(s + 1)`` the weight of step ``s``."""

    source: int
    rows: Rows


class Frame(NamedTuple):
    """``p = product of the operands' rows``, ``[rows, width]``; the frame is ``p W``.

    Attributes:
        columns: of the frame; 0: the frame is ``p`` itself.
        weight: of W, as in :class:`Read`; None: a column of ones.
        transposed: the weight is a frame ``[columns, width]``.
    """

    level: int
    rows: int
    width: int
    columns: int
    weight: int | None
    transposed: bool
    operands: tuple[Read, ...]

    @property
    def cols(self) -> int:
        """Columns of the frame."""
        return self.columns or self.width

    @property
    def step(self) -> int:
        """The step of the tree whose weight W is, or -1."""
        return -1 if self.weight is None or self.weight >= 0 else -(self.weight + 1)


@dataclass
class FrameList:
    """Frames in an order in which operands come first; the last one is the result.

    Attributes:
        program: the tree's.
        grid: rows are formed by arithmetic, not read from lists.
        most_operands: of a frame; one of more takes the products of a few of them at a time.
        frames: the frames.
        regrouped: a plan's lists of which the backward pass needs the order, and where in longer
            lists it has to stand: ``(ids, rows, start, order)``.
    """

    program: Program
    grid: bool = False
    most_operands: int | None = None
    frames: list[Frame] = field(default_factory=list)
    regrouped: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The tree's nodes in execution order."""
        return self.program.steps

    def shape(self, source: int) -> tuple[int, int]:
        """Rows and columns of an operand."""
        if source < 0:
            step = self.steps[-(source + 1)]
            if self.grid and step.parent < 0:  # the root's weight is stored transposed
                return step.cols, step.rows
            return step.rows, step.cols
        frame = self.frames[source]
        return frame.rows, frame.cols

    def add(
        self,
        rows: int,
        operands: Iterable[Read],
        weight: int | None = None,
        columns: int = 0,
        transposed: bool = False,
    ) -> int:
        """A new last frame; where it is."""
        operands = tuple(operands)
        most = self.most_operands or len(operands)
        while len(operands) > most:
            few = [operands[i : i + most] for i in range(0, len(operands), most)]
            operands = tuple(f[0] if len(f) == 1 else Read(self.add(rows, f), Rows()) for f in few)
        sources = [o.source for o in operands]
        if weight is not None and transposed:
            sources.append(weight)
        level = 1 + max(0 if s < 0 else self.frames[s].level for s in sources)
        width = self.shape(operands[0].source)[1]
        self.frames.append(Frame(level, rows, width, columns, weight, transposed, operands))
        return len(self.frames) - 1

    def add_step(self, s: int, rows: int, operands: Iterable[Read]) -> int:
        """The frame of a step of the tree."""
        step = self.steps[s]
        return self.add(rows, operands, -(s + 1) if step.group >= 0 else None, step.cols)


def sample_frames(program: Tensor, batch: int) -> FrameList:
    """Every node for every sample: a leaf's rows are named by its mode's column of the indices.
    Their order is that of each column: :func:`htfkernels.triton.gather_run.orders`."""
    made = FrameList(read(program))
    longest = 1 + max(step.rows for step in made.steps if step.is_leaf)
    reads: list[Read] = []  # of each step's message
    for step in made.steps:
        if step.is_leaf:
            rows = Rows(step.mode, start=step.mode * longest, order=step.mode * batch)
            reads.append(Read(-(step.index + 1), rows))
        else:
            operands = [reads[c] for c in step.children]
            reads.append(Read(made.add_step(step.index, batch, operands), Rows()))
    return made


def planned_frames(program: Tensor, table: Tensor, most_operands: int | None = None) -> FrameList:
    """What an index plan frames, then what it walks per sample."""
    made = FrameList(read(program), most_operands=most_operands)
    plan = read_table(table)
    for row in plan.framed:
        if row.right == NO_OPERAND:
            operands = [Read(row.left, Rows())]
        else:
            left = Rows(row.left_ids, start=row.left_start)
            right = Rows(row.right_ids, start=row.right_start, order=row.right_order)
            operands = [Read(row.left, left), Read(row.right, right)]
        if row.step >= 0:
            made.add_step(row.step, row.rows, operands)
        else:
            made.add(row.rows, operands)
    end = plan.length
    walked: dict[int, list[Read]] = {}
    for cut in plan.cuts:
        start, order = cut.start, cut.order
        if start < 0:
            start, order, end = end, end + cut.rows + 1, end + cut.rows + 1 + plan.batch
            made.regrouped.append((cut.ids, cut.rows, start, order))
        read_cut = Read(cut.operand, Rows(cut.ids, start=start, order=order))
        walked.setdefault(cut.parent, []).append(read_cut)
    if plan.form == FRAMED_ROOT:
        made.add(plan.batch, walked[-1])
        return made
    for s, step in enumerate(made.steps):
        if s in walked:
            message = Read(made.add_step(s, plan.batch, walked.pop(s)), Rows())
            walked.setdefault(step.parent, []).append(message)
    return made


_longer: WeakIdKeyDictionary = WeakIdKeyDictionary()


def with_orders(made: FrameList, batch: int, lists: Tensor) -> Tensor:
    """A plan's lists, longer by the orders that its cuts lack; made once, on the device.

    What is made while a CUDA graph is captured belongs to the graph, and holds nothing before the
    graph runs: nobody else is given it.
    """
    if not made.regrouped:
        return lists
    longer: Tensor | None = _longer.get(lists)
    if longer is None:
        pieces = [lists]
        for ids, rows, _, _ in made.regrouped:
            listed, order = lists[ids : ids + batch].sort(stable=True)
            every = torch.arange(rows + 1, dtype=lists.dtype, device=lists.device)
            pieces += [torch.searchsorted(listed, every, out_int32=True), order.to(lists.dtype)]
        longer = torch.cat(pieces)
        if not capturing(lists):
            _longer[lists] = longer
    return longer


def grid_frames(program: Tensor) -> FrameList:
    """Frames over all index tuples; rows of a frame in the order of its modes, the last fastest.

    The root is a matrix product of two of them: with L ``[nl, R]`` the Khatri-Rao product of its
    first children, N ``[nr, R]`` that of the others::

        T = L E^T  [nl, nr * out_features]      E[(j, o), r] = N[j, r] W[r, o]

    so E is one more Khatri-Rao product, for which the root's weight is stored transposed.
    """
    made = FrameList(read(program), grid=True)
    here: list[tuple[int, int]] = []  # of each step its smallest mode, and its source
    for step in made.steps:
        below = sorted(here[c] for c in step.children)
        sources = [source for _, source in below]
        if step.is_leaf:
            here.append((step.mode, -(step.index + 1)))
        elif step.parent >= 0:
            frame = made.add_step(step.index, *_khatri_rao(made, sources))
            here.append((below[0][0], frame))
        else:
            _grid_root(made, step.index, sources)
    return made


def _khatri_rao(made: FrameList, sources: list[int]) -> tuple[int, list[Read]]:
    counts = [made.shape(source)[0] for source in sources]
    reads = []
    for c, source in enumerate(sources):
        below = math.prod(counts[c + 1 :])
        alone = below == 1 and counts[c] == math.prod(counts)
        reads.append(Read(source, Rows() if alone else Rows(div=below, mod=counts[c])))
    return math.prod(counts), reads


def _grid_root(made: FrameList, s: int, sources: list[int]) -> None:
    counts = [made.shape(source)[0] for source in sources]

    def larger(at: int) -> int:
        return max(math.prod(counts[:at]), math.prod(counts[at:]))

    at = min(range(1, len(sources)), key=larger, default=1)
    factors = sources[at:] + ([-(s + 1)] if made.steps[s].group >= 0 else [])
    weight = factors[0] if factors else None
    if len(factors) > 1:
        weight = made.add(*_khatri_rao(made, factors))
    rows, reads = _khatri_rao(made, sources[:at])
    columns = 1 if weight is None else made.shape(weight)[0]
    made.add(rows, reads, weight, columns, transposed=weight is not None)
