"""Factors of matricizations and their singular values by the operators of csrc/spectra/."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.ops.spectra.factors import Factors
from htfkernels.runtime.compiled import call
from htfkernels.tree.layout import Layout

__all__ = ["factors", "singular_values", "svd"]

_MOST = 64  # rows or columns of a matrix; above, one LAPACK call after another is as fast


def singular_values(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool, keep: bool
) -> tuple[Tensor, Tensor, list[int], Sequence[Tensor]]:
    """See :func:`htfkernels.ops.spectra.singular_values`."""
    packed = _packed(layout, weights, nodes, gram, keep)
    frames, environments, table, _ = packed
    values, exponents = call("factor_values", frames, environments, table, list(nodes))
    sizes = [_count(row) for row in table[list(nodes)].tolist()]
    return values, exponents, sizes, packed


def factors(
    layout: Layout,
    weights: Sequence[Tensor],
    nodes: Sequence[int],
    gram: bool,
    kept: Sequence[Tensor],
) -> list[Factors]:
    """See :func:`htfkernels.ops.spectra.factors_of`."""
    packed = kept or _packed(layout, weights, nodes, gram, True)
    frames, environments, table, exponents = packed
    result = []
    for row in table[list(nodes)].tolist():
        frame, frame_rows, environment, environment_rows, cols, ld, first, scale, *_ = row
        result.append(
            Factors(
                frames.as_strided((frame_rows, cols), (ld, 1), frame),
                environments.as_strided((environment_rows, cols), (ld, 1), environment),
                exponents[first : first + cols],
                scale,
            )
        )
    return result


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """``[F, p, q] -> u [F, p, k], s [F, k], v [F, q, k]``, NaN where a matrix is not finite; None
    for larger matrices."""
    if min(matrices.shape[1:]) > _MOST:
        return None
    u, s, v = call("small_svd", matrices)
    return u, s, v


def _packed(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool, keep: bool
) -> Sequence[Tensor]:
    arguments = (weights, layout.program, list(nodes), int(gram), int(keep))
    packed: Sequence[Tensor] = call("spectral_factors", *arguments)
    return packed


def _count(row: list[int]) -> int:
    _, frame_rows, _, environment_rows, *_, rows, _ = row
    return min(rows, frame_rows // rows * environment_rows)
