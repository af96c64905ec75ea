"""How many products of functions of two regions a network's output takes: its separation rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import htfkernels as hk
from htflearn.locality.profile import as_the_model, evaluating

__all__ = ["SeparationRank", "separation_rank"]


@dataclass(frozen=True, eq=False)
class SeparationRank:
    """Singular values of a function of two regions, one row for each output.

    Attributes:
        singular_values: ``[K, m]``, descending.
        numerical_rank: ``[K]`` int64, see :func:`htfkernels.numerical_rank`.
        effective_rank: ``[K]``, see :func:`htfkernels.effective_rank`.
    """

    singular_values: Tensor
    numerical_rank: Tensor
    effective_rank: Tensor

    @classmethod
    def of(cls, singular_values: Tensor, rtol: float | None = None) -> SeparationRank:
        """Ranks of singular values ``[K, m]``; ``rtol`` as in :func:`htfkernels.numerical_rank`."""
        return cls(
            singular_values,
            hk.numerical_rank(singular_values, rtol=rtol),
            hk.effective_rank(singular_values),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "singular_values": self.singular_values.tolist(),
            "numerical_rank": self.numerical_rank.tolist(),
            "effective_rank": self.effective_rank.tolist(),
        }


def separation_rank(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    mask: Tensor,
    *,
    output: int | None = None,
    rtol: float | None = None,
    batch_size: int = 512,
) -> SeparationRank:
    """The rank between two regions of the image, estimated from m images for any network::

        F[i, j] = f(pixels of region A from image i, all others from image j)

    The rank of F is at most the separation rank of f: the least number of summands
    ``u(x_A) v(x_rest)`` that make it up. For a :class:`htflearn.ConvAC` it is the rank of the
    matricization, as soon as m is as large as that and the images are in general position. Takes
    ``m^2`` evaluations.

    Args:
        model: images to outputs ``[B, K]`` or ``[B]``; its images come on the device and in the
            dtype of its first parameter.
        images: ``[m, C, H, W]`` of real numbers, two or more.
        mask: ``[H, W]`` bool, true in region A.
        output: which of the K; by default all of them.
        rtol: singular values above this fraction of the largest count; by default ``m eps`` with
            the outputs' precision ``eps``, which the rounding errors of a deep network in float32
            may well exceed: ranks are for float64.
        batch_size: evaluations at once.

    Returns:
        singular values ``[K, m]`` in float64, and their ranks.

    Raises:
        ValueError: images, mask or outputs of another shape or kind, an empty region, no such
            output, or outputs that are not finite.

    Example:
        >>> left = torch.arange(8).expand(8, 8) < 4
        >>> model = lambda x: x.flatten(1).sum(1)
        >>> separation_rank(model, torch.randn(6, 1, 8, 8).double(), left).numerical_rank
        tensor([2])
    """
    if images.ndim != 4 or not images.is_floating_point() or len(images) < 2:
        raise ValueError(
            "separation_rank: images must be two or more [m, C, H, W] of real numbers, got "
            f"{images.dtype} {list(images.shape)}"
        )
    if mask.dtype != torch.bool or mask.shape != images.shape[2:]:
        raise ValueError(
            f"separation_rank: mask must be bool {list(images.shape[2:])}, got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(
            "separation_rank: both regions must have pixels, the mask is all of a kind"
        )
    if batch_size < 1:
        raise ValueError(f"separation_rank: batch_size must be positive, got {batch_size}")
    values, eps = _values(model, images, mask, output, batch_size)
    if not values.isfinite().all():
        raise ValueError("separation_rank: the model's outputs are not finite")
    rtol = len(images) * eps if rtol is None else rtol
    return SeparationRank.of(torch.linalg.svdvals(values), rtol)


def _values(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    mask: Tensor,
    output: int | None,
    batch_size: int,
) -> tuple[Tensor, float]:
    """``F [K, m, m]`` in float64, and the precision of what the model gave."""
    count = len(images)
    found = []
    with evaluating(model), torch.no_grad():
        x = as_the_model(model, images)
        inside = mask.to(x.device)
        for pairs in torch.arange(count * count, device=x.device).split(batch_size):
            outputs = model(torch.where(inside, x[pairs // count], x[pairs % count]))
            if outputs.ndim not in (1, 2) or len(outputs) != len(pairs):
                raise ValueError(
                    f"separation_rank: the model must give [{len(pairs)}, K] or [{len(pairs)}] for "
                    f"{len(pairs)} images, it gave {list(outputs.shape)}"
                )
            outputs = outputs.reshape(len(pairs), -1)
            if output is not None:
                if not 0 <= output < outputs.shape[1]:
                    most = outputs.shape[1] - 1
                    raise ValueError(f"separation_rank: output must be in 0..{most}, got {output}")
                outputs = outputs[:, output : output + 1]
            found.append(outputs)
    matrix = torch.cat(found)
    eps = torch.finfo(matrix.dtype).eps
    return matrix.double().T.reshape(-1, count, count), eps
