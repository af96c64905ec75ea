"""Which nodes a plan computes, and which rows of their operands they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from htfkernels.index_build import FRAMED_ROOT, NO_OPERAND, CutRow, FramedRow, Step
from htfkernels.layout import PROGRAM_HEADER

__all__ = ["MOST_OPERANDS", "Node", "Nodes", "Read", "planned_nodes"]

MOST_OPERANDS = 4  # of a node, as the kernels read them
_PLAN_HEADER = 8


class Read(NamedTuple):
    """An operand: node ``source``, or the weight of the leaf with step ``-(source + 1)``.

    Row ``i`` reads row ``lists[ids + i]`` of it, or row ``i`` where ``ids`` is -1. Row ``j`` is
    read by rows number ``start[j]`` to ``start[j + 1] - 1``, of ``order`` where that is not -1.
    """

    source: int
    ids: int = -1
    start: int = -1
    order: int = -1


class Node(NamedTuple):
    """``p = product of the operands' rows``, ``[rows, width]``; its frame is ``p W``, ``[rows,
    cols]``, with the weight of program step ``step``; -1: it is ``p``, and ``cols == width``."""

    level: int
    rows: int
    width: int
    cols: int
    step: int
    operands: tuple[Read, ...]


@dataclass
class Nodes:
    """Nodes in an order in which operands come first; the last one's frame is the result.

    Attributes:
        steps: the program's rows.
        nodes: the nodes.
        regrouped: ids whose order the lists lack, and where it has to stand behind them:
            ``(ids, rows, start, order)``.
    """

    steps: tuple[Step, ...]
    nodes: list[Node] = field(default_factory=list)
    regrouped: list[tuple[int, int, int, int]] = field(default_factory=list)

    def shape(self, source: int) -> tuple[int, int]:
        """Rows and columns of a frame."""
        if source < 0:
            step = self.steps[-(source + 1)]
            return step.rows, step.cols
        return self.nodes[source].rows, self.nodes[source].cols

    def add(self, rows: int, operands: list[Read], step: int = -1) -> int:
        """A new last node; where it is. Of many operands it takes a few products at a time."""
        while len(operands) > MOST_OPERANDS:
            together = [operands[i : i + MOST_OPERANDS] for i in range(0, len(operands), 4)]
            operands = [Read(self.add(rows, t)) if len(t) > 1 else t[0] for t in together]
        level = 1 + max(self.nodes[o.source].level if o.source >= 0 else 0 for o in operands)
        width = self.shape(operands[0].source)[1]
        cols = self.steps[step].cols if step >= 0 else width
        self.nodes.append(Node(level, rows, width, cols, step, tuple(operands)))
        return len(self.nodes) - 1


def planned_nodes(program: Tensor, table: Tensor) -> Nodes:
    """What a plan frames, then what it walks per sample."""
    rows = program[len(PROGRAM_HEADER) :].view(-1, len(Step._fields)).tolist()
    made = Nodes(tuple(Step(*row) for row in rows))
    _, batch, count, _, form, end, _, _ = table[:_PLAN_HEADER].tolist()
    split = _PLAN_HEADER + count * len(FramedRow._fields)
    for values in table[_PLAN_HEADER:split].view(-1, len(FramedRow._fields)).tolist():
        row = FramedRow(*values)
        operands = [Read(row.left)]
        if row.right != NO_OPERAND:
            left = Read(row.left, row.left_ids, row.left_start)
            operands = [left, Read(row.right, row.right_ids, row.right_start, row.right_order)]
        made.add(row.rows, operands, row.step)
    walked: dict[int, list[Read]] = {}
    for values in table[split:].view(-1, len(CutRow._fields)).tolist():
        cut = CutRow(*values)
        start, order = cut.start, cut.order
        if start < 0:
            start, order, end = end, end + cut.rows + 1, end + cut.rows + 1 + batch
            made.regrouped.append((cut.ids, cut.rows, start, order))
        walked.setdefault(cut.parent, []).append(Read(cut.operand, cut.ids, start, order))
    if form == FRAMED_ROOT:
        made.add(batch, walked[-1])
        return made
    for s, step in enumerate(made.steps):
        if s in walked:
            read = Read(made.add(batch, walked.pop(s), s))
            walked.setdefault(step.parent, []).append(read)
    return made
