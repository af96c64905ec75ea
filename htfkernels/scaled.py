"""Powers of two kept apart from the numbers they scale, so that long products stay in range.

Exponents are float64 tensors of whole numbers and constants to autograd: scaling by a power of two
is exact, and what is scaled back later has the gradient of what was never scaled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["leading", "power", "sign", "split"]


def sign(t: Tensor) -> Tensor:
    """-1, 0 or 1, without gradient; NaN where ``t`` is NaN (PyTorch's own sign is 0 there)."""
    t = t.detach()
    return torch.where(t.isnan(), t, t.sign())


def split(t: Tensor) -> tuple[Tensor, Tensor]:
    """``t`` as mantissas of magnitude in [1/2, 1) and exponents; a zero is 0 times ``2**0``."""
    exponent = torch.frexp(t.detach()).exponent.to(torch.float64)
    half = torch.floor(exponent / 2)  # in two steps: 2**-e itself may be out of range
    return t * power(-half, t) * power(half - exponent, t), exponent


def leading(mantissa: Tensor, exponent: Tensor, dim: int) -> Tensor:
    """The largest exponent along ``dim`` of those whose mantissa is not zero; 0 where all are."""
    nothing = mantissa.detach() == 0
    largest = exponent.masked_fill(nothing, -math.inf).amax(dim, keepdim=True)
    return largest.masked_fill(largest == -math.inf, 0.0)


def power(exponent: Tensor, like: Tensor) -> Tensor:
    """``2**exponent`` in the dtype of ``like``: 0 below its range, and its largest power of two
    above, where only zeros, which have a gradient all the same, are ever scaled that far."""
    largest = math.frexp(torch.finfo(like.dtype).max)[1] - 1
    return torch.exp2(exponent.clamp(max=largest)).to(like.dtype)
