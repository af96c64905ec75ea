"""The compiled module of the CUDA operators, and why it cannot run here.

Kernels of ``htfkernels._C_cuda`` are compiled by nvcc and run on a GPU. The same sources compiled
by the host's compiler, every thread a fiber, are ``htfkernels._C_emulated``: kernels on CPU
tensors, to check them without a GPU. ``HTF_EMULATE_CUDA=1`` builds that (``setup.py``) and, when a
process starts, takes it in place of the other.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "build_info",
    "call",
    "device_type",
    "emulated",
    "file",
    "library",
    "shared_bytes",
    "why_not",
]


@cache
def emulated() -> bool:
    """Whether CUDA kernels of this process run on the CPU. Very slow."""
    return os.environ.get("HTF_EMULATE_CUDA", "").lower() in ("1", "true", "on", "yes", "y")


def device_type() -> str:
    """Where the tensors of the kernels of this process are."""
    return "cpu" if emulated() else "cuda"


@cache
def _module() -> Any:
    return import_module("htfkernels._C_emulated" if emulated() else "htfkernels._C_cuda")


@cache
def why_not(device: str) -> str | None:
    """None where kernels run on tensors of a device type, else one sentence that says why not."""
    try:
        module = _module()
    except ImportError as error:
        name = "_C_emulated" if emulated() else "_C_cuda"
        if isinstance(error, ModuleNotFoundError):
            return f"htfkernels._{name[1:]} was not built: {_MISSING[emulated()]}"
        return f"the compiled module htfkernels.{name} cannot be loaded ({error})"
    if emulated():
        if device == "cpu":
            return None
        return "HTF_EMULATE_CUDA is set: CUDA kernels run on CPU tensors"
    if torch.version.cuda is None:
        return "this PyTorch is one without CUDA"
    reason: str | None = module.why_not()
    if reason is not None:
        return f"CUDA finds no device to run on ({reason})"
    if device != "cuda":
        return f"cuda runs on CUDA tensors, and these are on {device}"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the CUDA kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


@cache
def shared_bytes() -> int:
    """Of shared memory that a block can have, on the least of this machine's GPUs; an H100's where
    there is none."""
    if emulated() or not torch.cuda.is_available():
        return 227 * 1024
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return min(getattr(d, "shared_memory_per_block_optin", 99 * 1024) for d in devices)


_MISSING = {
    False: "HTF_BUILD_CUDA=1 asks for it where PyTorch is not a CUDA build, and it needs nvcc",
    True: "HTF_EMULATE_CUDA=1 python setup.py build_ext --inplace does",
}


def build_info() -> dict[str, str] | str:
    """How the module was compiled, or why it cannot be loaded."""
    try:
        found: dict[str, str] = _module().build_info()
    except ImportError as error:
        return str(error)
    return found


def file() -> Path:
    """The compiled module's file.

    Raises:
        ImportError: it cannot be loaded.
    """
    return Path(_module().__file__)


@cache
def library() -> Any:
    """The operators' namespace in ``torch.ops``.

    Raises:
        ImportError: the module cannot be loaded.
    """
    _module()
    return torch.ops.htfkernels_emulated if emulated() else torch.ops.htfkernels_cuda


@cache
def _operator(name: str) -> Any:
    return getattr(library(), name).default


def call(name: str, *args: Any) -> Any:
    """Runs an operator of the module; differentiation is its caller's affair."""
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(name)(*args)
