"""The benchmark: every implementation is held against float64 first, then all are timed in turn.

Here: what an implementation is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from htflearn.bench.workloads import Problem

__all__ = ["Implementation", "Prepared", "Skipped"]


class Skipped(Exception):
    """An implementation does not run on a workload; the sentence says why."""


@dataclass
class Prepared:
    """An implementation with everything done that is not to be timed.

    Attributes:
        forward: computes the result, differentiable by the weights and by ``inputs``.
        inputs: leaf tensors of vectors.
        by_mode: gradients of ``inputs`` -> one ``[B, D_n]`` for each mode.
        weights: leaf tensors to differentiate by; None: the model's own.
        by_weight: gradients of ``weights`` -> those of the model's weights.
        before: called before each run, outside the clock.
        setup_seconds: what preparing for these indices took, where that is worth knowing.
    """

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    by_mode: Callable[[Sequence[Tensor]], list[Tensor]] = list
    weights: list[Tensor] | None = None
    by_weight: Callable[[Sequence[Tensor]], list[Tensor]] = list
    before: Callable[[], None] | None = None
    setup_seconds: float | None = None


@dataclass(frozen=True)
class Implementation:
    """A way to compute.

    Attributes:
        summary: one line.
        prepare: raises :class:`Skipped` where it does not apply.
        limit: seconds that preparing and the first run of a pass may take, where that may be long.
    """

    summary: str
    prepare: Callable[[Problem], Prepared]
    limit: float | None = None
