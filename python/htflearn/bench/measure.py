"""Correct first, then fast: errors against float64, times, memory, and the machine's GEMM rate."""

from __future__ import annotations

import ctypes
import gc
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import htfkernels as hk
from htflearn.bench import Implementation, Prepared, Skipped, spectra
from htflearn.bench.workloads import PASSES, Problem

__all__ = ["COPIED", "GEMMS", "TOLERANCE", "Machine", "copy_rate", "gemm_rate", "measure"]

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.1}
"""How far a result may be off, relative to the largest number of the tensor: far above rounding,
far below what a wrong formula gives."""

_SLOW_SECONDS, _SLOW_REPEATS = 2.0, 5
_SHORT_SECONDS = 0.05
_CHUNK = 2**25  # numbers in the messages of a chunk of the float64 computation
GEMMS = ((1024, 1024, 1024), (4096, 128, 128), (2048, 512, 512))
COPIED = 2**26  # bytes, more than caches hold


@dataclass(frozen=True)
class Machine:
    """What the machine did best in this run.

    Attributes:
        gemm: rate of ``torch.mm``, GFLOP/s.
        copy: rate of ``Tensor.copy_`` between large tensors, GB/s read and written together.
    """

    gemm: float
    copy: float


@dataclass(frozen=True)
class _Truth:
    values: Tensor
    weights: list[Tensor]
    inputs: list[Tensor]


