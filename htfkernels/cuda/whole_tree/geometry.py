"""How the whole-tree kernels are launched: the search for a cut, and the model of time that it
minimises. Nothing here knows of a device but its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch

from htfkernels.cuda.whole_tree.tree import CHUNK, MATH, SIDE, STREAM, Cut, Tree, math_of, tree_of
from htfkernels.tree.layout import Layout

__all__ = [
    "TILES",
    "Geometry",
    "Machine",
    "geometries",
    "geometry",
    "launches",
    "seconds",
    "shared_bytes",
]

TILES = {  # rows of the batch that a block takes at a time
    (torch.float32, 0): (4, 16, 32),
    (torch.float64, 0): (4, 16),
    (torch.float32, 1): (16, 32),
    (torch.float32, 2): (16, 32),
    (torch.bfloat16, 3): (16, 32),
}

T = TypeVar("T")


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

    def apart(columns: int, size: int) -> int:
        return columns + (16 // size if math == 0 else 16 * (columns % 32 == 0))

    width, vectors = widths
    most = max(widths)
    quarters = most // 16
    pieces = 32 * (2 * (quarters - 1) + -(-most // 32))
    stage = stored * (16 * pieces + rows * apart(vectors, stored))
    stages = 2 if backward or stored == 8 else 3
    numbers = rows * (slots * apart(width, value) + quarters * (most + 4)) + SIDE
    return 4 * part + stages * stage + value * numbers


# The model of time, for an H100; seconds, bytes and operations a second.
_LAUNCH = 4e-6
_BARRIER = 0.05e-6
# A message to global memory, the arrival, and the children's from there: a store, a fence, an
# atomic and a load, one after the other.
_ARRIVAL = 1.0e-6
_OTHERS = 0.3e-6  # the siblings' messages of a step down the path
_SUMS = 2e-6  # a launch that adds the splits' gradients
_L2 = 5.5e12  # that all multiprocessors get together
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
            up = chunks * CHUNK + max((size * d * r + vectors) / stream, flops)
            down = up + chunks * CHUNK + max(parts * size * d * r / stream, flops)
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
        task = [ups[root + 1] - ups[nodes[root].begin] for root in cut.roots]
        ways = map(sum, zip(task, (self._arrivals[root] for root in cut.roots), strict=True))
        return max(ways), sum(task) + sum(self.up[v] + _ARRIVAL for v in cut.above)

    def backward(self, cut: Cut) -> tuple[float, float]:
        """The longest task of a tile, and the sum of all."""
        nodes, ups, downs = self.tree.nodes, self._ups, self._downs
        tasks = []
        for root in cut.roots:
            first = nodes[root].begin
            inside = ups[root] - ups[first] + downs[root + 1] - downs[first]
            tasks.append(inside + self._path[root])
        owned = [self.down[v] for v in cut.above]
        return max(tasks) + max(owned, default=0.0), sum(tasks) + sum(owned)


def _beside(
    dtype: torch.dtype, math: int, rows: int, needed: int, machine: Machine, backward: bool
) -> int:
    """Blocks of a multiprocessor at a time: as registers (``forward_blocks`` of tree_forward.cuh,
    ``backward_blocks`` of tree_backward.cuh) and shared memory allow."""
    alone = math == MATH["tf32x3"]
    if backward:
        alone |= dtype == torch.float64 or rows == 32
    else:
        alone |= (math == 0 and rows == 32) or (dtype == torch.float64 and rows == 16)
    if alone:
        return 1
    # Each block takes a kilobyte for itself; a multiprocessor has one more than a block can have.
    return 2 if 2 * (needed + 1024) <= machine.shared_bytes + 1024 else 1


def launches(
    tree: Tree, batch: int, dtype: torch.dtype, math: int, machine: Machine, backward: bool,
    cuts: Sequence[Cut],
) -> Iterator[Geometry]:  # fmt: skip
    """The ways to launch one pass over each cut, a way for each height of tiles that fits into the
    device's shared memory. Arguments as in :func:`geometry`."""

    @cache
    def costs(rows: int, busy: int, again: bool) -> _Costs:
        stream = min(STREAM, _L2 / min(busy, machine.processors))
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
            # Two blocks of a multiprocessor wait while the other works.
            time = _LAUNCH + max(way * each, work * tiles / resident)
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
    found = launches(tree, batch, dtype, math, machine, False, tree.cuts)
    return _fastest(tree, machine, found, lambda g: g.seconds)


def geometries(
    tree: Tree, batch: int, dtype: torch.dtype, math: int, machine: Machine
) -> tuple[Geometry, Geometry]:
    """The fastest way to launch a forward and a backward pass over one cut: the first leaves
    messages for the second. Arguments and errors as in :func:`geometry`."""

    cuts = tree.cuts

    def best(backward: bool) -> dict[Cut, Geometry]:
        made: dict[Cut, Geometry] = {}
        for g in launches(tree, batch, dtype, math, machine, backward, cuts):
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
