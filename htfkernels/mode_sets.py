"""Singular values of the matricization with any set of modes as rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from htfkernels.tree import ModeTree, Node

__all__ = ["matricization_spectrum"]


def matricization_spectrum(
    tree: ModeTree, weights: Mapping[Node, Tensor], modes: Iterable[int]
) -> Tensor:
    """Singular values of the matricization with any set of modes as rows, in the tree or not.

    A node's message, rows and columns apart, is a core ``[a, b, R]`` between orthonormal bases of
    the rows and the columns below it. Only the cores are kept: Kronecker product of the children's
    in ``a`` and ``b``, Hadamard product in ``r``, times ``W_v``, then QR of both sides.

    Args:
        tree: the mode tree.
        weights: ``[R_in, R_out]`` for every node.
        modes: the rows' modes; the outputs, where there are several, are columns.

    Returns:
        the singular values, descending.

    Raises:
        ValueError: ``modes`` is empty, or names a mode twice or one that is not there.
    """
    rows = list(modes)
    if not rows or len(set(rows)) < len(rows) or not set(rows) <= set(range(tree.order)):
        raise ValueError(
            f"matricization_spectrum: modes must be distinct, of 0..{tree.order - 1}, got {rows}"
        )
    dtype = weights[tree.root].dtype
    cores: dict[int, Tensor] = {}
    for node in tree.nodes:
        w = weights[node].float() if dtype in (torch.float16, torch.bfloat16) else weights[node]
        if node.is_leaf:
            core = w[:, None] if node.index in rows else w[None]
        else:
            children = [cores.pop(c.index) for c in node.children]
            core = reduce(_kronecker, children) @ w
        cores[node.index] = _compressed(_compressed(core).transpose(0, 1)).transpose(0, 1)
    return torch.linalg.svdvals(cores[tree.root.index].flatten(1)).to(dtype)


def _kronecker(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None, :, None] * y[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def _compressed(core: Tensor) -> Tensor:
    """The same core on a basis of its rows: at most ``b R`` of them."""
    return _triangle(core.flatten(1)).unflatten(1, core.shape[1:])


def _triangle(matrix: Tensor) -> Tensor:
    """A matrix with the same Gram matrix and at most as many rows as columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else torch.linalg.qr(matrix, mode="r").R
