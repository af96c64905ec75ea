"""What the CUDA C++ kernels compute, and what they leave to others."""

from __future__ import annotations

from collections.abc import Callable

import torch

from htfkernels.cuda import planned, spectra, tree
from htfkernels.layout import Layout

__all__ = ["OPS", "why_not"]

Limit = Callable[[Layout, torch.dtype], str | None]


def _any_layout(layout: Layout, dtype: torch.dtype) -> None:
    """No layout is left to others."""


OPS: dict[str, tuple[frozenset[torch.dtype], Limit]] = {
    "evaluate": (tree.DTYPES, tree.why_not),
    "evaluate_at": (tree.DTYPES, tree.why_not_at),
    "evaluate_at_planned": (tree.DTYPES, planned.why_not),
    "index_plan": (frozenset({torch.int64}), _any_layout),
    # A step is planned evaluation, its backward and the optimizer's step.
    "completion_step": (frozenset({torch.float32, torch.float64}), planned.why_not),
    "group_rmsprop": (frozenset({torch.float32, torch.float64, torch.bfloat16}), _any_layout),
    "spectra": (spectra.DTYPES, spectra.why_not),
}
"""For each operation its dtypes, and why a layout is not computed, or None."""


def why_not(op: str, layout: Layout | None, dtype: torch.dtype) -> str | None:
    """None where there are kernels for an operation, else one sentence that says why not. Without a
    layout: whether there are any."""
    if op not in OPS:
        return f"cuda has no {op}; it has {', '.join(sorted(OPS)) or 'none'}"
    dtypes, limit = OPS[op]
    if dtype not in dtypes:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"cuda computes {op} in {names}, not in {dtype}"
    return None if layout is None else limit(layout, dtype)
