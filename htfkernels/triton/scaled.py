"""Messages with their scales apart, a level of a tree in one launch.

    p_v = Hadamard product of the operands                 [B, K_v]
    q_v = 2^-e p_v          e = exponent of the largest magnitude of each row of p_v
    m_v = 2^-f q_v W_v      f = that of each row of q_v W_v;   s_v = e + f
    value of the tree = m_root * 2^(sum over all nodes of s_v)

Operands are messages or, for a leaf, its vectors. A row's largest magnitude is in [1/2, 1) or 0,
and a zero row has e = f = 0; so nothing leaves the range of a dtype, provided that the entries of
the weights are at most 1. All factors are powers of two: where unscaled messages stay in range,
these are the same numbers, up to what is rounded in the last sum.

Messages are stored in the dtype of the vectors, the root's ``result [B, out_features]`` in the
accumulator's, ``shift [nodes, B]`` is int32. Tables as in :mod:`htfkernels.triton.ragged`, with
parts of one node each; grid (node, tile of rows). A program holds all columns of its node, since a
row has one scale, and reads its operands twice: for e, and for the sum.

A backward pass is that of :mod:`htfkernels.triton.ragged` with ``shift``: scales are constants, and
gradients those of the scaled messages, ``g_v = d / d m_v``, which have their natural size too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from htfkernels.triton import configs
from htfkernels.triton.launch import cdiv, launch
from htfkernels.triton.ragged import Pack, constants_of, product, work_of
from htfkernels.triton.tables import Ragged, Tables
from htfkernels.triton.tiles import cast, dot, exponent, input_precision, shifted

__all__ = ["forward"]


@triton.jit
def _formed(
    x, buffer, operands, leaf, first, count, rows, x_width, i, k, K, ACC: tl.constexpr
):  # fmt: skip
    """A tile of p."""
    row = i[:, None].to(tl.int64)
    inside = (i < rows)[:, None] & (k < K)[None, :]
    if leaf != 0:
        at = row * x_width + k[None, :]
        p = tl.load(x + tl.load(operands + first) + at, mask=inside, other=0.0).to(ACC)
    else:
        at = row * K + k[None, :]
        p = product(buffer, operands, first, count, rows, at, inside, -1, ACC)
    return p


@triton.jit(do_not_specialize=["tiles_m"])
def _forward(
    x, buffer, weight, result, shift, nodes, operands, rows, x_width, tiles_m,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    entry = nodes + (pid // tiles_m).to(tl.int64) * 9
    i = (pid % tiles_m) * BM + tl.arange(0, BM)
    leaf = tl.load(entry)
    K = tl.load(entry + 1)
    N = tl.load(entry + 2)
    w_base = weight + tl.load(entry + 3)
    column = tl.load(entry + 4)
    first = tl.load(entry + 6)
    count = tl.load(entry + 7)
    place = tl.load(entry + 8)
    n = tl.arange(0, BN)
    largest = tl.zeros((BM,), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        p = _formed(x, buffer, operands, leaf, first, count, rows, x_width, i, k, K, ACC)
        largest = tl.maximum(largest, tl.max(tl.abs(p), 1))
    e = exponent(largest)
    total = tl.zeros((BM, BN), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        p = _formed(x, buffer, operands, leaf, first, count, rows, x_width, i, k, K, ACC)
        w = tl.load(
            w_base + k[:, None] * N + n[None, :],
            mask=(k < K)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        total = dot(cast(shifted(p, -e), w.dtype), w, total, PRECISION)
    f = exponent(tl.max(tl.abs(total), 1))
    total = shifted(total, -f)
    at = i[:, None].to(tl.int64) * N + n[None, :]
    inside = (i < rows)[:, None] & (n < N)[None, :]
    if tl.load(entry + 5) != 0:
        tl.store(result + at, total, mask=inside)
    else:
        out = buffer + column * rows
        tl.store(out + at, cast(total, buffer.dtype.element_ty), mask=inside)
    tl.store(shift + place * rows + i, e + f, mask=i < rows)


def forward(
    tables: Tables, launched: Ragged, x: Tensor, buffer: Tensor, pack: Pack, weight: Tensor,
    result: Tensor, shift: Tensor, precision: str,
) -> None:  # fmt: skip
    """Scaled messages of the nodes, into ``buffer``, the root's into ``result``.

    Args:
        tables, launched: the tree, its launches being levels, and the nodes: of at most
            :data:`configs.SCALED_WIDTH` columns and few operands.
        x: ``[B, sum of the mode dimensions]``.
        buffer: all messages.
        pack, weight: the packed weights, scaled.
        result: ``[B, out_features]``, in the accumulator's dtype.
        shift: ``[nodes, B]``, int32.
        precision: of float32 products.
    """
    work, rows = work_of(tables, launched, pack, None), x.shape[0]
    inputs = input_precision(x.dtype, precision)
    config = configs.scaled_forward(x.dtype, inputs, rows, work.depth, work.width)
    tiles_m = cdiv(rows, config.m)
    args = (
        x, buffer, weight, result, shift, work.nodes, work.operands, rows, x.shape[1], tiles_m,
    )  # fmt: skip
    launch(_forward, work.count * tiles_m, args, constants_of(x, inputs, config), config)