def measure(
    problem: Problem,
    implementations: dict[str, Implementation],
    passes: Sequence[str],
    repeats: int,
    machine: Machine,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Validates all implementations on a problem, then times the correct ones in turn.

    Args:
        problem: model and data.
        implementations: by name.
        passes: keys of :data:`~htflearn.bench.workloads.PASSES`; those that make no sense for the
            problem are left out.
        repeats: of the timing; one that takes more than 2 seconds is run 5 times at most, one that
            takes less than 0.05 once more before each time, untimed.
        machine: what it did best in the same run.
        log: told what is being done.

    Returns:
        a row for each pass and implementation; ``error`` says why a row has no times.
    """
    workload = problem.workload
    passes = [p for p in passes if p in workload.passes]
    if not passes or not implementations:
        return []
    log(f"{workload.name}: computing in float64")
    truth = None if workload.kind == "spectra" else _exact(problem)
    prepared: dict[str, Prepared] = {}
    refused: dict[str, str] = {}
    for name, implementation in implementations.items():
        try:
            prepared[name] = implementation.prepare(problem)
        except Exception as error:
            refused[name] = _sentence(error)
    rows = []
    for which in passes:
        errors, off, ready = dict(refused), {}, {}
        expected = spectra.exact(problem.model, which) if truth is None else truth
        for name, ways in prepared.items():
            log(f"{workload.name}, {PASSES[which]}: checking {name}")
            for x in ways.inputs:
                x.requires_grad_(which == "inputs")
            try:
                run = _runner(problem, ways, which)
                with _time_limit(implementations[name].limit):
                    off[name] = _error(problem, ways, which, run, expected)
            except Exception as error:
                errors[name] = _sentence(error)
                continue
            if off[name] < spectra.TOLERANCES.get(which, TOLERANCE[problem.cotangent.dtype]):
                ready[name] = run
            else:
                errors[name] = f"wrong: off by {off[name]:.1e} of the largest number"
        log(f"{workload.name}, {PASSES[which]}: timing {', '.join(ready) or 'nothing'}")
        times = _interleaved(ready, prepared, repeats)
        flops, moved = problem.flops(which), problem.bytes(which)
        by_flops = 0.0 if flops is None else flops / machine.gemm / 1e6
        by_bytes = moved / machine.copy / 1e6
        for name in implementations:
            row: dict[str, Any] = {
                "workload": workload.name,
                "sizes": workload.sizes,
                "dtype": str(problem.cotangent.dtype).removeprefix("torch."),
                "implementation": name,
                "pass": PASSES[which],
                "median_ms": None,
                "min_ms": None,
                "repeats": 0,
                "gflops": None,
                "fraction_of_gemm": None,
                "flops": flops,
                "bytes": moved,
                "floor_ms": max(by_flops, by_bytes),
                "bound": "flops" if by_flops >= by_bytes else "bytes",
                "peak_mb": None,
                "setup_seconds": prepared[name].setup_seconds if name in prepared else None,
                "off": off.get(name),
                "error": errors.get(name),
            }
            if name in times:
                median = statistics.median(times[name])
                rate = None if flops is None else flops / median / 1e9
                row |= {
                    "median_ms": median * 1e3,
                    "min_ms": min(times[name]) * 1e3,
                    "repeats": len(times[name]),
                    "gflops": rate,
                    "fraction_of_gemm": None if rate is None else rate / machine.gemm,
                    "peak_mb": _peak_mb(ready[name], prepared[name]),
                }
            rows.append(row)
    return rows


def gemm_rate(
    dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]] = GEMMS, repeats: int = 10
) -> float:
    """The best rate of ``torch.mm`` in GFLOP/s over a few shapes ``(m, k, n)``.

    Example:
        >>> gemm_rate(torch.float32) > 0
        True
    """
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2e-9 * m * k * n / (time.perf_counter() - start))
    return best


def copy_rate(copied: int = COPIED, repeats: int = 10) -> float:
    """The best rate of copying ``copied`` bytes between tensors in GB/s, read and written together.

    Example:
        >>> copy_rate(2**20) > 0
        True
    """
    source, target = (torch.ones(copied // 4) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2e-9 * copied / (time.perf_counter() - start))
    return best


def _runner(problem: Problem, ways: Prepared, which: str) -> Callable[[], Any]:
    compute = ways.computes(which)
    if which.startswith("forward"):
        return torch.no_grad()(compute)
    weights = list(problem.model.weights) if ways.weights is None else ways.weights
    wanted = [*weights, *(ways.inputs if which == "inputs" else [])]
    return lambda: torch.autograd.grad(compute(), wanted, problem.cotangent)


def _exact(problem: Problem) -> _Truth:
    """Values and gradients in float64 on the reference, in chunks that fit into memory."""
    layout = problem.workload.layout
    weights = [w.detach().double().requires_grad_() for w in problem.model.weights]
    columns = [x.detach().double().requires_grad_() for x in problem.columns]
    cotangent = problem.cotangent.double()
    wanted = [*weights, *columns]
    grads = [torch.zeros_like(t) for t in wanted]
    values = []
    dense = problem.workload.kind == "tensor"
    # Of the full tensor, a slice of the first mode at a time.
    per_row = sum(len(g.nodes) * (g.rows + g.cols) for g in layout.groups)
    rows = 1 if dense else max(1, _CHUNK // per_row)
    with hk.use_backend("reference"):
        for start in range(0, len(cotangent), rows):
            part = slice(start, start + rows)
            if dense:
                matrices = {
                    n: weights[g][s]
                    for n in layout.tree.nodes
                    for g, s in [layout.location[n.index]]
                }
                matrices[layout.tree.nodes[0]] = matrices[layout.tree.nodes[0]][part]
                value = hk.full_tensor(layout.tree, matrices)
            elif problem.indices is not None:
                at = problem.indices[part]
                value = hk.evaluate_at(layout.tree, weights, at, layout=layout)
            else:
                x = [c[part] for c in columns]
                value = hk.evaluate(layout.tree, weights, x, layout=layout)
            for total, grad in zip(
                grads, torch.autograd.grad(value, wanted, cotangent[part]), strict=True
            ):
                total += grad
            values.append(value.detach())
    return _Truth(torch.cat(values), grads[: len(weights)], grads[len(weights) :])


def _error(
    problem: Problem,
    ways: Prepared,
    which: str,
    run: Callable[[], Any],
    truth: _Truth | list[Tensor],
) -> float:
    """The largest error of what a pass computes, relative to the largest number of its tensor."""
    if ways.before:
        ways.before()
    result = run()
    if isinstance(truth, list):
        sort = ways.by_node if which.startswith("forward") else ways.by_weight
        return spectra.error(which, sort(result), truth)
    if which == "forward":
        return spectra.relative([result], [truth.values])
    count = len(truth.weights if ways.weights is None else ways.weights)
    worst = spectra.relative(ways.by_weight(result[:count]), truth.weights)
    if which == "inputs":
        worst = max(worst, spectra.relative(ways.by_mode(result[count:]), truth.inputs))
    return worst


def _interleaved(
    ready: dict[str, Callable[[], Any]], prepared: dict[str, Prepared], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each, run in turn, so that what disturbs the machine disturbs all of them."""
    times: dict[str, list[float]] = {name: [] for name in ready}
    slow: set[str] = set()
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats + 1):
            # Whoever comes always behind the same one finds its caches, and its threads, in the
            # same state: the order is another one in each round.
            for name in order.sample(list(ready), len(ready)):
                if name in slow and len(times[name]) >= _SLOW_REPEATS:
                    continue
                before = prepared[name].before
                # A training loop finds its own data in the cache and the threads awake.
                if times[name] and times[name][-1] < _SHORT_SECONDS:
                    if before:
                        before()
                    ready[name]()
                if before:
                    before()
                start = time.perf_counter()
                result = ready[name]()
                seconds = time.perf_counter() - start
                del result
                if repeat:  # the first round warms up
                    times[name].append(seconds)
                if seconds > _SLOW_SECONDS:
                    slow.add(name)
    finally:
        gc.enable()
    return times


def _peak_mb(run: Callable[[], Any], ways: Prepared) -> float | None:
    """Memory that a run needs beyond what the process holds; None where Linux does not tell."""
    if ways.before:
        ways.before()
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


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Ends the block after a time, where the system can do that."""
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Skipped(f"compiling it takes more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _sentence(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, Skipped) else f"failed: {type(error).__name__}: {first}"
