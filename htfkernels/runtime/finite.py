"""Whether numbers are finite, which decompositions, choosing by comparison, may lose sight of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["all_finite"]


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no entry is infinite or not a number: a bool ``[]`` on the tensors' device.

    Example:
        >>> all_finite([torch.ones(3), torch.tensor([0.0, torch.inf])])
        tensor(False)
    """
    largest = [torch.linalg.vector_norm(t.detach(), torch.inf) for t in tensors]
    return torch.stack(largest).isfinite().all()
