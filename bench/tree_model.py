"""How long the whole-tree kernels take over different cuts, and what the model of time says.

For some trees and batches, forward and backward passes over a sample of the cuts that the search
looks at, in every height of tiles, are captured in CUDA graphs and timed. Printed are the measured
and the estimated times, how much slower the chosen cut is than the fastest of the sample, and the
constants that a least squares fit of the model's terms to the small batches gives:

    python bench/tree_model.py
    python bench/tree_model.py --seconds 20 --out tree-model.json
    HTF_EMULATE_CUDA=1 python bench/tree_model.py     # tiny: a check where there is no GPU
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from index_plan_device import provenance
from torch import Tensor

import htfkernels as hk
from htfkernels.cuda.whole_tree import run as tree_run
from htfkernels.cuda.whole_tree.geometry import Geometry, launches
from htfkernels.cuda.whole_tree.tree import Cut
from htfkernels.runtime import cuda_module as module
from htfkernels.tree.layout import Layout
from htflearn.bench import report
from htflearn.bench.device import Replay

LAUNCHES = 20  # of a graph

TERMS = {
    "forward": ("launch", "product", "arrival"),
    "backward": ("launch", "up", "path", "down"),
}


@dataclass(frozen=True)
class Problem:
    """A balanced tree of equal sizes, and a batch."""

    order: int
    dim: int
    rank: int
    batch: int
    dtype: torch.dtype = torch.float32
    precision: str = "tf32"

    def __str__(self) -> str:
        how = self.precision if self.dtype == torch.float32 else str(self.dtype).split(".")[1]
        return f"N {self.order}, D {self.dim}, R {self.rank}, B {self.batch}, {how}"


PROBLEMS = (
    Problem(64, 16, 64, 1),
    Problem(32, 16, 32, 64),
    Problem(16, 8, 16, 1024),
    Problem(64, 16, 64, 1024),
    Problem(64, 16, 64, 1, precision="ieee"),
    Problem(16, 8, 16, 1024, torch.bfloat16),
    Problem(64, 16, 64, 256, torch.bfloat16),
    Problem(16, 8, 16, 64, torch.float64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=6, help="of each problem")
    parser.add_argument("--seconds", type=float, default=60, help="no more are begun after these")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    options = parser.parse_args()
    problems: tuple[Problem, ...] = PROBLEMS
    if module.emulated():  # the times say nothing
        problems = tuple(Problem(8, 4, 8, 3, p.dtype, p.precision) for p in PROBLEMS[-4:])
    device = module.device_type()
    reason = module.why_not(device)
    if reason is not None:
        raise SystemExit(f"the whole-tree kernels cannot be timed here: {reason}")
    end = time.monotonic() + options.seconds
    where, rows = provenance(device), []
    for problem in problems:
        found = []
        for row in measure(problem, device, options.cuts, lambda: time.monotonic() > end):
            found.append(row)
            show(row)
        if found:
            rows += found
            print(chosen(problem, found), flush=True)
            # Written as it goes: what was measured is not lost with the rest.
            if options.out:
                report.save(options.out, where, rows)
    for name, terms in TERMS.items():
        print(fit([row for row in rows if row["pass"] == name], terms, name))


def measure(
    problem: Problem, device: str, cuts: int, over: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """A row for each pass over each cut of the sample, as they are measured."""
    torch.manual_seed(0)
    layout = Layout.make(hk.ModeTree.balanced(problem.order), problem.dim, problem.rank)
    weights = [
        torch.randn(len(g.nodes), g.rows, g.cols, device=device).mul_(g.rows**-0.5)
        for g in layout.groups
    ]
    weights = [w.to(problem.dtype) for w in weights]
    x = torch.randn(problem.batch, layout.offsets[-1], device=device).to(problem.dtype)
    made = tree_run.evaluation(layout.program, weights[0], x, problem.precision)
    how = (problem.batch, *made.how)
    own = (  # the model's choice, before another is fixed
        made.forward(problem.batch, True).geometry,
        made.backward(problem.batch, needs(weights)).geometry,
    )
    for cut in sample(made.tree.cuts, own[0].cut, cuts):
        up, down = (list(launches(made.tree, *how, backward, [cut])) for backward in (False, True))
        for pair in pairs_of(up, down):
            if over():
                return
            made.fix(problem.batch, pair)
            seconds = times(made, weights, x)
            for name, g, chosen, measured in zip(TERMS, pair, own, seconds, strict=True):
                yield {
                    "problem": str(problem),
                    "pass": name,
                    "subtrees": len(cut.roots),
                    "rows": g.rows,
                    "tiles": g.tiles,
                    "splits": g.splits,
                    "shared_bytes": g.shared_bytes,
                    "chosen": (cut, g.rows) == (chosen.cut, chosen.rows),
                    "estimated_us": g.seconds * 1e6,
                    "measured_us": measured * 1e6,
                    "terms": terms(g, name),
                }


def pairs_of(up: list[Geometry], down: list[Geometry]) -> Iterator[tuple[Geometry, Geometry]]:
    """Pairs with every one of both at least once; none where one is empty: it does not fit."""
    for i in range(max(len(up), len(down)) if up and down else 0):
        yield up[min(i, len(up) - 1)], down[min(i, len(down) - 1)]


def needs(weights: list[Tensor]) -> tuple[bool, ...]:
    return (True,) * (len(weights) + 1)


def sample(cuts: tuple[Cut, ...], own: Cut, count: int) -> list[Cut]:
    """So many cuts, evenly spread, and the chosen one."""
    places = {round(i) for i in np.linspace(0, len(cuts) - 1, min(count, len(cuts)))}
    return [cut for i, cut in enumerate(cuts) if i in places or cut is own]


def times(made: tree_run.Evaluation, weights: list[Tensor], x: Tensor) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    result, kept = tree_run.forward(made, weights, x, True)

    def up() -> Tensor:
        return [tree_run.forward(made, weights, x, True) for _ in range(LAUNCHES)][-1][0]

    def down() -> list[Tensor]:
        call = (made, result, weights, x, kept, needs(weights))
        return [tree_run.backward(*call) for _ in range(LAUNCHES)][-1]

    if not x.is_cuda:
        up(), down()
        return 1e-6, 1e-6
    found = []
    for step in (up, down):
        replay = Replay(step)
        replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
        for mark in marks:
            replay()
            mark.record()
        torch.cuda.synchronize()
        each = [a.elapsed_time(b) for a, b in pairwise(marks)]
        found.append(float(np.median(each)) * 1e-3 / LAUNCHES)
    return found[0], found[1]


def terms(g: Geometry, name: str) -> list[int]:
    """How often each of the model's terms is on the longest way of a block."""
    longest, tree = [0] * 3, g.cut.tree
    for root in g.cut.roots:
        inside, path = len(tree.subtree(root)), len(tree.path(root))
        if name == "forward":
            ways = [inside + path, path]
        else:
            ways = [inside - 1, path, inside + (1 if path else 0)]
        longest = max(longest, ways, key=sum)
    each = 1 if name == "forward" else -(-g.tiles // max(1, g.splits))
    return [1, *(each * n for n in longest)]


def show(row: dict[str, Any]) -> None:
    mark = ", chosen" if row["chosen"] else ""
    print(
        f"{row['problem']}: {row['pass']}, {row['subtrees']} subtrees, {row['tiles']} tiles of "
        f"{row['rows']}, {row['splits']} splits: {row['measured_us']:.1f} us, estimated "
        f"{row['estimated_us']:.1f}{mark}"
    )


def chosen(problem: Problem, rows: list[dict[str, Any]]) -> str:
    """How the model's choice compares with the fastest of the sample."""
    parts = []
    for name in TERMS:
        all_of = [row for row in rows if row["pass"] == name]
        fastest = min(all_of, key=lambda row: row["measured_us"])
        own = min((r["measured_us"] for r in all_of if r["chosen"]), default=float("nan"))
        parts.append(
            f"{name} {own:.1f} us as chosen, {fastest['measured_us']:.1f} with "
            f"{fastest['subtrees']} subtrees in tiles of {fastest['rows']}"
        )
    return f"== {problem}: {'; '.join(parts)}"


def fit(rows: list[dict[str, Any]], names: tuple[str, ...], what: str) -> str:
    """The constants that explain the measured times best, each time counting for as much."""
    few = [row for row in rows if row["tiles"] * row["subtrees"] <= 264]
    if len(few) < len(names):
        return f"== {what}: too few times for a fit"
    measured = np.array([row["measured_us"] for row in few])
    matrix = np.array([row["terms"] for row in few], dtype=float) / measured[:, None]
    found, *_ = np.linalg.lstsq(matrix, np.ones(len(few)), rcond=None)
    off = np.abs(matrix @ found - 1)
    constants = ", ".join(f"{n} {us:.2f} us" for n, us in zip(names, found, strict=True))
    return f"== {what}: {constants}; {np.median(off):.0%} off in the median of {len(few)}"


if __name__ == "__main__":
    main()
