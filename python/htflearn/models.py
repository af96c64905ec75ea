"""Matrix and tensor factorizations as the paper writes them, on the engine's trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import htfkernels as hk

__all__ = ["matrix_factorization", "tensor_factorization"]


def matrix_factorization(
    rows: int,
    columns: int,
    depth: int = 3,
    hidden: int | None = None,
    init_std: float = 1e-3,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> hk.HTF:
    """A deep matrix factorization ``W_1 W_2 ... W_depth``.

    Args:
        rows, columns: shape of the product.
        depth: number of matrices, at least 2.
        hidden: columns of every matrix but the last; by default ``min(rows, columns)``, so that the
            shapes leave the rank free.
        init_std: standard deviation of the normal initial weights.
        dtype, device: of the parameters.

    Returns:
        the model; ``full_tensor()`` is the product.

    Raises:
        ValueError: sizes that are not positive.

    Example:
        >>> model = matrix_factorization(6, 5, depth=3)
        >>> model.full_tensor().shape
        torch.Size([6, 5])
    """
    width = min(rows, columns) if hidden is None else hidden
    return hk.HTF(
        hk.ModeTree.chain(depth),
        (rows, columns),
        width,
        root="sum",
        init_std=init_std,
        dtype=dtype,
        device=device,
    )


def tensor_factorization(
    dims: Sequence[int],
    components: int,
    init_std: float = 1e-3,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> hk.HTF:
    """A tensor (CP) factorization: a sum of ``components`` outer products.

    Args:
        dims: ``D_n`` for each mode.
        components: number of outer products.
        init_std: standard deviation of the normal initial weights.
        dtype, device: of the parameters.

    Returns:
        the model; ``local_component_norms()[model.tree.root]`` are the norms of its components.

    Raises:
        ValueError: sizes that are not positive.

    Example:
        >>> model = tensor_factorization((4, 5, 3), components=6)
        >>> model.full_tensor().shape
        torch.Size([4, 5, 3])
    """
    return hk.HTF(
        hk.ModeTree.flat(len(dims)),
        tuple(dims),
        components,
        root="sum",
        init_std=init_std,
        dtype=dtype,
        device=device,
    )
