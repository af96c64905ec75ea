"""Nodes whose operands' rows are gathered: forward, and the gradients of weights and of operands.

For each node of a launch, with operands' frames ``A_c [rows_c, K]`` and a weight ``W [K, N]``::

    p[i, k] = product over c of A_c[row_c(i), k]          [rows, K], formed on load, never stored
    DOT:      m = p W                                     [rows, N]
    SUM:      m[i] = sum over k of p[i, k] W[k]           N == 1; W = 1 where the node has none
    PRODUCT:  m = p                                       N == K

``row_c(i)`` is ``i``, an entry of a list or of a column of ``indices [rows, N]`` (``ids_row``,
``ids_mode`` are its strides), or with GRID ``(i // div) % mod``: row-wise Khatri-Rao products.
TRANSPOSED: ``W`` is a frame, ``[N, K]``. ``CHILDREN`` is the number of operands, 0 where it is read
at run time. Everything is row-major. Records, buffers and spaces are those of
:mod:`htfkernels.triton.gather_records`. The grid has one dimension: the tiles of a job, column by
column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from htfkernels.triton.gather_records import (
    CHILD_DEST,
    CHILD_SPACE,
    DEST,
    DOT,
    DP,
    FIELDS,
    NOWHERE,
    PRODUCT,
    SPACE,
    SPLITS,
    SUM,
    WEIGHT,
    node_of,
    others,
    places_of,
    product,
    put,
)
from htfkernels.triton.tiles import cast, dot

__all__ = ["forward", "product_gradient", "weight_gradient"]


@triton.jit
def forward(
    TABLE, WORK, IDS, BUF, MESSAGES, ids_row, ids_mode,
    KIND: tl.constexpr, CHILDREN: tl.constexpr, GRID: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGN_K: tl.constexpr, ALIGN_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile ``[BM, BN]`` of a message. DOT: over (row tile, column tile); SUM: over row tiles, all
    of K in each; PRODUCT: over (row tile, BK columns)."""
    job, tile, rows, K, N, out, operands, count = node_of(TABLE, WORK, ALIGN_K, ALIGN_N)
    if KIND == DOT:
        across = tl.cdiv(N, BN)
    elif KIND == PRODUCT:
        across = tl.cdiv(K, BK)
    else:
        across = 1
    i = (tile // across).to(tl.int64) * BM + tl.arange(0, BM)
    column = tile % across
    live = i < rows
    places = places_of(operands, IDS, ids_row, ids_mode, i, live, K, CHILDREN, GRID, ALIGN_K)
    like = tl.zeros((BM, BK), ACC)

    if KIND == PRODUCT:
        k = column * BK + tl.arange(0, BK)
        mask = live[:, None] & (k < K)[None, :]
        if CHILDREN > 0:
            p = product(BUF, places, k, mask, -1, CHILDREN, like)
        else:
            p = others(
                BUF, operands, count, -1, IDS, ids_row, ids_mode, i, live, k, K, mask, like,
                GRID, ALIGN_K,
            )  # fmt: skip
        p = cast(p, MESSAGES.dtype.element_ty)
        tl.store(MESSAGES + out + i[:, None] * K + k[None, :], p, mask=mask)
    else:
        weight = tl.load(job + WEIGHT)
        if ALIGN_N or (KIND == SUM and ALIGN_K):
            weight = tl.multiple_of(weight, 16)
        n = column * BN + tl.arange(0, BN)
        if KIND == DOT:
            total = tl.zeros((BM, BN), ACC)
        else:
            total = like
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            mask = live[:, None] & (k < K)[None, :]
            if CHILDREN > 0:
                p = product(BUF, places, k, mask, -1, CHILDREN, like)
            else:
                p = others(
                    BUF, operands, count, -1, IDS, ids_row, ids_mode, i, live, k, K, mask, like,
                    GRID, ALIGN_K,
                )  # fmt: skip
            if KIND == SUM:
                # Without a weight the load has no lane and gives ones.
                w = tl.load(BUF + weight + k, mask=tl.where(weight >= 0, k < K, False), other=1.0)
                total += p * w.to(ACC)[None, :]
            elif TRANSPOSED:
                w = tl.load(
                    BUF + weight + n.to(tl.int64)[:, None] * K + k[None, :],
                    mask=(n < N)[:, None] & (k < K)[None, :],
                    other=0.0,
                )
                total = dot(cast(p, w.dtype), tl.trans(w), total, PRECISION)
            else:
                w = tl.load(
                    BUF + weight + k.to(tl.int64)[:, None] * N + n[None, :],
                    mask=(k < K)[:, None] & (n < N)[None, :],
                    other=0.0,
                )
                total = dot(cast(p, w.dtype), w, total, PRECISION)
        if KIND == SUM:
            sums = cast(tl.sum(total, axis=1), MESSAGES.dtype.element_ty)
            tl.store(MESSAGES + out + i, sums, mask=live)
        else:
            tl.store(
                MESSAGES + out + i[:, None] * N + n[None, :],
                cast(total, MESSAGES.dtype.element_ty),
                mask=live[:, None] & (n < N)[None, :],
            )


@triton.jit
def product_gradient(
    TABLE, WORK, IDS, BUF, GRADS, WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, ids_row, ids_mode,
    KIND: tl.constexpr, CHILDREN: tl.constexpr, GRID: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGN_K: tl.constexpr, ALIGN_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dp = g W^T``, and of operands read row by row the gradient ``dp * product of the others``.

    A tile ``[BM, BK]`` over (row tile, column tile), summed over N in steps of BN. ``dp`` itself is
    stored among the frames' gradients where operands are gathered, for
    :func:`htfkernels.triton.segments.segment_gradient`. SUM: ``dp = g W``, PRODUCT: ``dp = g``.
    """
    job, tile, rows, K, N, out, operands, count = node_of(TABLE, WORK, ALIGN_K, ALIGN_N)
    across = tl.cdiv(K, BK)
    i = (tile // across).to(tl.int64) * BM + tl.arange(0, BM)
    k = (tile % across) * BK + tl.arange(0, BK)
    live = i < rows
    mask = live[:, None] & (k < K)[None, :]
    if KIND == PRODUCT:
        dp = tl.load(GRADS + out + i[:, None] * K + k[None, :], mask=mask, other=0.0).to(ACC)
    elif KIND == SUM:
        weight = tl.load(job + WEIGHT)
        w = tl.load(BUF + weight + k, mask=tl.where(weight >= 0, k < K, False), other=1.0).to(ACC)
        dp = tl.load(GRADS + out + i, mask=live, other=0.0).to(ACC)[:, None] * w[None, :]
    else:
        weight = tl.load(job + WEIGHT)
        if ALIGN_N:
            weight = tl.multiple_of(weight, 16)
        dp = tl.zeros((BM, BK), ACC)
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            g = tl.load(
                GRADS + out + i[:, None] * N + n[None, :],
                mask=live[:, None] & (n < N)[None, :],
                other=0.0,
            )
            if TRANSPOSED:
                w = tl.load(
                    BUF + weight + n.to(tl.int64)[:, None] * K + k[None, :],
                    mask=(n < N)[:, None] & (k < K)[None, :],
                    other=0.0,
                )
            else:
                w = tl.load(
                    BUF + weight + k.to(tl.int64)[:, None] * N + n[None, :],
                    mask=(k < K)[:, None] & (n < N)[None, :],
                    other=0.0,
                )
                w = tl.trans(w)
            dp = dot(g, w, dp, PRECISION, False)
        dp_at = tl.load(job + DP)
        if ALIGN_K:
            dp_at = tl.multiple_of(dp_at, 16)
        if dp_at >= 0:
            stored = cast(dp, FRAMES_OUT.dtype.element_ty)
            tl.store(FRAMES_OUT + dp_at + i[:, None] * K + k[None, :], stored, mask=mask)

    at = i[:, None] * K + k[None, :]
    if CHILDREN > 0:
        places = places_of(operands, IDS, ids_row, ids_mode, i, live, K, CHILDREN, GRID, ALIGN_K)
        for c in tl.static_range(CHILDREN):
            space = tl.load(operands + c * FIELDS + CHILD_SPACE)
            if space != NOWHERE:
                dest = tl.load(operands + c * FIELDS + CHILD_DEST)
                if ALIGN_K:
                    dest = tl.multiple_of(dest, 16)
                gradient = dp * product(BUF, places, k, mask, c, CHILDREN, dp)
                put(WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, space, dest + at, gradient, mask)
    else:
        for c in range(count):
            space = tl.load(operands + c * FIELDS + CHILD_SPACE)
            if space != NOWHERE:
                dest = tl.load(operands + c * FIELDS + CHILD_DEST)
                if ALIGN_K:
                    dest = tl.multiple_of(dest, 16)
                gradient = dp * others(
                    BUF, operands, count, c, IDS, ids_row, ids_mode, i, live, k, K, mask, dp,
                    GRID, ALIGN_K,
                )  # fmt: skip
                put(WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, space, dest + at, gradient, mask)


@triton.jit
def weight_gradient(
    TABLE, WORK, IDS, BUF, GRADS, WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, ids_row, ids_mode,
    KIND: tl.constexpr, CHILDREN: tl.constexpr, GRID: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGN_K: tl.constexpr, ALIGN_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dW = p^T g``, a tile ``[BK, BN]`` over (part of the rows, K tile, N tile), summed over the
    part's rows in steps of BM. Parts follow each other, ``splits`` of ``[K, N]`` (TRANSPOSED:
    ``[N, K]``)."""
    job, tile, rows, K, N, out, operands, count = node_of(TABLE, WORK, ALIGN_K, ALIGN_N)
    dest = tl.load(job + DEST)
    if ALIGN_N:
        dest = tl.multiple_of(dest, 16)
    space, splits = tl.load(job + SPACE), tl.load(job + SPLITS)
    across, down = tl.cdiv(N, BN), tl.cdiv(K, BK)
    n = (tile % across) * BN + tl.arange(0, BN)
    k = (tile // across % down) * BK + tl.arange(0, BK)
    part = tile // (across * down)
    each = tl.cdiv(tl.cdiv(rows, splits), BM) * BM
    low = part * each
    high = tl.minimum(low + each, rows)
    like = tl.zeros((BM, BK), ACC)
    if KIND == DOT:
        total = tl.zeros((BK, BN), ACC)
    else:
        total = like
    for i0 in range(low, high, BM):
        i = i0 + tl.arange(0, BM).to(tl.int64)
        live = i < high
        mask = live[:, None] & (k < K)[None, :]
        if CHILDREN > 0:
            places = places_of(
                operands, IDS, ids_row, ids_mode, i, live, K, CHILDREN, GRID, ALIGN_K
            )
            p = product(BUF, places, k, mask, -1, CHILDREN, like)
        else:
            p = others(
                BUF, operands, count, -1, IDS, ids_row, ids_mode, i, live, k, K, mask, like,
                GRID, ALIGN_K,
            )  # fmt: skip
        if KIND == DOT:
            g = tl.load(
                GRADS + out + i[:, None] * N + n[None, :],
                mask=live[:, None] & (n < N)[None, :],
                other=0.0,
            )
            total = dot(tl.trans(cast(p, g.dtype)), g, total, PRECISION, False)
        else:
            g = tl.load(GRADS + out + i, mask=live, other=0.0)
            total += p * g.to(ACC)[:, None]
    size = K.to(tl.int64) * N
    dest += part * size
    if KIND == SUM:
        put(WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, space, dest + k, tl.sum(total, axis=0), k < K)
    elif TRANSPOSED:
        put(
            WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, space,
            dest + n.to(tl.int64)[:, None] * K + k[None, :],
            tl.trans(total), (n < N)[:, None] & (k < K)[None, :],
        )  # fmt: skip
    else:
        put(
            WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, space,
            dest + k.to(tl.int64)[:, None] * N + n[None, :],
            total, (k < K)[:, None] & (n < N)[None, :],
        )  # fmt: skip
