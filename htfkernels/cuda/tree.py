"""How a whole tree is evaluated in one launch: into what subtrees it is cut, and what that costs.

The kernels (``csrc/evaluate/tree_forward.cuh``, ``tree_backward.cuh``) give each block a subtree of
a *cut* of the tree and a tile of the batch. Here are the limits of that, the search for a cut, and
the model of time that the search minimises. Nothing here knows of a device but its numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from htfkernels.layout import PROGRAM_FIELDS, PROGRAM_HEADER, Layout

__all__ = [
    "DTYPES",
    "MATH",
    "Geometry",
    "Machine",
    "Node",
    "Tree",
    "geometry",
    "math_of",
    "seconds",
    "shared_bytes",
    "tree_of",
    "why_not",
]

# The numbers of csrc/evaluate/tree_products.cuh and tree_parts.cuh.
SIDE = 64
GROUPS = 400
FIELDS = 16
STAGES = {False: 3, True: 2}  # forward, backward
OWN_SLOTS = 3  # of the backward pass, that hold no message
TILES = {  # rows of the batch that a block takes at a time
    (torch.float32, 0): (4, 16, 32),
    (torch.float64, 0): (4, 16),
    (torch.float32, 1): (16, 32),
    (torch.float32, 2): (16, 32),
    (torch.bfloat16, 3): (16, 32),
}
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})
MATH = {"ieee": 0, "tf32": 1, "tf32x3": 2}
NODES = 2048  # every task's table lists the nodes above it, and their children


def math_of(dtype: torch.dtype, precision: str) -> int:
    """How products are computed: 0 multiply-adds, 1 TF32, 2 TF32 three times, 3 bfloat16."""
    if dtype == torch.float32:
        return MATH[precision]
    return 3 if dtype == torch.bfloat16 else 0


def why_not(layout: Layout, dtype: torch.dtype) -> str | None:
    """None where a layout is evaluated in one launch, else one sentence that says why not."""
    del dtype
    widest = max(*layout.ranks, layout.out_features)
    if widest > SIDE:
        return (
            f"cuda evaluates trees whose local ranks and out_features are at most {SIDE}, and "
            f"this one has {widest}"
        )
    if len(layout.groups) > GROUPS:
        return (
            f"cuda evaluates trees of at most {GROUPS} groups of weights, and this one has "
            f"{len(layout.groups)}"
        )
    if len(layout.tree.nodes) > NODES:
        return (
            f"cuda evaluates trees of at most {NODES} nodes, and this one has "
            f"{len(layout.tree.nodes)}"
        )
    weights = sum(len(g.nodes) * g.rows * g.cols for g in layout.groups)
    if max(weights, layout.offsets[-1]) >= 2**31 - 16 * GROUPS:
        return "cuda evaluates trees of fewer than 2^31 weights and columns of vectors"
    return None


class Node(NamedTuple):
    """A node in execution order, as a program's row has it."""

    group: int
    slot: int
    rows: int
    cols: int
    offset: int
    parent: int
    children: tuple[int, ...]
    first: int  # the first node of its subtree, which ends with the node itself

    @property
    def is_leaf(self) -> bool:
        return self.offset >= 0


