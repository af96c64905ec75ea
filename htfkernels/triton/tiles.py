"""Pieces of Triton kernels: what all of them do to tiles in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from htfkernels.triton.launch import INTERPRETED

__all__ = ["accumulator", "cast", "dot", "exponent", "input_precision", "shifted"]

_INTERPRETED = tl.constexpr(INTERPRETED)


def accumulator(dtype: torch.dtype) -> Any:
    """What sums of products of this dtype are accumulated in: float64 in itself, all else in
    float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def input_precision(dtype: torch.dtype, precision: str) -> str:
    """The precision of ``tl.dot``: one of float32's, and for other dtypes always the same, so that
    they are compiled once."""
    return precision if dtype == torch.float32 else "ieee"


@triton.jit
def _nearest_tf32(tile):
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r, r", [tile], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, NEAREST: tl.constexpr = True):
    """``total + a @ b``, in the dtype of ``total``.

    With ``NEAREST``, tf32 operands are rounded to the nearest. Tensor cores cut them off, and so
    would leave every message of a tree a little too small, by about 2^-11 for each node below it,
    which adds up over a thousand nodes. A gradient passes through one node a level, and can do
    without.
    """
    if _INTERPRETED:
        if a.dtype == tl.bfloat16:  # whose bits the interpreter would multiply as integers
            return tl.dot(a.to(tl.float32), b.to(tl.float32), total, out_dtype=total.dtype)
    elif NEAREST and PRECISION == "tf32":
        a = _nearest_tf32(a)
        b = _nearest_tf32(b)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def cast(value, DTYPE: tl.constexpr):
    """``value`` rounded to the nearest of another dtype."""
    if _INTERPRETED:
        if DTYPE == tl.bfloat16:  # which the interpreter would truncate to
            bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(DTYPE)
    return value.to(DTYPE)


@triton.jit
def exponent(size):
    """``e`` with ``size`` in ``[2^(e-1), 2^e)``, as ``frexp``; 0 for 0. ``size`` is positive or 0,
    of an accumulator's dtype; for infinities and NaN ``e`` is some number."""
    if size.dtype == tl.float64:
        biased = (size.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        raised = size * 18014398509481984.0  # a subnormal number times 2^54 is a normal one
        below = ((raised.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 54
        e = tl.where(biased == 0, below, biased).to(tl.int32) - 1022
    else:
        biased = (size.to(tl.int32, bitcast=True) >> 23) & 0xFF
        raised = size * 16777216.0  # 2^24
        below = ((raised.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 24
        e = tl.where(biased == 0, below, biased) - 126
    return tl.where(size == 0, 0, e)


@triton.jit
def _power(e, DTYPE: tl.constexpr):
    if DTYPE == tl.float64:
        power = ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((e + 127) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def shifted(tile, e):
    """``2^e`` times the rows of a tile in an accumulator's dtype, exactly. In three steps: ``e``
    may be the sum of two numbers' exponents, far out of the range of one power of two."""
    third = e // 3
    step = _power(third, tile.dtype)[:, None]
    return tile * step * step * _power(e - 2 * third, tile.dtype)[:, None]
