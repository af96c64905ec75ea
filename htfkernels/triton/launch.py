"""Launching Triton kernels: one door for all of them, so that a check can stand in it.

Every kernel of this package is launched by :func:`launch` with everything that decides its machine
code: the compile-time constants and the tile configuration. ``bench/compile_gate.py`` puts a
recorder there and compiles what would have run, on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

__all__ = [
    "INTERPRETED",
    "MOST",
    "Config",
    "cdiv",
    "check_programs",
    "check_size",
    "launch",
    "recorded",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""

MOST = 2**31 - 2**16
"""Samples of a batch, and rows and columns of a weight, at most: kernels number them in 32 bits, a
few tiles past the last, and round up to parts of a batch. Offsets into memory are of 64 bits."""

Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any], "Config"], None]
_recorder: Recorder | None = None


class Config(NamedTuple):
    """Tile sizes of a launch: rows, columns and the summed dimension; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3


def launch(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any], config: Config
) -> None:
    """Runs ``programs`` instances of a kernel on the current stream.

    Args:
        kernel: a ``triton.jit`` function, whose first argument is a tensor.
        programs: size of the one-dimensional grid; none are launched for 0.
        args: the run-time arguments, in order.
        constants: the compile-time arguments by name.
        config: warps and stages are taken from it; tile sizes are among the constants.
    """
    if programs == 0:
        return
    check_programs(programs)
    if _recorder is not None:
        _recorder(kernel, (programs,), args, constants, config)
        return
    device = args[0].device
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext():  # Triton takes the current one
        kernel[(programs,)](
            *args,
            **constants,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )


def check_programs(programs: int) -> None:
    """
    Raises:
        ValueError: a grid of so many programs is more than a GPU takes.
    """
    if programs >= 2**31:
        raise ValueError(f"htfkernels: {programs} tiles in one launch, more than a GPU takes")


def check_size(op: str, size: int, what: str) -> None:
    """
    Raises:
        ValueError: there are more of ``what`` than kernels can number (:data:`MOST`).
    """
    if size > MOST:
        raise ValueError(f"{op}: the Triton kernels take up to {MOST} {what}, got {size}")


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """In the block, launches are handed to ``recorder(kernel, grid, args, constants, config)``
    instead of run; results hold garbage then."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)