class Tree:
    """A program's nodes.

    Attributes:
        nodes: in execution order, the root last.
        outputs: columns of the result.
        groups: how many folded weights there are.
        width: the widest message, a multiple of 16.
    """

    def __init__(self, program: torch.Tensor) -> None:
        numbers = program.tolist()
        head = dict(zip(PROGRAM_HEADER, numbers, strict=False))
        start, fields = len(PROGRAM_HEADER), len(PROGRAM_FIELDS)
        rows = [
            dict(zip(PROGRAM_FIELDS, numbers[at : at + fields], strict=True))
            for at in range(start, start + head["steps"] * fields, fields)
        ]
        children: list[list[int]] = [[] for _ in rows]
        for i, row in enumerate(rows):
            if row["parent"] >= 0:
                children[row["parent"]].append(i)
        nodes: list[Node] = []
        for i, row in enumerate(rows):
            below = tuple(children[i])
            first = nodes[below[0]].first if below else i
            shape = (row["group"], row["slot"], row["rows"], row["cols"])
            nodes.append(Node(*shape, row["offset"], row["parent"], below, first))
        self.nodes = tuple(nodes)
        self.outputs: int = head["out_features"]
        self.groups: int = head["groups"]
        self.width = 16 * -(-max(n.cols for n in nodes) // 16)

    def subtree(self, root: int) -> range:
        """The nodes below a node and itself, in execution order."""
        return range(self.nodes[root].first, root + 1)

    def path(self, node: int) -> list[int]:
        """The nodes above one, nearest first."""
        found = []
        while (node := self.nodes[node].parent) >= 0:
            found.append(node)
        return found

    def above(self, cut: Sequence[int]) -> list[int]:
        """The nodes above a cut, in execution order."""
        return sorted({v for root in cut for v in self.path(root)})

    def products(self, root: int) -> tuple[dict[int, int], int]:
        """Which buffer holds the product of each interior node of a subtree, and how many there
        are."""
        free: list[int] = []
        buffer: dict[int, int] = {}
        count = 0
        for i in self.subtree(root):
            parent = self.nodes[i].parent
            if i != root and parent not in buffer:
                if not free:
                    free.append(count)
                    count += 1
                buffer[parent] = free.pop()
            if not self.nodes[i].is_leaf:
                free.append(buffer[i])
        return buffer, count

    @cached_property
    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """The cuts that are looked at: from the root alone, always the subtree of the most work is
        cut into its children's."""
        work = [0.0] * len(self.nodes)
        for i, n in enumerate(self.nodes):
            work[i] += _CHUNK * max(1, -(-n.rows // SIDE)) + n.rows * n.cols * 4 / _STREAM
            if n.parent >= 0:
                work[n.parent] += work[i]
        root = len(self.nodes) - 1
        whole, heap = {root}, [(-work[root], root)]
        cuts, wanted = [(root,)], 2.0
        while heap:
            _, heaviest = heapq.heappop(heap)
            if self.nodes[heaviest].is_leaf:
                continue
            whole.remove(heaviest)
            whole.update(self.nodes[heaviest].children)
            for c in self.nodes[heaviest].children:
                heapq.heappush(heap, (-work[c], c))
            if len(whole) >= wanted or all(self.nodes[i].is_leaf for i in whole):
                cuts.append(tuple(sorted(whole)))
                wanted = max(len(whole) + 1, len(whole) * 1.2)
        return tuple(cuts)


@lru_cache(maxsize=64)
def tree_of(layout: Layout) -> Tree:
    """A layout's tree."""
    return Tree(layout.program)


class Machine(NamedTuple):
    """What plans depend on; the default is an H100's."""

    processors: int = 132
    shared_bytes: int = 232448


@dataclass(frozen=True)
class Geometry:
    """How one pass is launched.

    Attributes:
        cut: the roots of the subtrees, one task each, in execution order.
        rows: samples of a tile.
        tiles: how many there are in the batch.
        splits: parts of the batch that blocks go through by themselves; as many as tiles in a
            forward pass.
        slots: messages in a block's shared memory.
        part: numbers of the longest task's table, a multiple of 32.
        shared_bytes: of a block.
        seconds: what the model says.
    """

    cut: tuple[int, ...]
    rows: int
    tiles: int
    splits: int
    slots: int
    part: int
    shared_bytes: int
    seconds: float


def shared_bytes(
    dtype: torch.dtype, math: int, rows: int, width: int, slots: int, part: int, backward: bool
) -> int:
    """What a block needs of shared memory: the layout that tree_parts.cuh describes."""
    stored = torch.empty(0, dtype=dtype).element_size()
    value = 8 if dtype == torch.float64 else 4
    spread = 2 if math in (1, 2) and not backward else 1
    stage = stored * (SIDE * (width + spread * 16 // stored) + rows * (width + 16 // stored))
    scratch = 1024 if math == 0 and rows < 16 else 0
    messages = slots * rows * (width + 16 // value)
    return 4 * part + STAGES[backward] * stage + value * (messages + scratch + SIDE)


# The model of time, for an H100; seconds, bytes and operations a second.
_LAUNCH = 4e-6
_CHUNK = 0.15e-6  # barrier, table and latencies of a product
_BARRIER = 0.05e-6
_ARRIVAL = 1.5e-6  # a message to global memory, the arrival, and the children's from there
_STREAM = 100e9  # bytes that one multiprocessor gets from L2
_L2 = 5.5e12  # that all of them get together
_RATES = {(torch.float64, 0): 12e12, 0: 30e12, 1: 90e12, 2: 40e12, 3: 110e12}


class _Costs:
    """Seconds of a tile's products in one block, where `busy` blocks share the device."""

    def __init__(
        self, tree: Tree, dtype: torch.dtype, math: int, rows: int, machine: Machine, busy: int
    ) -> None:
        self.tree, self.rows = tree, rows
        self.size = torch.empty(0, dtype=dtype).element_size()
        self.stream = min(_STREAM, _L2 / max(1, min(busy, machine.processors)))
        self.rate = _RATES.get((dtype, math), _RATES[math]) / 132

    def product(self, node: Node, streamed: float = 1.0) -> float:
        """One product with a node's weight, of which so many bytes move."""
        chunks = max(1, -(-node.rows // SIDE)) if node.group >= 0 else 1
        moved = streamed * self.size * node.rows * node.cols
        if node.is_leaf:
            moved += self.size * self.rows * node.rows
        flops = 2.0 * self.rows * max(node.rows, 16) * max(node.cols, 16)
        return chunks * _CHUNK + max(moved / self.stream, flops / self.rate)

    def forward(self, cut: Sequence[int]) -> tuple[float, float]:
        """The longest way through the tree, and the sum of all blocks of a tile."""
        own = [self.product(n) for n in self.tree.nodes]
        task = [sum(own[i] for i in self.tree.subtree(root)) for root in cut]
        ways = [
            t + sum(own[v] + _ARRIVAL for v in self.tree.path(root))
            for t, root in zip(task, cut, strict=True)
        ]
        above = sum(own[v] + _ARRIVAL for v in self.tree.above(cut))
        return max(ways), sum(task) + above

    def backward(self, cut: Sequence[int], again: bool) -> tuple[float, float]:
        """The longest task of a tile, and the sum of all; with gradients added to what is there."""
        nodes = self.tree.nodes
        up = [self.product(n) for n in nodes]
        parts = 8 // self.size * (2.0 if again else 1.0)
        down = [
            self.product(n, parts) + self.product(n) + _BARRIER * (2 + len(n.children))
            for n in nodes
        ]
        path = [
            u + 2 * _BARRIER + 0.3e-6 * (1 + len(n.children) / 8)
            for u, n in zip(up, nodes, strict=True)
        ]
        tasks = []
        for root in cut:
            inside = self.tree.subtree(root)
            tasks.append(
                sum(up[i] + down[i] for i in inside)
                - up[root]
                + sum(path[v] for v in self.tree.path(root))
            )
        owned = sum(down[v] for v in self.tree.above(cut))
        return max(tasks) + (max(down) if owned else 0.0), sum(tasks) + owned


def _parts(tree: Tree, cut: Sequence[int], backward: bool) -> int:
    """Numbers of the longest part of a table."""
    longest = 0
    for root in cut:
        size, lists = len(tree.subtree(root)), 0
        for v in tree.path(root):
            size, lists = size + 1, lists + len(tree.nodes[v].children)
        if backward:
            inside = len(tree.subtree(root)) - 1
            size, lists = size + inside, lists + 2 * inside
        longest = max(longest, size * FIELDS + lists)
    return -(-longest // 32) * 32


def _slots(tree: Tree, cut: Sequence[int], backward: bool) -> int:
    if backward:
        return OWN_SLOTS + max(len(tree.subtree(root)) - 1 for root in cut)
    return max(1, *(tree.products(root)[1] for root in cut))


def _geometries(
    tree: Tree, batch: int, dtype: torch.dtype, math: int, machine: Machine, backward: bool,
    cuts: Sequence[tuple[int, ...]],
) -> Iterator[Geometry]:  # fmt: skip
    for cut in cuts:
        slots, part = _slots(tree, cut, backward), _parts(tree, cut, backward)
        for rows in TILES[dtype, math]:
            needed = shared_bytes(dtype, math, rows, tree.width, slots, part, backward)
            if needed > machine.shared_bytes:
                continue
            tiles = -(-batch // rows)
            blocks = len(cut) * max(1, tiles)
            costs = _Costs(tree, dtype, math, rows, machine, blocks)
            if not backward:
                way, work = costs.forward(cut)
                time = _LAUNCH + max(way, work * tiles / machine.processors)
                yield Geometry(cut, rows, tiles, tiles, slots, part, needed, time)
                continue
            resident = machine.processors * (2 if 2 * needed <= machine.shared_bytes else 1)
            splits = max(1, min(tiles, resident // len(cut)))
            each = -(-tiles // splits)
            splits = -(-tiles // each) if tiles else 1
            way, work = costs.backward(cut, each > 1)
            time = _LAUNCH + max(way * each, work * tiles / machine.processors)
            if splits > 1:
                weights = sum(n.rows * n.cols for n in tree.nodes)
                time += 2e-6 + 4.0 * splits * weights / (_L2 / 2)
            yield Geometry(cut, rows, tiles, splits, slots, part, needed, time)


def geometry(
    tree: Tree, batch: int, dtype: torch.dtype, math: int, machine: Machine, backward: bool,
    cut: tuple[int, ...] | None = None,
) -> Geometry:  # fmt: skip
    """The fastest way to launch a pass, by the model.

    Args:
        tree: its nodes.
        batch: how many samples.
        dtype, math: of the numbers and the products.
        machine: what it runs on.
        backward: which pass.
        cut: the one to use: a forward pass leaves messages for the backward pass of the same cut.

    Raises:
        RuntimeError: no block fits into shared memory.
    """
    cuts = tree.cuts if cut is None else (cut,)
    found = list(_geometries(tree, batch, dtype, math, machine, backward, cuts))
    if not found:
        raise RuntimeError(
            f"cuda: no subtree of this tree of {len(tree.nodes)} nodes fits into "
            f"{machine.shared_bytes} bytes of shared memory"
        )
    return min(found, key=lambda g: g.seconds)


@lru_cache(maxsize=1024)
def _seconds(
    layout: Layout, batch: int, dtype: torch.dtype, math: int, processors: int, backward: bool
) -> float:
    tree, machine = tree_of(layout), Machine(processors)
    if not backward:
        return geometry(tree, batch, dtype, math, machine, False).seconds
    down = geometry(tree, batch, dtype, math, machine, True)
    up = geometry(tree, batch, dtype, math, machine, False, down.cut)
    return up.seconds + down.seconds


def seconds(
    layout: Layout, rows: int, dtype: torch.dtype, precision: str, processors: int, backward: bool
) -> float:
    """What the model says a call takes on the device, without Python's part.

    A launch; then the longest way of a block through its subtree and on to the root, or the work of
    all blocks spread over the multiprocessors, whichever is more. A product costs a latency for
    each 64 rows of its weight, and the longer of streaming the weight from L2 and of the
    multiply-adds. The constants are an H100's.

    Args:
        layout: a layout for which :func:`why_not` is None.
        rows: the batch.
        dtype: of the numbers.
        precision: of float32 products.
        processors: the device's multiprocessors.
        backward: whether a backward pass follows; then the time of both.

    Example:
        >>> seconds(layout, 1, torch.float32, "ieee", 132, False) < 1e-4
        True
    """
    return _seconds(layout, rows, dtype, math_of(dtype, precision), processors, backward)
