"""When an index plan is worth what it takes to build."""

from __future__ import annotations

import heapq
import math
from functools import lru_cache

from htfkernels.tree.checks import as_int
from htfkernels.tree.layout import Layout

__all__ = ["STEP", "passes_to_pay"]

# What building takes on one thread: a plan, each pair of operands and each leaf, and a sample of
# these. And what a pass saves with each row of a node that is not computed: its multiply-adds, and
# reading and writing it. Fitted to 500 trees and batches on a Xeon with AVX-512.
SECONDS_PER_PLAN = 40e-6
SECONDS_PER_NODE = 10e-6
SECONDS_PER_ID = 4e-9
SECONDS_PER_ROW = 8e-9
MULTIPLY_ADDS_PER_SECOND = 50e9
STEP = 3  # passes: forward, and backward for both operands of each product


@lru_cache(maxsize=256)
def passes_to_pay(layout: Layout, batch: int) -> float:
    """How many passes save as much time as a plan takes to build: for indices drawn uniformly."""
    if not isinstance(layout, Layout):
        raise ValueError(f"pays: layout must be a Layout, got {type(layout).__name__}")
    if as_int("pays: batch", batch) < 0:
        raise ValueError(f"pays: batch must not be negative, got {batch}")
    if batch >= 2**31 or max(layout.mode_dims) >= 2**31:
        return math.inf  # a plan counts in 32 bits
    steps = layout.steps
    operands: list[list[float]] = [[] for _ in steps]  # logarithms of their numbers of cells
    saved, looked_at = 0.0, 0  # seconds of a pass; pairs and leaves

    def shared(cells: float, multiply_adds: int) -> bool:
        nonlocal saved, looked_at
        looked_at += 1
        rows = _expected_distinct(cells, batch)
        if rows > batch // 2:
            return False
        each = multiply_adds / MULTIPLY_ADDS_PER_SECOND + SECONDS_PER_ROW
        saved += (batch - rows) * each
        return True

    for s, step in enumerate(steps):
        below = operands[s]
        whole = len(below) == len(step.children)
        if step.mode >= 0:
            below.append(math.log(step.rows))
            looked_at += 1
        elif whole and len(below) == 1:
            whole = shared(below[0], step.rows * step.cols)
        else:  # two at a time, as the builder combines them
            heapq.heapify(below)
            while len(below) > 1:
                both = heapq.heappop(below) + heapq.heappop(below)
                sends = step.cols if whole and not below else 0
                if not shared(both, step.rows * (1 + sends)):
                    whole = False
                    break
                heapq.heappush(below, both)
        if step.parent >= 0 and whole and len(below) == 1:
            operands[step.parent].append(below[0])
    building = SECONDS_PER_PLAN + looked_at * (batch * SECONDS_PER_ID + SECONDS_PER_NODE)
    return building / saved if saved else math.inf


def _expected_distinct(log_cells: float, batch: int) -> float:
    """Of ``batch`` balls in ``exp(log_cells)`` bins: the expected number of bins that have one."""
    if log_cells > 40:
        return float(batch)
    cells = math.exp(log_cells)
    return -cells * math.expm1(-batch / cells)
