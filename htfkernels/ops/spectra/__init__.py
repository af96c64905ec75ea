"""``spectra``: the matricizations at a tree's nodes as products of small factors, and their
singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from htfkernels.ops.spectra import reference
from htfkernels.ops.spectra.factors import Factors, Pull
from htfkernels.runtime.compiled import call
from htfkernels.runtime.graphs import fake, without_gradient
from htfkernels.runtime.operations import (
    FLOATS,
    NO_FLOAT16,
    Family,
    Operation,
    Runs,
    load,
    register,
)
from htfkernels.runtime.plan import Plan

__all__ = ["SPECTRA", "Factors", "Pull", "factors_of", "pullback", "singular_values", "svd"]

SPECTRA = register(
    Operation(
        "spectra",
        backends={
            "cpp": Runs(
                NO_FLOAT16,
                module="htfkernels.ops.spectra.cpp",
                family=Family("cpp", "spectra", ("float64",)),
            ),
            "cuda": Runs(
                FLOATS,  # of the weights; all is computed in float64
                module="htfkernels.ops.spectra.cuda",
                limit="htfkernels.cuda.spectra:why_not",
                family=Family("cuda", "spectra", ("float64",)),
            ),
        },
    )
)


def singular_values(
    plan: Plan,
    weights: Sequence[Tensor],
    nodes: Sequence[int],
    gram: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, list[int], Sequence[Tensor]]:
    """Of some nodes (no repetitions) the singular values.

    Returns:
        all values in one flat float64 tensor, between 0 and about 1, or NaN, all of them, where a
        weight is infinite or not a number; int64 ``[nodes]``, the powers of two that they are to be
        taken by; how many there are of each; with ``keep`` what :func:`factors_of` would compute
        again.
    """
    found = _on(plan.backend).singular_values(plan.layout, weights, nodes, gram, keep)
    values, exponents, sizes, kept = found
    return values, exponents, sizes, kept if keep else []


def factors_of(
    plan: Plan,
    weights: Sequence[Tensor],
    nodes: Sequence[int],
    gram: bool,
    kept: Sequence[Tensor] = (),
) -> list[Factors]:
    """Of some nodes (no repetitions) the factors, from what :func:`singular_values` kept if that is
    given."""
    found: list[Factors] = _on(plan.backend).factors(plan.layout, weights, nodes, gram, kept)
    return found


def pullback(
    plan: Plan, weights: Sequence[Tensor], nodes: Sequence[int], pulls: Sequence[Pull]
) -> tuple[Tensor, ...]:
    """Gradients of the weights, compiled."""
    weight, left, right, columns, scales = (list(each) for each in zip(*pulls, strict=True))
    arguments = (weights, plan.layout.program, list(nodes), left, right, weight, columns, scales)
    return tuple(call("matricization_pullback", *arguments))


def svd(matrices: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """``[F, p, q] -> u [F, p, k], s [F, k], v [F, q, k]``; NaN where a matrix is not finite."""
    found: tuple[Tensor, Tensor, Tensor] | None = _on(backend).svd(matrices)
    return reference.svd(matrices) if found is None else found


def _on(backend: str) -> Any:
    """The module of a backend: they have the same functions."""
    return reference if backend == "reference" else load(SPECTRA.backends[backend].module)


# Sizes depend on the program.


@fake("spectral_factors")
def _(
    weights: list[Tensor], program: Tensor, wanted: list[int], gram: int, keep: int
) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    nodes = size()
    return [
        weights[0].new_empty(size(), dtype=torch.float64),
        weights[0].new_empty(size(), dtype=torch.float64),
        program.new_empty(nodes, 10),
        program.new_empty(size()),
    ]


@fake("factor_values")
def _(frames: Tensor, environments: Tensor, table: Tensor, wanted: list[int]) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return [frames.new_empty(size), table.new_empty(len(wanted))]


@fake("matricization_pullback")
def _(
    weights: list[Tensor],
    program: Tensor,
    wanted: list[int],
    left: list[Tensor],
    right: list[Tensor],
    weight: list[Tensor],
    exponents: list[Tensor],
    scales: list[int],
) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


@fake("small_svd")
def _(matrices: Tensor) -> list[Tensor]:
    count, p, q = matrices.shape
    k = min(p, q)
    return [matrices.new_empty(s) for s in ((count, p, k), (count, k), (count, q, k))]


for _name in ("spectral_factors", "factor_values", "matricization_pullback", "small_svd"):
    without_gradient(_name)
