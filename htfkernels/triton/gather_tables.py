"""Schedules: the launches that compute a list of frames, with their tables on the device.

A schedule depends on shapes alone and is made once. Nodes of a level go in one launch for each way
they are computed; the number of launches grows with the depth of the tree, not with its nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htfkernels.schedule.frames import Frame, FrameList
from htfkernels.triton import gather, gather_records
from htfkernels.triton.gather_configs import gemm_tile, vector_tile
from htfkernels.triton.gather_records import Job, Operand
from htfkernels.triton.launch import Config, cdiv, check_programs, check_size
from htfkernels.triton.tiles import accumulator, input_precision

__all__ = ["Forward", "Launch", "Tables", "forward_schedule"]

DOT, SUM, PRODUCT = (int(getattr(gather_records, name).value) for name in ("DOT", "SUM", "PRODUCT"))
NOWHERE, WEIGHTS, FRAMES, PARTS = (
    int(getattr(gather_records, name).value) for name in ("NOWHERE", "WEIGHTS", "FRAMES", "PARTS")
)
_FIELDS = int(gather_records.FIELDS.value)
# A kernel is compiled for up to so many operands, and loops over more. The second number is for
# rows that do not end with a whole vector: each of their elements has an address in registers.
_UNROLLED, _UNROLLED_ODD = 4, 2
_ALIGNMENT = 16  # elements


class Launch(NamedTuple):
    """Arguments of :func:`htfkernels.triton.launch.launch`, but for the buffers.

    Attributes:
        last: whether the message, or its gradient, is the operation's own.
    """

    kernel: Any
    programs: int
    table: Tensor
    work: Tensor
    constants: dict[str, Any]
    config: Config
    last: bool


@dataclass(frozen=True)
class Forward:
    """Launches, and how many elements the weights and all of the buffer take."""

    launches: list[Launch]
    weights: int
    buffer: int


def rounded(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


class _Places:
    """Where weights and frames are in their buffer."""

    def __init__(self, made: FrameList) -> None:
        self.made = made
        self.shapes: list[tuple[int, int, int]] = []
        count = 1 + max(step.group for step in made.steps)
        for g in range(count):
            steps = [s for s in made.steps if s.group == g]
            slots = 1 + max(s.slot for s in steps)
            self.shapes.append((slots, steps[0].rows, steps[0].cols))
        self.group = [0]
        for slots, rows, cols in self.shapes:
            self.group.append(self.group[-1] + rounded(slots * rows * cols))
        self.weights = self.group.pop()
        self.frame: list[int] = []  # among the frames
        end = 0
        for node in made.frames[:-1]:
            self.frame.append(end)
            end += rounded(node.rows * (node.cols))
        self.frames = end
        self.frame.append(0)  # the result's own
        self.first = self.weights

    def of(self, source: int) -> int:
        """Offset in the buffer of an operand, or of a weight."""
        if source >= 0:
            return self.first + self.frame[source]
        step = self.made.steps[-(source + 1)]
        return self.group[step.group] + step.slot * step.rows * step.cols


def kind_of(node: Frame) -> int:
    """How a node's message is computed."""
    if not node.columns:
        return PRODUCT
    return SUM if node.columns == 1 else DOT


def unrolled(node: Frame) -> int:
    """The number of operands that a kernel is compiled for, 0 for any."""
    count = len(node.operands)
    return count if count <= (_UNROLLED_ODD if node.width % _ALIGNMENT else _UNROLLED) else 0


@dataclass
class Pending:
    """A launch whose records are not complete yet."""

    kernel: Any
    jobs: list[list[int]]
    programs: list[int]
    constants: dict[str, Any]
    config: Config
    last: bool
    aligned: dict[str, Iterable[tuple[int, str]]] = field(default_factory=dict)


