"""Hierarchical tensor factorizations: evaluated, differentiated and measured at the speed of the
hardware."""

from importlib.metadata import PackageNotFoundError, version

import torch

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"htfkernels needs PyTorch 2.11 or newer, and this is {torch.__version__}")

from htfkernels.algebra import add, distance, inner, log_distance, log_norm, norm, scale, slog_inner
from htfkernels.functional import evaluate, evaluate_at, full_tensor, slog_evaluate
from htfkernels.nn import HTF
from htfkernels.runtime.dispatch import backends, use_backend
from htfkernels.runtime.memory import release_memory
from htfkernels.runtime.plan import Plan
from htfkernels.runtime.precision import use_precision
from htfkernels.schedule.index_cache import use_index_plans
from htfkernels.schedule.index_plan import IndexPlan
from htfkernels.spectra.ranks import (
    effective_rank,
    entanglement_entropy,
    nuclear_norm,
    numerical_rank,
    renyi2_rank,
    schatten_norm,
    stable_rank,
)
from htfkernels.tree import ModeTree, Node
from htfkernels.tree.layout import Layout

try:
    __version__ = version("htfkernels")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "HTF",
    "IndexPlan",
    "Layout",
    "ModeTree",
    "Node",
    "Plan",
    "add",
    "backends",
    "distance",
    "effective_rank",
    "entanglement_entropy",
    "evaluate",
    "evaluate_at",
    "full_tensor",
    "inner",
    "log_distance",
    "log_norm",
    "norm",
    "nuclear_norm",
    "numerical_rank",
    "release_memory",
    "renyi2_rank",
    "scale",
    "schatten_norm",
    "slog_evaluate",
    "slog_inner",
    "stable_rank",
    "use_backend",
    "use_index_plans",
    "use_precision",
]
