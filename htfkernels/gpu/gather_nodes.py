"""Which nodes an operation computes, and which rows of their operands they read.

The three operations over indices are one computation (see :mod:`htfkernels.gpu.gather`) on three
lists of nodes: every node per sample (:func:`sample_nodes`), what an index plan says
(:func:`planned_nodes`), and the frames over full grids (:func:`grid_nodes`). Nothing here knows of
a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from htfkernels.gpu.launch import check_size
from htfkernels.index_build import FRAMED_ROOT, NO_OPERAND, CutRow, FramedRow, Step
from htfkernels.layout import PROGRAM_HEADER

__all__ = ["Node", "NodeList", "Rows", "grid_nodes", "planned_nodes", "sample_nodes"]

_PLAN_HEADER = 8


class Rows(NamedTuple):
    """Which row of an operand row ``i`` of a node reads: ``i``, ``ids[i]``, or on a grid ``(i //
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
    """An operand: ``source >= 0`` is a node's frame, ``-(s + 1)`` the weight of step ``s``."""

    source: int
    rows: Rows


class Node(NamedTuple):
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


@dataclass
class NodeList:
    """Nodes in an order in which operands come first; the last one's frame is the result.

    Attributes:
        steps: the program's rows.
        grid: rows are formed by arithmetic, not read from lists.
        regrouped: a plan's lists of which the backward pass needs the order, and where in longer
            lists it has to stand: ``(ids, rows, start, order)``.
    """

    steps: tuple[Step, ...]
    grid: bool = False
    nodes: list[Node] = field(default_factory=list)
    regrouped: list[tuple[int, int, int, int]] = field(default_factory=list)

    def shape(self, source: int) -> tuple[int, int]:
        """Rows and columns of a frame."""
        if source < 0:
            step = self.steps[-(source + 1)]
            if self.grid and step.parent < 0:  # the root's weight is stored transposed
                return step.cols, step.rows
            return step.rows, step.cols
        node = self.nodes[source]
        return node.rows, node.columns or node.width

    def add(
        self,
        rows: int,
        operands: Iterable[Read],
        weight: int | None = None,
        columns: int = 0,
        transposed: bool = False,
    ) -> int:
        """A new last node; where it is."""
        operands = tuple(operands)
        sources = [o.source for o in operands] + ([weight] if transposed else [])
        level = 1 + max(0 if s < 0 else self.nodes[s].level for s in sources)
        width = self.shape(operands[0].source)[1]
        self.nodes.append(Node(level, rows, width, columns, weight, transposed, operands))
        return len(self.nodes) - 1

    def add_step(self, s: int, rows: int, operands: Iterable[Read]) -> int:
        """The node of a program step."""
        step = self.steps[s]
        return self.add(rows, operands, -(s + 1) if step.group >= 0 else None, step.cols)


def _rows(flat: Tensor, kind: Any) -> list[Any]:
    return [kind(*row) for row in flat.view(-1, len(kind._fields)).tolist()]


def _steps(program: Tensor) -> tuple[Step, ...]:
    return tuple(_rows(program[len(PROGRAM_HEADER) :], Step))


def sample_nodes(program: Tensor, batch: int) -> NodeList:
    """Every node for every sample: a leaf's rows are named by its mode's column of the indices.
    Their order is that of each column: :func:`htfkernels.gpu.gather_run.orders`."""
    made = NodeList(_steps(program))
    longest = 1 + max(step.rows for step in made.steps if step.mode >= 0)
    operands: list[list[Read]] = [[] for _ in made.steps]
    for s, step in enumerate(made.steps):
        if step.mode >= 0:
            rows = Rows(step.mode, start=step.mode * longest, order=step.mode * batch)
            read = Read(-(s + 1), rows)
        else:
            read = Read(made.add_step(s, batch, operands[s]), Rows())
        if step.parent >= 0:
            operands[step.parent].append(read)
    return made


def planned_nodes(program: Tensor, table: Tensor) -> NodeList:
    """What an index plan frames, then what it walks per sample."""
    made = NodeList(_steps(program))
    _, batch, count, _, form, end, _, _ = table[:_PLAN_HEADER].tolist()
    split = _PLAN_HEADER + count * len(FramedRow._fields)
    framed = _rows(table[_PLAN_HEADER:split], FramedRow)
    cuts = _rows(table[split:], CutRow)
    for row in framed:
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
    walked: dict[int, list[Read]] = {}
    for cut in cuts:
        start, order = cut.start, cut.order
        if start < 0:
            start, order, end = end, end + cut.rows + 1, end + cut.rows + 1 + batch
            made.regrouped.append((cut.ids, cut.rows, start, order))
        read = Read(cut.operand, Rows(cut.ids, start=start, order=order))
        walked.setdefault(cut.parent, []).append(read)
    if form == FRAMED_ROOT:
        made.add(batch, walked[-1])
        return made
    for s, step in enumerate(made.steps):
        if s in walked:
            read = Read(made.add_step(s, batch, walked.pop(s)), Rows())
            walked.setdefault(step.parent, []).append(read)
    return made


def grid_nodes(program: Tensor) -> NodeList:
    """Frames over all index tuples; rows of a node in the order of its modes, the last fastest.

    The root is a matrix product of two of them: with L ``[nl, R]`` the Khatri-Rao product of its
    first children, N ``[nr, R]`` that of the others::

        T = L E^T  [nl, nr * out_features]      E[(j, o), r] = N[j, r] W[r, o]

    so E is one more Khatri-Rao product, for which the root's weight is stored transposed.
    """
    made = NodeList(_steps(program), grid=True)
    operands: list[list[tuple[int, int]]] = [[] for _ in made.steps]  # (smallest mode, source)
    for s, step in enumerate(made.steps):
        operands[s].sort()
        sources = [source for _, source in operands[s]]
        if step.mode >= 0:
            here = (step.mode, -(s + 1))
        elif step.parent >= 0:
            here = (operands[s][0][0], made.add_step(s, *_khatri_rao(made, sources)))
        else:
            _grid_root(made, s, sources)
            return made
        operands[step.parent].append(here)
    raise AssertionError("a program ends with its root")


def _khatri_rao(made: NodeList, sources: list[int]) -> tuple[int, list[Read]]:
    counts = [made.shape(source)[0] for source in sources]
    if len(counts) > 1:  # rows are taken apart in 32 bits
        check_size("full_tensor", math.prod(counts), "rows of a product of frames")
    reads = []
    for c, source in enumerate(sources):
        below = math.prod(counts[c + 1 :])
        alone = below == 1 and counts[c] == math.prod(counts)
        reads.append(Read(source, Rows() if alone else Rows(div=below, mod=counts[c])))
    return math.prod(counts), reads


def _grid_root(made: NodeList, s: int, sources: list[int]) -> None:
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
