"""Correct first, then fast: errors against float64, times and memory."""

from __future__ import annotations

import gc
import random
import re
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import htfkernels as hk
from htflearn.bench import Implementation, Prepared, Skipped, spectra
from htflearn.bench.accuracy import Judge, judge
from htflearn.bench.device import Machine, Replay, peak_mb, poison, released, seconds
from htflearn.bench.workloads import PASSES, Problem

__all__ = ["Machine", "measure"]

_SLOW_SECONDS, _SLOW_REPEATS = 2.0, 5
_SHORT_SECONDS = 0.05
_ALARM_SECONDS = 0.5
_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.@+-]+/)+")
# Numbers in the messages of a chunk of the float64 computation.
_CHUNK = {"cpu": 2**25, "cuda": 2**28}


@dataclass(frozen=True)
class _Truth:
    values: Tensor
    weights: list[Tensor]
    inputs: list[Tensor]

    def vanishes_in(self, dtype: torch.dtype) -> bool:
        """Whether all values are below the smallest normal number."""
        return bool(self.values.abs().max() < torch.finfo(dtype).tiny)


def measure(
    problem: Problem,
    implementations: dict[str, Implementation],
    passes: Sequence[str],
    repeats: int,
    machine: Machine,
    log: Callable[[str], None] = lambda line: None,
    precision: str = "ieee",
    limit: float | None = None,
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
        precision: the float32 precision in force, which the tolerance depends on.
        limit: seconds that preparing and the first run of a pass may take, for the implementations
            that have such a limit, where theirs is longer.

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
            if truth is not None and truth.vanishes_in(problem.cotangent.dtype):
                raise Skipped(f"all results are below what {problem.cotangent.dtype} can hold")
            prepared[name] = implementation.prepare(problem)
        except Exception as error:
            refused[name] = _sentence(error)
    rows = []
    nodes = len(workload.layout.tree.nodes)
    judged = judge(problem.cotangent.dtype, problem.device, precision, nodes)
    for which in passes:
        errors, off, ready = dict(refused), {}, {}
        expected = spectra.exact(problem.model, which) if truth is None else truth
        for name, ways in prepared.items():
            log(f"{workload.name}, {PASSES[which]}: checking {name}")
            for x in ways.inputs:
                x.requires_grad_(which == "inputs")
            try:
                released(problem.device)
                poison(problem.device)
                allowed = implementations[name].limit
                if allowed is not None and limit is not None:
                    allowed = min(allowed, limit)
                with _time_limit(allowed):
                    run = _runner(problem, ways, which)
                    off[name] = _error(problem, ways, which, run, expected, judged)
            except Exception as error:
                errors[name] = _sentence(error)
                continue
            if off[name] < spectra.TOLERANCES.get(which, judged[1]):
                ready[name] = run
            else:
                errors[name] = f"wrong: off by {off[name]:.1e} of the largest number"
        log(f"{workload.name}, {PASSES[which]}: timing {', '.join(ready) or 'nothing'}")
        times = _interleaved(ready, prepared, repeats, problem.device)
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
                    "peak_mb": _peak_mb(ready[name], prepared[name], problem.device),
                }
            rows.append(row)
    return rows


def _runner(problem: Problem, ways: Prepared, which: str) -> Callable[[], Any]:
    compute = ways.computes(which)
    step: Callable[[], Any]
    if which.startswith("forward"):
        step = torch.no_grad()(compute)
    else:
        weights = list(problem.model.weights) if ways.weights is None else ways.weights
        wanted = [*weights, *(ways.inputs if which == "inputs" else [])]

        def step() -> Any:
            return torch.autograd.grad(compute(), wanted, problem.cotangent)

    return Replay(step) if ways.captured else step


def _peak_mb(run: Callable[[], Any], ways: Prepared, device: str) -> float | None:
    if not ways.allocates:
        return None
    if ways.before:
        ways.before()
    return peak_mb(run, device)


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
    rows = 1 if dense else max(1, _CHUNK[problem.device] // per_row)
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
    judged: Judge,
) -> float:
    """The largest error of what a pass computes, relative to the largest number of its tensor."""
    if ways.before:
        ways.before()
    result = run()
    if isinstance(truth, list):
        sort = ways.by_node if which.startswith("forward") else ways.by_weight
        return spectra.error(which, sort(result), truth)
    relative = judged[0]
    if which == "forward":
        return relative([result], [truth.values])
    count = len(truth.weights if ways.weights is None else ways.weights)
    worst = relative(ways.by_weight(result[:count]), truth.weights)
    if which == "inputs":
        worst = max(worst, relative(ways.by_mode(result[count:]), truth.inputs))
    return worst


def _interleaved(
    ready: dict[str, Callable[[], Any]], prepared: dict[str, Prepared], repeats: int, device: str
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
                taken, result = seconds(ready[name], device)
                del result
                if repeat:  # the first round warms up
                    times[name].append(taken)
                if taken > _SLOW_SECONDS:
                    slow.add(name)
    finally:
        gc.enable()
    return times


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Ends the block after a time, where the system can do that."""
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        yield
        return

    sentence = f"compiling it takes more than {seconds:g} s"
    over = False

    def stop(number: int, frame: Any) -> None:
        nonlocal over
        over = True
        raise Skipped(sentence)

    previous = signal.signal(signal.SIGALRM, stop)
    # Again and again: a compiler that tries many kernels goes on with the next where one raises.
    signal.setitimer(signal.ITIMER_REAL, seconds, _ALARM_SECONDS)
    try:
        yield
    except Exception as error:
        if not over:
            raise
        raise Skipped(sentence) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _sentence(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, Skipped):
        return first
    # Files of results are published: where things lie on a machine is nobody's business.
    return f"failed: {type(error).__name__}: {_FOLDERS.sub('', first)}"
