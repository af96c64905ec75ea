"""Memory of the Triton kernels: PyTorch's, filled with NaN where tests ask for it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty", "sums"]

_POISON = os.environ.get("HTF_POISON") == "1"


def empty(shape: Sequence[int] | int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor on the device of ``like``, in its dtype unless another is given.

    With ``HTF_POISON=1`` in the environment floating-point memory comes full of NaN, so that
    nothing can be read unnoticed before it is written.
    """
    made = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if _POISON and made.is_floating_point():
        made.fill_(float("nan"))
    return made


def sums(shape: Sequence[int], like: Tensor, covered: bool) -> Tensor:
    """Memory for partial sums in the accumulator's dtype (float64 for float64, else float32):
    zeros, unless every entry is going to be written."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return empty(shape, like, dtype) if covered else like.new_zeros(shape, dtype=dtype)
