"""What was measured: a file with its provenance, tables, and two files compared."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import htfkernels as hk
from htflearn.bench.device import Machine
from htflearn.bench.implementations import OURS
from htflearn.errors import UserError, reason
from htflearn.files import read_object, replace_file
from htflearn.metrics import plain

__all__ = ["Row", "load", "print_change", "print_summary", "print_workload", "provenance", "save"]

Row = dict[str, Any]

_VISIBLE = 0.05  # changes up to this are noise
_WIDTH = 120
_LONGEST = 1e12  # milliseconds
_ENVIRONMENT = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "HTF_BACKEND", "HTF_CPU", "HTF_PRECISION")


def provenance(machines: Mapping[str, Machine], scale: str) -> dict[str, Any]:
    """Where, when, with what and by which command the numbers were made.

    Args:
        machines: what the machine did best, for each dtype that there are rows of.
        scale: of the workloads.
    """
    first = next(iter(machines.values()))
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": ", ".join(machines),
        "scale": scale,
        "gemm_gflops": first.gemm,
        "gemm_gflops_by_dtype": {dtype: machine.gemm for dtype, machine in machines.items()},
        "copy_gb_per_s": first.copy,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "htfkernels": hk.__version__,
        "numpy": _version("numpy"),
        "opt_einsum": _version("opt_einsum"),
        "cirkit": _version("libcirkit"),
        "tensap": _version("tensap"),
        # Where a copy without its history runs, whoever made the copy can say what it is of.
        "commit": _commit(Path(hk.__file__).parent) or os.environ.get("HTF_COMMIT"),
        "command": shlex.join(["htf", *map(_named, sys.argv[1:])]),
        "environment": {k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _named(argument: str) -> str:
    """An argument; of a file's absolute path the name alone."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if os.path.isabs(value) else argument


