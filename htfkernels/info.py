"""What this installation is and can do, as text."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import numpy
import torch

import htfkernels as hk
from htfkernels.runtime import cuda_module, dispatch, verdicts
from htfkernels.runtime.operations import families
from htfkernels.runtime.precision import PRECISIONS
from htfkernels.runtime.verdicts import driver_version

__all__ = ["PRECISIONS", "driver_version", "info_text"]

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
        ("backend asked for", dispatch.requested()),
    ]
    for name in dispatch.BACKENDS:
        spec = dispatch.Spec("evaluate", torch.float32, dispatch.device_of(name))
        reason = dispatch.why_not(name, spec)
        rows.append((f"backend {name}", "runs here" if reason is None else f"no: {reason}"))
        if reason is None and spec.device == "cuda":
            rows += [(f"  {state}", names) for state, names in _verified(name)]
    rows.append(("compiled module", _build()))
    rows.append(("compiled for CUDA", _cuda_build()))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _verified(backend: str) -> list[tuple[str, str]]:
    """What is known of a backend's kernels; ``htf verify`` finds it out."""
    if verdicts.trusted():
        return [("trusted", "HTF_VERIFY says that nothing is to be checked")]
    found: dict[str, list[str]] = {"verified": [], "FAILED": [], "not checked yet": []}
    for place in verdicts.places("cuda"):
        for family in families():
            for math in family.maths if family.backend == backend else ():
                verdict = verdicts.known(family, math, place)
                state = "not checked yet"
                if verdict is not None:
                    state = "verified" if verdict.failure is None else "FAILED"
                found[state].append(f"{family.name} {math}")
    return [(state, ", ".join(names)) for state, names in found.items() if names]


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
