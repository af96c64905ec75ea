"""The benchmark: every implementation is held against float64 first, then all are timed in turn.

Here: what an implementation is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from htflearn.bench.workloads import Problem

__all__ = ["Implementation", "Prepared", "Skipped"]


class Skipped(Exception):
    """An implementation does not run on a workload; the sentence says why."""


@dataclass
class Prepared:
    """An implementation with everything done that is not to be timed.

    Attributes:
        forward: computes the result, differentiable by the weights and by ``inputs``; None where
            each pass computes something else.
        inputs: leaf tensors of vectors.
        by_mode: gradients of ``inputs`` -> one ``[B, D_n]`` for each mode.
        weights: leaf tensors to differentiate by; None: the model's own.
        by_weight: gradients of ``weights`` -> those of the model's weights.
        before: called before each run, outside the clock.
        setup_seconds: what preparing for these indices took, where that is worth knowing.
        by_pass: pass -> what it computes, where that is not ``forward``; or a sentence that says
            why there is no such pass.
        by_node: what a pass computes, of spectra -> one tensor for each node but the root.
        captured: each pass runs as one CUDA graph, captured before it is checked.
        allocates: whether a run takes its memory when it runs; where it replays graphs of its own,
            nobody can tell.
    """

    forward: Callable[[], Tensor] | None
    inputs: list[Tensor]
    by_mode: Callable[[Sequence[Tensor]], list[Tensor]] = list
    weights: list[Tensor] | None = None
    by_weight: Callable[[Sequence[Tensor]], list[Tensor]] = list
    before: Callable[[], None] | None = None
    setup_seconds: float | None = None
    by_pass: Mapping[str, Callable[[], Any] | str] = field(default_factory=dict)
    by_node: Callable[[Any], list[Tensor]] = list
    captured: bool = False
    allocates: bool = True

    def computes(self, which: str) -> Callable[[], Any]:
        """What a pass computes.

        Raises:
            Skipped: there is no such pass.
        """
        found = self.by_pass.get(which, self.forward)
        if found is None or isinstance(found, str):
            raise Skipped(found or "it has no such pass")
        return found


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
