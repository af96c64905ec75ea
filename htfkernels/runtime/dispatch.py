"""Which backend runs an operation: what was asked for, what is there, and why not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from htfkernels.arguments import shown
from htfkernels.runtime import compiled, cuda_module, operations, verdicts
from htfkernels.runtime.operations import OPERATIONS, families, load
from htfkernels.tree.layout import Layout

__all__ = [
    "BACKENDS",
    "Spec",
    "backends",
    "choose",
    "device_of",
    "interpreted",
    "refusal",
    "requested",
    "use_backend",
    "why_not",
    "why_not_taken",
]

BACKENDS = ("reference", "cpp", "cuda", "triton")
_PREFERENCE = ("cuda", "triton", "cpp", "reference")
_WITHOUT_WHOLE_TREES = ("triton", "cuda", "cpp", "reference")
_ON_CPU = {
    "cuda": "emulated CUDA kernels run only when asked for by name",
    "triton": "Triton's interpreter runs only when asked for by name",
}

_requested: ContextVar[str | None] = ContextVar("htfkernels_backend", default=None)


@dataclass(frozen=True)
class Spec:
    """What is to be run.

    Attributes:
        op: an operation.
        dtype, device: of its numbers; a device type.
        layout: where it is known.
        rows: of the batch, about; 0 where that is not known or does not matter.
        precision: of float32 products on a GPU.
    """

    op: str
    dtype: torch.dtype
    device: str
    layout: Layout | None = None
    rows: int = 0
    precision: str = "ieee"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the operations in the block on one backend.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or ``"auto"`` (the default: the
            fastest that can run). The environment variable ``HTF_BACKEND`` sets the same for a
            process.

    Raises:
        ValueError: there is no backend of that name.

    Example:
        >>> with use_backend("reference"):
        ...     y = model(x)
    """
    token = _requested.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested() -> str:
    """The backend asked for by :func:`use_backend` or ``HTF_BACKEND``, else ``"auto"``."""
    name = _requested.get()
    return (
        name if name is not None else _checked(os.environ.get("HTF_BACKEND", "auto"), "HTF_BACKEND")
    )


def backends() -> dict[str, str | None]:
    """Every backend, with None where it can run here and the reason where it cannot; also which of
    its kernels ``auto`` leaves alone, where some have computed something wrong on this machine
    (``htf verify``)."""
    return {
        name: why_not(name, Spec("evaluate", torch.float32, device_of(name))) or _failures(name)
        for name in BACKENDS
    }


def device_of(backend: str) -> str:
    """The device type that a backend's kernels run on in this process."""
    if backend == "cuda":
        return cuda_module.device_type()
    return "cuda" if backend == "triton" and not interpreted() else "cpu"


def _failures(backend: str) -> str | None:
    """What is known of kernels that failed; nothing is checked."""
    device = device_of(backend)
    if verdicts.trusted() or (device == "cpu" and backend in _ON_CPU):
        return None
    found = (
        verdicts.known_failure(family, math, device)
        for family in families()
        if family.backend == backend
        for math in family.maths
    )
    return "; ".join(sentence for sentence in found if sentence) or None


def why_not(backend: str, spec: Spec) -> str | None:
    """None where the backend can run the operation, else one sentence that says why it cannot."""
    if backend == "reference":
        return None
    op, dtype = spec.op, spec.dtype
    return (
        operations.why_not(backend, op, None, dtype)
        or _NOT_HERE[backend](spec.device)
        or operations.why_not(backend, op, spec.layout, dtype)
    )


def _no_cpp(device: str) -> str | None:
    if device != "cpu":
        return f"cpp runs on CPU tensors, and these are on {device}"
    return compiled.MISSING


@cache
def _no_triton(device: str) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed; htfkernels[triton] asks for it"
    if interpreted():
        # Kernels of such a process run nowhere else.
        return None if device == "cpu" else "TRITON_INTERPRET is set: kernels run on CPU tensors"
    if device != "cuda":
        return f"triton runs on CUDA tensors, and these are on {device}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs, and this is a ROCm build of PyTorch"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the Triton kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


