"""Sums of partial results, in a fixed order.

    result[j] = sum_s partial[s, j]          s = 0, 1, ..., in this order

``partial [S, n]`` in the accumulator's dtype, its rows ``step`` apart; ``result [n]`` in any dtype.
A program takes BN entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from htfkernels.triton.launch import Config, cdiv, launch
from htfkernels.triton.memory import empty

__all__ = ["gradients", "reduce"]

_CONFIG = Config(1, 1024, 1, warps=4, stages=1)


@triton.jit(do_not_specialize=["count", "step"])
def _reduce(partial, result, count, step, n, BN: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = j < n
    at = partial + j
    total = tl.load(at, mask=inside, other=0.0)
    for _ in range(1, count):
        at += step
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(result + j, total.to(result.dtype.element_ty), mask=inside)


def reduce(partial: Tensor, result: Tensor) -> None:
    """Writes the sum over the first dimension of ``partial [S, n]`` into ``result``, contiguous and
    of ``n`` numbers; rows of ``partial`` may be apart."""
    n = result.numel()
    args = (partial, result, partial.shape[0], partial.stride(0), n)
    launch(_reduce, cdiv(n, _CONFIG.n), args, {"BN": _CONFIG.n}, _CONFIG)


def gradients(parts: Sequence[Tensor], weight: Tensor) -> Tensor:
    """A folded weight's gradient, of partial ones.

    Args:
        parts: ``[S, F, K, N]`` each, in the accumulator's dtype, to be added; F nodes.
        weight: ``[F, K, N]``, or ``[1, K, N]`` where all nodes share it.
    """
    first = parts[0]
    together = first.shape[1] != weight.shape[0]
    if len(parts) == 1 and first.shape[0] == 1 and first.dtype == weight.dtype and not together:
        return first[0]
    found = None
    for part in parts:
        total = empty(weight.shape, part if len(parts) > 1 else weight)
        reduce(part.reshape(-1, weight.numel()) if together else part.flatten(1), total)
        found = total if found is None else found + total
    return found.to(weight.dtype)
