"""What planned evaluation launches, written down once for a plan, a dtype and the needed gradients.

The format is that of ``csrc/evaluate_at/planned_cuda_jobs.h``: a header, then launches with their
jobs, addresses as a space and an offset in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from htfkernels.runtime.memory import Kept
from htfkernels.schedule.frames import Frame, FrameList, Read, planned_frames, with_orders
from htfkernels.tree.layout import Layout

__all__ = ["Schedule", "schedule", "why_not"]

VERSION = 1
MOST_OPERANDS = 4  # of a frame, as the kernels read them
HEADER = 16
MODES = ("ieee", "tf32", "tf32x3", "bf16", "f64")
PRODUCT, DOT, ROWS = range(3)  # forward
TO_ROWS, TO_WEIGHT = range(2)  # products
STORED, PARTS, COLUMN = range(3)  # segments
FORWARD, PRODUCTS, SEGMENTS = range(3)
SLICED, SQUARE, LARGE = range(3)
SIDES = {SQUARE: 64, LARGE: 128}
THREADS = 256
IDS_TOGETHER = 1024
NOWHERE, FRAMES, WORKSPACE, RESULT, GRAD = range(5)
WEIGHTS, GRADIENTS = 16, 1 << 32
PENDING = -1000
# Blocks a launch should have: two for each processor of an H100.
WANTED_BLOCKS = 264
MOST_WEIGHT_PARTS = 256  # that blocks leave of a column's gradient, and a later launch sums
MOST = 2**31 - 2**16 - 1  # rows, columns, blocks: `narrow` of planned_cuda.cu refuses more

Address = tuple[int, int]
NULL: Address = (NOWHERE, 0)


class Schedule(NamedTuple):
    """What the operators and ``planned_forward``, ``planned_backward`` of C++ take.

    Attributes:
        table: int64, on the CPU.
        lists: the plan's, int32, on its device; longer where a backward pass needs orders that
            the plan lacks.
    """

    table: Tensor
    lists: Tensor


def why_not(layout: Layout, dtype: torch.dtype) -> str | None:
    """None where trees are evaluated by a plan, else one sentence that says why not."""
    del dtype
    for group in layout.groups:
        if max(group.rows, group.cols) > MOST:
            return (
                f"cuda evaluates by a plan where weights have at most {MOST} rows and columns, and "
                f"this layout has a weight of {group.rows} by {group.cols}"
            )
        # The sum over the nodes that share it takes its gradient as one row of numbers.
        if len(group.nodes) > group.count and group.rows * group.cols > MOST:
            return (
                f"cuda evaluates by a plan where weights that nodes share have at most {MOST} "
                f"numbers, and this layout has one of {group.rows} by {group.cols}"
            )
    return None


_schedules: Kept[tuple[Tensor, FrameList]] = Kept(most=16)


def schedule(
    program: Tensor,
    table: Tensor,
    lists: Tensor,
    like: Tensor,
    precision: str,
    needs: Sequence[bool] = (),
) -> Schedule:
    """The schedule of a plan, made at the first call and kept as long as the plan's table lives.

    Args:
        program: the layout's.
        table, lists: the plan's; lists on the device.
        like: a weight: its dtype is that of the computation.
        precision: ``"ieee"``, ``"tf32"`` or ``"tf32x3"``, of float32.
        needs: for each group of weights, whether a backward pass is to give its gradient; without
            any there is a forward pass alone.
    """
    mode = {torch.bfloat16: "bf16", torch.float64: "f64"}.get(like.dtype, precision)
    wanted = tuple(bool(n) for n in needs)

    def make() -> tuple[Tensor, FrameList]:
        frames = planned_frames(program, table, MOST_OPERANDS)
        return _Maker(frames, batch, mode, wanted).made(), frames

    batch = int(table[1])
    made, frames = _schedules.of(table, (mode, wanted), make, like)
    if any(wanted):
        lists = with_orders(frames, batch, lists)
    return Schedule(made, lists)


def _over(n: int, each: int) -> int:
    return -(-n // each)


def _tiles(shapes: Sequence[tuple[int, int]], config: int) -> int:
    side = SIDES[config]
    return sum(_over(rows, side) * _over(cols, side) for rows, cols in shapes)


def _config(shapes: Sequence[tuple[int, int]]) -> int:
    """The largest tiles that give every processor at least one and are not mostly margin."""
    square, large = _tiles(shapes, SQUARE), _tiles(shapes, LARGE)
    if square < WANTED_BLOCKS // 2:
        return SLICED
    return LARGE if large >= WANTED_BLOCKS // 2 and 16 * large <= 5 * square else SQUARE


def _power_over(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


class _Segments(NamedTuple):
    """Sums over the rows of a node, for one operand."""

    node: Frame
    operand: int
    source: int
    grad: Address
    wanted: bool  # the operand's gradient
    weight: bool  # the gradient of the node's own weight too


class _Maker:
    def __init__(self, made: FrameList, batch: int, mode: str, needs: tuple[bool, ...]) -> None:
        self.list, self.mode = made, mode
        self.groups, self.outputs = made.program.groups, made.program.out_features
        self.batch = batch
        self.needs = needs or (False,) * self.groups
        self.size = {"bf16": 2, "f64": 8}.get(mode, 4)
        self.part_size = 8 if mode == "f64" else 4
        self.vector = 16 // self.size
        self.last = len(made.frames) - 1
        self.frames = 0  # elements
        self.frame_at: list[int] = []
        for frame in made.frames[: self.last]:
            self.frame_at.append(self.frames)
            self.frames += _over(frame.rows * frame.cols, 16) * 16
        self.workspace = 0  # bytes
        self.gradient_at: dict[int, int] = {}  # of a node's frame
        self.launches: list[tuple[int, int, list[tuple[int, ...]]]] = []
        self.uses: dict[tuple[int, int], int] = {}
        for step in made.steps:
            key = (step.group, step.slot)
            self.uses[key] = self.uses.get(key, 0) + 1
        # Of gradients that are sums of parts: how many, and which launch writes the last. Where
        # each group of parts is, is known once all are: until then its space is PENDING - place.
        self.copies: dict[tuple[int, int], int] = {}
        self.written: dict[tuple[int, int], int] = {}
        self.pending: list[tuple[tuple[int, int], int]] = []

    def made(self) -> Tensor:
        levels: dict[int, list[int]] = {}
        for k, node in enumerate(self.list.frames):
            levels.setdefault(node.level, []).append(k)
        for level in sorted(levels):
            self.forward(levels[level])
        forward = len(self.launches)
        if any(self.needs):
            self.needed = self.what_is_needed()
            # Gradients of products live for a level.
            self.products_at = self.reserve(max(map(self.products_size, levels.values())))
            for level in sorted(levels, reverse=True):
                self.backward(levels[level])
            self.add_parts()
        numbers: list[int] = []
        for kind, config, jobs in self.launches:
            numbers += [kind, config, len(jobs)]
            for job in jobs:
                numbers += job
        header = [
            VERSION, MODES.index(self.mode), self.groups, self.batch, self.outputs,
            HEADER + len(numbers) + self.groups, self.frames, self.workspace,
            forward, len(self.launches) - forward, HEADER + len(numbers), *[0] * 5,
        ]  # fmt: skip
        needed = [int(n) for n in self.needs]
        return torch.tensor(header + numbers + needed, dtype=torch.int64)

    # -- addresses --------------------------------------------------------------------------------

    def reserve(self, size: int) -> int:
        at = self.workspace
        self.workspace += _over(size, 128) * 128
        return at

    def weight(self, step: int, space: int = WEIGHTS) -> Address:
        """Of a program step's weight, or its gradient; null without one."""
        if step < 0:
            return NULL
        s = self.list.steps[step]
        return space + s.group, s.slot * s.rows * s.cols * self.size

    def frame(self, source: int) -> Address:
        if source < 0:
            return self.weight(-(source + 1))
        if source == self.last:
            return RESULT, 0
        return FRAMES, self.frame_at[source] * self.size

    def gradient(self, k: int) -> Address:
        """Of a node's frame."""
        return (GRAD, 0) if k == self.last else (WORKSPACE, self.gradient_at[k])

    def read(self, read: Read) -> tuple[int, ...]:
        return (*self.frame(read.source), read.rows.ids)

    def operands(self, reads: Sequence[Read], count: int = MOST_OPERANDS) -> list[int]:
        flat: list[int] = []
        for read in reads:
            flat += self.read(read)
        return flat + [NOWHERE, 0, -1] * (count - len(reads))

    # -- forward ----------------------------------------------------------------------------------

    def kind(self, node: Frame) -> int:
        if not node.columns:
            return ROWS
        return DOT if node.cols == 1 else PRODUCT

    def forward(self, level: Sequence[int]) -> None:
        jobs, shapes = [], []
        for k in level:
            node = self.list.frames[k]
            kind = self.kind(node)
            if kind == PRODUCT:
                shapes.append((node.rows, node.cols))
            weight = self.weight(node.step)
            sizes = (kind, len(node.operands), node.rows, node.width, node.cols)
            jobs.append((*sizes, *weight, *self.frame(k), *self.operands(node.operands)))
        self.launches.append((FORWARD, _config(shapes), jobs))

    # -- backward ---------------------------------------------------------------------------------

    def what_is_needed(self) -> list[bool]:
        """For each node, whether the gradient of its frame is needed for anything."""
        needed: list[bool] = []
        for node in self.list.frames:
            own = self.step_needed(node.step)
            needed.append(own or any(self.below(read, needed) for read in node.operands))
        return needed

    def step_needed(self, step: int) -> bool:
        return step >= 0 and self.group_needed(step)

    def group_needed(self, step: int) -> bool:
        return self.needs[self.list.steps[step].group]

    def below(self, read: Read, needed: list[bool]) -> bool:
        return needed[read.source] if read.source >= 0 else self.group_needed(-(read.source + 1))

    def to(self, read: Read, copies: int, launch: int) -> tuple[Address, bool, bool]:
        """Where an operand's gradient goes, if it is the sum of ``copies`` terms; whether the terms
        are stored as parts; whether nothing is left to do then."""
        rows, cols = self.list.shape(read.source)
        if read.source < 0:
            return self.to_weight(-(read.source + 1), copies, launch)
        at = self.gradient_at[read.source] = self.reserve(rows * cols * self.size)
        if copies == 1:
            return (WORKSPACE, at), False, False
        return (WORKSPACE, self.reserve(rows * cols * copies * self.part_size)), True, False

    def to_weight(self, step: int, copies: int, launch: int) -> tuple[Address, bool, bool]:
        s = self.list.steps[step]
        if self.uses[s.group, s.slot] == 1 and copies == 1:
            return self.weight(step, GRADIENTS), False, True
        return self.part(step, copies, launch), True, False

    def part(self, step: int, copies: int, launch: int) -> Address:
        s = self.list.steps[step]
        key = (s.group, s.slot)
        before = self.copies.get(key, 0)
        self.copies[key] = before + copies
        self.written[key] = launch
        self.pending.append((key, before * s.rows * s.cols * self.part_size))
        return PENDING - len(self.pending) + 1, 0

    def backward(self, level: Sequence[int]) -> None:
        products: list[tuple[int, ...]] = []
        segments: list[_Segments] = []
        level = [k for k in level if self.needed[k]]
        through = [k for k in level if self.kind(self.list.frames[k]) == PRODUCT]
        config = _config([(self.list.frames[k].rows, self.list.frames[k].width) for k in through])
        weights = [(self.list.frames[k].width, self.list.frames[k].cols) for k in through]
        weight_tiles = _tiles(weights, max(config, SQUARE))
        here = len(self.launches)  # the products' launch, if there are any
        at = self.products_at
        for k in level:
            node = self.list.frames[k]
            kind = self.kind(node)
            wanted = [c for c, r in enumerate(node.operands) if self.below(r, self.needed)]
            if kind == DOT:
                # The sums over one operand's rows give the weight's gradient too.
                own = self.step_needed(node.step)
                for c in wanted or [0]:
                    dp = self.gradient(k)
                    segments.append(_Segments(node, c, COLUMN, dp, bool(wanted), own))
                    own = False
                continue
            dp = self.gradient(k)
            if kind == PRODUCT:
                if self.step_needed(node.step):
                    products.append(self.weight_product(k, weight_tiles, here))
                direct = len(node.operands) == 1 and node.operands[0].rows.one_by_one
                if wanted and direct:
                    out = self.to(node.operands[0], 1, here)
                    products.append(self.rows_product(k, *out))
                    continue
                if wanted:
                    dp = WORKSPACE, at
                    at += self.product_size(k)
                    products.append(self.rows_product(k, dp, False, False))
            for c in wanted:
                segments.append(_Segments(node, c, STORED, dp, True, False))
        if products:
            self.launches.append((PRODUCTS, config, products))
        self.sum_segments(segments)

    def product_size(self, k: int) -> int:
        node = self.list.frames[k]
        if self.kind(node) != PRODUCT or not self.needed[k]:
            return 0
        return _over(node.rows * node.width * self.size, 128) * 128

    def products_size(self, level: Sequence[int]) -> int:
        return sum(map(self.product_size, level))

    def rows_product(self, k: int, out: Address, parts: bool, final: bool) -> tuple[int, ...]:
        node = self.list.frames[k]
        sizes = (TO_ROWS, 0, node.rows, node.width, node.cols, 1, int(parts), int(final))
        where = (*self.weight(node.step), *self.gradient(k), *out)
        return (*sizes, *where, *self.operands(()))

    def weight_product(self, k: int, tiles: int, launch: int) -> tuple[int, ...]:
        node = self.list.frames[k]
        splits = min(_over(node.rows, 64), WANTED_BLOCKS // tiles)
        splits = max(1, splits, _over(node.rows, IDS_TOGETHER))
        each = max(1, _over(_over(node.rows, splits), 32) * 32)
        splits = max(1, _over(node.rows, each))
        out, parts, final = self.to_weight(node.step, splits, launch)
        count = len(node.operands)
        sizes = (TO_WEIGHT, count, node.rows, node.width, node.cols, each, int(parts), int(final))
        return (*sizes, *NULL, *self.gradient(k), *out, *self.operands(node.operands))

    def sum_segments(self, segments: Sequence[_Segments]) -> None:
        """A launch, and one more where sums over many rows are split."""
        jobs: list[tuple[int, ...]] = []
        more: list[tuple[int, ...]] = []
        here = len(self.launches)
        for one in segments:
            read, node = one.node.operands[one.operand], one.node
            rows = self.list.shape(read.source)[0]
            shape = self.segment_shape(rows, node.width, node.rows, len(segments), one.weight)
            splits, blocks = shape[3], shape[4]
            out, parts, final = NULL, False, False
            if one.wanted:
                out, parts, final = self.to(read, splits, here)
                if parts and read.source >= 0:
                    whole = WORKSPACE, self.gradient_at[read.source]
                    more.append(self.sum_of_parts(out, splits, rows * node.width, whole, False))
            weight_parts = self.part(node.step, splits * blocks, here) if one.weight else NULL
            weight = self.weight(node.step) if one.source == COLUMN else NULL
            others = [r for o, r in enumerate(node.operands) if o != one.operand]
            jobs.append((
                one.source, len(others), rows, node.width, node.rows, *shape[:4], int(parts),
                int(final), read.rows.start, read.rows.order, *one.grad, *weight,
                *self.frame(read.source), *weight_parts, *out,
                *self.operands(others, MOST_OPERANDS - 1),
            ))  # fmt: skip
        for launch in (jobs, more):
            if launch:
                self.launches.append((SEGMENTS, 0, launch))

    def segment_shape(
        self, segments: int, width: int, rows: int, beside: int, weight: bool
    ) -> tuple[int, int, int, int, int]:
        """``(lane bits, group bits, segments one after the other, splits, blocks)`` of sums over
        ``rows`` rows in ``segments`` segments, in a launch of ``beside`` such jobs."""
        wanted, mean = _over(WANTED_BLOCKS, beside), rows // max(1, segments)
        lanes = min(32, _power_over(_over(width, self.vector)))
        chunks, most = _over(width, self.vector * lanes), THREADS // lanes
        groups = min(most, _power_over(_over(mean, 4)))

        def blocks(groups: int) -> int:
            return _over(segments, most // groups)

        while 2 * groups <= min(most, mean) and blocks(groups) * chunks < wanted:
            groups *= 2
        splits = 1
        if blocks(groups) * chunks < wanted and mean > 64 * groups:
            splits = min(64, _over(wanted, blocks(groups) * chunks), mean // (16 * groups))
        repeats = _over(blocks(groups), MOST_WEIGHT_PARTS) if weight else 1
        repeats = max(1, repeats)
        bits = lanes.bit_length() - 1, groups.bit_length() - 1
        return (*bits, repeats, splits, _over(segments, most // groups * repeats))

    def sum_of_parts(
        self, parts: Address, copies: int, size: int, out: Address, final: bool
    ) -> tuple[int, ...]:
        groups = min(16, _power_over(_over(copies, 4)))
        lanes = min(THREADS // groups, _power_over(_over(size, self.vector)))
        bits = lanes.bit_length() - 1, groups.bit_length() - 1
        return (
            PARTS, 0, 1, size, copies, *bits, 1, 1, 0, int(final), -1, -1,
            *parts, *NULL, *NULL, *NULL, *out, *self.operands((), MOST_OPERANDS - 1),
        )  # fmt: skip

    def add_parts(self) -> None:
        """Sums the parts of gradients, in the last launch if that comes after them all."""
        at: dict[tuple[int, int], int] = {}
        jobs = []
        for step in self.list.steps:
            key = (step.group, step.slot)
            if key in at or key not in self.copies:
                continue
            size, copies = step.rows * step.cols, self.copies[key]
            at[key] = self.reserve(size * copies * self.part_size)
            out = GRADIENTS + step.group, step.slot * size * self.size
            jobs.append(self.sum_of_parts((WORKSPACE, at[key]), copies, size, out, True))
        if not jobs:
            return
        last = len(self.launches) - 1
        if self.launches[last][0] == SEGMENTS and max(self.written.values()) < last:
            self.launches[last][2].extend(jobs)
        else:
            self.launches.append((SEGMENTS, 0, jobs))
        for _, _, launch in self.launches:
            launch[:] = [self.placed(job, at) for job in launch]

    def placed(self, job: tuple[int, ...], at: dict[tuple[int, int], int]) -> tuple[int, ...]:
        """A job whose pending spaces are places in the workspace."""
        numbers = list(job)
        for i, number in enumerate(numbers):
            if number <= PENDING:
                key, offset = self.pending[PENDING - number]
                numbers[i : i + 2] = [WORKSPACE, at[key] + offset]
        return tuple(numbers)
