"""Factors of matricizations and their singular values by the CUDA kernels of csrc/spectra/.

All is float64 whatever the weights' dtype. Where a weight is infinite or not a number, so are
singular values: that they did not converge nobody waits to hear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.cuda.module import call
from htfkernels.cuda.spectra import WIDEST, Program, program
from htfkernels.layout import Layout

__all__ = ["factors", "singular_values", "svd"]


def singular_values(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool
) -> tuple[Tensor, Tensor, list[int], list[Tensor]]:
    """Values, exponents, how many there are of each node, and what :func:`factors` can be given
    (see :func:`htfkernels.ops.spectra.singular_values`)."""
    steps, kept = _run(layout, weights, nodes, gram)
    values, exponents = call(
        "spectra_values", *kept, steps.value_table, steps.value_launches, steps.value_sizes
    )
    return values, exponents, steps.counts, kept


def factors(
    layout: Layout,
    weights: Sequence[Tensor],
    nodes: Sequence[int],
    gram: bool,
    kept: Sequence[Tensor] = (),
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each node the frame ``[rows, R]``, the environment ``[rows, R]``, the frame's exponents
    ``[R]``, int64, and the scale ``[]``, int64 (see :class:`htfkernels.ops.spectra.Factors`)."""
    steps = _program(layout, weights, nodes, gram)
    memory, exponents = kept or _run(layout, weights, nodes, gram)[1]
    found = []
    for frame, environment in steps.sides:
        k = exponents[frame.exponents :][: frame.columns]
        e = exponents[environment.exponents :][: environment.columns]
        scale = (k + e).amax()
        found.append(
            (
                memory[frame.at :][: frame.rows * frame.columns].view(-1, frame.columns),
                memory[environment.at :][: environment.rows * environment.columns].view(
                    -1, environment.columns
                )
                * (k + e - scale).clamp_min(-1100).double().exp2(),
                k,
                scale,
            )
        )
    return found


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """``[F, p, q] -> u [F, p, k], s [F, k], v [F, q, k]``, or None for wider matrices."""
    if max(matrices.shape[1:]) > WIDEST:
        return None
    u, s, v = call("spectra_svd", matrices.contiguous())
    return u, s, v


def _program(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool
) -> Program:
    return program(layout, tuple(nodes), gram, weights[0].device)


def _run(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool
) -> tuple[Program, list[Tensor]]:
    steps = _program(layout, weights, nodes, gram)
    flat = torch.cat([w.detach().reshape(-1) for w in weights]).double()
    return steps, list(call("spectra_factors", flat, steps.table, steps.launches, steps.sizes))
