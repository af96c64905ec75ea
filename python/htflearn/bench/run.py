"""``htf bench`` from the options to the file of rows."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

import torch
import typer

from htflearn.bench import Implementation, report
from htflearn.bench.accuracy import TOLERANCE
from htflearn.bench.device import (
    DEVICES,
    PRECISIONS,
    Machine,
    copy_rate,
    described,
    gemm_rate,
    precision,
)
from htflearn.bench.gpu_implementations import GPU_IMPLEMENTATIONS
from htflearn.bench.implementations import IMPLEMENTATIONS, OURS
from htflearn.bench.measure import measure
from htflearn.bench.spectra_implementations import SPECTRA
from htflearn.bench.workloads import PASSES, SCALES, Workload, workloads
from htflearn.errors import UserError
from htflearn.options import shown

__all__ = ["print_names", "run"]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
_WRONG = 1


def run(
    workload: list[str] | None,
    implementation: list[str] | None,
    passes: list[str] | None,
    repeats: int,
    threads: int | None,
    dtype: str,
    device: str,
    rounding: str,
    budget: float | None,
    compile_limit: float | None,
    scale: str,
    out: Path | None,
) -> None:
    """Checks and times what is asked for, and prints tables.

    Args:
        workload, implementation, passes: names; None: all.
        rounding: ``--precision``.
        out: file of the rows.
        repeats, threads, dtype, device, budget, compile_limit, scale: as on the command line.

    Raises:
        UserError: there is no such thing, or it cannot be had here.
    """
    available, ways = _there(scale, device)
    for what, value, known in (("dtype", dtype, _DTYPES), ("precision", rounding, PRECISIONS)):
        _check_word(what, value, known)
    if device == "cpu":
        _refuse_gpus(workload, implementation, scale)
    elif not torch.cuda.is_available():
        raise UserError("--device cuda needs a CUDA device, and PyTorch finds none")
    if rounding != "ieee" and (device, dtype) != ("cuda", "float32"):
        raise UserError(
            f"--precision {rounding} is of float32 on a GPU, got --dtype {dtype} on {device}"
        )
    chosen = _chosen("workload", workload, available)
    asked = _chosen("implementation", implementation, dict.fromkeys([*ways, *SPECTRA]))
    which = _passes(passes)
    if threads is not None:
        torch.set_num_threads(threads)
    end = None if budget is None else time.monotonic() + budget
    rows: list[report.Row] = []
    too_large = False
    with precision(rounding):
        machines = _machines(available, chosen, dtype, device, scale == "tiny")
        made = report.provenance(machines, scale)
        if device != "cpu":
            made |= described(rounding)
        _print_machine(made, machines)
        for name in chosen:
            if end is not None and time.monotonic() > end:
                typer.echo(f"{name}: not begun, {budget:g} s are over", err=True)
                continue
            all_ways = SPECTRA if available[name].kind == "spectra" else ways
            try:
                measured = measure(
                    available[name].build(_DTYPES[dtype], device),
                    {n: all_ways[n] for n in asked if n in all_ways},
                    which,
                    repeats,
                    machines[_dtype(available[name], dtype)],
                    lambda s: typer.echo(s, err=True),
                    rounding,
                    compile_limit,
                )
            except torch.OutOfMemoryError:
                typer.echo(f"{name}: left out, it does not fit into the GPU's memory", err=True)
                too_large = True
                continue
            rows += measured
            if out is not None:
                report.save(out, made, rows)  # at each step: whatever ends a long run, this is kept
            if measured:
                report.print_workload(measured, available[name].summary)
    if out is not None:
        report.save(out, made, rows)
    report.print_summary(rows)
    if out is not None:
        typer.echo(f"written: {out}")
    if too_large or any(_ours_is_wrong(row, device) for row in rows):
        raise typer.Exit(_WRONG)


def print_names(scale: str, device: str) -> None:
    """Prints what there is to choose from."""
    available, ways = _there(scale, device)
    _print_names({name: w.summary for name, w in available.items()}, "workloads")
    _print_names({n: i.summary for n, i in ways.items()}, "implementations")
    _print_names({n: i.summary for n, i in SPECTRA.items()}, "implementations of spectra")
    _print_names(PASSES, "passes")


def _there(scale: str, device: str) -> tuple[dict[str, Workload], dict[str, Implementation]]:
    """Workloads and implementations by name."""
    _check_word("scale", scale, SCALES)
    _check_word("device", device, DEVICES)
    available = {n: w for n, w in workloads(scale).items() if device != "cpu" or not w.needs_gpu}
    return available, IMPLEMENTATIONS if device == "cpu" else _on_gpu()


def _check_word(option: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UserError(f"--{option} must be one of {', '.join(known)}, got {shown(value)}")


def _on_gpu() -> dict[str, Implementation]:
    """Those that run everywhere and those of a GPU, ours first."""
    ours = {n: i for n, i in GPU_IMPLEMENTATIONS.items() if n.startswith(OURS)}
    return {OURS: IMPLEMENTATIONS[OURS], **ours, **IMPLEMENTATIONS, **GPU_IMPLEMENTATIONS}


def _refuse_gpus(workload: list[str] | None, implementation: list[str] | None, scale: str) -> None:
    """Raises UserError where something was asked for that runs on a GPU only."""
    for name in workload or []:
        found = workloads(scale).get(name)
        if found is not None and found.needs_gpu:
            raise UserError(
                f"--workload: {name!r} needs the memory and speed of a GPU: --device cuda or "
                "--scale tiny"
            )
    for name in implementation or []:
        if name in GPU_IMPLEMENTATIONS:
            raise UserError(f"--implementation: {name!r} needs --device cuda, got --device cpu")


def _machines(
    available: dict[str, Workload], chosen: list[str], dtype: str, device: str, tiny: bool
) -> dict[str, Machine]:
    """What the machine does best, for each dtype of the workloads."""
    copied = copy_rate(device, tiny)
    return {
        name: Machine(gemm_rate(_DTYPES[name], device, tiny), copied)
        for name in dict.fromkeys(_dtype(available[name], dtype) for name in chosen)
    }


def _print_machine(made: report.Row, machines: dict[str, Machine]) -> None:
    rates = ", ".join(f"GEMM {m.gemm:.0f} GFLOP/s in {name}" for name, m in machines.items())
    where = f"{made['processor']}, {made['capability']}, threads: {made['threads']}"
    if "gpu" in made:
        where = f"{made['gpu']}, driver {made['driver']}, {made['precision']}"
    copied = made["copy_gb_per_s"]
    typer.echo(f"{where}, torch {made['torch']}, {rates}, copy {copied:.0f} GB/s")


def _ours_is_wrong(row: report.Row, device: str) -> bool:
    if not row["implementation"].startswith(OURS) or row["median_ms"]:
        return False
    # On a GPU what raises has failed a test that no CPU can make.
    return bool(row["off"]) or (device != "cpu" and row["error"].startswith("failed"))


def _chosen(option: str, given: list[str] | None, known: Collection[str]) -> list[str]:
    """Those asked for, in their usual order; all of them by default."""
    unknown = [name for name in given or [] if name not in known]
    if unknown:
        listed = "; ".join(known)
        raise UserError(f"--{option}: there is no {unknown[0]!r}, only {listed}")
    return [name for name in known if not given or name in given]


def _passes(given: list[str] | None) -> list[str]:
    """``forward`` and ``backward`` stand for those of spectra too."""
    asked = _chosen("pass", given, PASSES)
    return [name for name in PASSES if name in asked or name.split("-")[0] in asked]


def _dtype(workload: Workload, asked: str) -> str:
    return asked if workload.dtype is None else str(workload.dtype).removeprefix("torch.")


def _print_names(lines: dict[str, str], title: str) -> None:
    width = max(map(len, lines))
    typer.echo(f"{title}:")
    for name, summary in lines.items():
        typer.echo(f"  {name:{width}}  {summary}")
