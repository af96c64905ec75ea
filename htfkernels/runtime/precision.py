"""How float32 matrix products are rounded on a GPU's tensor cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from htfkernels.arguments import shown

__all__ = ["PRECISIONS", "float32_precision", "use_precision"]

PRECISIONS = ("ieee", "tf32", "tf32x3")

_requested: ContextVar[str | None] = ContextVar("htfkernels_precision", default=None)


@contextmanager
def use_precision(name: str) -> Iterator[None]:
    """Sets how float32 matrix products of the GPU backends are computed in the block.

    A backward pass uses what was in force when its forward pass ran; that of a compiled graph,
    which runs in a thread of its own, what ``HTF_PRECISION`` or PyTorch's setting says. Other
    dtypes, and the CPU, are not concerned.

    Args:
        name: ``"ieee"``: float32 multiply-adds, without tensor cores. ``"tf32"``: on tensor
            cores, operands rounded to 10 bits of mantissa. ``"tf32x3"``: on tensor cores in three
            products of split operands, about as exact as float32, at about a third of the speed of
            ``"tf32"``. ``"auto"`` (the default): ``"tf32"`` where PyTorch's own setting allows it
            (``torch.set_float32_matmul_precision("high")`` or
            ``torch.backends.cuda.matmul.fp32_precision = "tf32"``), else ``"ieee"``. The
            environment variable ``HTF_PRECISION`` sets the same for a process.

    Raises:
        ValueError: there is no precision of that name.

    Example:
        >>> with use_precision("tf32x3"):
        ...     float32_precision()
        'tf32x3'
    """
    token = _requested.set(_checked(name, "use_precision"))
    try:
        yield
    finally:
        _requested.reset(token)


def float32_precision() -> str:
    """One of :data:`PRECISIONS`: what a float32 product would be computed in now."""
    name = _requested.get()
    if name is None:
        name = _checked(os.environ.get("HTF_PRECISION", "auto"), "HTF_PRECISION")
    if name != "auto":
        return name
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _checked(name: str, where: str) -> str:
    if name != "auto" and name not in PRECISIONS:
        expected = ", ".join((*PRECISIONS, "auto"))
        raise ValueError(f"{where}: expected one of {expected}, got {shown(name)}")
    return name
