"""Weights of the same tensor whose messages are near 1: powers of two, carried apart.

Multiplying a column of a node's weight by ``2^k`` and the same row of its parent's by ``2^-k``
changes nothing, and both are exact. Only one power is left over, the tensor's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.tree import ModeTree

__all__ = ["balance", "scaled"]

_LOWEST = -(2**40)


def scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """``x 2^exponent`` for float64 and int64, exactly; exponents beyond 2044 count as that."""
    exponent = exponent.clamp(-2044, 2044)
    half = exponent // 2
    return x * _power(half) * _power(exponent - half)


def _power(exponent: Tensor) -> Tensor:
    """``2^exponent``, exactly, for -1022..1023: the bits of the number."""
    return ((exponent + 1023) << 52).view(torch.float64)


@torch.no_grad()
def balance(tree: ModeTree, weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Powers of two that bring all that subtrees stand for near 1.

    The norm of a column of a node's frame ``U_v`` is the square root of a diagonal entry of ``G_v =
    W_v^T (hadamard of the children's G) W_v``; each is divided by the nearest power of two.

    Args:
        tree: the mode tree.
        weights: float64, ``[R_in, R_out]`` for each node of ``tree.nodes``.

    Returns:
        integers ``p_v [R_in, R_out]`` for each node, and ``t []``: the tensor of the weights is
        ``2^t`` times the one of ``W_v 2^(p_v)``, whose norm is between 1/2 and 1, as are those of
        the products of columns that meet at any node (if terms do not cancel to less than 1e-8).

    Example:
        >>> weights = [torch.full((1, 1), w).double() for w in (4.0, 8.0, 1.0)]
        >>> powers, total = balance(ModeTree.flat(2), weights)
        >>> int(total)  # 32 is 1/2 times
        6
    """
    eps = torch.finfo(torch.float64).eps
    powers: list[Tensor] = []
    grams: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    exponents: dict[int, Tensor] = {}
    for node, w in zip(tree.nodes, weights, strict=True):
        below = torch.zeros(w.shape[0], dtype=torch.int64, device=w.device)
        norm = torch.ones(w.shape[0], dtype=torch.float64, device=w.device)
        alive = norm != 0
        inner = None
        for child in node.children:
            # Their product's norms are kept near 1, not each child's: there may be thousands.
            c = child.index
            own = norms.pop(c)
            alive = alive & (own != 0)
            norm = norm * torch.where(own == 0, 1, own)
            shift = torch.frexp(norm).exponent.long()
            norm = norm * _power(-shift)
            powers[c] = powers[c] - shift
            below = below + exponents.pop(c) + shift
            gram = scaled(grams.pop(c), -(shift[:, None] + shift))
            inner = gram if inner is None else inner * gram
        exponent = torch.frexp(w).exponent.long()
        # The largest term of each column's sum; columns of zeros are taken to be like the others,
        # and rows that meet zeros do not count, but must not overflow.
        seen = (w != 0) & alive[:, None]
        top = torch.where(seen, exponent + below[:, None], _LOWEST).amax(0)
        top = torch.where(top == _LOWEST, top.amax(), top)
        top = torch.where(top == _LOWEST, 0, top)
        power = below[:, None] - (top.amax() if node.is_root else top)
        power = torch.where(seen, power, power.minimum(30 - exponent))
        near = scaled(w, power)
        image = near if inner is None else inner @ near
        if node.is_root:  # of many outputs only the diagonal is needed
            squares = (near * image).sum(0)
        else:
            grams[node.index] = near.T @ image
            squares = grams[node.index].diagonal()
        # Where terms cancel, rounding errors are all that is left of the squares.
        bound = near.abs().T @ (norm * alive)
        norms[node.index] = squares.maximum(eps * bound.square()).sqrt()
        exponents[node.index] = top
        powers.append(power)
    root = tree.root.index
    last = torch.frexp(norms[root].norm()).exponent.long()
    powers[root] = powers[root] - last
    return powers, exponents[root].amax() + last
