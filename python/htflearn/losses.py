"""Losses: ``(prediction, target) -> scalar mean``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOSSES", "Loss", "loss_function"]

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
"""Mean squared error, mean absolute error, and the Huber loss with ``delta = 1`` (which is half the
squared error near zero)."""


def loss_function(loss: str | Loss) -> Loss:
    """The loss of a name, or the function itself.

    Raises:
        ValueError: there is no loss of that name.

    Example:
        >>> prediction, target = torch.ones(4), torch.zeros(4)
        >>> loss_function("l1")(prediction, target)
        tensor(1.)
    """
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    return LOSSES[loss]
