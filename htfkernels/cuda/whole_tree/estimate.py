"""About how long an evaluation takes on a GPU: one launch for a whole tree, or one for each level.

A whole tree in one launch (``_C_cuda``) saves launches and never writes messages that only its own
block reads; but a block multiplies with the small tiles that fit beside all the rest, and its nodes
wait for each other. A launch for each level (Triton) has the better tiles and all of a level's
nodes at once, and pays for every launch and for every message. The first is for small batches and
small trees, and where between them the line is, is estimated here from what is known before the
data. The numbers are an H100's; they have not been held against measurements.
"""

from __future__ import annotations

import torch

from htfkernels.cuda.whole_tree import geometry as tree_geometry
from htfkernels.tree.layout import Layout

__all__ = ["PROCESSORS", "chosen", "levels_seconds"]

PROCESSORS = 132
LAUNCH = 3e-6
"""Seconds that a launch adds to a stream in which each launch waits for the one before it: about
1e-6 for the gap, the rest for the kernel's ramp and tail."""
BYTES_PER_SECOND = 2.5e12
"""That kernels of this kind reach, of an H100's 3.35e12."""

# Multiply-adds a second on all processors, about 60% of the peak.
_RATES = {"half": 300e12, "single": 150e12, "split": 50e12, "plain": 18e12, "double": 18e12}


def _kind(dtype: torch.dtype, precision: str) -> str:
    if dtype == torch.float64:
        return "double"
    if dtype != torch.float32:
        return "half"
    return {"ieee": "plain", "tf32": "single", "tf32x3": "split"}[precision]


def levels_seconds(
    layout: Layout, rows: int, dtype: torch.dtype, precision: str, backward: bool
) -> float:
    """Seconds of an evaluation level by level.

    Args:
        layout: tree and shapes.
        rows: of the batch.
        dtype: of the numbers.
        precision: of float32 products, see :func:`htfkernels.use_precision`.
        backward: with the gradients of weights and vectors.
    """
    steps = layout.steps
    multiply_adds = rows * sum(s.rows * s.cols for s in steps)
    # Messages are written once and read once; vectors and weights are read.
    moved = rows * (sum(2 * s.cols for s in steps) + sum(s.rows for s in steps if s.mode >= 0))
    moved += sum(g.count * g.rows * g.cols for g in layout.groups)
    launches = layout.tree.depth
    if backward:  # both products of the gradients, and their messages; sums over the batch's parts
        multiply_adds *= 3
        moved *= 3
        launches += 2 * layout.tree.depth + 1
    busy = max(
        multiply_adds / _RATES[_kind(dtype, precision)],
        moved * dtype.itemsize / BYTES_PER_SECOND,
    )
    return launches * LAUNCH + busy


def chosen(layout: Layout, rows: int, dtype: torch.dtype, precision: str) -> tuple[bool, str]:
    """Whether the whole tree in one launch is estimated to be the faster way for an evaluation and
    its gradients, and a phrase that says by what numbers."""
    whole = tree_geometry.seconds(layout, rows, dtype, precision, PROCESSORS, backward=True)
    levels = levels_seconds(layout, rows, dtype, precision, backward=True)
    phrase = (
        f"for {rows} rows with gradients, estimated {whole * 1e6:.0f} us in one launch each way, "
        f"{levels * 1e6:.0f} us level by level"
    )
    return whole <= levels, phrase
