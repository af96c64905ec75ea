"""What this installation is and can do, as text."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import numpy
import torch

import htfkernels as hk
from htfkernels.cuda import module as cuda_module
from htfkernels.dispatch import requested

__all__ = ["info_text"]

_LEARN = ("matplotlib", "rich", "safetensors", "typer")


def info_text() -> str:
    """Versions, threads, the CPU's capability, the backends, and how the compiled module was built.

    Returns:
        lines of ``name  value``.

    Example:
        >>> info_text().splitlines()[0].split()[0]
        'htfkernels'
    """
    rows = [
        ("htfkernels", f"{hk.__version__} in {os.path.dirname(os.path.abspath(hk.__file__))}"),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("numpy", numpy.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("learn extra", ", ".join(f"{name} {_version(name)}" for name in _LEARN)),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"),
        ("waiting threads", _waiting()),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("CUDA", _cuda()),
        ("backend asked for", requested()),
    ]
    for name, reason in hk.backends().items():
        rows.append((f"backend {name}", "runs here" if reason is None else f"no: {reason}"))
    rows.append(("compiled module", _build()))
    rows.append(("compiled for CUDA", _cuda_build()))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _waiting() -> str:
    """What OpenMP was told, and what to tell it."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    told = ", ".join(f"{name} {os.environ.get(name, 'not set')}" for name in names)
    return (
        f"{told}; where other processes want the cores, a script sets GOMP_SPINCOUNT=100 before it "
        "imports torch, as htf does for its commands"
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "no device" if built else "no: this is a CPU build of PyTorch"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


def _build() -> str:
    try:
        module = import_module("htfkernels._C")
    except ImportError as error:
        return f"cannot be loaded: {error}"
    described = ", ".join(f"{key} {value}" for key, value in module.build_info().items())
    return f"{os.path.basename(str(module.__file__))}: {described}"


def _cuda_build() -> str:
    found = cuda_module.build_info()
    if isinstance(found, str):
        return f"cannot be loaded: {found}"
    return ", ".join(f"{key} {value}" for key, value in found.items())
