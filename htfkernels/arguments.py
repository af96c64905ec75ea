"""Arguments in the words of error messages."""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["came", "shown"]


def came(value: Any) -> str:
    """What came where a dense tensor of some shape was expected: its shape, or what else it is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "nested tensor"
    kind = "" if value.layout is torch.strided else f" ({value.layout})"
    return f"{list(value.shape)}{kind}"


def shown(value: Any) -> str:
    """A value in one short line, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor {came(value)}"
    return " ".join(_SHORT.repr(value).split())


_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 80
