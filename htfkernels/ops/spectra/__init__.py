"""``spectra``: the matricizations at a tree's nodes as products of small factors, and their
singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htfkernels.finite import all_finite
from htfkernels.ops import autograd
from htfkernels.ops.spectra import reference
from htfkernels.plan import Plan

__all__ = ["Factors", "Pull", "factors_of", "pullback", "singular_values", "svd"]


@dataclass(frozen=True)
class Factors:
    """A matricization ``M_v = U_v E_v^T``, without its many rows and columns.

    Attributes:
        frame: ``[rows, R_out]``, float64; ``Q frame 2^frame_exponents = U_v`` with ``Q^T Q = 1``.
        environment: ``[rows, R_out]``; ``Q environment 2^(scale - frame_exponents) = E_v``.
        frame_exponents: ``[R_out]``, int64.
        scale: a power of two; an int64 tensor ``[]`` where reading it would wait for a device.
    """

    frame: Tensor
    environment: Tensor
    frame_exponents: Tensor
    scale: int | Tensor


class Pull(NamedTuple):
    """How a function changes with a node's matricization.

    Attributes:
        weight: ``[K]``, the derivative by each singular value times the value over 2.
        left, right: ``[R_out, K]``; the singular vectors are ``U_v left`` and ``E_v right``, in
            the scale of :class:`Factors`.
        columns: ``[R_out]``, the factors' ``frame_exponents``.
        scale: the power of two of the matricization, as in :class:`Factors`.
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    columns: Tensor
    scale: int | Tensor


def singular_values(
    plan: Plan,
    weights: Sequence[Tensor],
    nodes: Sequence[int],
    gram: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, list[int], list[Tensor]]:
    """Of some nodes (no repetitions) the singular values.

    Returns:
        all values in one flat float64 tensor, between 0 and about 1, or NaN, all of them, where a
        weight is infinite or not a number; int64 ``[nodes]``, the powers
        of two that they are to be taken by; how many there are of each; with ``keep`` what
        :func:`factors_of` would compute again.
    """
    if plan.backend == "cpp":
        packed = _packed(plan, weights, nodes, gram, keep)
        frames, environments, table, _ = packed
        values, exponents = autograd.call("factor_values", frames, environments, table, list(nodes))
        sizes = [_count(row) for row in table[list(nodes)].tolist()]
        return values, exponents, sizes, packed if keep else []
    if plan.backend == "cuda":
        found = _cuda().singular_values(plan.layout, weights, nodes, gram)
        values, exponents, sizes, packed = found
        return values, exponents, sizes, packed if keep else []
    pairs = [
        reference.values(frame, environment)
        for frame, environment in _reference_factors(plan, weights, nodes, gram)
    ]
    each = [s for s, _ in pairs]
    flat = torch.cat(each) if each else weights[0].new_empty(0, dtype=torch.float64)
    exponents = torch.tensor([k for _, k in pairs], dtype=torch.int64, device=flat.device)
    return flat, exponents, [len(s) for s in each], []


def _packed(
    plan: Plan, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool, keep: bool
) -> list[Tensor]:
    arguments = (weights, plan.layout.program, list(nodes), int(gram), int(keep))
    return list(autograd.call("spectral_factors", *arguments))


def factors_of(
    plan: Plan,
    weights: Sequence[Tensor],
    nodes: Sequence[int],
    gram: bool,
    kept: Sequence[Tensor] = (),
) -> list[Factors]:
    """Of some nodes (no repetitions) the factors, from what :func:`singular_values` kept if that is
    given."""
    if plan.backend == "cpp":
        packed = kept or _packed(plan, weights, nodes, gram, True)
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
    if plan.backend == "cuda":
        found = _cuda().factors(plan.layout, weights, nodes, gram, kept)
        return [Factors(*each) for each in found]
    result = []
    for (frame, k), (environment, e) in _reference_factors(plan, weights, nodes, gram):
        scale = int((k + e).amax())
        powers = torch.ldexp(torch.ones_like(environment[0]), (k + e - scale).double())
        result.append(Factors(frame, environment * powers, k, scale))
    return result


def pullback(
    plan: Plan, weights: Sequence[Tensor], nodes: Sequence[int], pulls: Sequence[Pull]
) -> tuple[Tensor, ...]:
    """Gradients of the weights, compiled."""
    weight, left, right, columns, scales = (list(each) for each in zip(*pulls, strict=True))
    arguments = (weights, plan.layout.program, list(nodes), left, right, weight, columns, scales)
    return tuple(autograd.call("matricization_pullback", *arguments))


# Above, one LAPACK call after another is as fast.
_MOST = 64


def svd(matrices: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """``[F, p, q] -> u [F, p, k], s [F, k], v [F, q, k]``; NaN where a matrix is not finite."""
    if backend == "cpp" and min(matrices.shape[1:]) <= _MOST:
        u, s, v = autograd.call("small_svd", matrices)
        return u, s, v
    finite = matrices.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    matrices = torch.where(finite, matrices, 0)
    if backend == "cuda" and (found := _cuda().svd(matrices)) is not None:
        u, s, v = found
    else:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        v = vh.mT
    u, v = (torch.where(finite, x, torch.nan) for x in (u, v))
    return u, torch.where(finite[:, 0], s, torch.nan), v


def _cuda() -> Any:
    return import_module("htfkernels.ops.spectra.cuda")


def _count(row: list[int]) -> int:
    _, frame_rows, _, environment_rows, *_, rows, _ = row
    return min(rows, frame_rows // rows * environment_rows)


def _reference_factors(
    plan: Plan, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool
) -> list[tuple[reference.Scaled, reference.Scaled]]:
    finite = bool(all_finite(weights))
    known = weights if finite else [torch.zeros_like(w) for w in weights]
    frames, environments = reference.factors(plan.layout, known, gram)
    found = [(frames[n], environments[n]) for n in nodes]
    if finite:
        return found
    # Every matricization has all entries of the tensor.
    return [((f + torch.nan, j), (e + torch.nan, k)) for (f, j), (e, k) in found]
