"""A matricization as a product of small factors, and how a function changes with it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Factors", "Pull"]


class Factors(NamedTuple):
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
