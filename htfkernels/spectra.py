"""Singular values of every matricization of a tree, from its factors, without the tensor.

The matricization at a node ``v`` (rows: the modes of ``v``; columns: all others) is ``M_v = U_v
E_v^T`` with the node's frame ``U_v`` (its message for every index tuple) and its environment
``E_v``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from htfkernels.tree import ModeTree, Node

__all__ = ["matricization_spectra"]


def matricization_spectra(
    tree: ModeTree,
    weights: Mapping[Node, Tensor],
    nodes: Iterable[Node] | None = None,
    method: str = "auto",
) -> dict[Node, Tensor]:
    """Singular values of ``M_v`` for nodes ``v``, descending.

    With ``"qr"`` frames and environments are kept as triangular factors ``F`` (``U_v = Q F_v``),
    so that ``sigma(M_v) = sigma(F_v E_v^T)`` to full precision: ``F_leaf = R(W)``, ``F_v =
    R(KhatriRao(F_c) W_v)``, ``E_c = R(KhatriRao(E_v W_v^T, F_siblings))``. With ``"gram"`` they
    are Gram matrices (float64 inside), cheaper, accurate to about 1e-8 of the largest singular
    value.

    Args:
        tree: the mode tree.
        weights: ``[R_in, R_out]`` for every node.
        nodes: which nodes; by default all but the root. At the root of a model with several outputs
            the outputs are the columns.
        method: ``"qr"``, ``"gram"`` or ``"auto"`` (= ``"qr"``).

    Returns:
        for each node at most ``min(prod D of its modes, R_out)`` singular values.

    Raises:
        ValueError: there is no such method, or a node is of another tree.
    """
    if method not in ("auto", "qr", "gram"):
        raise ValueError(
            f'matricization_spectra: method must be "auto", "qr" or "gram", got {method!r}'
        )
    wanted = [n for n in tree.nodes if not n.is_root] if nodes is None else list(nodes)
    foreign = next((n for n in wanted if n.tree != tree), None)
    if foreign is not None:
        raise ValueError(f"matricization_spectra: {foreign} is a node of another tree")
    spectrum = _by_grams if method == "gram" else _by_factors
    return spectrum(tree, {n.index: w for n, w in weights.items()}, wanted)


def _by_factors(
    tree: ModeTree, weights: dict[int, Tensor], wanted: list[Node]
) -> dict[Node, Tensor]:
    dtype = weights[0].dtype
    if dtype in (torch.float16, torch.bfloat16):  # LAPACK has neither
        weights = {i: w.float() for i, w in weights.items()}
    frames: dict[int, Tensor] = {}
    for node in tree.nodes:
        w = weights[node.index]
        frames[node.index] = _triangle(
            w if node.is_leaf else _rows([frames[c.index] for c in node.children]) @ w
        )
    outputs = weights[tree.root.index].shape[1]
    environments = {
        tree.root.index: torch.eye(outputs, dtype=frames[0].dtype, device=frames[0].device)
    }
    for node in reversed(tree.interior):
        above = environments[node.index] @ weights[node.index].T
        for child in node.children:
            others = [frames[c.index] for c in node.children if c != child]
            environments[child.index] = _triangle(_rows([above, *others]))
    return {
        n: torch.linalg.svdvals(frames[n.index] @ environments[n.index].T).to(dtype) for n in wanted
    }


def _by_grams(tree: ModeTree, weights: dict[int, Tensor], wanted: list[Node]) -> dict[Node, Tensor]:
    dtype = next(iter(weights.values())).dtype
    double = {i: w.double() for i, w in weights.items()}
    up: dict[int, Tensor] = {}
    for node in tree.nodes:
        w = double[node.index]
        inner = w if node.is_leaf else reduce(torch.mul, [up[c.index] for c in node.children]) @ w
        up[node.index] = w.T @ inner
    down = {
        tree.root.index: torch.eye(
            double[tree.root.index].shape[1], dtype=torch.float64, device=inner.device
        )
    }
    for node in reversed(tree.interior):
        w = double[node.index]
        above = w @ down[node.index] @ w.T
        for child in node.children:
            down[child.index] = reduce(
                torch.mul, [above, *(up[c.index] for c in node.children if c != child)]
            )
    spectra = {}
    for node in wanted:
        root = _root_of_gram(up[node.index])
        squared = torch.linalg.eigvalsh(root.T @ down[node.index] @ root).flip(0)
        size = min(math.prod(weights[m].shape[0] for m in node.modes), squared.numel())
        spectra[node] = squared[:size].clamp_min(0).sqrt().to(dtype)
    return spectra


def _root_of_gram(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()


def _rows(factors: list[Tensor]) -> Tensor:
    """Row-wise Khatri-Rao product, triangularised as it grows so that it never has more than R rows
    too many."""

    def pair(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None, :] * b[None, :, :]).flatten(0, 1)

    product = factors[0]
    for factor in factors[1:]:
        product = pair(_triangle(product), factor)
    return product


def _triangle(matrix: Tensor) -> Tensor:
    """A matrix with the same Gram matrix and at most as many rows as columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else torch.linalg.qr(matrix, mode="r").R
