"""Nodes of any shapes in one launch: levels of many shapes, and the walked top of a tree.

    p_v = Hadamard product of the operands                 [B, K_v]
    m_v = p_v W_v                                          [B, N_v]
    dp_v = g_v W_v^T,   dW_v = p_v^T g_v,   d operand = dp_v * (the other operands)

What a program does is read from tables (int64), so shapes differ from node to node; tiles that
stick out are masked in registers. The weights of the nodes are packed one after the other.

``nodes``, 9 numbers each: ``[leaf, K, N, start of W, column of the message, is it the result, first
operand, operands, place in the program]``. ``operands``: columns of children, or a leaf's first
column of ``x``. Blocks of messages are ``[B, N]`` at ``column * B``.
``parts``: ``[first node, end]`` for each part. A part's nodes are walked one after the other for
one tile of rows, each reading what the same program wrote before; there is a barrier between them.
A part of one node is split further: ``tiles`` programs share its columns.

Forward and operands' backward: grid (part, tile of rows, share of the columns). Weights' backward:
``jobs``, ``[node, first row of dW, first column]`` for each tile of a dW; grid (split of the batch,
job); partial sums ``[S, packed weights]``, summed in a fixed order.

``SCALED``: the messages are those of :mod:`htfkernels.triton.scaled`, ``m_v = 2^-s p_v W_v`` with
an ``s`` for each node and row, ``shift [nodes, B]``. Then ``dp_v = 2^-s g_v W_v^T`` and
``dW_v = (2^-s p_v)^T g_v``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from htfkernels.tree.program import Step
from htfkernels.triton import configs
from htfkernels.triton.launch import cdiv, launch
from htfkernels.triton.memory import sums
from htfkernels.triton.tables import Needed, Ragged, Tables, Uniform
from htfkernels.triton.tiles import accumulator, cast, dot, input_precision, shifted

__all__ = [
    "Pack",
    "Work",
    "backward",
    "constants_of",
    "forward",
    "pack_of",
    "product",
    "weight_gradients",
    "work_of",
]

_FEW = 4  # operands whose others' products are formed one by one, in quadratic time


@triton.jit
def product(source, operands, first, count, unit, at, inside, skip, ACC: tl.constexpr):
    """Of the operands' tiles, but for the one numbered ``skip``."""
    p = tl.full(at.shape, 1.0, ACC)
    for c in range(0, count):
        if c != skip:
            block = tl.load(operands + first + c) * unit
            p *= tl.load(source + block + at, mask=inside, other=0.0).to(ACC)
    return p


@triton.jit
def _unscaled(tile, shift, entry, i, rows, SCALED: tl.constexpr):
    """``2^-s`` times the tile's rows, for the shifts ``s`` of a node."""
    if SCALED:
        s = tl.load(shift + tl.load(entry + 8) * rows + i, mask=i < rows, other=0)
        tile = shifted(tile, -s)
    return tile


