"""Index plans: for a fixed set of index tuples, what of a tree is evaluated once per distinct
sub-tuple, and what once per sample.

The samples of a tensor completion are many tuples of few indices: a node over modes ``(0, 1)`` has
at most ``D_0 D_1`` different messages, however many samples there are. A plan frames such nodes:
their products and messages are computed for the distinct sub-tuples alone, and gathered where
samples need them. The rest of the tree is walked per sample.

What the kernels read is fixed.

``table``, int64 on the CPU, flat: a header of 8 ``[version = 1, B, F, K, form, length of lists, N,
steps of the program]``, then F framed rows of 10 fields and K cut rows of 6
(:class:`FramedRow`, :class:`CutRow`). ``lists``, int32: all lists one after the other; a field that
names a list is its offset, -1 where there is none.

An operand ``k >= 0`` is framed row ``k``; ``x < 0`` is the leaf with program step ``-(x + 1)``,
whose frame is its own weight ``[D_n, R]``.

Framed row: ``p[i] = frame(left)[left_ids[i]] * frame(right)[right_ids[i]]``, ``i`` in ``0 ..
rows - 1``, sorted by (left id, right id), each pair once. With ``step >= 0`` its frame is ``p W``
of that program step, with ``step == -1`` it is ``p`` (a part of a node with more than two
operands). Rows with left id ``i`` are ``left_start[i] .. left_start[i + 1] - 1``, those with right
id ``j``, ascending, ``right_order[right_start[j] .. right_start[j + 1] - 1]``. ``right ==
NO_OPERAND``: a one-child node, whose rows are the left operand's, without lists. ``level`` is one
more than the operands' highest, a leaf's is 0. Rows come after their operands.

Cut row: an operand of a walked node. ``ids [B]`` is each sample's row of it.

- form 0, walk: what is not framed is walked per sample; ``start`` and ``order`` are -1.
- form 1, bilinear: only the root is not framed, ``out_features == 1``, and two operands are left:
  two cut rows, with ``start [rows + 1]`` and ``order [B]``: the samples with id ``i``, ascending,
  are ``order[start[i] .. start[i + 1] - 1]``.
- form 2, framed root: one cut row, whose operand is the root's framed row and whose parent is -1,
  with ``start`` and ``order``.

Example:
    >>> import torch
    >>> from htfkernels import Layout, ModeTree
    >>> layout = Layout.make(ModeTree.balanced(4), mode_dims=3, ranks=8)
    >>> plan = IndexPlan.make(layout, torch.randint(3, (1000, 4)))
    >>> [plan.rows_of(node) for node in layout.tree.interior]
    [9, 9, 81]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy
import torch
from torch import Tensor

from htfkernels.arguments import came
from htfkernels.runtime import dispatch
from htfkernels.runtime.operations import OPERATIONS, load
from htfkernels.schedule.index_build import (
    BILINEAR,
    FRAMED_ROOT,
    NO_OPERAND,
    WALK,
    Builder,
    CutRow,
    FramedRow,
    Loops,
    OnCpu,
)
from htfkernels.schedule.index_cost import STEP, passes_to_pay
from htfkernels.tree import Node
from htfkernels.tree.checks import format_modes
from htfkernels.tree.layout import Layout

__all__ = [
    "BILINEAR",
    "FRAMED_ROOT",
    "NO_OPERAND",
    "WALK",
    "CutRow",
    "FramedRow",
    "IndexPlan",
    "Indices",
    "build_plan",
    "check_indices",
]

Indices = Tensor | Sequence[Sequence[int]] | numpy.ndarray[Any, Any]

FORMS = ("walked per sample", "bilinear in two frames", "framed up to the root")

# Indices on a GPU: for fewer samples, the launches (about 20 for all nodes of a height) cost more
# than the CPU's loops and the copies do in a tree of a few nodes. Counted, not timed.
WORTH_LAUNCHES = 4096


@dataclass(frozen=True, eq=False, repr=False)
class IndexPlan:
    """How a fixed set of index tuples is evaluated. Build with :meth:`make`, or
    :meth:`htfkernels.HTF.index_plan`.

    Attributes:
        layout: tree and shapes.
        indices: ``[B, N]``, the tensor it was made of; the plan is that of its values then.
        table, lists: what the kernels read, see the top of this module; ``lists`` is on the
            indices' device, ``table`` on the CPU.
        form: ``WALK``, ``BILINEAR`` or ``FRAMED_ROOT``.
        framed, cuts: the table's rows.
    """

    layout: Layout
    indices: Tensor
    table: Tensor
    lists: Tensor
    form: int
    framed: tuple[FramedRow, ...]
    cuts: tuple[CutRow, ...]

    @classmethod
    def make(cls, layout: Layout, indices: Indices) -> IndexPlan:
        """The plan of these tuples.

        A node whose operands (leaves, and nodes framed before) have at most ``B // 2`` distinct
        combinations among the samples is framed; operands are combined in pairs, the two with the
        fewest rows first.

        The plan of indices on a GPU is built there, if the CUDA kernels can run, have been found
        right on it and there are at least 4,096 tuples, or the backend ``"cuda"`` was asked for by
        name; else on the CPU. It is the same plan.

        Args:
            layout: tree and shapes.
            indices: ``[B, N]``: a tensor of integers with any strides, or a list, tuple or NumPy
                array of them.

        Raises:
            ValueError: not integers ``[B, N]``, or more than 2^31 - 1 samples or indices of a mode.
            IndexError: an index is out of range.
            RuntimeError: the compiled module for it cannot be loaded.

        Example:
            >>> from htfkernels import Layout, ModeTree
            >>> layout = Layout.make(ModeTree.balanced(2), mode_dims=2, ranks=3)
            >>> plan = IndexPlan.make(layout, torch.tensor([[0, 1], [1, 1], [0, 1], [0, 1]]))
            >>> len(plan), plan.rows_of(layout.tree.root)
            (4, 2)
        """
        if not isinstance(layout, Layout):
            raise ValueError(f"IndexPlan: layout must be a Layout, got {type(layout).__name__}")
        values = check_indices("IndexPlan", layout, indices)
        return build_plan("IndexPlan", layout, indices, values)

    def to(self, device: torch.device | str) -> IndexPlan:
        """The same plan with its indices and lists on another device."""
        lists = self.lists.to(device)
        if lists is self.lists:
            return self
        return replace(self, indices=self.indices.to(device), lists=lists)

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.indices.shape[0]

    def __len__(self) -> int:
        return self.batch

    def rows_of(self, node: Node) -> int:
        """For how many rows a node is evaluated: its distinct sub-tuples where it is framed, else
        ``B``. A leaf's frame is its own weight, of ``D_n`` rows."""
        if not isinstance(node, Node) or node.tree != self.layout.tree:
            raise ValueError(f"rows_of: {node!r} is not a node of this plan's tree")
        if node.is_leaf:
            return self.layout.mode_dims[node.index]
        return self._framed_rows().get(node.index, self.batch)

    def _framed_rows(self) -> dict[int, int]:
        steps = self.layout.steps
        return {steps[row.step].node: row.rows for row in self.framed if row.step >= 0}

    def multiply_adds(self) -> tuple[int, int]:
        """Of one evaluation: ``(with this plan, of every node for every sample)``."""
        steps = self.layout.steps
        planned = 0
        widths: list[int] = []  # of the framed rows' products: the ranks of their nodes
        for row in self.framed:
            if row.left < 0:
                width = steps[-(row.left + 1)].cols
            else:
                left = self.framed[row.left]
                width = steps[left.step].cols if left.step >= 0 else widths[row.left]
            widths.append(width)
            sent = steps[row.step].cols if row.step >= 0 else 0
            planned += row.rows * width * (sent + (row.right != NO_OPERAND))
        if self.form == BILINEAR:
            # The root's weight goes into the smaller frame, which leaves an inner product.
            planned += steps[-1].rows * (self.batch + min(cut.rows for cut in self.cuts))
        elif self.form == WALK:
            framed = {row.step for row in self.framed}
            parts = [0] * len(steps)
            for cut in self.cuts:
                parts[cut.parent] += 1
            for s, step in enumerate(steps):
                if step.mode < 0 and s not in framed:
                    planned += self.batch * step.rows * (step.cols + parts[s] - 1)
                    if step.parent >= 0:
                        parts[step.parent] += 1
        return planned, self.batch * _cost_of_sample(self.layout)

    @staticmethod
    def pays(layout: Layout, batch: int) -> bool:
        """Whether a plan for a new mini-batch of this size is expected to save more in one step
        (forward and backward: three passes) than it costs to build.

        The expectation is that of indices drawn uniformly; samples of a real data set repeat more.
        A set of tuples that is used again and again is worth a plan in any case.

        Raises:
            ValueError: not a layout, or not a number of samples.
        """
        return passes_to_pay(layout, batch) < STEP

    def __repr__(self) -> str:
        return f"IndexPlan(batch={self.batch}, order={self.layout.tree.order}, {self._summary()})"

    def _summary(self) -> str:
        nodes = sum(row.step >= 0 for row in self.framed)
        return f"{FORMS[self.form]}, {nodes} of {len(self.layout.tree.interior)} nodes framed"

    def __str__(self) -> str:
        planned, per_sample = self.multiply_adds()
        size = self.lists.numel() * 4 + self.table.numel() * 8
        lines = [
            f"index plan of {self.batch:,} samples, order {self.layout.tree.order}: "
            + self._summary(),
            *self._node_lines(),
            f"multiply-adds: {planned:,} instead of {per_sample:,}, "
            f"{_saved(planned, per_sample)} saved; the plan takes {size:,} bytes",
        ]
        return "\n".join(lines)

    def _node_lines(self) -> Iterator[str]:
        tree, rows, batch = self.layout.tree, self._framed_rows(), self.batch
        if len(tree.nodes) > 40:
            for level, nodes in enumerate(tree.levels):
                if level:
                    total = sum(rows.get(node.index, batch) for node in nodes)
                    yield (
                        f"level {level}: {len(nodes)} nodes, {total:,} of "
                        f"{batch * len(nodes):,} rows, {_saved(total, batch * len(nodes))} saved"
                    )
            return
        for node in tree.interior:
            count = rows.get(node.index, batch)
            note = "" if node.index in rows else " (per sample)"
            yield (
                f"{format_modes(node.modes)}: {count:,} of {batch:,} rows, "
                f"{_saved(count, batch)} saved{note}"
            )


