"""``htf bench``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import torch
import typer

from htflearn.bench import report
from htflearn.bench.implementations import IMPLEMENTATIONS, OURS
from htflearn.bench.measure import COPIED, GEMMS, TOLERANCE, Machine, copy_rate, gemm_rate, measure
from htflearn.bench.spectra_implementations import SPECTRA
from htflearn.bench.workloads import PASSES, SCALES, Workload, workloads
from htflearn.errors import UserError, writable_directory

__all__ = ["bench"]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
_TINY_GEMMS, _TINY_COPIED = ((128, 128, 128),), 2**20
_WRONG = 1


def bench(
    workload: Annotated[
        list[str] | None, typer.Option("--workload", "-w", help="Only this; may be repeated.")
    ] = None,
    implementation: Annotated[
        list[str] | None, typer.Option("--implementation", "-i", help="Only this; may be repeated.")
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", help="forward, backward or inputs, or one of --list; repeatable."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 20,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, float64 or bfloat16; spectra are always in float64.")
    ] = "float32",
    scale: Annotated[str, typer.Option(help="full, or tiny: a few seconds.")] = "full",
    out: Annotated[Path | None, typer.Option(help="JSON file of the rows.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two such files: how the times changed.")
    ] = None,
    names: Annotated[
        bool, typer.Option("--list", help="Show the names of workloads and implementations.")
    ] = False,
) -> None:
    """Times the kernels against PyTorch and other libraries.

    Every implementation is held against float64 first, and one that is wrong is not timed. The
    others run in turn. Rates count the multiply-adds that the workload needs, and are shown as a
    fraction of the best rate of torch.mm in the same run. Exit code 1: htfkernels itself was wrong.
    """
    if compare is not None:
        report.print_change(*compare)
        return
    for what, value, known in (("scale", scale, SCALES), ("dtype", dtype, _DTYPES)):
        if value not in known:
            raise UserError(f"--{what} must be one of {', '.join(known)}, got {value!r}")
    available = workloads(scale)
    if names:
        _print_names({name: w.summary for name, w in available.items()}, "workloads")
        _print_names({n: i.summary for n, i in IMPLEMENTATIONS.items()}, "implementations")
        _print_names({n: i.summary for n, i in SPECTRA.items()}, "implementations of spectra")
        _print_names(PASSES, "passes")
        return
    for option, number in (("repeats", repeats), ("threads", threads)):
        if number is not None and number < 1:
            raise UserError(f"--{option} must be positive, got {number}")
    chosen = _chosen("workload", workload, available)
    ways = _chosen("implementation", implementation, dict.fromkeys([*IMPLEMENTATIONS, *SPECTRA]))
    which = _passes(passes)
    if out is not None:
        if out.is_dir():
            raise UserError(f"--out must be a file, and {out} is a directory")
        writable_directory(out.parent)
    if threads is not None:
        torch.set_num_threads(threads)
    tiny = scale == "tiny"
    copied = copy_rate(_TINY_COPIED if tiny else COPIED)
    machines = {
        name: Machine(gemm_rate(_DTYPES[name], _TINY_GEMMS if tiny else GEMMS), copied)
        for name in dict.fromkeys(_dtype(available[name], dtype) for name in chosen)
    }
    made = report.provenance(machines, scale)
    rates = ", ".join(f"GEMM {m.gemm:.0f} GFLOP/s in {name}" for name, m in machines.items())
    typer.echo(
        f"{made['processor']}, {made['capability']}, threads: {made['threads']}, "
        f"torch {made['torch']}, {rates}, copy {copied:.0f} GB/s"
    )
    rows = []
    for name in chosen:
        all_ways = SPECTRA if available[name].kind == "spectra" else IMPLEMENTATIONS
        measured = measure(
            available[name].build(_DTYPES[dtype]),
            {n: all_ways[n] for n in ways if n in all_ways},
            which,
            repeats,
            machines[_dtype(available[name], dtype)],
            lambda s: typer.echo(s, err=True),
        )
        if measured:
            report.print_workload(measured, available[name].summary)
        rows += measured
    report.print_summary(rows)
    if out is not None:
        report.save(out, made, rows)
        typer.echo(f"written: {out}")
    if any(r["implementation"].startswith(OURS) and r["off"] and not r["median_ms"] for r in rows):
        raise typer.Exit(_WRONG)


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
