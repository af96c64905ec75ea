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
from htflearn.bench.workloads import PASSES, SCALES, workloads
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
        list[str] | None, typer.Option("--pass", help="forward, backward or inputs; repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 20,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64 or bfloat16.")] = "float32",
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
        return
    for option, number in (("repeats", repeats), ("threads", threads)):
        if number is not None and number < 1:
            raise UserError(f"--{option} must be positive, got {number}")
    chosen = _chosen("workload", workload, available)
    ways = {
        n: IMPLEMENTATIONS[n] for n in _chosen("implementation", implementation, IMPLEMENTATIONS)
    }
    which = _chosen("pass", passes, PASSES)
    if out is not None:
        if out.is_dir():
            raise UserError(f"--out must be a file, and {out} is a directory")
        writable_directory(out.parent)
    if threads is not None:
        torch.set_num_threads(threads)
    tiny = scale == "tiny"
    machine = Machine(
        gemm_rate(_DTYPES[dtype], _TINY_GEMMS if tiny else GEMMS),
        copy_rate(_TINY_COPIED if tiny else COPIED),
    )
    made = report.provenance(machine, dtype, scale)
    typer.echo(
        f"{made['processor']}, {made['capability']}, threads: {made['threads']}, {dtype}, "
        f"torch {made['torch']}, GEMM {machine.gemm:.0f} GFLOP/s, copy {machine.copy:.0f} GB/s"
    )
    rows = []
    for name in chosen:
        problem = available[name].build(_DTYPES[dtype])
        measured = measure(
            problem, ways, which, repeats, machine, lambda s: typer.echo(s, err=True)
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


def _print_names(lines: dict[str, str], title: str) -> None:
    width = max(map(len, lines))
    typer.echo(f"{title}:")
    for name, summary in lines.items():
        typer.echo(f"  {name:{width}}  {summary}")
