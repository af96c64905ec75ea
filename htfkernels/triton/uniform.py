"""Nodes of one shape: forward and backward of a group in one launch each.

    p_v = Hadamard product of the operands' blocks         [B, K]
    m_v = p_v W_v                                          [B, N]
    dp_v = g_v W_v^T,   dW_v = p_v^T g_v,   d operand = dp_v * (the other operands)

An operand's block starts ``operand * unit`` numbers into ``source`` and its rows are ``stride``
apart: of an interior node, a child's message (``unit = B``, ``stride = K``); of a leaf, its columns
of ``x`` (``unit = 1``, ``stride`` the width of ``x``). The products are formed as operands are
loaded, never stored.

A row of ``table`` is ``[slot of W, place of dW, operand, operand, ...]`` for each of the F nodes;
``weight`` is ``[slots, K, N]``; messages and their gradients ``[F, B, N]``.

Grid of the forward: (node, tile of rows, tile of columns), the last fastest, so that programs next
to each other share operands and a weight through the cache. Where N is 1, sums instead of a matrix
product.

Grid of the backward: (node, split of the batch, tile of K). A program keeps its rows of W and of
dW on chip while it goes through its split; a split of the batch gives a partial dW, and these are
summed in a fixed order. All of N is one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from htfkernels.triton import configs
from htfkernels.triton.launch import cdiv, launch
from htfkernels.triton.memory import sums
from htfkernels.triton.tables import Uniform
from htfkernels.triton.tiles import accumulator, cast, dot, input_precision

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"])
def _forward(
    source, weight, result, table, rows, K, N, unit, stride, arity, tiles_m, tiles_n,
    ARITY: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_m = (pid // tiles_n) % tiles_m
    node = pid // (tiles_n * tiles_m)
    entry = table + node.to(tl.int64) * (2 + arity)
    slot = tl.load(entry)
    i = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    row = i[:, None].to(tl.int64) * stride
    w_base = weight + slot * K * N
    total = tl.zeros((BM,), ACC) if VECTOR else tl.zeros((BM, BN), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (i < rows)[:, None] & (k < K)[None, :]
        at = row + k[None, :]
        operand = tl.load(entry + 2) * unit
        if ALIGNED:
            operand = tl.multiple_of(operand, 16)
        p = tl.load(source + operand + at, mask=inside, other=0.0)
        if ARITY != 1:
            p = p.to(ACC)
            if ARITY == 0:
                for c in range(1, arity):
                    operand = tl.load(entry + 2 + c) * unit
                    p *= tl.load(source + operand + at, mask=inside, other=0.0).to(ACC)
            else:
                for c in tl.static_range(1, ARITY):
                    operand = tl.load(entry + 2 + c) * unit
                    if ALIGNED:
                        operand = tl.multiple_of(operand, 16)
                    p *= tl.load(source + operand + at, mask=inside, other=0.0).to(ACC)
        if VECTOR:
            w = tl.load(w_base + k, mask=k < K, other=0.0)
            total += tl.sum(p.to(ACC) * w.to(ACC)[None, :], 1)
        else:
            w = tl.load(
                w_base + k[:, None].to(tl.int64) * N + n[None, :],
                mask=(k < K)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            total = dot(cast(p, w.dtype), w, total, PRECISION)
    out = result + node.to(tl.int64) * rows * N
    if VECTOR:
        tl.store(out + i, cast(total, result.dtype.element_ty), mask=i < rows)
    else:
        tl.store(
            out + i[:, None].to(tl.int64) * N + n[None, :],
            cast(total, result.dtype.element_ty),
            mask=(i < rows)[:, None] & (n < N)[None, :],
        )


@triton.jit(do_not_specialize=["places", "tiles_k", "splits", "rows_per_split"])
def _backward(
    source, weight, grad, grad_source, partial, table, rows, K, N, unit, stride, arity,
    places, tiles_k, splits, rows_per_split,
    ARITY: tl.constexpr, ALIGNED: tl.constexpr,
    OPERANDS: tl.constexpr, WEIGHTS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile_k = pid % tiles_k
    split = (pid // tiles_k) % splits
    node = pid // (tiles_k * splits)
    entry = table + node.to(tl.int64) * (2 + arity)
    k = tile_k * BK + tl.arange(0, BK)
    n = tl.arange(0, BN)
    g_base = grad + node.to(tl.int64) * rows * N
    if OPERANDS:
        slot = tl.load(entry)
        w_t = tl.load(
            weight + slot * K * N + k[None, :].to(tl.int64) * N + n[:, None],
            mask=(k < K)[None, :] & (n < N)[:, None],
            other=0.0,
        )
    total = tl.zeros((BK, BN), ACC)
    begin = split * rows_per_split
    for start in range(begin, min(begin + rows_per_split, rows), BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (k < K)[None, :]
        at = i[:, None].to(tl.int64) * stride + k[None, :]
        g = tl.load(
            g_base + i[:, None].to(tl.int64) * N + n[None, :],
            mask=(i < rows)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if ARITY == 1:
            operand = tl.load(entry + 2) * unit
            if ALIGNED:
                operand = tl.multiple_of(operand, 16)
            if WEIGHTS:
                p = tl.load(source + operand + at, mask=inside, other=0.0)
                total = dot(tl.trans(p), g, total, PRECISION, False)
            if OPERANDS:
                dp = dot(g, w_t, tl.zeros((BM, BK), ACC), PRECISION, False)
                tl.store(
                    grad_source + operand + at, cast(dp, grad_source.dtype.element_ty), mask=inside
                )
        else:
            blocks = ()
            for c in tl.static_range(ARITY):
                operand = tl.load(entry + 2 + c) * unit
                if ALIGNED:
                    operand = tl.multiple_of(operand, 16)
                block = tl.load(source + operand + at, mask=inside, other=0.0)
                blocks += (block.to(ACC),)
            if OPERANDS:
                dp = dot(g, w_t, tl.zeros((BM, BK), ACC), PRECISION, False)
                for c in tl.static_range(ARITY):
                    d = dp
                    for other in tl.static_range(ARITY):
                        if other != c:
                            d *= blocks[other]
                    operand = tl.load(entry + 2 + c) * unit
                    if ALIGNED:
                        operand = tl.multiple_of(operand, 16)
                    tl.store(
                        grad_source + operand + at,
                        cast(d, grad_source.dtype.element_ty),
                        mask=inside,
                    )
            if WEIGHTS:
                p = blocks[0]
                for c in tl.static_range(1, ARITY):
                    p *= blocks[c]
                total = dot(tl.trans(cast(p, g.dtype)), g, total, PRECISION, False)
    if WEIGHTS:
        out = partial + (split.to(tl.int64) * places + tl.load(entry + 1)) * K * N
        tl.store(
            out + k[:, None].to(tl.int64) * N + n[None, :],
            cast(total, partial.dtype.element_ty),
            mask=(k < K)[:, None] & (n < N)[None, :],
        )


def forward(
    launched: Uniform, source: Tensor, stride: int, unit: int, weight: Tensor, result: Tensor,
    rows: int, precision: str,
) -> None:  # fmt: skip
    """Messages of a group: ``result`` starts at that of its first node.

    Args:
        launched: the nodes.
        source: where the operands are; ``stride`` and ``unit`` as at the top of this module.
        weight: ``[slots, K, N]``.
        result: takes ``[F, B, N]``.
        rows: B.
        precision: of float32 products.
    """
    node, dtype = launched.first, weight.dtype
    inputs = input_precision(dtype, precision)
    config = configs.forward(weight.device, dtype, inputs, rows, node.rows, node.cols)
    tiles_m, tiles_n = cdiv(rows, config.m), cdiv(node.cols, config.n)
    arity = node.operands
    args = (
        source, weight, result, launched.table, rows, node.rows, node.cols, unit, stride, arity,
        tiles_m, tiles_n,
    )  # fmt: skip
    constants = {
        "ARITY": arity if arity <= configs.STATIC_ARITY else 0,
        "ALIGNED": launched.aligned,
        "VECTOR": node.cols == 1,
        "ACC": accumulator(dtype),
        "PRECISION": inputs,
        "BM": config.m,
        "BN": config.n,
        "BK": config.k,
    }
    programs = len(launched.nodes) * tiles_m * tiles_n
    launch(_forward, programs, args, constants, config)


def backward(
    launched: Uniform, source: Tensor, stride: int, unit: int, weight: Tensor, grad: Tensor,
    grad_source: Tensor | None, places: int, rows: int, precision: str,
) -> Tensor | None:  # fmt: skip
    """Gradients of a group's operands and weights.

    Args:
        launched, source, stride, unit, weight, rows, precision: as in :func:`forward`.
        grad: ``[F, B, N]``, of the messages.
        grad_source: takes the operands' gradients, laid out as ``source``; None: not wanted.
        places: how many nodes the group has; 0: the weights' gradients are not wanted.

    Returns:
        partial gradients of the weights ``[S, places, K, N]`` in the accumulator's dtype, 0 at
        other nodes' places; or None.
    """
    node, dtype = launched.first, weight.dtype
    inputs = input_precision(dtype, precision)
    config = configs.backward(weight.device, dtype, inputs, rows, node.rows, node.cols)
    tiles_k, nodes = cdiv(node.rows, config.k), len(launched.nodes)
    splits, per_split = configs.splits(weight.device, nodes * tiles_k, rows, config.m)
    partial = None
    if places:
        partial = sums((splits, places, node.rows, node.cols), weight, nodes == places)
    args = (
        source, weight, grad, grad if grad_source is None else grad_source,
        grad if partial is None else partial, launched.table, rows, node.rows, node.cols, unit,
        stride, node.operands, places, tiles_k, splits, per_split,
    )  # fmt: skip
    constants = {
        "ARITY": node.operands,
        "ALIGNED": launched.aligned,
        "OPERANDS": grad_source is not None,
        "WEIGHTS": places > 0,
        "ACC": accumulator(dtype),
        "PRECISION": inputs,
        "BM": config.m,
        "BN": config.n,
        "BK": config.k,
    }
    launch(_backward, nodes * splits * tiles_k, args, constants, config)
    return partial
