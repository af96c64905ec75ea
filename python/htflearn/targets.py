"""Ground truths: random tensors of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

import htfkernels as hk

__all__ = ["make_target"]


def make_target(
    kind: Literal["matrix", "cp", "ht"],
    dims: Sequence[int],
    rank: int,
    norm: float,
    tree: hk.ModeTree | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A low-rank tensor: standard normal parameters, then scaled to a Frobenius norm.

    Args:
        kind: ``"matrix"`` (a product of two factors), ``"cp"``, or ``"ht"`` (equal local ranks).
        dims: ``D_n`` for each mode.
        rank: matrix rank, number of outer products, or local rank.
        norm: Frobenius norm of the result.
        tree: of an ``"ht"`` target; by default ``ModeTree.balanced``.
        generator: of the parameters. They are drawn in float64 whatever the dtype, so that a seed
            means the same target in every dtype.
        dtype: of the result.

    Returns:
        ``[D_1, ..., D_N]``.

    Raises:
        ValueError: there is no such kind, or the sizes do not fit it.

    Example:
        >>> target = make_target("cp", (4, 5, 3), rank=2, norm=10.0)
        >>> round(target.norm().item(), 3)
        10.0
    """
    order = len(dims)
    root: Literal["linear", "sum"] = "sum"
    if kind == "matrix" and order != 2:
        raise ValueError(f'make_target: a "matrix" has 2 modes, got dims {tuple(dims)}')
    if kind != "ht" and tree is not None:
        raise ValueError(f'make_target: only an "ht" target has a tree to choose, not {kind!r}')
    if kind == "ht":
        tree, root = hk.ModeTree.balanced(order) if tree is None else tree, "linear"
    elif kind in ("matrix", "cp"):
        tree = hk.ModeTree.flat(order)
    else:
        raise ValueError(f'make_target: kind must be "matrix", "cp" or "ht", got {kind!r}')
    model = hk.HTF(tree, tuple(dims), rank, root=root, dtype=torch.float64)
    with torch.no_grad():
        for weight in model.weights:
            weight.normal_(generator=generator)
        tensor = model.full_tensor()
        return (tensor * (norm / tensor.norm())).to(dtype or torch.get_default_dtype())
