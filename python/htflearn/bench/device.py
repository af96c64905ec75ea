"""Where the benchmark runs: how time and memory are taken there, and what the machine can do."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import htfkernels as hk
from htfkernels.info import PRECISIONS, driver_version

__all__ = [
    "DEVICES",
    "PRECISIONS",
    "Machine",
    "Replay",
    "copy_rate",
    "described",
    "free_bytes",
    "gemm_rate",
    "peak_mb",
    "poison",
    "precision",
    "released",
    "seconds",
]

DEVICES = ("cpu", "cuda")
_GEMMS = {
    "cpu": ((1024, 1024, 1024), (4096, 128, 128), (2048, 512, 512)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192)),
}
_COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes, more than caches hold
_TINY_GEMMS, _TINY_COPIED = ((128, 128, 128),), 2**20
_WARM_UPS = 3
_POISONED = 2**32  # bytes at most


@dataclass(frozen=True)
class Machine:
    """What the machine did best in this run.

    Attributes:
        gemm: rate of ``torch.mm``, GFLOP/s.
        copy: rate of ``Tensor.copy_`` between large tensors, GB/s read and written together.
    """

    gemm: float
    copy: float


def gemm_rate(
    dtype: torch.dtype, device: str = "cpu", tiny: bool = False, repeats: int = 10
) -> float:
    """The best rate of ``torch.mm`` in GFLOP/s over a few shapes, in the float32 precision that
    PyTorch is set to.

    Args:
        dtype: of the matrices.
        device: ``"cpu"`` or ``"cuda"``.
        tiny: one small product, to see that it runs.
        repeats: of each shape.

    Example:
        >>> gemm_rate(torch.float32, tiny=True) > 0
        True
    """
    best = 0.0
    for m, k, n in _TINY_GEMMS if tiny else _GEMMS[device]:
        # Random: products of zeros run faster than any others on a GPU.
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(k, n, device=device).to(dtype)
        for _ in range(repeats):
            best = max(best, 2e-9 * m * k * n / seconds(partial(torch.mm, a, b), device)[0])
    return best


def copy_rate(device: str = "cpu", tiny: bool = False, repeats: int = 10) -> float:
    """The best rate of copying between two large tensors in GB/s, read and written together.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        tiny: 1 MB, to see that it runs.
        repeats: of the copy.

    Example:
        >>> copy_rate(tiny=True) > 0
        True
    """
    copied = _TINY_COPIED if tiny else _COPIED[device]
    source, target = (torch.ones(copied // 4, device=device) for _ in range(2))
    taken = (seconds(lambda: target.copy_(source), device)[0] for _ in range(repeats))
    return 2e-9 * copied / min(taken)


def seconds(run: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """How long a call takes, and what it returns.

    On a GPU by events of its stream, from an idle device to the end of the last kernel: the time to
    launch kernels counts where the device waits for them, as it does in a step of training.

    Example:
        >>> seconds(lambda: 5)[1]
        5
    """
    if device == "cpu":
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    result = run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, result


def free_bytes(device: str = "cpu") -> int | None:
    """Memory that is free; None where the system does not tell."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo") as lines:
            return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def released(device: str = "cpu") -> None:
    """Gives memory that no tensor uses back: on a GPU CUDA graphs and other libraries take theirs
    past PyTorch's cache."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def poison(device: str = "cpu") -> None:
    """Fills memory that the next results will lie in with NaN, so that a number that nobody wrote
    is seen. Nothing on a CPU, where the kernels' tests do it."""
    if device == "cpu":
        return
    free = free_bytes(device) or 0
    # PyTorch's allocator takes tensors below 1 MB from blocks of their own.
    small = [torch.full((2**17,), torch.nan, device=device) for _ in range(64)]
    large = torch.full((min(free // 4, _POISONED) // 4,), torch.nan, device=device)
    del small, large


def peak_mb(run: Callable[[], Any], device: str = "cpu") -> float | None:
    """Memory that a run needs beyond what is held before it, results included, in MB.

    On a CPU the process's, None where Linux does not tell; on a GPU that of PyTorch's allocator, of
    a :class:`Replay` what its capture took.
    """
    if isinstance(run, Replay):
        return run.peak_mb
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # What this library and malloc keep for later would hide that the run asks for it.
        hk.release_memory()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again
        held = _status_kb("VmRSS")
        run()
        return max(0, _status_kb("VmHWM") - held) / 1024
    except (OSError, AttributeError, StopIteration):
        return None


def _status_kb(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Replay:
    """A step captured as one CUDA graph; calling it replays the graph on the same memory.

    Args:
        step: what to capture; it returns a tensor or a sequence of tensors. The tensors it reads
            stay where they are: new numbers are written into them.

    Attributes:
        peak_mb: memory that the capture took, MB.

    Example:
        >>> replay = Replay(lambda: model(x))  # doctest: +SKIP
        >>> x.copy_(batch); y = replay()  # doctest: +SKIP
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        # Outside the capture: compiling kernels, and what libraries set up at their first call.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = step()
        self.peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
        # What a replay leaves unwritten must not look like a result.
        for tensor in [self._result] if isinstance(self._result, Tensor) else self._result:
            tensor.detach().fill_(torch.nan)

    def __call__(self) -> Any:
        self._graph.replay()
        return self._result


@contextmanager
def precision(name: str) -> Iterator[None]:
    """In the block, float32 products on a GPU are rounded like this, ours and PyTorch's.

    PyTorch has no ``"tf32x3"``: its own products are float32's then.

    Args:
        name: one of :data:`htfkernels.runtime.precision.PRECISIONS`.

    Example:
        >>> with precision("tf32"):
        ...     torch.backends.cuda.matmul.fp32_precision
        'tf32'
    """
    matmul = torch.backends.cuda.matmul
    before, inherits = torch.get_float32_matmul_precision(), matmul.fp32_precision == "none"
    # Not by setting fp32_precision: torch.compile's max-autotune reads the older setting, which
    # raises once the newer alone was set. This one keeps both.
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with hk.use_precision(name):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        if inherits:
            matmul.fp32_precision = "none"


def described(rounding: str) -> dict[str, Any]:
    """The GPU and what drives it, for the provenance of numbers.

    Args:
        rounding: the float32 precision in force.
    """
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": "cuda",
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
        "gpu_multiprocessors": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cuquantum": _version("cuquantum-python-cu13") or _version("cuquantum-python-cu12"),
        "precision": rounding,
        "backends": hk.backends(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
