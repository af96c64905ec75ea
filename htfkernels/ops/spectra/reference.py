"""Factors of the matricizations at a tree's nodes: the formula, in plain PyTorch.

``F_leaf = R(W)``, ``F_v = R(R(KhatriRao(F_c)) W_v)``; at the root ``E = 1``, for a child ``c`` of
``v`` ``E_c = R(KhatriRao(E_v W_v^T, F_siblings))``. ``R(X)`` is ``X``, or where it has more rows
than columns a factor with ``R^T R = X^T X``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from htfkernels.ops.spectra.factors import Factors
from htfkernels.runtime.finite import all_finite
from htfkernels.tree.layout import Layout

Scaled = tuple[Tensor, Tensor]  # columns near 1, and the powers of two that they are to be taken by


def singular_values(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool, keep: bool
) -> tuple[Tensor, Tensor, list[int], Sequence[Tensor]]:
    """See :func:`htfkernels.ops.spectra.singular_values`."""
    pairs = [values(*both) for both in _of_nodes(layout, weights, nodes, gram)]
    each = [s for s, _ in pairs]
    flat = torch.cat(each) if each else weights[0].new_empty(0, dtype=torch.float64)
    exponents = torch.tensor([k for _, k in pairs], dtype=torch.int64, device=flat.device)
    return flat, exponents, [len(s) for s in each], []


def factors(
    layout: Layout,
    weights: Sequence[Tensor],
    nodes: Sequence[int],
    gram: bool,
    kept: Sequence[Tensor],
) -> list[Factors]:
    """See :func:`htfkernels.ops.spectra.factors_of`."""
    result = []
    for (frame, k), (environment, e) in _of_nodes(layout, weights, nodes, gram):
        scale = int((k + e).amax())
        powers = torch.ldexp(torch.ones_like(environment[0]), (k + e - scale).double())
        result.append(Factors(frame, environment * powers, k, scale))
    return result


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`htfkernels.ops.spectra.svd`."""

    def run(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        return u, s, vh.mT

    return of_finite(matrices, run)


def of_finite(
    matrices: Tensor, run: Callable[[Tensor], Sequence[Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """A decomposition that may not end, or may lose a NaN, where a matrix is not finite."""
    finite = matrices.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    u, s, v = run(torch.where(finite, matrices, 0))
    u, v = (torch.where(finite, x, torch.nan) for x in (u, v))
    return u, torch.where(finite[:, 0], s, torch.nan), v


def _of_nodes(
    layout: Layout, weights: Sequence[Tensor], nodes: Sequence[int], gram: bool
) -> list[tuple[Scaled, Scaled]]:
    finite = bool(all_finite(weights))
    known = weights if finite else [torch.zeros_like(w) for w in weights]
    frames, environments = frames_and_environments(layout, known, gram)
    found = [(frames[n], environments[n]) for n in nodes]
    if finite:
        return found
    # Every matricization has all entries of the tensor.
    return [((f + torch.nan, j), (e + torch.nan, k)) for (f, j), (e, k) in found]


def frames_and_environments(
    layout: Layout, weights: Sequence[Tensor], gram: bool
) -> tuple[list[Scaled], list[Scaled]]:
    """Of every node the frame ``[rows, R_out]`` and the environment ``[rows, R_out]``, float64,
    with the exponents ``[R_out]`` of their columns."""
    tree, device = layout.tree, weights[0].device
    shrink = _by_gram if gram else _by_qr
    frames: list[Scaled] = []
    for node in tree.nodes:
        w = _weight(layout, weights, node.index)
        if node.is_leaf:
            through, exponents = _scaled(w, torch.zeros_like(w[:, 0], dtype=torch.int64))
        else:
            product, exponents = _khatri_rao([frames[c.index] for c in node.children], shrink)
            weight, exponents = _scaled(w, exponents)
            through = product @ weight
        frame, grown = _normalised(through)
        frames.append((_by_qr(frame), exponents + grown))
    outputs = torch.eye(layout.out_features, dtype=torch.float64, device=device)
    environments: list[Scaled] = [_normalised(outputs)] * len(tree.nodes)
    for node in reversed(tree.interior):
        w = _weight(layout, weights, node.index)
        e, exponents = environments[node.index]
        scaled = _scaled(w.T, exponents)
        above, exponents = _normalised(e @ scaled[0])
        above = _by_qr(above)
        for child in node.children:
            others = [frames[c.index] for c in node.children if c != child]
            environments[child.index] = _khatri_rao(
                [(above, exponents + scaled[1]), *others], shrink
            )
    return frames, environments


def values(frame: Scaled, environment: Scaled) -> tuple[Tensor, int]:
    """Singular values of ``F E^T``, descending, near 1, and the power of two they are to be taken
    by; NaN where a factor is not finite."""
    exponents = frame[1] + environment[1]
    largest = int(exponents.amax())
    scale = torch.ldexp(torch.ones_like(frame[0][0]), (exponents - largest).double())
    matrix = (frame[0] * scale) @ environment[0].T
    if not bool(matrix.isfinite().all()):
        return matrix.new_full((min(matrix.shape),), torch.nan), 0
    s = torch.linalg.svdvals(matrix)
    k = int(torch.frexp(s[0]).exponent)
    return torch.ldexp(s, torch.tensor(-float(k), device=s.device)), largest + k


def _weight(layout: Layout, weights: Sequence[Tensor], node: int) -> Tensor:
    if node not in layout.location:
        return torch.ones(layout.ranks[-1], 1, dtype=torch.float64, device=weights[0].device)
    group, slot = layout.location[node]
    return weights[group][slot].double()


def _khatri_rao(factors: list[Scaled], shrink: Callable[[Tensor], Tensor]) -> Scaled:
    (product, exponents), *rest = factors
    for factor, more in rest:
        product = shrink((product[:, None, :] * factor[None, :, :]).flatten(0, 1))
        product, grown = _normalised(product)
        exponents = exponents + more + grown
    return product, exponents


def _scaled(w: Tensor, exponents: Tensor) -> Scaled:
    """``2^exponents W``, its columns near 1, and their exponents."""
    mantissa, own = torch.frexp(w)
    own = torch.where(mantissa == 0, -(2**40), own + exponents[:, None])
    top = own.amax(0).clamp_min(-(2**30))
    return torch.ldexp(mantissa, (own - top).clamp_min(-1100).double()), top


def _normalised(x: Tensor) -> Scaled:
    exponents = torch.frexp(x.abs().amax(0)).exponent.long()
    return torch.ldexp(x, -exponents.double()), exponents


def _by_qr(x: Tensor) -> Tensor:
    return x if x.shape[0] <= x.shape[1] else torch.linalg.qr(x, mode="r").R


def _by_gram(x: Tensor) -> Tensor:
    if x.shape[0] <= x.shape[1]:
        return x
    values, vectors = torch.linalg.eigh(x.T @ x)
    return (vectors * values.clamp_min(0).sqrt()).T
