"""Factors of matricizations and their singular values by the CUDA kernels of csrc/spectra/.

Everything is float64, for weights of any dtype. Where a weight is infinite or not a number, factors
and singular values are NaN. Nothing waits for the device to say whether they converged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.cuda.spectra import Program, program
from htfkernels.cuda.spectra_tasks import widest
from htfkernels.ops.spectra.factors import Factors
from htfkernels.ops.spectra.reference import of_finite
from htfkernels.runtime.cuda_module import call
from htfkernels.runtime.finite import all_finite
from htfkernels.tree.layout import Layout

__all__ = ["factors", "singular_values", "svd"]


def singular_values(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool, keep: bool = True
) -> tuple[Tensor, Tensor, list[int], Sequence[Tensor]]:
    """See :func:`htfkernels.ops.spectra.singular_values`."""
    steps, kept = _run(layout, weights, nodes, gram)
    values, exponents = call(
        "spectra_values", *kept, steps.value_table, steps.value_launches, steps.value_sizes
    )
    return values + _nothing(weights), exponents, steps.counts, kept


def factors(
    layout: Layout,
    weights: Sequence[Tensor],
    nodes: Sequence[int],
    gram: bool,
    kept: Sequence[Tensor] = (),
) -> list[Factors]:
    """See :func:`htfkernels.ops.spectra.factors_of`."""
    steps = _program(layout, weights, nodes, gram)
    memory, exponents = kept or _run(layout, weights, nodes, gram)[1]
    nothing = _nothing(weights)
    found: dict[int, Factors] = {}
    for shape in steps.shapes:
        columns = torch.arange(shape.columns, device=memory.device)
        k, e = exponents[shape.exponents[:, :, None] + columns]
        frame, environment = (
            memory[at[:, None] + torch.arange(rows * shape.columns, device=memory.device)] + nothing
            for at, rows in zip(shape.at, shape.rows, strict=True)
        )
        scale = (k + e).amax(1)
        powers = (k + e - scale[:, None]).clamp_min(-1100).double().exp2()
        sides = (
            frame.unflatten(1, (-1, shape.columns)),
            environment.unflatten(1, (-1, shape.columns)) * powers[:, None, :],
        )
        each = zip(*(t.unbind(0) for t in (*sides, k, scale)), strict=True)
        found.update(zip(shape.nodes, (Factors(*one) for one in each), strict=True))
    return [found[i] for i in range(len(nodes))]


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """``[F, p, q] -> u [F, p, k], s [F, k], v [F, q, k]``, or None for wider matrices."""
    if max(matrices.shape[1:]) > widest():
        return None
    return of_finite(matrices, lambda m: call("spectra_svd", m.contiguous()))


def _program(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool
) -> Program:
    return program(layout, tuple(nodes), gram, weights[0].device)


def _nothing(weights: Sequence[Tensor]) -> Tensor:
    """0, or NaN where a weight is not finite: comparisons on the way may lose that."""
    return torch.where(all_finite(weights), 0.0, torch.nan)


def _run(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool
) -> tuple[Program, list[Tensor]]:
    steps = _program(layout, weights, nodes, gram)
    flat = torch.cat([w.detach().reshape(-1) for w in weights]).double()
    return steps, list(call("spectra_factors", flat, steps.table, steps.launches, steps.sizes))
