"""Optimizers that PyTorch does not have."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["GroupRMSprop"]

# Optimizer keeps and saves state under keys that are no parameters as it is.
_SHARED = "shared"


class GroupRMSprop(Optimizer):
    """RMSprop with one adaptive step size for all parameters.

    With ``g`` all gradients of all groups as one vector, at step ``t``::

        v <- alpha v + (1 - alpha) |g|^2
        p <- p - lr / (sqrt(v / (1 - alpha^t)) + eps) g_p

    so a step has the direction of gradient descent, and its length adapts. This keeps the path of
    gradient flow (the order in which components are learned) and leaves plateaus behind faster.
    (Razin, Maman & Cohen, ICML 2021.)

    Args:
        params: parameters, or groups of them, which may differ in ``lr`` and ``weight_decay``.
        lr: step size.
        alpha: smoothing constant of the average.
        eps: added to the denominator.
        weight_decay: coefficient of an L2 penalty, added to the gradient.

    Raises:
        ValueError: a setting is out of range, or ``alpha`` and ``eps`` differ between groups.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = GroupRMSprop(model.parameters(), lr=0.01)
        >>> model(torch.ones(2, 3)).sum().backward(); optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"GroupRMSprop: lr must not be negative, got {lr}")
        if not 0 <= alpha < 1:
            raise ValueError(f"GroupRMSprop: alpha must be in [0, 1), got {alpha}")
        if not eps >= 0:
            raise ValueError(f"GroupRMSprop: eps must not be negative, got {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"GroupRMSprop: weight_decay must not be negative, got {weight_decay}")
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for name in ("alpha", "eps"):
            values = {group[name] for group in self.param_groups}
            if len(values) > 1:
                raise ValueError(
                    f"GroupRMSprop: {name} belongs to the one average and cannot differ between "
                    f"groups, got {sorted(values)}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; ``closure``, if given, evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [_with_gradients(group) for group in self.param_groups]
        gradients = [g for _, grads in groups for g in grads]
        if not gradients:
            return loss
        device = gradients[0].device
        dtype = reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
        norms = [n.to(device) for n in torch._foreach_norm(gradients, dtype=dtype)]
        squared = torch.stack(norms).square().sum()

        shared: dict[str, Any] = cast(Any, self.state)[_SHARED]
        first = self.param_groups[0]
        alpha, eps = first["alpha"], first["eps"]
        count = shared.get("step", 0) + 1
        fresh = squared * (1 - alpha)
        # Out of place, so that a state dict taken or loaded earlier keeps its own value.
        average = fresh if count == 1 else shared["average"].to(device) * alpha + fresh
        shared["step"], shared["average"] = count, average

        denominator = (average / (1 - alpha**count)).sqrt_().add_(eps)
        for group, (params, grads) in zip(self.param_groups, groups, strict=True):
            size = group["lr"] / denominator
            for p, g in zip(params, grads, strict=True):
                p.addcmul_(g, size.to(p.device, p.dtype), value=-1.0)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned, bit for bit."""
        super().load_state_dict(state_dict)
        state = cast(Any, self.state)
        if _SHARED in state:  # a copy: the saved dictionary may feed another optimizer
            state[_SHARED] = dict(state[_SHARED])


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The group's parameters that have gradients, and these, weight decay included."""
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    if any(g.is_sparse for g in grads):
        raise RuntimeError("GroupRMSprop: sparse gradients are not supported")
    if group["weight_decay"] != 0 and params:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    return params, grads
