"""Pieces of Triton kernels: what all of them do to tiles in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from htfkernels.gpu.launch import INTERPRETED

__all__ = ["accumulator", "dot", "input_precision", "narrow"]

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
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b``, in the dtype of ``total``."""
    if _INTERPRETED:
        if a.dtype == tl.bfloat16:  # whose bits the interpreter would multiply as integers
            return tl.dot(a.to(tl.float32), b.to(tl.float32), total, out_dtype=total.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """``x`` in a dtype, rounded to nearest."""
    if _INTERPRETED:
        if DTYPE == tl.bfloat16 and x.dtype == tl.float32:  # which the interpreter cuts off
            bits = x.to(tl.uint32, bitcast=True)
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
