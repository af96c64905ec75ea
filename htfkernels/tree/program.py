"""The program: a layout's tree in the order in which it is computed, as all backends read it.

The program is an int64 tensor on the CPU: a header of :data:`HEADER`, then a row of :data:`FIELDS`
for each node. :func:`written` makes it from a layout and :func:`read` takes it apart; in C++,
``csrc/cpu/program.h`` does. Compiled operators take it as an argument, since the graphs of
``torch.compile`` pass tensors and no layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from htfkernels.tree.layout import Layout

__all__ = ["FIELDS", "HEADER", "VERSION", "Program", "Step", "read", "written"]

VERSION = 1
HEADER = (
    "version",
    "steps",
    "groups",
    "buffers",
    "out_features",
    "x_width",
    "order",
    "sum_root",
)
FIELDS = (
    "group", "slot", "rows", "cols", "mode", "offset",
    "parent", "first", "buffer", "children", "node",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A node of the tree in execution order.

    Attributes:
        index: its place in that order.
        group, slot: where its weight is among the folded ones; group -1: the root of a sum.
        rows, cols: shape of its weight.
        mode, offset: of a leaf, the mode and its first column in the packed vectors; else -1.
        parent: the parent's index, -1 for the root.
        children: the children's indices.
        node: its index in ``tree.nodes``.
        level: one more than the highest of its children's; 0 for a leaf.
        begin: index of the first step of its subtree, which ends with the step itself.
    """

    index: int
    group: int
    slot: int
    rows: int
    cols: int
    mode: int
    offset: int
    parent: int
    children: tuple[int, ...]
    node: int
    level: int
    begin: int

    @property
    def is_leaf(self) -> bool:
        return self.mode >= 0

    @property
    def operands(self) -> int:
        """What its product has: children, or the one vector of a leaf."""
        return max(1, len(self.children))


@dataclass(frozen=True)
class Program:
    """A program, read.

    Attributes:
        steps: the nodes in execution order, children before their parents, the root last.
        groups: number of folded weights.
        buffers: how many products a walk of the steps holds at a time.
        out_features: columns of the result.
        x_width: columns of the packed vectors.
    """

    steps: tuple[Step, ...]
    groups: int
    buffers: int
    out_features: int
    x_width: int


def written(layout: Layout) -> Tensor:
    """The program of a layout.

    Execution order is depth first, the child that needs most buffers first (Sethi and Ullman), so
    that a walk holds about ``log2(order)`` products at a time, whatever the shape of the tree.
    """
    tree, order = layout.tree, layout.tree.order
    need = [0] * len(tree.parents)
    by_need: list[list[int]] = [[] for _ in tree.parents]
    for i in range(order, len(tree.parents)):
        children = sorted(tree._children[i], key=lambda c: -need[c])
        by_need[i] = children
        need[i] = max(
            need[children[0]],
            2 if children[0] >= order else 1,
            *(1 + max(need[c], 1 if c >= order else 0) for c in children[1:]),
        )
    sequence: list[int] = []
    stack = [tree.root.index]
    while stack:  # parents first, last child first: the reverse is the execution order
        i = stack.pop()
        sequence.append(i)
        stack.extend(by_need[i])
    sequence.reverse()
    step_of = {node: step for step, node in enumerate(sequence)}
    free: list[int] = []
    buffers = 0
    buffer_of: dict[int, int] = {}
    rows: list[list[int]] = []
    for i in sequence:
        parent = tree.parents[i]
        first = parent >= 0 and parent not in buffer_of
        if first:
            if not free:
                free.append(buffers)
                buffers += 1
            buffer_of[parent] = free.pop()
        group, slot = layout.location.get(i, (-1, 0))
        node_rows, node_cols = layout.shape(tree.nodes[i])
        leaf = i < order
        rows.append([
            group, slot, node_rows, node_cols,
            i if leaf else -1, layout.offsets[i] if leaf else -1,
            step_of[parent] if parent >= 0 else -1, int(first),
            -1 if leaf else buffer_of[i], len(tree._children[i]), i,
        ])  # fmt: skip
        if not leaf:
            free.append(buffer_of[i])
    header = [
        VERSION, len(rows), len(layout.groups), buffers, layout.out_features,
        layout.offsets[-1], order, int(layout.root == "sum"),
    ]  # fmt: skip
    return torch.tensor(header + [value for row in rows for value in row], dtype=torch.int64)


_programs: WeakIdKeyDictionary = WeakIdKeyDictionary()


def read(program: Tensor) -> Program:
    """A program's steps; read once, and kept as long as the tensor lives."""
    made: Program | None = _programs.get(program)
    if made is None:
        made = _programs[program] = _read(program.tolist())
    return made


def _read(numbers: list[int]) -> Program:
    head = dict(zip(HEADER, numbers, strict=False))
    body = numbers[len(HEADER) :]
    rows = [
        dict(zip(FIELDS, body[at : at + len(FIELDS)], strict=True))
        for at in range(0, len(body), len(FIELDS))
    ]
    children: list[list[int]] = [[] for _ in rows]
    for i, row in enumerate(rows):
        if row["parent"] >= 0:
            children[row["parent"]].append(i)
    steps: list[Step] = []
    for i, row in enumerate(rows):
        below = tuple(children[i])
        steps.append(
            Step(
                i, row["group"], row["slot"], row["rows"], row["cols"], row["mode"], row["offset"],
                row["parent"], below, row["node"],
                level=1 + max((steps[c].level for c in below), default=-1),
                begin=steps[below[0]].begin if below else i,
            )
        )  # fmt: skip
    return Program(
        tuple(steps), head["groups"], head["buffers"], head["out_features"], head["x_width"]
    )
