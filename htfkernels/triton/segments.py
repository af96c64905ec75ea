"""Gradients of gathered rows, and sums of parts: in a fixed order, without atomics.

Records, buffers and spaces are those of :mod:`htfkernels.triton.gather_records`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from htfkernels.triton.gather_records import (
    CHILD,
    DEST,
    DIV,
    DP,
    FIELDS,
    MOD,
    ORDER,
    OUT,
    ROWS,
    SPACE,
    SPLITS,
    START,
    SUM,
    WEIGHT,
    WIDTH,
    job_of,
    node_of,
    others,
    place_of,
    put,
)

__all__ = ["add_parts", "segment_gradient"]


@triton.jit
def segment_gradient(
    TABLE, WORK, IDS, STARTS, ORDERS, BUF, GRADS, WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT,
    ids_row, ids_mode,
    KIND: tl.constexpr, CHILDREN: tl.constexpr, GRID: tl.constexpr, ALIGN_K: tl.constexpr,
    MANY: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of one gathered operand ``A_c [n, K]`` of a node::

        G[j, :] = sum over the rows i with row_c(i) == j, ascending, of
                  dp[i, :] * product over the other operands of A_d[row_d(i), :]

    The rows of ``j`` are number ``STARTS[j]`` to ``STARTS[j + 1] - 1`` in the order of ORDERS; with
    GRID they are ``(q mod + j) div + t``. ``dp`` is read from GRADS; SUM: ``dp[i, :] = g[i] W``.
    Tiles are ``[BM, BK]``. With MANY, a tile has BM rows j, and adds one row i to each of them at a
    time; else it has BM rows i of one j. The grid is over (rows j, part of their rows, column
    tile); parts follow each other, ``splits`` of ``[n, K]``.
    """
    job, tile, rows, K, segments, out, operands, count = node_of(TABLE, WORK, ALIGN_K, False)
    child, splits = tl.load(job + CHILD).to(tl.int32), tl.load(job + SPLITS).to(tl.int32)
    across = tl.cdiv(K, BK)
    k = (tile % across) * BK + tl.arange(0, BK)
    part = (tile // across) % splits
    lane = tl.arange(0, BM).to(tl.int64)
    if MANY:
        j = (tile // across // splits).to(tl.int64) * BM + lane
        ahead, step = lane * 0, 1
    else:
        j = (tile // across // splits).to(tl.int64) + lane * 0
        ahead, step = lane, BM
    valid = j < segments
    order = tl.load(job + ORDER)
    if GRID:
        div = tl.load(operands + child * FIELDS + DIV).to(tl.int32)
        mod = tl.load(operands + child * FIELDS + MOD)
        begin = lane * 0
        end = begin + rows // mod
    else:
        starts = STARTS + tl.load(job + START) + j
        begin = tl.load(starts, mask=valid, other=0).to(tl.int64)
        end = tl.load(starts + 1, mask=valid, other=0).to(tl.int64)
    each = tl.cdiv(tl.cdiv(end - begin, splits), step) * step
    low = begin + part * each
    high = tl.minimum(low + each, end)
    total = tl.zeros((BM, BK), ACC)
    for done in range(0, tl.max(high - low, axis=0), step):
        e = low + done + ahead
        live = valid & (e < high)
        mask = live[:, None] & (k < K)[None, :]
        if GRID:
            i = ((e.to(tl.int32) // div) * mod + j) * div + e.to(tl.int32) % div
        else:
            listed = tl.load(ORDERS + order + e, mask=tl.where(order >= 0, live, False), other=0)
            i = tl.where(order >= 0, listed.to(tl.int64), e)
        if KIND == SUM:
            term = tl.load(GRADS + out + i, mask=live, other=0.0).to(ACC)[:, None]
        else:
            at = tl.load(job + DP)
            if ALIGN_K:
                at = tl.multiple_of(at, 16)
            term = tl.load(GRADS + at + i[:, None] * K + k[None, :], mask=mask, other=0.0).to(ACC)
        if CHILDREN > 0:
            for other in tl.static_range(CHILDREN - 1):
                operand = operands + (other + (other >= child).to(tl.int32)) * FIELDS
                place = place_of(operand, IDS, ids_row, ids_mode, i, live, K, GRID, ALIGN_K)
                factor = tl.load(BUF + place[:, None] + k[None, :], mask=mask, other=0.0)
                term = term * factor.to(ACC)
        else:
            term = term * others(
                BUF, operands, count, child, IDS, ids_row, ids_mode, i, live, k, K, mask, total,
                GRID, ALIGN_K,
            )  # fmt: skip
        total += term
    if KIND == SUM:
        weight = tl.load(job + WEIGHT)
        w = tl.load(BUF + weight + k, mask=tl.where(weight >= 0, k < K, False), other=1.0)
        total *= w.to(ACC)[None, :]
    space, dest = tl.load(job + SPACE), tl.load(job + DEST)
    if ALIGN_K:
        dest = tl.multiple_of(dest, 16)
    if MANY:
        at = dest + (part.to(tl.int64) * segments + j)[:, None] * K + k[None, :]
        mask = valid[:, None] & (k < K)[None, :]
        put(WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, space, at, total, mask)
    else:
        one = tile // across // splits
        at = dest + (part.to(tl.int64) * segments + one) * K + k
        put(WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, space, at, tl.sum(total, axis=0), k < K)


@triton.jit
def add_parts(TABLE, WORK, PARTS, WEIGHTS_OUT, FRAMES_OUT, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``dest[e] = sum over parts q, ascending, of PARTS[q, e]``: a block of elements a program."""
    job, tile = job_of(TABLE, WORK)
    size, count = tl.load(job + WIDTH), tl.load(job + ROWS).to(tl.int32)
    e = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = PARTS + tl.load(job + OUT) + e
    total = tl.zeros((BLOCK,), ACC)
    for q in range(count):
        total += tl.load(source + q * size, mask=e < size, other=0.0)
    dest = tl.load(job + DEST) + e
    put(WEIGHTS_OUT, FRAMES_OUT, PARTS, tl.load(job + SPACE), dest, total, e < size)
