"""How a whole tree is evaluated in one launch: into what subtrees it is cut, and what that costs.

The kernels (``csrc/evaluate/tree_forward.cuh``, ``tree_backward.cuh``) give each block a subtree of
a *cut* of the tree and a tile of the batch. Here are the limits of that, the search for a cut, and
the model of time that the search minimises. Nothing here knows of a device but its numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch

from htfkernels.layout import PROGRAM_FIELDS, PROGRAM_HEADER, Layout

__all__ = [
    "DTYPES",
    "MATH",
    "Cut",
    "Geometry",
    "Machine",
    "Node",
    "Tree",
    "geometries",
    "geometry",
    "math_of",
    "seconds",
    "shared_bytes",
    "tree_of",
    "why_not",
    "why_not_at",
]

# The numbers of csrc/evaluate/tree_products.cuh and tree_parts.cuh.
SIDE = 64
GROUPS = 400
FIELDS = 16
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
LONGEST = 256  # by index: a leaf's gradient is a product with vectors of zeros and ones
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


T = TypeVar("T")


def why_not_at(layout: Layout, dtype: torch.dtype) -> str | None:
    """The same for leaves by index."""
    longest = max(layout.mode_dims)
    if longest > LONGEST:
        return (
            f"cuda evaluates entries of trees whose mode dimensions are at most {LONGEST}, and "
            f"this one has {longest}"
        )
    return why_not(layout, dtype)


class Node(NamedTuple):
    """A node in execution order, as a program's row has it."""

    group: int
    slot: int
    rows: int
    cols: int
    vectors: int  # leaf: the first column of its vectors, or its mode
    parent: int
    children: tuple[int, ...]
    first: int  # the first node of its subtree, which ends with the node itself

    @property
    def is_leaf(self) -> bool:
        return self.vectors >= 0


