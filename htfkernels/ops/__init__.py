"""The operations, one package each: what describes it, the formula in plain PyTorch, the backends.

A package registers its operation when it is imported (:mod:`htfkernels.runtime.operations`).
"""

from htfkernels.ops import (
    completion_step,
    evaluate,
    evaluate_at,
    full_tensor,
    group_rmsprop,
    index_plan,
    slog,
    spectra,
)

__all__ = [
    "completion_step",
    "evaluate",
    "evaluate_at",
    "full_tensor",
    "group_rmsprop",
    "index_plan",
    "slog",
    "spectra",
]