@triton.jit(do_not_specialize=["tiles_m", "tiles"])
def _forward(
    x, buffer, weight, result, nodes, operands, parts, rows, x_width, tiles_m, tiles,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    share = pid % tiles
    tile_m = (pid // tiles) % tiles_m
    part = (pid // (tiles * tiles_m)).to(tl.int64)
    i = tile_m * BM + tl.arange(0, BM)
    row = i[:, None].to(tl.int64)
    for v in range(tl.load(parts + 2 * part), tl.load(parts + 2 * part + 1)):
        entry = nodes + v * 9
        leaf = tl.load(entry)
        K = tl.load(entry + 1)
        N = tl.load(entry + 2)
        w_base = weight + tl.load(entry + 3)
        column = tl.load(entry + 4)
        first = tl.load(entry + 6)
        count = tl.load(entry + 7)
        for start_n in range(share * BN, N, tiles * BN):
            n = start_n + tl.arange(0, BN)
            total = tl.zeros((BM, BN), ACC)
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)
                inside = (i < rows)[:, None] & (k < K)[None, :]
                if leaf != 0:
                    at = row * x_width + k[None, :]
                    p = tl.load(x + tl.load(operands + first) + at, mask=inside, other=0.0).to(ACC)
                else:
                    at = row * K + k[None, :]
                    p = product(buffer, operands, first, count, rows, at, inside, -1, ACC)
                w = tl.load(
                    w_base + k[:, None] * N + n[None, :],
                    mask=(k < K)[:, None] & (n < N)[None, :],
                    other=0.0,
                )
                total = dot(cast(p, w.dtype), w, total, PRECISION)
            if tl.load(entry + 5) != 0:
                out = result
            else:
                out = buffer + column * rows
            tl.store(
                out + row * N + n[None, :],
                cast(total, result.dtype.element_ty),
                mask=(i < rows)[:, None] & (n < N)[None, :],
            )
        tl.debug_barrier()


@triton.jit(do_not_specialize=["tiles_m", "tiles"])
def _backward(
    buffer, weight, grad, grad_buffer, grad_x, shift, nodes, operands, parts, rows, x_width,
    tiles_m, tiles, FEW: tl.constexpr, SCALED: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    share = pid % tiles
    tile_m = (pid // tiles) % tiles_m
    part = (pid // (tiles * tiles_m)).to(tl.int64)
    i = tile_m * BM + tl.arange(0, BM)
    row = i[:, None].to(tl.int64)
    begin = tl.load(parts + 2 * part)
    end = tl.load(parts + 2 * part + 1)
    for step in range(0, end - begin):
        entry = nodes + (end - 1 - step) * 9
        leaf = tl.load(entry)
        K = tl.load(entry + 1)
        N = tl.load(entry + 2)
        w_base = weight + tl.load(entry + 3)
        column = tl.load(entry + 4)
        first = tl.load(entry + 6)
        count = tl.load(entry + 7)
        if tl.load(entry + 5) != 0:
            g_base = grad
        else:
            g_base = grad_buffer + column * rows
        for start in range(share * BK, K, tiles * BK):
            k = start + tl.arange(0, BK)
            inside = (i < rows)[:, None] & (k < K)[None, :]
            dp = tl.zeros((BM, BK), ACC)
            for start_n in range(0, N, BN):
                n = start_n + tl.arange(0, BN)
                g = tl.load(
                    g_base + row * N + n[None, :],
                    mask=(i < rows)[:, None] & (n < N)[None, :],
                    other=0.0,
                )
                w_t = tl.load(
                    w_base + k[None, :] * N + n[:, None],
                    mask=(k < K)[None, :] & (n < N)[:, None],
                    other=0.0,
                )
                dp = dot(g, w_t, dp, PRECISION, False)
            if leaf != 0:
                at = row * x_width + k[None, :]
                block = grad_x + tl.load(operands + first)
                dp = _unscaled(dp, shift, entry, i, rows, SCALED)
                tl.store(block + at, cast(dp, grad_x.dtype.element_ty), mask=inside)
            else:
                at = row * K + k[None, :]
                if count <= FEW:
                    for c in range(0, count):
                        others = product(buffer, operands, first, count, rows, at, inside, c, ACC)
                        block = grad_buffer + tl.load(operands + first + c) * rows
                        d = _unscaled(dp * others, shift, entry, i, rows, SCALED)
                        tl.store(block + at, cast(d, grad_buffer.dtype.element_ty), mask=inside)
                else:
                    # In linear time: first times the operands before each, then times those after.
                    before = _unscaled(dp, shift, entry, i, rows, SCALED)
                    for c in range(0, count):
                        block = tl.load(operands + first + c) * rows
                        d = cast(before, grad_buffer.dtype.element_ty)
                        tl.store(grad_buffer + block + at, d, mask=inside)
                        before *= tl.load(buffer + block + at, mask=inside, other=0.0).to(ACC)
                    tl.debug_barrier()
                    after = tl.full((BM, BK), 1.0, ACC)
                    for back in range(0, count):
                        block = tl.load(operands + first + count - 1 - back) * rows
                        d = tl.load(grad_buffer + block + at, mask=inside, other=0.0).to(ACC)
                        d = cast(d * after, grad_buffer.dtype.element_ty)
                        tl.store(grad_buffer + block + at, d, mask=inside)
                        after *= tl.load(buffer + block + at, mask=inside, other=0.0).to(ACC)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["count_jobs", "size", "rows_per_split"])
def _weights(
    x, buffer, grad, grad_buffer, partial, shift, nodes, operands, jobs, rows, x_width, count_jobs,
    size, rows_per_split, SCALED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    job = jobs + (pid % count_jobs).to(tl.int64) * 3
    split = pid // count_jobs
    entry = nodes + tl.load(job) * 9
    leaf = tl.load(entry)
    K = tl.load(entry + 1)
    N = tl.load(entry + 2)
    start_w = tl.load(entry + 3)
    column = tl.load(entry + 4)
    first = tl.load(entry + 6)
    count = tl.load(entry + 7)
    k = tl.load(job + 1) + tl.arange(0, BK)
    n = tl.load(job + 2) + tl.arange(0, BN)
    if tl.load(entry + 5) != 0:
        g_base = grad
    else:
        g_base = grad_buffer + column * rows
    total = tl.zeros((BK, BN), ACC)
    begin = split * rows_per_split
    for start in range(begin, min(begin + rows_per_split, rows), BM):
        i = start + tl.arange(0, BM)
        row = i[:, None].to(tl.int64)
        inside = (i < rows)[:, None] & (k < K)[None, :]
        if leaf != 0:
            at = row * x_width + k[None, :]
            p = tl.load(x + tl.load(operands + first) + at, mask=inside, other=0.0).to(ACC)
        else:
            at = row * K + k[None, :]
            p = product(buffer, operands, first, count, rows, at, inside, -1, ACC)
        g = tl.load(
            g_base + row * N + n[None, :],
            mask=(i < rows)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        p = _unscaled(p, shift, entry, i, rows, SCALED)
        total = dot(tl.trans(cast(p, g.dtype)), g, total, PRECISION, False)
    tl.store(
        partial + split.to(tl.int64) * size + start_w + k[:, None] * N + n[None, :],
        cast(total, partial.dtype.element_ty),
        mask=(k < K)[:, None] & (n < N)[None, :],
    )


class Pack(NamedTuple):
    """How the weights of ragged launches lie one after the other.

    Attributes:
        groups: in this order.
        start: group -> its first number; -1 is the root of a sum, a column of ones.
        size: of all.
        ones: how many of them, at the end.
    """

    groups: tuple[int, ...]
    start: dict[int, int]
    size: int
    ones: int

    def weights(self, weights: Sequence[Tensor]) -> Tensor:
        """The packed weights."""
        if not self.size:
            return weights[0]
        if len(self.groups) == 1 and not self.ones:
            return weights[self.groups[0]]
        parts = [weights[g].reshape(-1) for g in self.groups]
        if self.ones:
            parts.append(weights[0].new_ones(self.ones))
        return torch.cat(parts)


class Work(NamedTuple):
    """The tables of a launch on the device, and what its grid and tiles are chosen by: number of
    parts, whether one has several nodes, the largest K and N."""

    nodes: Tensor
    operands: Tensor
    parts: Tensor
    count: int
    walked: bool
    depth: int
    width: int


class _Jobs(NamedTuple):
    nodes: Tensor
    operands: Tensor
    jobs: Tensor
    count: int
    size: int
    covered: bool
    groups: tuple[tuple[int, int], ...]


def pack_of(tables: Tables, widest: int | None = None) -> Pack:
    """Of the weights of all ragged launches; in a backward pass, also of those too wide for it."""
    key = ("pack", widest)
    if key not in tables.cache:
        tables.cache[key] = _pack(tables, widest)
    return tables.cache[key]


def _pack(tables: Tables, widest: int | None) -> Pack:
    nodes = []
    for launched in tables.launches:
        wide = (
            widest is not None
            and isinstance(launched, Uniform)
            and not launched.fits_backward(widest)
        )
        if isinstance(launched, Ragged) or wide:
            nodes += launched.nodes
    groups = tuple(sorted({n.group for n in nodes if n.group >= 0}))
    start: dict[int, int] = {}
    size = 0
    for g in groups:
        of = tables.of_group[g]
        start[g] = size
        size += (1 + max(n.slot for n in of)) * of[0].rows * of[0].cols
    ones = next((n.rows for n in nodes if n.group < 0), 0)
    start[-1] = size
    return Pack(groups, start, size + ones, ones)


def _records(
    tables: Tables, nodes: Sequence[Step], starts: Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    records, operands = [], []
    for node, start in zip(nodes, starts, strict=True):
        is_root = node.parent < 0
        records.append([
            int(node.is_leaf), node.rows, node.cols, start,
            0 if is_root else tables.column[node.index], int(is_root), len(operands),
            node.operands, node.index,
        ])  # fmt: skip
        columns = [node.offset] if node.is_leaf else [tables.column[c] for c in node.children]
        operands += columns
    return records, operands


def _slots(pack: Pack, nodes: Sequence[Step]) -> list[int]:
    return [pack.start[n.group] + n.slot * n.rows * n.cols * (n.group >= 0) for n in nodes]


def work_of(tables: Tables, launched: Ragged, pack: Pack, needed: Needed | None) -> Work:
    """The tables of a launch, of all nodes or of those below which gradients are needed; made
    once."""
    key = (pack.groups, None if needed is None else needed.needs)
    if key not in launched.cache:
        nodes, parts = [], []
        for first, end in launched.parts:
            of = [n for n in launched.nodes[first:end] if needed is None or needed.below[n.index]]
            if of:
                parts.append([len(nodes), len(nodes) + len(of)])
                nodes += of
        records, operands = _records(tables, nodes, _slots(pack, nodes))
        launched.cache[key] = Work(
            tables.tensor(records), tables.tensor([operands]), tables.tensor(parts), len(parts),
            any(end - first > 1 for first, end in launched.parts),
            max((n.rows for n in nodes), default=0), max((n.cols for n in nodes), default=0),
        )  # fmt: skip
    return launched.cache[key]


def forward(
    tables: Tables, launched: Ragged, x: Tensor, buffer: Tensor, pack: Pack, weight: Tensor,
    result: Tensor, precision: str,
) -> None:  # fmt: skip
    """Messages of the nodes, into ``buffer``, the root's into ``result``.

    Args:
        tables, launched: the tree and the nodes.
        x: ``[B, sum of the mode dimensions]``.
        buffer: all messages.
        pack, weight: the packed weights.
        result: ``[B, out_features]``.
        precision: of float32 products.
    """
    work, rows = work_of(tables, launched, pack, None), x.shape[0]
    inputs = input_precision(x.dtype, precision)
    config = configs.ragged_forward(x.dtype, inputs, rows, work.depth, work.width)
    tiles_m = cdiv(rows, config.m)
    tiles = 1 if work.walked else cdiv(work.width, config.n)
    args = (
        x, buffer, weight, result, work.nodes, work.operands, work.parts, rows, x.shape[1],
        tiles_m, tiles,
    )  # fmt: skip
    launch(_forward, work.count * tiles_m * tiles, args, constants_of(x, inputs, config), config)


def backward(
    tables: Tables, launched: Ragged, needed: Needed, buffer: Tensor, pack: Pack,
    weight: Tensor, grad: Tensor, grad_buffer: Tensor, grad_x: Tensor, shape: Sequence[int],
    precision: str, shift: Tensor | None = None,
) -> None:  # fmt: skip
    """Gradients of the operands that are needed, into ``grad_buffer`` and ``grad_x``.

    Args:
        tables, launched, buffer, pack, weight, precision: as in :func:`forward`.
        needed: what the backward pass is for.
        grad: of the result.
        shape: of ``x``, whose gradient may not be wanted.
        shift: where the messages are scaled, their shifts.
    """
    work, (rows, x_width) = work_of(tables, launched, pack, needed), shape
    inputs = input_precision(weight.dtype, precision)
    choose = configs.ragged_backward if shift is None else configs.scaled_backward
    config = choose(weight.dtype, inputs, rows, work.depth, work.width)
    tiles_m = cdiv(rows, config.m)
    tiles = 1 if work.walked else cdiv(work.depth, config.k)
    args = (
        buffer, weight, grad, grad_buffer, grad_x, work.nodes if shift is None else shift,
        work.nodes, work.operands, work.parts, rows, x_width, tiles_m, tiles,
    )  # fmt: skip
    scaled = {"SCALED": shift is not None}
    constants = {"FEW": _FEW, **scaled, **constants_of(weight, inputs, config)}
    launch(_backward, work.count * tiles_m * tiles, args, constants, config)


def weight_gradients(
    tables: Tables, nodes: Sequence[Step], x: Tensor, buffer: Tensor, grad: Tensor,
    grad_buffer: Tensor, precision: str, shift: Tensor | None = None,
) -> dict[int, Tensor]:  # fmt: skip
    """Partial gradients of the nodes' weights: for each of their groups ``[S, places, K, N]``, in
    the accumulator's dtype, 0 at the places of other nodes.

    Args:
        tables, nodes: the tree and the nodes.
        x, buffer: vectors and messages.
        grad, grad_buffer: gradients of the result and of the messages.
        precision: of float32 products.
        shift: where the messages are scaled, their shifts.
    """
    rows = x.shape[0]
    inputs = input_precision(x.dtype, precision)
    depth, width = max(n.rows for n in nodes), max(n.cols for n in nodes)
    config = configs.ragged_weights(x.dtype, inputs, rows, depth, width)
    key = (tuple(n.index for n in nodes), config.k, config.n)
    if key not in tables.cache:
        tables.cache[key] = _jobs(tables, nodes, config)
    work = tables.cache[key]
    splits, per_split = configs.splits(x.device, work.count, rows, config.m)
    partial = sums((splits, work.size), x, work.covered)
    args = (
        x, buffer, grad, grad_buffer, partial, work.nodes if shift is None else shift, work.nodes,
        work.operands, work.jobs, rows, x.shape[1], work.count, work.size, per_split,
    )  # fmt: skip
    constants = {"SCALED": shift is not None, **constants_of(x, inputs, config)}
    launch(_weights, work.count * splits, args, constants, config)
    found = {}
    for g, at in work.groups:
        of = tables.of_group[g]
        shape = (len(of), of[0].rows, of[0].cols)
        size = len(of) * of[0].rows * of[0].cols
        found[g] = partial[:, at : at + size].unflatten(1, shape)
    return found


def _jobs(tables: Tables, nodes: Sequence[Step], config: configs.Config) -> _Jobs:
    groups, size = [], 0
    for g in sorted({n.group for n in nodes}):
        of = tables.of_group[g]
        groups.append((g, size))
        size += len(of) * of[0].rows * of[0].cols
    first = dict(groups)
    starts = [first[n.group] + tables.place[n.index] * n.rows * n.cols for n in nodes]
    records, operands = _records(tables, nodes, starts)
    jobs = [
        [v, k, n]
        for v, node in enumerate(nodes)
        for k in range(0, node.rows, config.k)
        for n in range(0, node.cols, config.n)
    ]
    covered = sum(n.rows * n.cols for n in nodes) == size
    return _Jobs(
        tables.tensor(records), tables.tensor([operands]), tables.tensor(jobs), len(jobs), size,
        covered, tuple(groups),
    )  # fmt: skip


def constants_of(like: Tensor, inputs: str, config: configs.Config) -> dict[str, object]:
    """The compile-time arguments that all kernels of tables have."""
    return {
        "ACC": accumulator(like.dtype),
        "PRECISION": inputs,
        "BM": config.m,
        "BN": config.n,
        "BK": config.k,
    }
