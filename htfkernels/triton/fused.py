"""Leaves and their parents in one kernel: a leaf's message is never stored.

    m_c = x_c W_c                    leaf c of C: x_c [B, D], W_c [D, K]
    p   = m_1 * ... * m_C            [B, K]
    m   = p W                        W [K, N]

    dp = g W^T,  dW = p^T g,  dm_c = dp * (the other leaves' messages),  dW_c = x_c^T dm_c

A tile of rows of all x_c is on chip; K is gone through in steps, and a step's slices of the m_c are
formed, multiplied, and used up. The backward pass forms them again, which at D < N costs less than
reading them would.

A row of ``table`` is ``[slot of W, place of dW]`` and, for each leaf, ``[first column of x_c, slot
of W_c, place of dW_c]``.

Grid of the forward: (node, tile of rows). Grid of the backward: (node, split of the batch, tile of
K); partial gradients as in :mod:`htfkernels.triton.uniform`, of the node and of its leaves.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from htfkernels.triton import configs
from htfkernels.triton.launch import cdiv, launch
from htfkernels.triton.memory import sums
from htfkernels.triton.tables import Fused
from htfkernels.triton.tiles import accumulator, cast, dot, input_precision

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=["tiles_m"])
def _forward(
    x, leaf_weight, weight, result, table, rows, D, K, N, x_width, tiles_m,
    C: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile_m = pid % tiles_m
    node = pid // tiles_m
    entry = table + node.to(tl.int64) * (2 + 3 * C)
    w_base = weight + tl.load(entry) * K * N
    i = tile_m * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    n = tl.arange(0, BN)
    x_row = i[:, None].to(tl.int64) * x_width + d[None, :]
    vectors = ()
    for c in tl.static_range(C):
        offset = tl.load(entry + 2 + 3 * c)
        if ALIGNED:
            offset = tl.multiple_of(offset, 16)
        vectors += (
            tl.load(x + offset + x_row, mask=(i < rows)[:, None] & (d < D)[None, :], other=0.0),
        )
    total = tl.zeros((BM, BN), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(
            w_base + k[:, None].to(tl.int64) * N + n[None, :],
            mask=(k < K)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        p = tl.full((BM, BK), 1.0, ACC)
        for c in tl.static_range(C):
            leaf = leaf_weight + tl.load(entry + 3 + 3 * c) * D * K
            w_c = tl.load(
                leaf + d[:, None].to(tl.int64) * K + k[None, :],
                mask=(d < D)[:, None] & (k < K)[None, :],
                other=0.0,
            )
            m = dot(vectors[c], w_c, tl.zeros((BM, BK), ACC), PRECISION)
            if c == 0:
                p = m
            else:
                p *= m
        total = dot(cast(p, w.dtype), w, total, PRECISION)
    tl.store(
        result + (node.to(tl.int64) * rows + i[:, None]) * N + n[None, :],
        cast(total, result.dtype.element_ty),
        mask=(i < rows)[:, None] & (n < N)[None, :],
    )


@triton.jit(do_not_specialize=["places", "leaf_places", "tiles_k", "splits", "rows_per_split"])
def _backward(
    x, leaf_weight, weight, grad, partial, leaf_partial, table, rows, D, K, N, x_width,
    places, leaf_places, tiles_k, splits, rows_per_split,
    C: tl.constexpr, ALIGNED: tl.constexpr, LEAVES: tl.constexpr, WEIGHTS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile_k = pid % tiles_k
    split = (pid // tiles_k) % splits
    node = pid // (tiles_k * splits)
    entry = table + node.to(tl.int64) * (2 + 3 * C)
    d = tl.arange(0, BD)
    n = tl.arange(0, BN)
    k = tile_k * BK + tl.arange(0, BK)
    in_leaf = (d < D)[:, None] & (k < K)[None, :]
    at_leaf = d[:, None].to(tl.int64) * K + k[None, :]
    if LEAVES:
        w_t = tl.load(
            weight + tl.load(entry) * K * N + k[None, :].to(tl.int64) * N + n[:, None],
            mask=(k < K)[None, :] & (n < N)[:, None],
            other=0.0,
        )
    leaves = ()
    leaf_totals = ()
    for c in tl.static_range(C):
        leaf = leaf_weight + tl.load(entry + 3 + 3 * c) * D * K
        leaves += (tl.load(leaf + at_leaf, mask=in_leaf, other=0.0),)
        if LEAVES:
            leaf_totals += (tl.zeros((BD, BK), ACC),)
    total = tl.zeros((BK, BN), ACC)
    begin = split * rows_per_split
    for start in range(begin, min(begin + rows_per_split, rows), BM):
        i = start + tl.arange(0, BM)
        vectors = ()
        messages = ()
        for c in tl.static_range(C):
            offset = tl.load(entry + 2 + 3 * c)
            if ALIGNED:
                offset = tl.multiple_of(offset, 16)
            x_c = tl.load(
                x + offset + i[:, None].to(tl.int64) * x_width + d[None, :],
                mask=(i < rows)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            vectors += (x_c,)
            messages += (dot(x_c, leaves[c], tl.zeros((BM, BK), ACC), PRECISION, False),)
        g = tl.load(
            grad + (node.to(tl.int64) * rows + i[:, None]) * N + n[None, :],
            mask=(i < rows)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if WEIGHTS:
            p = messages[0]
            for c in tl.static_range(1, C):
                p *= messages[c]
            total = dot(tl.trans(cast(p, g.dtype)), g, total, PRECISION, False)
        if LEAVES:
            dp = dot(g, w_t, tl.zeros((BM, BK), ACC), PRECISION, False)
            sums = ()
            for c in tl.static_range(C):
                dm = dp
                for other in tl.static_range(C):
                    if other != c:
                        dm *= messages[other]
                sums += (
                    dot(tl.trans(vectors[c]), cast(dm, g.dtype), leaf_totals[c], PRECISION, False),
                )
            leaf_totals = sums
    if WEIGHTS:
        place = split.to(tl.int64) * places + tl.load(entry + 1)
        tl.store(
            partial + place * K * N + k[:, None].to(tl.int64) * N + n[None, :],
            cast(total, partial.dtype.element_ty),
            mask=(k < K)[:, None] & (n < N)[None, :],
        )
    if LEAVES:
        for c in tl.static_range(C):
            place = split.to(tl.int64) * leaf_places + tl.load(entry + 4 + 3 * c)
            tl.store(
                leaf_partial + place * D * K + at_leaf,
                cast(leaf_totals[c], leaf_partial.dtype.element_ty),
                mask=in_leaf,
            )


def forward(
    launched: Fused, x: Tensor, leaf_weight: Tensor, weight: Tensor, result: Tensor, precision: str
) -> None:
    """Messages of a group over leaves: ``result`` starts at that of its first node.

    Args:
        launched: the nodes.
        x: ``[B, sum of the mode dimensions]``.
        leaf_weight: ``[leaf slots, D, K]``.
        weight: ``[slots, K, N]``.
        result: takes ``[F, B, N]``.
        precision: of float32 products.
    """
    node, leaf, rows, dtype = launched.first, launched.leaf, x.shape[0], x.dtype
    inputs, count = input_precision(dtype, precision), node.operands
    config = configs.fused_forward(
        x.device, dtype, inputs, rows, count, leaf.rows, node.rows, node.cols
    )
    tiles_m = cdiv(rows, config.m)
    args = (
        x, leaf_weight, weight, result, launched.table, rows, leaf.rows, node.rows, node.cols,
        x.shape[1], tiles_m,
    )  # fmt: skip
    constants = {
        "C": count,
        "ALIGNED": launched.aligned,
        "ACC": accumulator(dtype),
        "PRECISION": inputs,
        "BM": config.m,
        "BN": config.n,
        "BK": config.k,
        "BD": configs.power_of_two(leaf.rows),
    }
    launch(_forward, len(launched.nodes) * tiles_m, args, constants, config)


def backward(
    launched: Fused, x: Tensor, leaf_weight: Tensor, weight: Tensor, grad: Tensor,
    places: int, leaf_places: int, precision: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Partial gradients of the group's weights ``[S, places, K, N]`` and of its leaves' ``[S,
    leaf_places, D, K]``, as :func:`htfkernels.triton.uniform.backward` gives them.

    Args:
        launched, x, leaf_weight, weight, precision: as in :func:`forward`.
        grad: ``[F, B, N]``, of the messages.
        places, leaf_places: how many nodes the two groups have; 0: gradients are not wanted.
    """
    node, leaf, rows, dtype = launched.first, launched.leaf, x.shape[0], x.dtype
    inputs, count, nodes = input_precision(dtype, precision), node.operands, len(launched.nodes)
    config = configs.fused_backward(
        x.device, dtype, inputs, rows, count, leaf.rows, node.rows, node.cols
    )
    tiles_k = cdiv(node.rows, config.k)
    splits, per_split = configs.splits(x.device, nodes * tiles_k, rows, config.m)
    partial = leaf_partial = None
    if places:
        partial = sums((splits, places, node.rows, node.cols), x, nodes == places)
    if leaf_places:
        shape = (splits, leaf_places, leaf.rows, node.rows)
        leaf_partial = sums(shape, x, nodes * count == leaf_places)
    args = (
        x, leaf_weight, weight, grad, x if partial is None else partial,
        x if leaf_partial is None else leaf_partial, launched.table, rows, leaf.rows, node.rows,
        node.cols, x.shape[1], places, leaf_places, tiles_k, splits, per_split,
    )  # fmt: skip
    constants = {
        "C": count,
        "ALIGNED": launched.aligned,
        "LEAVES": leaf_places > 0,
        "WEIGHTS": places > 0,
        "ACC": accumulator(dtype),
        "PRECISION": inputs,
        "BM": config.m,
        "BN": config.n,
        "BK": config.k,
        "BD": configs.power_of_two(leaf.rows),
    }
    launch(_backward, nodes * splits * tiles_k, args, constants, config)
    return partial, leaf_partial