def _padded(width: int) -> int:
    return 16 * -(-width // 16)


class Tree:
    """A program's nodes, with ``indexed`` for leaves that are given by index.

    Attributes:
        nodes: in execution order, the root last.
        outputs: columns of the result.
        groups: how many folded weights there are.
        widths: of the widest message, and of the widest chunk of vectors, multiples of 16.
    """

    def __init__(self, program: torch.Tensor, indexed: bool = False) -> None:
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
            vectors = row["mode" if indexed else "offset"]
            nodes.append(Node(*shape, vectors, row["parent"], below, first))
        self.nodes = tuple(nodes)
        self.outputs: int = head["out_features"]
        self.groups: int = head["groups"]
        leaves = [n for n in nodes if n.is_leaf]
        vectors = max(min(SIDE, n.rows) for n in leaves)
        if indexed:  # rows of weights are where chunks of vectors would be
            vectors = max(vectors, *(n.cols for n in leaves))
        self.widths = (_padded(max(n.cols for n in nodes)), _padded(vectors))

    def subtree(self, root: int) -> range:
        """The nodes below a node and itself, in execution order."""
        return range(self.nodes[root].first, root + 1)

    def path(self, node: int) -> list[int]:
        """The nodes above one, nearest first."""
        found = []
        while (node := self.nodes[node].parent) >= 0:
            found.append(node)
        return found

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
    def numbers(self) -> int:
        """How many weights there are, shared ones once for each node."""
        return sum(n.rows * n.cols for n in self.nodes if n.group >= 0)

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts that are looked at: from the root alone, always the subtree of the most work is
        cut into its children's."""
        work = [0.0] * len(self.nodes)
        for i, n in enumerate(self.nodes):
            work[i] += _CHUNK * max(1, -(-n.rows // SIDE)) + n.rows * n.cols * 4 / _STREAM
            if n.parent >= 0:
                work[n.parent] += work[i]
        root = len(self.nodes) - 1
        roots, heap = {root}, [(-work[root], root)]
        cuts, wanted = [Cut(self, (root,))], 2.0
        while heap:
            _, heaviest = heapq.heappop(heap)
            if self.nodes[heaviest].is_leaf:
                continue
            roots.remove(heaviest)
            roots.update(self.nodes[heaviest].children)
            for c in self.nodes[heaviest].children:
                heapq.heappush(heap, (-work[c], c))
            if len(roots) >= wanted or all(self.nodes[i].is_leaf for i in roots):
                cuts.append(Cut(self, tuple(sorted(roots))))
                wanted = max(len(roots) + 1, len(roots) * 1.2)
        return tuple(cuts)


class Cut:
    """A cut of a tree into subtrees.

    Attributes:
        roots: the subtrees' roots, one task each, in execution order.
        above: the nodes above them, in execution order.
        sizes: for a forward and a backward pass: how many messages a block holds in shared memory,
            and the numbers of the longest task's part of the table, a multiple of 32.
    """

    def __init__(self, tree: Tree, roots: tuple[int, ...]) -> None:
        self.tree, self.roots = tree, roots
        found: set[int] = set()
        for v in roots:
            while (v := tree.nodes[v].parent) >= 0 and v not in found:
                found.add(v)
        self.above = tuple(sorted(found))

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        tree = self.tree
        path = [0] * len(tree.nodes)  # numbers of the steps above a node, and of their lists
        for v in reversed(self.above):
            own = FIELDS + len(tree.nodes[v].children)
            for c in tree.nodes[v].children:
                path[c] = path[v] + own
        insides = [len(tree.subtree(root)) for root in self.roots]
        longest = [0, 0]
        for root, inside in zip(self.roots, insides, strict=True):
            forward = path[root] + inside * FIELDS
            # Backward, all but the root go up and down, each with its children's slots.
            longest[0] = max(longest[0], forward)
            longest[1] = max(longest[1], forward + (inside - 1) * (FIELDS + 2))
        up, down = (-(-numbers // 32) * 32 for numbers in longest)
        products = max(1, *(tree.products(root)[1] for root in self.roots))
        return (products, up), (OWN_SLOTS + max(insides) - 1, down)


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
        cut: into the blocks' tasks.
        rows: samples of a tile.
        tiles: how many there are in the batch.
        splits: parts of the batch that blocks go through by themselves; as many as tiles in a
            forward pass.
        slots, part: the cut's sizes.
        shared_bytes: of a block.
        seconds: what the model says.
    """

    cut: Cut
    rows: int
    tiles: int
    splits: int
    slots: int
    part: int
    shared_bytes: int
    seconds: float


def shared_bytes(
    dtype: torch.dtype, math: int, rows: int, widths: tuple[int, int], slots: int, part: int,
    backward: bool,
) -> int:  # fmt: skip
    """What a block needs of shared memory: the layout that tree_parts.cuh describes."""
    stored = torch.empty(0, dtype=dtype).element_size()
    value = 8 if dtype == torch.float64 else 4
    spread = 2 if math in (1, 2) and not backward else 1
    width, vectors = widths
    stage = stored * (SIDE * (width + spread * 16 // stored) + rows * (vectors + 16 // stored))
    stages = 2 if backward or stored == 8 else 3
    scratch = 1024 if math == 0 and rows < 16 else 0
    messages = slots * rows * (width + 16 // value)
    return 4 * part + stages * stage + value * (messages + scratch + SIDE)


# The model of time, for an H100; seconds, bytes and operations a second.
_LAUNCH = 4e-6
_CHUNK = 0.15e-6  # barrier, table and latencies of a product
_BARRIER = 0.05e-6
_ARRIVAL = 1.5e-6  # a message to global memory, the arrival, and the children's from there
_OTHERS = 0.3e-6  # the siblings' messages of a step down the path
_SUMS = 2e-6  # a launch that adds the splits' gradients
_STREAM = 100e9  # bytes that one multiprocessor gets from L2
_L2 = 5.5e12  # that all of them get together
_RATES = {(torch.float64, 0): 12e12, 0: 30e12, 1: 90e12, 2: 40e12, 3: 110e12}


class _Costs:
    """Seconds of a tile's products in one block. Sums over subtrees are differences of running
    sums, since a subtree's nodes follow each other."""

    def __init__(
        self, tree: Tree, dtype: torch.dtype, math: int, rows: int, stream: float, again: bool
    ) -> None:
        self.tree = tree
        size = torch.empty(0, dtype=dtype).element_size()
        rate = _RATES.get((dtype, math), _RATES[math]) / 132
        parts = (8 if size == 8 else 4) / size * (2 if again else 1)

        @cache
        def shape(leaf: bool, d: int, r: int, children: int) -> tuple[float, float, float]:
            """A product with a weight [d, r]; its backward's two; and a step down the path."""
            chunks = -(-d // SIDE)
            vectors = size * rows * d if leaf else 0
            flops = 2.0 * rows * max(d, 16) * max(r, 16) / rate
            up = chunks * _CHUNK + max((size * d * r + vectors) / stream, flops)
            down = up + chunks * _CHUNK + max(parts * size * d * r / stream, flops)
            path = up + _OTHERS * (1 + children / 8)
            return up, down + _BARRIER * (2 + children), path + 2 * _BARRIER

        nodes = tree.nodes
        each = [shape(n.is_leaf, n.rows, n.cols, len(n.children)) for n in nodes]
        self.up = [e[0] for e in each]
        self.down = [e[1] for e in each]
        self._ups = [0.0, *accumulate(self.up)]
        self._downs = [0.0, *accumulate(self.down)]
        self._arrivals, self._path = [0.0] * len(nodes), [0.0] * len(nodes)
        for i in range(len(nodes) - 2, -1, -1):
            v = nodes[i].parent
            self._arrivals[i] = self._arrivals[v] + self.up[v] + _ARRIVAL
            self._path[i] = self._path[v] + each[v][2]

    def forward(self, cut: Cut) -> tuple[float, float]:
        """The longest way through the tree, and the sum of all blocks of a tile."""
        nodes, ups = self.tree.nodes, self._ups
        task = [ups[root + 1] - ups[nodes[root].first] for root in cut.roots]
        ways = map(sum, zip(task, (self._arrivals[root] for root in cut.roots), strict=True))
        return max(ways), sum(task) + sum(self.up[v] + _ARRIVAL for v in cut.above)

    def backward(self, cut: Cut) -> tuple[float, float]:
        """The longest task of a tile, and the sum of all."""
        nodes, ups, downs = self.tree.nodes, self._ups, self._downs
        tasks = []
        for root in cut.roots:
            first = nodes[root].first
            inside = ups[root] - ups[first] + downs[root + 1] - downs[first]
            tasks.append(inside + self._path[root])
        owned = [self.down[v] for v in cut.above]
        return max(tasks) + max(owned, default=0.0), sum(tasks) + sum(owned)


def _beside(
    dtype: torch.dtype, math: int, rows: int, needed: int, machine: Machine, backward: bool
) -> int:
    """Blocks of a multiprocessor at a time: as registers (``backward_blocks`` of
    tree_backward.cuh, ``__launch_bounds__`` of tree_forward.cuh) and shared memory allow."""
    tall = math == 0 and rows == 32
    if tall or (backward and dtype == torch.float64):
        return 1
    # Each block takes a kilobyte for itself; a multiprocessor has one more than a block can have.
    return 2 if 2 * (needed + 1024) <= machine.shared_bytes + 1024 else 1


def _launches(
    tree: Tree, batch: int, dtype: torch.dtype, math: int, machine: Machine, backward: bool,
    cuts: Sequence[Cut],
) -> Iterator[Geometry]:  # fmt: skip
    @cache
    def costs(rows: int, busy: int, again: bool) -> _Costs:
        stream = min(_STREAM, _L2 / min(busy, machine.processors))
        return _Costs(tree, dtype, math, rows, stream, again)

    for cut in cuts:
        slots, part = cut.sizes[backward]
        for rows in TILES[dtype, math]:
            needed = shared_bytes(dtype, math, rows, tree.widths, slots, part, backward)
            if needed > machine.shared_bytes:
                continue
            tiles = -(-batch // rows)
            beside = _beside(dtype, math, rows, needed, machine, backward)
            resident = machine.processors * beside
            splits = max(1, min(tiles, resident // len(cut.roots))) if backward else tiles
            each = -(-tiles // splits) if tiles else 1
            splits = -(-tiles // each)
            # Nearly the number of blocks: costs are the same for the next power of two.
            cost = costs(rows, 1 << (len(cut.roots) * splits).bit_length(), backward and each > 1)
            way, work = cost.backward(cut) if backward else cost.forward(cut)
            time = _LAUNCH + max(way * each, work * tiles / machine.processors)
            if backward and splits > 1:
                time += _SUMS + 4.0 * splits * tree.numbers / (_L2 / 2)
            yield Geometry(cut, rows, tiles, max(1, splits), slots, part, needed, time)


def _fastest(tree: Tree, machine: Machine, found: Iterable[T], key: Callable[[T], float]) -> T:
    best = min(found, key=key, default=None)
    if best is None:
        raise RuntimeError(
            f"cuda: no subtree of this tree of {len(tree.nodes)} nodes fits into "
            f"{machine.shared_bytes} bytes of shared memory"
        )
    return best


def geometry(tree: Tree, batch: int, dtype: torch.dtype, math: int, machine: Machine) -> Geometry:
    """The fastest way to launch a forward pass that no backward pass follows, by the model.

    Args:
        tree: its nodes.
        batch: how many samples.
        dtype, math: of the numbers and the products.
        machine: what it runs on.

    Raises:
        RuntimeError: no block fits into shared memory.
    """
    found = _launches(tree, batch, dtype, math, machine, False, tree.cuts)
    return _fastest(tree, machine, found, lambda g: g.seconds)


def geometries(
    tree: Tree, batch: int, dtype: torch.dtype, math: int, machine: Machine
) -> tuple[Geometry, Geometry]:
    """The fastest way to launch a forward and a backward pass over one cut: the first leaves
    messages for the second. Arguments and errors as in :func:`geometry`."""

    cuts = tree.cuts

    def best(backward: bool) -> dict[Cut, Geometry]:
        made: dict[Cut, Geometry] = {}
        for g in _launches(tree, batch, dtype, math, machine, backward, cuts):
            if g.cut not in made or g.seconds < made[g.cut].seconds:
                made[g.cut] = g
        return made

    up, down = best(False), best(True)
    pairs = [(up[cut], down[cut]) for cut in up if cut in down]
    return _fastest(tree, machine, pairs, lambda pair: pair[0].seconds + pair[1].seconds)


@lru_cache(maxsize=1024)
def _seconds(
    layout: Layout, batch: int, dtype: torch.dtype, math: int, processors: int, backward: bool
) -> float:
    how = (tree_of(layout), batch, dtype, math, Machine(processors))
    if not backward:
        return geometry(*how).seconds
    return sum(g.seconds for g in geometries(*how))


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
