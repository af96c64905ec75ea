"""Spectra with what PyTorch has: a level's nodes in one batch, no loop over nodes.

The formulas are those of :func:`htfkernels.spectra.matricizations.matricization_spectra`. Frames
and environments never have more rows than columns. ``R(KhatriRao(F_1, F_2) W)`` is taken as
``R(KhatriRao(F_1, F_2)) W``, which saves a product of as many rows as the Khatri-Rao product has,
and a decomposition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["by_gram", "by_qr", "effective_ranks", "renyi2_ranks", "renyi2_ranks_by_gram"]

Side = tuple[Tensor, bool]  # [F, rows, R] and True, or the Gram matrix [F, R, R] and False


def by_qr(weights: Sequence[Tensor]) -> list[Tensor]:
    """Singular values by QR decompositions.

    Args:
        weights: ``[F, R_in, R_out]`` of each level of a binary tree, leaves first, in which node
            ``i`` of a level has the children ``2 i`` and ``2 i + 1``, and the root one output.

    Returns:
        ``[F, K]`` for each level but the root's.
    """
    frames = [_triangle(weights[0])]
    for w in weights[1:-1]:
        product = _triangle(_khatri_rao(frames[-1][0::2], frames[-1][1::2]))
        frames.append(_triangle(product @ w))
    environment = weights[0].new_ones(1, 1, 1)
    values = []
    for w, frame in zip(reversed(weights[1:]), reversed(frames), strict=True):
        above = _triangle(environment @ w.mT)
        product = _khatri_rao(above[:, None], _siblings(frame))
        environment = _triangle(product).flatten(0, 1)
        values.append(torch.linalg.svdvals(frame @ environment.mT))
    return values[::-1]


def by_gram(weights: Sequence[Tensor]) -> list[Tensor]:
    """Singular values by Gram matrices, ``sqrt(eig(L^T H L))`` with the Cholesky factor ``L L^T =
    G``, the fastest there is; it raises where a frame has linearly dependent columns.

    Differentiable: what is zero to rounding has no derivative.

    Args:
        weights: as :func:`by_qr` takes them.

    Returns:
        ``[F, K]`` for each level but the root's.
    """
    values = []
    for (f, f_explicit), (e, e_explicit) in _sides(weights):
        if f_explicit and e_explicit:
            values.append(torch.linalg.svdvals(f @ e.mT))
            continue
        if f_explicit:
            squared = f @ e @ f.mT
        elif e_explicit:
            squared = e @ f @ e.mT
        else:
            root = torch.linalg.cholesky(f)
            squared = root.mT @ e @ root
        eigenvalues = torch.linalg.eigvalsh(squared).flip(-1)
        floor = torch.finfo(f.dtype).eps * eigenvalues.detach()[:, :1].clamp_min(1e-300)
        values.append(eigenvalues.maximum(floor).sqrt())
    return values[::-1]


def renyi2_ranks_by_gram(weights: Sequence[Tensor]) -> list[Tensor]:
    """``tr(G H)^2 / tr(G H G H)`` of each node, without any decomposition.

    Args:
        weights: as :func:`by_qr` takes them.

    Returns:
        ``[F]`` for each level but the root's.
    """
    ranks = []
    for (f, f_explicit), (e, e_explicit) in _sides(weights):
        if f_explicit and e_explicit:
            m = f @ e.mT
            p = m @ m.mT if m.shape[1] <= m.shape[2] else m.mT @ m
        elif f_explicit:
            p = f @ e @ f.mT
        else:
            p = e @ f @ e.mT if e_explicit else f @ e
        trace = p.diagonal(dim1=1, dim2=2).sum(-1)
        ranks.append(trace.square() / (p * p.mT).sum((1, 2)))
    return ranks[::-1]


def effective_ranks(values: Tensor) -> Tensor:
    """``exp(entropy(s / sum s))`` of ``[F, K]`` positive numbers."""
    shares = values / values.sum(-1, keepdim=True)
    return (-torch.xlogy(shares, shares).sum(-1)).exp()


def renyi2_ranks(values: Tensor) -> Tensor:
    """``(sum s^2)^2 / sum s^4`` of ``[F, K]``, not all zero."""
    squares = (values / values.detach()[:, :1]).square()
    return squares.sum(-1).square() / squares.square().sum(-1)


def _sides(weights: Sequence[Tensor]) -> Iterator[tuple[Side, Side]]:
    """Frames and environments, level by level, leaves last."""
    frames = [_through((weights[0], True))]
    for w in weights[1:-1]:
        x, explicit = frames[-1]
        product, explicit = _product((x[0::2], explicit), (x[1::2], explicit))
        frames.append(_through((product @ w, True)) if explicit else (w.mT @ product @ w, False))
    environment: Side = (weights[0].new_ones(1, 1, 1), True)
    for w, frame in zip(reversed(weights[1:]), reversed(frames), strict=True):
        e, explicit = environment
        above = _through((e @ w.mT, True)) if explicit else (w @ e @ w.mT, False)
        e, explicit = _product((above[0][:, None], above[1]), (_siblings(frame[0]), frame[1]))
        environment = (e.flatten(0, 1), explicit)
        yield frame, environment


def _through(side: Side) -> Side:
    x, explicit = side
    return (x.mT @ x, False) if explicit and x.shape[-2] > x.shape[-1] else side


def _product(a: Side, b: Side) -> Side:
    (x, x_explicit), (y, y_explicit) = a, b
    if x_explicit and y_explicit and x.shape[-2] * y.shape[-2] <= x.shape[-1]:
        return _khatri_rao(x, y), True
    return (x.mT @ x if x_explicit else x) * (y.mT @ y if y_explicit else y), False


def _siblings(x: Tensor) -> Tensor:
    """``[F, ..] -> [F / 2, 2, ..]``: of each pair of children, the other one's."""
    return x.unflatten(0, (-1, 2)).flip(1)


def _khatri_rao(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., :, None, :] * y[..., None, :, :]).flatten(-3, -2)


def _triangle(x: Tensor) -> Tensor:
    return x if x.shape[-2] <= x.shape[-1] else torch.linalg.qr(x, mode="r").R
