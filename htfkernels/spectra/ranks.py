"""Rank measures and norms of singular values ``s [..., K]``, in any order.

All are differentiable, except the numerical rank; the ranks do not change when ``s`` is scaled and
are 0 where all singular values are. Derivatives are finite everywhere: where one does not exist (at
vanishing singular values, or at a largest one that is not alone) a subgradient is taken. Where a
singular value is NaN, so are the measures; the numerical rank, an integer, raises.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from htfkernels.arguments import came, shown

__all__ = [
    "effective_rank",
    "entanglement_entropy",
    "nuclear_norm",
    "numerical_rank",
    "renyi2_rank",
    "schatten_norm",
    "stable_rank",
]


def numerical_rank(s: Tensor, tol: float | None = None, rtol: float | None = None) -> Tensor:
    """Number of singular values above a tolerance.

    The default is NumPy's, ``tol = max(s) * K * eps``, with the number ``K`` of singular values in
    the place of the larger dimension of the matrix. NumPy's bounds the rounding errors of a matrix
    with that many rows; a factored tensor of order N has matricizations of ``D ** (N - 1)`` columns
    that nobody stores, and its singular values come from cores of at most ``R x R``.

    Args:
        s: ``[..., K]``.
        tol: absolute tolerance.
        rtol: tolerance relative to the largest singular value.

    Returns:
        ``[...]`` int64.

    Raises:
        ValueError: both tolerances are given, or one is not a number of at least 0; a singular
            value is infinite or NaN. A compiled graph and ``torch.func`` have -1 then.

    Example:
        >>> numerical_rank(torch.tensor([3.0, 1e-3, 1e-9])), numerical_rank(
        ...     torch.tensor([3.0, 1e-3, 1e-9]), rtol=0.01
        ... )
        (tensor(2), tensor(1))
    """
    _check_values("numerical_rank", s)
    if tol is not None and rtol is not None:
        raise ValueError(f"numerical_rank: expected tol or rtol, got both ({tol} and {rtol})")
    for name, given in (("tol", tol), ("rtol", rtol)):
        if given is not None and not (_is_number(given) and given >= 0):
            raise ValueError(
                f"numerical_rank: {name} must be a number of at least 0, got {shown(given)}"
            )
    if s.shape[-1] == 0:
        return torch.zeros(s.shape[:-1], dtype=torch.int64, device=s.device)
    largest = s.amax(-1, keepdim=True)
    relative = s.shape[-1] * torch.finfo(s.dtype).eps if rtol is None else rtol
    threshold = largest * _in_range(relative) if tol is None else _in_range(tol)
    count = (s > threshold).sum(-1)
    finite = largest.squeeze(-1).isfinite()
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.where(finite, count, -1)
    if not bool(finite.all()):
        raise ValueError("numerical_rank: a singular value is infinite or not a number")
    return count


def _check_values(op: str, s: Any) -> None:
    dense = isinstance(s, Tensor) and s.layout is torch.strided and not s.is_nested
    if not dense or not s.is_floating_point() or s.dim() == 0:
        kind = f"{s.dtype} {came(s)}" if isinstance(s, Tensor) else came(s)
        raise ValueError(f"{op}: s must be singular values [..., K], floating point, got {kind}")


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) or (isinstance(x, Tensor) and x.numel() == 1)


def _in_range(x: Any) -> Any:
    """A number that is not negative; infinity in place of an integer that no float holds."""
    try:
        return x if isinstance(x, Tensor) else float(x)
    except OverflowError:
        return math.inf


def effective_rank(s: Tensor) -> Tensor:
    """``exp(entropy(s / sum(s)))`` (Roy & Vetterli, 2007).

    Example:
        >>> effective_rank(torch.ones(5)).round()
        tensor(5.)
    """
    _check_values("effective_rank", s)
    entropy = _entropy(_shares(s))
    return torch.where(_any(s), entropy.exp(), torch.zeros_like(entropy))


def renyi2_rank(s: Tensor) -> Tensor:
    """``(sum s^2)^2 / sum s^4``: the exponential of the Rényi entropy of order 2 of ``s^2 / sum
    s^2``; the inverse participation ratio. It needs traces only, see
    :meth:`htfkernels.HTF.renyi2_ranks`.

    Example:
        >>> renyi2_rank(torch.tensor([2.0, 2.0, 0.0]))
        tensor(2.)
    """
    _check_values("renyi2_rank", s)
    squares = _scaled(s).square()
    return _ratio(squares.sum(-1).square(), squares.square().sum(-1))


def stable_rank(s: Tensor) -> Tensor:
    """``sum s^2 / max(s)^2``, the squared Frobenius norm over the squared spectral norm (Rudelson
    & Vershynin, 2007).

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 0.0]))
        tensor(1.2500)
    """
    _check_values("stable_rank", s)
    squares = _scaled(s).square()
    return _ratio(squares.sum(-1), squares.amax(-1) if s.shape[-1] else squares.sum(-1))


def entanglement_entropy(s: Tensor) -> Tensor:
    """``-sum p log p`` with ``p = s^2 / sum s^2``, in nats: the von Neumann entropy of one half of
    a pure state whose Schmidt coefficients are ``s``. 0 where all singular values are.

    Example:
        >>> (entanglement_entropy(torch.ones(8)) / math.log(2)).round()  # in bits
        tensor(3.)
    """
    _check_values("entanglement_entropy", s)
    return _entropy(_shares(_scaled(s).square()))


def nuclear_norm(s: Tensor) -> Tensor:
    """``sum s``: the Schatten norm with ``p = 1``."""
    _check_values("nuclear_norm", s)
    return s.sum(-1)


def schatten_norm(s: Tensor, p: float) -> Tensor:
    """``(sum s^p)^(1/p)``; ``p = 1`` is the nuclear norm, 2 Frobenius, ``math.inf`` spectral.

    Args:
        s: ``[..., K]``.
        p: positive; below 1 a quasi-norm, whose derivative grows without bound as a singular value
            goes to 0 (at 0 it is taken for 0).

    Raises:
        ValueError: ``p`` is not positive.

    Example:
        >>> schatten_norm(torch.tensor([3.0, 4.0]), 2)
        tensor(5.)
    """
    _check_values("schatten_norm", s)
    if not (_is_number(p) and p > 0):
        raise ValueError(f"schatten_norm: p must be a positive number, got {shown(p)}")
    if s.shape[-1] == 0:
        return s.sum(-1)
    p = _in_range(p)
    if math.isinf(p):
        return s.amax(-1)
    # Where s is 0 the derivative of s^p is not finite for p < 1.
    positive = ~_not_positive(s)
    scale = _largest(s)
    powers = torch.where(positive, s / scale, torch.ones_like(s)) ** p
    total = torch.where(positive, powers, torch.zeros_like(s)).sum(-1)
    some = ~_not_positive(total)
    root = torch.where(some, total, torch.ones_like(total)) ** (1 / p)
    return torch.where(some, root * scale.squeeze(-1), torch.zeros_like(total))


def _not_positive(x: Tensor) -> Tensor:
    """Whether a number is 0 (or less): what is NaN is not, and stays where this decides."""
    return x.detach() <= 0


def _largest(s: Tensor) -> Tensor:
    """The largest of each row as a constant, 1 where it is 0."""
    top = s.detach().amax(-1, keepdim=True)
    return torch.where(_not_positive(top), torch.ones_like(top), top)


def _scaled(s: Tensor) -> Tensor:
    """The same up to a constant factor of each row, squares and fourth powers in range."""
    return s / _largest(s) if s.shape[-1] else s


def _any(s: Tensor) -> Tensor:
    return ~_not_positive(s).all(-1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    zero = _not_positive(denominator)
    safe = torch.where(zero, torch.ones_like(denominator), denominator)
    return torch.where(zero, torch.zeros_like(numerator), numerator / safe)


def _shares(s: Tensor) -> Tensor:
    s = _scaled(s)
    total = s.sum(-1, keepdim=True)
    return s / torch.where(_not_positive(total), torch.ones_like(total), total)


def _entropy(p: Tensor) -> Tensor:
    # entr(0) = 0 too, but with an infinite derivative.
    zero = _not_positive(p)
    safe = torch.where(zero, torch.ones_like(p), p)
    return -torch.where(zero, torch.zeros_like(p), p * safe.log()).sum(-1)
