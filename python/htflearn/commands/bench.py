"""``htf bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htflearn.errors import writable_directory
from htflearn.files import check_output
from htflearn.options import LONGEST, positive, usable_threads

__all__ = ["bench"]


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
        str,
        typer.Option(help="float32, float64, bfloat16 or float16; spectra are always in float64."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, or cuda: the first GPU.")] = "cpu",
    rounding: Annotated[
        str,
        typer.Option(
            "--precision",
            help="Of float32 products on a GPU, ours and PyTorch's: ieee, tf32, tf32x3.",
        ),
    ] = "ieee",
    budget: Annotated[
        float | None, typer.Option(help="Seconds after which no workload is begun.")
    ] = None,
    compile_limit: Annotated[
        float | None, typer.Option(help="Seconds that compiling may take, for one pass of one.")
    ] = None,
    scale: Annotated[str, typer.Option(help="full, or tiny: a few seconds.")] = "full",
    out: Annotated[
        Path | None, typer.Option(help="JSON file of the rows, written after each workload.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier --out.")] = False,
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
    fraction of the best rate of torch.mm in the same run. Exit code 1: htfkernels itself was wrong,
    or failed on a GPU.
    """
    positive("repeats", repeats)
    usable_threads(threads)
    positive("budget", budget, LONGEST)
    positive("compile-limit", compile_limit, LONGEST)
    if out is not None and compare is None and not names:
        check_output(out, force)
        writable_directory(out.parent)
    # Only now, since it takes PyTorch and all its peers some seconds to load.
    from htflearn.bench import report
    from htflearn.bench.run import print_names, run

    if compare is not None:
        report.print_change(*compare)
    elif names:
        print_names(scale, device)
    else:
        run(
            workload,
            implementation,
            passes,
            repeats,
            threads,
            dtype,
            device,
            rounding,
            budget,
            compile_limit,
            scale,
            out,
        )