class Tables:
    """Collects records, and the launches that read them."""

    def __init__(self, made: FrameList, dtype: torch.dtype, precision: str) -> None:
        self.made, self.dtype = made, dtype
        self.places = _Places(made)
        self.precision = input_precision(dtype, precision)
        self.records: list[list[int]] = []
        self.pending: list[Pending] = []

    def record(self, fields: Job | Operand) -> list[int]:
        """A new last record, which may still be changed."""
        padded = [*fields, *[0] * (_FIELDS - len(fields))]
        self.records.append(padded)
        return padded

    def node_job(self, k: int, **fields: int) -> list[int]:
        """The record of a node, followed by those of its operands. Kernels read its width and its
        columns (or, of an operand's gradient, that one's rows) in 32 bits."""
        node = self.made.frames[k]
        weight = -1 if node.weight is None else self.places.of(node.weight)
        common = {
            "rows": node.rows,
            "k": node.width,
            "n": node.cols,
            "weight": weight,
            "operands": len(self.records) + 1,
            "count": len(node.operands),
        }
        job = self.record(Job(**{**common, **fields}))
        for name in ("k", "n"):
            size = job[Job._fields.index(name)]
            check_size("htfkernels", size, "rows or columns of a weight or frame")
        for source, rows in node.operands:
            base = self.places.of(source)
            if rows.mod:  # taken apart in 32 bits
                check_size("full_tensor", node.rows, "rows of a product of frames")
            self.record(Operand(base, rows.ids, rows.div, rows.mod))
        return job

    def constants(self, node: Frame, config: Config) -> dict[str, Any]:
        """What kernels are compiled for, but for alignment."""
        return {
            "KIND": kind_of(node),
            "CHILDREN": unrolled(node),
            "GRID": self.made.grid,
            "TRANSPOSED": node.transposed and node.columns > 1,
            "BM": config.m,
            "BN": config.n,
            "BK": config.k,
            "ACC": accumulator(self.dtype),
            "PRECISION": self.precision,
        }

    def alike(self, nodes: Iterable[int]) -> list[list[int]]:
        """Nodes of a level in classes that are computed in the same way."""
        classes: dict[tuple[Any, ...], list[int]] = {}
        for k in nodes:
            node = self.made.frames[k]
            key = (kind_of(node), unrolled(node), node.transposed)
            classes.setdefault(key, []).append(k)
        return list(classes.values())

    def levels(self) -> list[list[int]]:
        """Nodes by level, the lowest first."""
        found: dict[int, list[int]] = {}
        for k, node in enumerate(self.made.frames):
            found.setdefault(node.level, []).append(k)
        return [found[level] for level in sorted(found)]

    def is_last(self, k: int) -> bool:
        """Whether a node's frame is the operation's result."""
        return k == len(self.made.frames) - 1

    def largest(self, nodes: Sequence[int]) -> tuple[int, int, int]:
        """The largest rows, width and columns of some nodes."""
        chosen = [self.made.frames[k] for k in nodes]
        return (
            max(n.rows for n in chosen),
            max(n.width for n in chosen),
            max(n.cols for n in chosen),
        )

    def easy(self, nodes: Sequence[int]) -> bool:
        """Whether addresses take few registers: rows are whole vectors, and of at most two
        operands, or of one after the other for a narrow message."""
        chosen = [self.made.frames[k] for k in nodes]
        if any(node.width % _ALIGNMENT for node in chosen):
            return False
        if unrolled(chosen[0]) == 0:
            return max(node.columns for node in chosen) <= _ALIGNMENT
        whole = all(node.columns % _ALIGNMENT == 0 for node in chosen)
        return whole and len(chosen[0].operands) <= 2

    def finish(self, device: torch.device) -> list[Launch]:
        """The tables on the device, in two copies, and the launches."""
        numbers = {id(record): r for r, record in enumerate(self.records)}
        work: list[Tensor] = []
        for launch in self.pending:
            check_programs(sum(launch.programs))  # before there is an entry for each
            first = 0
            for job, programs in zip(launch.jobs, launch.programs, strict=True):
                job[Job._fields.index("first")] = first
                first += programs
            jobs = torch.tensor([numbers[id(job)] for job in launch.jobs], dtype=torch.int32)
            piece = jobs.repeat_interleave(torch.tensor(launch.programs, dtype=torch.int64))
            # Views start at whole 64 bytes, so that kernels are compiled for one alignment.
            work += [piece, piece.new_zeros(-len(piece) % 16)]
        table = torch.tensor(self.records or [[0] * _FIELDS], dtype=torch.int64).to(device)
        joined = torch.cat([*work, torch.zeros(16, dtype=torch.int32)]).to(device)
        made, at = [], 0
        for launch in self.pending:
            constants = {**launch.constants, **self._alignment(launch)}
            total = sum(launch.programs)
            made.append(
                Launch(
                    launch.kernel,
                    total,
                    table,
                    joined[at:],
                    constants,
                    launch.config,
                    launch.last,
                )
            )
            at += total + -total % 16
        return made

    def _alignment(self, launch: Pending) -> dict[str, bool]:
        """Whether all of a launch's widths and offsets of a kind are multiples of 16."""

        def multiples(jobs: Sequence[str], operands: Sequence[str]) -> bool:
            values = [job[Job._fields.index(f)] for job in launch.jobs for f in jobs]
            for job in launch.jobs:
                first, count = (job[Job._fields.index(f)] for f in ("operands", "count"))
                for record in self.records[first : first + count]:
                    values += [record[Operand._fields.index(f)] for f in operands]
            return all(v % _ALIGNMENT == 0 or v == -1 for v in values)

        return {name: multiples(*fields) for name, fields in launch.aligned.items()}


NODE_FIELDS = {"ALIGN_K": (("k", "dp"), ("base", "dest")), "ALIGN_N": (("n", "weight", "out"), ())}
SUM_FIELDS = {"ALIGN_K": (("k", "weight"), ("base",)), "ALIGN_N": (("n", "out"), ())}


def forward_schedule(
    made: FrameList, dtype: torch.dtype, precision: str, device: torch.device
) -> Forward:
    """All nodes, level by level."""
    tables = Tables(made, dtype, precision)
    places = tables.places
    for level in tables.levels():
        for nodes in tables.alike(level):
            rows, width, columns = tables.largest(nodes)
            some = made.frames[nodes[0]]
            kind, last = kind_of(some), tables.is_last(nodes[0])
            if kind == DOT:
                tile = gemm_tile(dtype, precision, rows, columns, tables.easy(nodes))
                down, across, config = tile.m, tile.n, tile
            else:
                config = vector_tile(rows, width)
                down, across = config.m, config.k if kind == PRODUCT else columns
            jobs, programs = [], []
            for k in nodes:
                node = made.frames[k]
                jobs.append(tables.node_job(k, out=0 if last else places.of(k)))
                programs.append(cdiv(node.rows, down) * cdiv(node.cols, across))
            constants = tables.constants(some, config)
            aligned = SUM_FIELDS if kind == SUM else NODE_FIELDS
            tables.pending.append(
                Pending(gather.forward, jobs, programs, constants, config, last, aligned)
            )
    return Forward(tables.finish(device), places.weights, places.first + places.frames)