def check_indices(op: str, layout: Layout, indices: Indices) -> Tensor:
    """Indices as an int64 tensor ``[B, N]``: int64 tensors themselves, a copy of anything else.
    Whether they are in range is not looked at.

    Raises:
        ValueError: not integers ``[B, N]``; ``op`` names who was called.
    """
    order = layout.tree.order
    tensor = indices if isinstance(indices, Tensor) else _as_tensor(op, order, indices)
    dtype = tensor.dtype
    if (
        (dtype is not torch.int64 and dtype not in _INTEGERS)
        or tensor.layout is not torch.strided
        or tensor.is_nested
        or tensor.dim() != 2
        or tensor.shape[1] != order
    ):
        _refuse(op, order, f"{dtype} {came(tensor)}")
    return tensor if dtype is torch.int64 else tensor.long()


_INTEGERS = {
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip


def _as_tensor(op: str, order: int, indices: Any) -> Tensor:
    if not isinstance(indices, (list, tuple, numpy.ndarray)):
        _refuse(op, order, type(indices).__name__)
    try:
        array = numpy.asarray(indices)
    except (TypeError, ValueError):
        _refuse(op, order, f"a {type(indices).__name__} that does not form an array")
    if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[1] != order:
        _refuse(op, order, f"{type(indices).__name__} of {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(numpy.int64))


def _refuse(op: str, order: int, what: str) -> NoReturn:
    raise ValueError(f"{op}: indices must be integers [B, {order}], got {what}")


def build_plan(op: str, layout: Layout, indices: Indices, values: Tensor) -> IndexPlan:
    """The plan of int64 ``values``; it keeps ``indices`` if they came as a tensor."""
    kept = indices if isinstance(indices, Tensor) else values
    if values.is_meta:
        raise ValueError(f"{op}: indices on the meta device have no values to make a plan of")
    try:
        return IndexPlan(layout, kept, *Builder(layout, values, _loops(values)).build())
    except IndexError as error:
        raise IndexError(f"{op}: {error}") from None


def _loops(indices: Tensor) -> type[Loops]:
    """Where a plan is built."""
    spec = dispatch.Spec("index_plan", indices.dtype, indices.device.type)
    few = not indices.is_cuda or len(indices) < WORTH_LAUNCHES
    if (few and dispatch.requested() != "cuda") or dispatch.why_not_taken("cuda", spec):
        return OnCpu
    on_device: type[Loops] = load(OPERATIONS["index_plan"].backends["cuda"].module).OnDevice
    return on_device


def _saved(part: int, whole: int) -> str:
    return f"{100 * (1 - part / whole) if whole else 0:.1f}%"


def _cost_of_sample(layout: Layout) -> int:
    """Multiply-adds of all interior nodes: the product of the messages, then the weight."""
    return sum(s.rows * (s.cols + len(s.children) - 1) for s in layout.steps if s.mode < 0)