_NOT_HERE = {
    "cpp": _no_cpp,
    "cuda": lambda device: cuda_module.why_not(device),
    "triton": lambda device: _no_triton(device),
}


def interpreted() -> bool:
    """Whether Triton kernels of this process run in its interpreter, on CPU tensors. Very slow: to
    check kernels without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def refusal(backend: str, spec: Spec) -> str | None:
    """None where ``auto`` may take the backend, else one sentence that says why it does not: it
    cannot run the operation, is slow, or its kernels failed on this device.

    Raises:
        htfkernels.runtime.verdicts.Unverified: nobody has checked the kernels, and they cannot be
            checked while a CUDA graph is captured.
    """
    return _unable(backend, spec) or _failure(backend, spec)


def why_not_taken(backend: str, spec: Spec) -> str | None:
    """None where a backend runs an operation that has no reference here, by what is asked for at
    this moment: the backend by name, and it can; or ``auto``, which may take it. Else one sentence
    that says why it does not.

    Raises:
        htfkernels.runtime.verdicts.Unverified: see :func:`refusal`.
    """
    asked = requested()
    if asked == "auto":
        return refusal(backend, spec)
    if asked != backend:
        return f"the backend {asked!r} was asked for, and {spec.op} is to run on {backend!r}"
    return why_not(backend, spec)


def _unable(backend: str, spec: Spec) -> str | None:
    reason = why_not(backend, spec)
    return _ON_CPU.get(backend) if reason is None and spec.device == "cpu" else reason


def _failure(backend: str, spec: Spec) -> str | None:
    if backend in ("reference", "cpp"):  # taken unchecked
        return None
    return verdicts.failure(backend, spec.op, spec.dtype, spec.precision, spec.device)


def choose(spec: Spec, request: str) -> tuple[str, str]:
    """The backend to run, and why.

    Raises:
        RuntimeError: a backend was asked for by name and cannot run the operation, and the
            reference does not stand in for it, as it does in ``slog``. Or ``auto`` wants kernels
            that nobody has checked, while a CUDA graph is captured.
    """
    if request != "auto":
        reason = why_not(request, spec)
        if reason is not None:
            if OPERATIONS[spec.op].reference_stands_in:
                return "reference", reason
            raise RuntimeError(f"{spec.op}: backend {request!r} was asked for, but {reason}")
        return request, _asked_for(request, spec)
    unable = {name: _unable(name, spec) for name in _PREFERENCE}
    order, phrase = _PREFERENCE, "the fastest for this device"
    if unable["cuda"] is None and unable["triton"] is None:
        better, phrase = _whole_tree(spec)
        order = _PREFERENCE if better else _WITHOUT_WHOLE_TREES
    reasons: list[str] = []
    for name in order:
        reason = unable[name] or _failure(name, spec)
        if reason is None:
            return name, "; ".join(reasons) or phrase
        reasons.append(reason)
    raise AssertionError("the reference runs everywhere")


def _asked_for(backend: str, spec: Spec) -> str:
    """With what is known against its kernels, which does not stop them."""
    if spec.device == "cpu" and backend in _ON_CPU:
        return "asked for"
    try:
        reason = _failure(backend, spec)
    except verdicts.Unverified:
        reason = None
    return "asked for" if reason is None else f"asked for, although {reason}"


def _whole_tree(spec: Spec) -> tuple[bool, str]:
    """Whether CUDA C++ is estimated to be faster than Triton, and by what numbers."""
    estimate = OPERATIONS[spec.op].faster
    if not estimate or spec.layout is None:
        return True, "the fastest for this device"
    found: tuple[bool, str] = load(estimate)(
        spec.layout, max(1, spec.rows), spec.dtype, spec.precision
    )
    return found


def _checked(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{where}: expected one of {', '.join((*BACKENDS, 'auto'))}, got {shown(name)}"
        )
    return name
