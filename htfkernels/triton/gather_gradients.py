"""Schedules of backward passes: from the result down, what the needed weights' gradients depend on.

At a node, with its message's gradient ``g``: the gradient of its weight, that of its product
``dp``, and from this those of its operands (:mod:`htfkernels.triton.gather`,
:mod:`htfkernels.triton.segments`). Every gradient is written once; where its terms are summed in
parts, or nodes share a weight, the parts are added up in a launch of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from htfkernels.schedule.frames import FrameList, Read
from htfkernels.triton import gather, segments
from htfkernels.triton.gather_configs import BLOCK, gemm_tile, segment_tile, splits, vector_tile
from htfkernels.triton.gather_records import Job, Operand
from htfkernels.triton.gather_tables import (
    DOT,
    FRAMES,
    NODE_FIELDS,
    NOWHERE,
    PARTS,
    SUM,
    WEIGHTS,
    Launch,
    Pending,
    Tables,
    kind_of,
    rounded,
    unrolled,
)
from htfkernels.triton.launch import Config, cdiv
from htfkernels.triton.tiles import accumulator

__all__ = ["Backward", "backward_schedule"]

_W_FIELDS = {"ALIGN_K": (("k",), ("base",)), "ALIGN_N": (("n", "out", "dest"), ())}
_SEGMENT_FIELDS = {"ALIGN_K": (("k", "dp", "dest"), ("base",))}


@dataclass(frozen=True)
class Backward:
    """Launches; sizes of the three buffers that gradients go to; where each group's are, -1 where
    they were not asked for; the groups' shapes."""

    launches: list[Launch]
    sizes: tuple[int, int, int]
    groups: list[int]
    shapes: list[tuple[int, int, int]]

    @property
    def gathers(self) -> bool:
        """Whether gradients of gathered rows are among what is computed."""
        return any(step.kernel is segments.segment_gradient for step in self.launches)


