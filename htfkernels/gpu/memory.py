"""Device memory of the Triton backends: PyTorch's own, so that CUDA graphs can capture it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["empty"]


def empty(shape: int | tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor on the device of ``like``, of its dtype by default.

    With ``HTF_POISON=1`` in the environment floating-point memory comes full of NaN, which shows
    what is read before it is written.
    """
    tensor = like.new_empty(shape, dtype=dtype, requires_grad=False)
    if os.environ.get("HTF_POISON") == "1" and tensor.is_floating_point():
        tensor.fill_(torch.nan)
    return tensor
