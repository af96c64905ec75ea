"""Files of ``htf bench`` as one Markdown table: ours, the fastest other, and the machine's limits.

python bench/gpu_report.py bench/results/gpu-*.json --out bench/results/gpu.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from htflearn.bench.implementations import OURS
from htflearn.bench.report import Row, load
from htflearn.errors import UserError

HEADER = (
    "| workload | pass | in | ours, ms | CUDA graph, ms | fastest other | ms | other / ours "
    "| of GEMM | of the floor | peak MB: ours / other |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)
NOTE = """
"other / ours" compares the faster of our two columns with the fastest of the others, those that
replay a CUDA graph included. "Of GEMM" is the rate of the multiply-adds that are needed over
`torch.mm`'s best in the same run, dtype and precision; "of the floor" the least time, by that rate
or by the bytes over the copy bandwidth, over the time taken.
"""


def number(value: float | None, unit: str = "") -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:#.3g}".rstrip(".") + unit


def percent(value: float | None) -> str:
    """A fraction in percent, or a dash."""
    return "-" if value is None else f"{100 * value:.0f}%"


def fastest(rows: Iterable[Row]) -> Row | None:
    """The timed row that took least, or None."""
    timed = [row for row in rows if row["median_ms"]]
    return min(timed, key=lambda row: row["median_ms"], default=None)


def line(rows: Sequence[Row], kind: str) -> str:
    """One line of the table: all implementations of one workload and pass."""
    # Ours by any way that a user would take; the others' ways of the same idea are others.
    ways = (OURS, f"{OURS}, CUDA graph")
    eager, graph = (
        next((row for row in rows if row["implementation"] == way), None) for way in ways
    )
    ours = fastest(row for row in (eager, graph) if row)
    other = fastest(row for row in rows if not row["implementation"].startswith(OURS))
    # Memory is compared as it is without graphs, whose pools are not a step's.
    plain = fastest(
        row for row in rows if not row["implementation"].startswith(OURS) and row["peak_mb"]
    )
    first = rows[0]
    ratio = other["median_ms"] / ours["median_ms"] if ours and other else None
    cells = [
        first["workload"],
        first["pass"],
        kind,
        number(eager and eager["median_ms"]),
        number(graph and graph["median_ms"]),
        other["implementation"] if other else "-",
        number(other and other["median_ms"]),
        number(ratio, "x"),
        percent(ours and ours["fraction_of_gemm"]),
        percent(first["floor_ms"] / ours["median_ms"] if ours else None),
        f"{number(eager and eager['peak_mb'])} / {number(plain and plain['peak_mb'])}",
    ]
    return f"| {' | '.join(cells)} |\n"


def machine(made: dict[str, Any]) -> str:
    """What a file was made on, and when."""
    gpu = made.get("gpu")
    if not gpu:
        where = f"no GPU: {made['processor']}"
    else:
        drives = f"driver {made['driver']}, CUDA {made['cuda']}, triton {made['triton']}"
        where = f"{gpu} (capability {made['gpu_capability']}, {drives})"
    rounding = f", {made['precision']}" if "float32" in made["dtype"] and gpu else ""
    return (
        f"- {made['dtype']}{rounding}: {where}, torch {made['torch']}, {made['date']}, commit "
        f"{made['commit']}; GEMM {made['gemm_gflops'] / 1e3:.3g} TFLOP/s, copy "
        f"{made['copy_gb_per_s']:.4g} GB/s; `{made['command']}`\n"
    )


def markdown(files: Sequence[dict[str, Any]]) -> str:
    """The table of several files, under what they were made on."""
    head, body, missing = "", "", dict[str, None]()
    for data in files:
        made, rows = data["provenance"], data["rows"]
        head += machine(made)
        kind = made["dtype"] + (
            f" ({made['precision']})" if made.get("precision") == "tf32" else ""
        )
        for case in dict.fromkeys((row["workload"], row["pass"]) for row in rows):
            body += line([r for r in rows if (r["workload"], r["pass"]) == case], kind)
        for row in (row for row in rows if row["error"] and row["error"].startswith(("w", "f"))):
            where = f"{row['workload']}, {row['pass']}, {kind}"
            missing[f"- {row['implementation']} ({where}): {row['error']}\n"] = None
    failures = f"\nNot timed, since wrong or failed:\n\n{''.join(missing)}" if missing else ""
    return f"{head}\n{HEADER}{body}{NOTE}{failures}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of htf bench --out")
    parser.add_argument("--out", type=Path, help="a Markdown file; standard output by default")
    given = parser.parse_args()
    try:
        text = markdown([load(path) for path in given.files])
    except UserError as error:
        print(f"gpu_report: {error}")
        return 2
    if given.out is None:
        print(text, end="")
    else:
        given.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