class Gradients(Tables):
    """The backward pass for the groups that are needed."""

    def __init__(
        self, made: FrameList, dtype: torch.dtype, precision: str, needs: Sequence[bool]
    ) -> None:
        super().__init__(made, dtype, precision)
        self.needs = needs
        self.groups, self.weights = [], 0
        for shape, needed in zip(self.places.shapes, needs, strict=True):
            self.groups.append(self.weights if needed else -1)
            self.weights += rounded(shape[0] * shape[1] * shape[2]) if needed else 0
        uses: dict[tuple[int, int], int] = {}
        for step in made.steps:
            uses[step.group, step.slot] = uses.get((step.group, step.slot), 0) + 1
        self.uses = uses
        self.below: list[bool] = []  # whether a node's gradient is wanted
        for node in made.frames:
            sources = [o.source for o in node.operands]
            sources += [] if node.weight is None else [node.weight]
            self.below.append(any(self.wanted(s) for s in sources))
        self.parts = 0
        self.sums: list[list[int]] = []  # of frames' gradients, in this level
        self.shared: dict[tuple[int, int], list[tuple[list[int], int, int, int]]] = {}
        self.weight_sums: list[list[int]] = []

    def wanted(self, source: int) -> bool:
        """Whether the gradient of a frame or weight is wanted."""
        if source >= 0:
            return self.below[source]
        return bool(self.needs[self.made.steps[-(source + 1)].group])

    def size(self, source: int) -> int:
        """Elements of a frame or weight."""
        rows, columns = self.made.shape(source)
        return rows * columns

    def target(self, source: int) -> tuple[int, int]:
        """Where the whole gradient of a source goes."""
        if source >= 0:
            return FRAMES, self.places.frame[source]
        step = self.made.steps[-(source + 1)]
        return WEIGHTS, self.groups[step.group] + step.slot * step.rows * step.cols

    def send(self, record: list[int], fields: tuple[str, ...], source: int, parts: int) -> None:
        """Sets where a record's result goes: right to its place, or into parts to be added up."""
        space, dest = (fields.index(f) for f in ("space", "dest"))
        step = self.made.steps[-(source + 1)] if source < 0 else None
        if step is not None and self.uses[step.group, step.slot] > 1:
            record[space] = PARTS
            uses = self.shared.setdefault((step.group, step.slot), [])
            uses.append((record, dest, parts, source))
        elif parts == 1:
            record[space], record[dest] = self.target(source)
        else:
            record[space], record[dest] = PARTS, self.parts
            self.add_sum(source, parts)

    def add_sum(self, source: int, parts: int) -> None:
        """A sum of parts from here on."""
        space, dest = self.target(source)
        size = self.size(source)
        job = Job(rows=parts, k=size, out=self.parts, space=space, dest=dest)
        (self.sums if space == FRAMES else self.weight_sums).append(self.record(job))
        self.parts += rounded(parts * size)

    def add_up(self, jobs: list[list[int]]) -> None:
        """The launch that adds parts."""
        if jobs:
            programs = [cdiv(job[Job._fields.index("k")], BLOCK) for job in jobs]
            constants = {"BLOCK": BLOCK, "ACC": accumulator(self.dtype)}
            config = Config(BLOCK, 1, 1, 4, 1)
            self.pending.append(
                Pending(segments.add_parts, list(jobs), programs, constants, config, False)
            )
            jobs.clear()

    def gradient_of(self, k: int) -> int:
        """Offset of a node's gradient: among the frames', or the operation's own."""
        return self.places.frame[k]

    def weight_launch(self, nodes: list[int]) -> None:
        """Gradients of weights."""
        made = self.made
        nodes = [k for k in nodes if (w := made.frames[k].weight) is not None and self.wanted(w)]
        if not nodes:
            return
        rows, width, columns = self.largest(nodes)
        some = made.frames[nodes[0]]
        if kind_of(some) == SUM:
            vector = vector_tile(rows, width)
            config, step, down, across = vector, vector.m, vector.k, 16
        else:
            easy = unrolled(some) == 0 and self.easy(nodes)
            tile = gemm_tile(self.dtype, self.precision, width, min(columns, 64), easy)
            config = tile._replace(m=tile.k, k=tile.m)
            step, down, across = config.m, config.k, config.n
        tiles = {k: cdiv(made.frames[k].width, down) * cdiv(made.frames[k].columns, across)
                 for k in nodes}  # fmt: skip
        jobs, programs = [], []
        for k in nodes:
            node = made.frames[k]
            parts = splits(node.rows, step, sum(tiles.values()))
            job = self.node_job(k, out=self.gradient_of(k), splits=parts)
            self.send(job, Job._fields, node.weight, parts)
            jobs.append(job)
            programs.append(tiles[k] * parts)
        self.pending.append(
            Pending(
                gather.weight_gradient,
                jobs,
                programs,
                self.constants(some, config),
                config,
                self.is_last(nodes[0]),
                _W_FIELDS,
            )
        )

    def gathered(self, k: int) -> list[tuple[int, Read]]:
        """The operands of a node that are gathered and whose gradients are wanted."""
        operands = enumerate(self.made.frames[k].operands)
        return [(c, o) for c, o in operands if not o.rows.one_by_one and self.wanted(o.source)]

    def product_launch(self, nodes: list[int], scratch: dict[int, int]) -> None:
        """Gradients of products where they have to be stored, and of operands read row by row."""
        made = self.made
        direct = {
            k: [o for o in made.frames[k].operands if o.rows.one_by_one and self.wanted(o.source)]
            for k in nodes
        }
        nodes = [k for k in nodes if direct[k] or k in scratch]
        if not nodes:
            return
        rows, width, _ = self.largest(nodes)
        some = made.frames[nodes[0]]
        if kind_of(some) == DOT:
            easy = self.easy(nodes) and width <= 64
            tile = gemm_tile(self.dtype, self.precision, rows, width, easy)
            config = tile._replace(n=tile.k, k=tile.n)
        else:
            config = vector_tile(rows, width)
        jobs, programs = [], []
        for k in nodes:
            node = made.frames[k]
            job = self.node_job(k, out=self.gradient_of(k), dp=scratch.get(k, -1))
            first = job[Job._fields.index("operands")]
            for record, (source, reads) in zip(
                self.records[first : first + len(node.operands)], node.operands, strict=True
            ):
                record[Operand._fields.index("space")] = NOWHERE
                if reads.one_by_one and self.wanted(source):
                    self.send(record, Operand._fields, source, 1)
            jobs.append(job)
            programs.append(cdiv(node.rows, config.m) * cdiv(node.width, config.k))
        self.pending.append(
            Pending(
                gather.product_gradient,
                jobs,
                programs,
                self.constants(some, config),
                config,
                self.is_last(nodes[0]),
                NODE_FIELDS,
            )
        )

    def segment_launch(self, nodes: list[int], scratch: dict[int, int]) -> None:
        """Gradients of gathered operands."""
        made = self.made
        found = [(k, c, o) for k in nodes for c, o in self.gathered(k)]
        if not found:
            return
        some = made.frames[nodes[0]]
        kind = kind_of(some)
        counts = [made.shape(o.source)[0] for _, _, o in found]
        average = max(made.frames[k].rows // n for (k, _, _), n in zip(found, counts, strict=True))
        widest = max(made.frames[k].width for k, _, _ in found)
        config, many = segment_tile(average, widest, made.grid, unrolled(some) == 0)
        step = 1 if many else config.m
        tiles = [
            cdiv(n, config.m if many else 1) * cdiv(made.frames[k].width, config.k)
            for (k, _, _), n in zip(found, counts, strict=True)
        ]
        jobs, programs = [], []
        for (k, c, operand), n, count in zip(found, counts, tiles, strict=True):
            parts = splits(made.frames[k].rows // n, step, sum(tiles))
            rows = operand.rows
            job = self.node_job(
                k,
                n=n,
                out=self.gradient_of(k),
                dp=scratch.get(k, self.gradient_of(k)),
                splits=parts,
                child=c,
                start=rows.start,
                order=rows.order,
            )
            self.send(job, Job._fields, operand.source, parts)
            jobs.append(job)
            programs.append(count * parts)
        chosen = self.constants(some, config)
        names = ("KIND", "CHILDREN", "GRID", "BM", "BK", "ACC")
        constants = {"MANY": many, **{name: chosen[name] for name in names}}
        last = self.is_last(nodes[0]) and kind != DOT
        self.pending.append(
            Pending(
                segments.segment_gradient, jobs, programs, constants, config, last, _SEGMENT_FIELDS
            )
        )

    def add_shared(self) -> None:
        """Sums over the nodes that share a weight."""
        for uses in self.shared.values():
            source = uses[0][3]
            size, at = self.size(source), self.parts
            self.add_sum(source, sum(parts for _, _, parts, _ in uses))
            for record, dest, parts, _ in uses:
                record[dest] = at
                at += parts * size


def backward_schedule(
    made: FrameList, dtype: torch.dtype, precision: str, device: torch.device, needs: Sequence[bool]
) -> Backward:
    """From the result down, level by level; only what the needed groups' gradients depend on."""
    tables = Gradients(made, dtype, precision, needs)
    most = 0  # elements that a level's gradients of products take
    for level in reversed(tables.levels()):
        wanted = [k for k in level if tables.below[k]]
        end, scratch = 0, {}
        for k in wanted:
            node = made.frames[k]
            if kind_of(node) == DOT and tables.gathered(k):
                scratch[k] = tables.places.frames + end
                end += rounded(node.rows * node.width)
        most = max(most, end)
        for nodes in tables.alike(wanted):
            tables.weight_launch(nodes)
            tables.product_launch(nodes, scratch)
            tables.segment_launch(nodes, scratch)
        tables.add_up(tables.sums)
    tables.add_shared()
    tables.add_up(tables.weight_sums)
    return Backward(
        tables.finish(device),
        (tables.weights, tables.places.frames + most, tables.parts),
        tables.groups,
        tables.places.shapes,
    )