def _processor() -> str:
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in found:
        return name
    return f"{name} (family {found['cpu family']}, model {found.get('model', '?')})"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of a checkout, "+changes" behind it where files differ from it."""

    def git(*arguments: str) -> str:
        # Without locks: another git command may be at work in the checkout.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def save(path: Path, made: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes ``{"provenance": ..., "rows": [...]}``, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(plain({"provenance": made, "rows": list(rows)}), indent=1)
    try:
        replace_file(path, text + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote.

    Raises:
        UserError: there is no such file, or it is none of these.
    """
    try:
        data = read_object(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    rows = data.get("rows")
    if not isinstance(data.get("provenance"), dict) or not isinstance(rows, list):
        raise UserError(f"{path} was not written by htf bench: it lacks provenance and rows")
    if not all(isinstance(row, dict) and _is_row(row) for row in rows):
        raise UserError(f"{path} was not written by htf bench: its rows have other fields")
    return data


def _is_row(row: Row) -> bool:
    names = all(isinstance(row.get(key), str) for key in ("workload", "implementation", "pass"))
    time = row.get("median_ms", "")
    timed = time is None or (isinstance(time, (int, float)) and 0 <= time < _LONGEST)
    return names and "sizes" in row and timed


def print_workload(rows: Sequence[Row], summary: str) -> None:
    """A table of one workload's rows; under it, who is missing and why."""
    sizes = ", ".join(
        f"{k}={f'{v[0]}..{v[1]}' if isinstance(v, list) else v}"
        for k, v in rows[0]["sizes"].items()
    )
    table = Table(title=f"{rows[0]['workload']}: {summary} ({sizes})", title_justify="left")
    for name in ("pass", "implementation"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "min", "x ours", "GFLOP/s", "% of GEMM", "peak MB"):
        table.add_column(name, justify="right")
    ours = {row["pass"]: row["median_ms"] for row in rows if row["implementation"] == OURS}
    shown = ""
    for row in (row for row in rows if row["median_ms"]):
        if shown and shown != row["pass"]:
            table.add_section()
        base = ours.get(row["pass"])
        fraction = row["fraction_of_gemm"]
        table.add_row(
            row["pass"] if shown != row["pass"] else "",
            row["implementation"],
            _number(row["median_ms"]),
            _number(row["min_ms"]),
            _number(row["median_ms"] / base if base else None),
            _number(row["gflops"]),
            _number(None if fraction is None else 100 * fraction),
            _number(row["peak_mb"]),
        )
        shown = row["pass"]
    console = _console()
    console.print(table)
    for row in (row for row in rows if row["implementation"] == OURS and row["median_ms"]):
        flops = "unknown" if row["flops"] is None else f"{_number(row['flops'] / 1e9)} GFLOP"
        line = (
            f"  {row['pass']}: {flops}, at least {_number(row['bytes'] / 1e6)} MB; "
            f"{_number(row['floor_ms'])} ms by {row['bound']}"
        )
        console.print(line, markup=False, highlight=False)
    missing: dict[str, list[str]] = {}
    for row in (row for row in rows if row["error"]):
        missing.setdefault(f"{row['implementation']}: {row['error']}", []).append(row["pass"])
    for sentence, passes in missing.items():
        where = "" if len(passes) == len({r["pass"] for r in rows}) else f" [{'; '.join(passes)}]"
        console.print(f"  {sentence}{where}", markup=False, highlight=False)


def print_summary(rows: Sequence[Row]) -> None:
    """For each workload and pass: ours, the best of the others, and how much slower that is."""
    table = Table(title="Ours and the best of the others", title_justify="left")
    for name in ("workload", "pass"):
        table.add_column(name, no_wrap=True)
    table.add_column("ours, ms", justify="right")
    table.add_column("best other", no_wrap=True)
    table.add_column("ms", justify="right")
    table.add_column("x ours", justify="right")
    cases = dict.fromkeys((row["workload"], row["pass"]) for row in rows)
    for workload, name in cases:
        timed = {
            row["implementation"]: row["median_ms"]
            for row in rows
            if (row["workload"], row["pass"]) == (workload, name) and row["median_ms"]
        }
        ours = timed.get(OURS)
        others = {k: v for k, v in timed.items() if not k.startswith(OURS)}
        best = min(others, key=lambda k: others[k], default=None)
        time = others[best] if best else None
        ratio = time / ours if time and ours else None
        table.add_row(
            workload, name, _number(ours), best or "-", _number(time), _number(ratio, "x")
        )
    _console().print(table)


def print_change(first: Path, second: Path) -> None:
    """The change of each row from one file to another: the ratio of the medians.

    Raises:
        UserError: a file cannot be read, or they have no row in common.
    """
    a, b = load(first), load(second)

    def key(row: Row) -> tuple[str, str, str, str]:
        sizes = json.dumps(row["sizes"], sort_keys=True)
        return row["workload"], row["implementation"], row["pass"], sizes

    before = {key(row): row["median_ms"] for row in a["rows"]}
    common = [row for row in b["rows"] if row["median_ms"] and before.get(key(row))]
    if not common:
        raise UserError(f"{first} and {second} have no timed row in common")
    table = Table(title=f"{first.name} -> {second.name}", title_justify="left")
    for name in ("workload", "implementation", "pass"):
        table.add_column(name, no_wrap=True)
    for name in ("before, ms", "after, ms", "after/before"):
        table.add_column(name, justify="right")
    for row in common:
        ratio = row["median_ms"] / before[key(row)]
        style = "green" if ratio < 1 - _VISIBLE else "red" if ratio > 1 + _VISIBLE else None
        names = (row["workload"], row["implementation"], row["pass"])
        times = (_number(before[key(row)]), _number(row["median_ms"]))
        table.add_row(*names, *times, f"{ratio:.3f}", style=style)
    console = _console()
    console.print(table)
    for field in (
        "processor", "capability", "gpu", "precision", "threads", "dtype", "torch", "environment"
    ):  # fmt: skip
        old, new = a["provenance"].get(field), b["provenance"].get(field)
        if old != new:
            line = f"  not the same {field}: {old} and {new}"
            console.print(line, markup=False, highlight=False)


def _console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _WIDTH))


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}{unit}"
