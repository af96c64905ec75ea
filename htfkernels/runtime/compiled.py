"""The compiled module of the CPU operators, ``htfkernels._C``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

__all__ = ["MISSING", "call", "module", "ops"]

# Loaded here, not on first use: a compiled graph must find the operators, and registering them
# while torch.compile traces is too late.
try:
    module: Any = import_module("htfkernels._C")
except ImportError as _error:
    module = None
    MISSING: str | None = f"the compiled module htfkernels._C cannot be loaded ({_error})"
else:
    MISSING = None

ops = torch.ops.htfkernels


@cache
def _operator(name: str) -> Any:
    return getattr(ops, name).default


def call(name: str, *args: Any) -> Any:
    """Runs a compiled operator below autograd: the eager path has its own ``autograd.Function``,
    and the Python layer of ``register_autograd`` would cost several microseconds for nothing."""
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(name)(*args)
