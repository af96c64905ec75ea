"""Optimizers that PyTorch does not have."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from htfkernels.training import (
    Spec,
    device_type,
    group_rmsprop_,
    group_rmsprop_on_cpu_,
    why_not_taken,
)

__all__ = ["GroupRMSprop"]

# PyTorch's Optimizer keeps and saves what is under keys other than parameters unchanged.
_SHARED = "shared"

_FLOATS = (torch.float32, torch.float64)

_Group = tuple[list[Tensor], list[Tensor]]  # parameters, and their gradients


class GroupRMSprop(Optimizer):
    """RMSprop with one adaptive step size for all parameters.

    With ``g`` all gradients of all groups as one vector, at step ``t``::

        v <- alpha v + (1 - alpha) |g|^2
        p <- p - lr / (sqrt(v / (1 - alpha^t)) + eps) g_p

    so a step has the direction of gradient descent, and its length adapts. This keeps the path of
    gradient flow (the order in which components are learned) and leaves plateaus behind faster.
    (Razin, Maman & Cohen, ICML 2021.)

    On the CPU, contiguous parameters and gradients of one dtype (float32, float64 or bfloat16) take
    a step in one compiled operator; anything else, and the backend ``"reference"``, takes the same
    formula in PyTorch's operations, which round differently. Either way the average is float32, or
    float64 with float64 parameters, and the same run has the same bits again.

    A capturable step keeps average and count as tensors beside the parameters and waits for
    nothing, so that a CUDA graph can hold it: on a GPU, for tensors as above, two launches of the
    ``"cuda"`` backend, elsewhere the same formula in PyTorch's operations, with the factor of ``v``
    in float64. The first step, which makes these tensors, cannot be captured. What a graph has
    captured keeps the settings of that moment, but for an ``lr`` that is a tensor on the
    parameters' device. A state dict fits optimizers of either kind, on any device.

    Args:
        params: parameters, or groups of them, which may differ in ``lr`` and ``weight_decay``.
        lr: step size.
        alpha: smoothing constant of the average.
        eps: added to the denominator.
        weight_decay: coefficient of an L2 penalty, added to the gradient.
        capturable: whether steps are of the kind that a CUDA graph can hold; None: where all
            parameters are on one CUDA device.

    Raises:
        ValueError: a setting is out of range, or ``alpha``, ``eps`` or ``capturable`` differ
            between groups.
        RuntimeError: a step is being captured, and none was taken before.

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
        capturable: bool | None = None,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"GroupRMSprop: lr must not be negative, got {lr}")
        if not 0 <= alpha < 1:
            raise ValueError(f"GroupRMSprop: alpha must be in [0, 1), got {alpha}")
        if not eps >= 0:
            raise ValueError(f"GroupRMSprop: eps must not be negative, got {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"GroupRMSprop: weight_decay must not be negative, got {weight_decay}")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "capturable": capturable,
        }
        super().__init__(params, defaults)
        for name in ("alpha", "eps", "capturable"):
            values = {group[name] for group in self.param_groups}
            if len(values) > 1:
                raise ValueError(
                    f"GroupRMSprop: {name} belongs to the one average and cannot differ between "
                    f"groups, got {sorted(values, key=str)}"
                )

    @property
    def capturable(self) -> bool:
        """Whether steps are of the kind that a CUDA graph can hold."""
        asked = self.param_groups[0]["capturable"]
        if asked is not None:
            return asked
        groups = [group["params"] for group in self.param_groups]
        if not all(p.is_cuda for params in groups for p in params):  # told by one look on the CPU
            return False
        return len({p.device for params in groups for p in params}) == 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; ``closure``, if given, evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [_with_gradients(group) for group in self.param_groups]
        if not any(params for params, _ in groups):
            return loss
        shared: dict[str, Any] = cast(Any, self.state)[_SHARED]
        if self.capturable:
            self._advance_in_place(groups, shared)
            return loss
        count = int(shared.get("step", 0)) + 1  # a capturable optimizer's is a tensor
        advance = self._advance_compiled if _compiled(groups) else self._advance
        # Out of place, so that a state dict taken or loaded earlier keeps its own value.
        shared["average"] = advance(groups, shared.get("average"), count)
        shared["step"] = count
        return loss

    def _advance_in_place(self, groups: list[_Group], shared: dict[str, Any]) -> None:
        """The same for a CUDA graph: what changes is written where it was, and the host neither
        reads nor counts."""
        gradients = [g for _, grads in groups for g in grads]
        dtype = _average_dtype(gradients)
        average, count = self.state_on(gradients[0].device, dtype)
        if average.dtype == dtype and _kernels_take(groups, self.param_groups):
            each = zip(self.param_groups, groups, strict=True)
            lr, weight_decay = self.settings([g for g, (ps, _) in each for _ in ps])
            params = [p for params, _ in groups for p in params]
            first = self.param_groups[0]
            group_rmsprop_(
                params, gradients, average, count, lr, weight_decay,
                first["alpha"], first["eps"],
            )  # fmt: skip
            torch.autograd.graph.increment_version(params)
            return
        count += 1
        average.copy_(self._advance(groups, average, count))

    def state_on(
        self, device: torch.device, dtype: torch.dtype, exactly: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Average and count of a capturable step, ``[]`` each, as they are in the state; made where
        they are not on the device yet. ``exactly``: also where the average is of another dtype.

        Raises:
            RuntimeError: they are not, and a step is being captured.
        """
        shared: dict[str, Any] = cast(Any, self.state)[_SHARED]
        average, count = shared.get("average"), shared.get("step")
        if (
            isinstance(average, Tensor)
            and isinstance(count, Tensor)
            and count.device == device
            and (average.dtype == dtype or not exactly)
        ):
            return average, count
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "GroupRMSprop: take a step before one is captured: the average that steps share is "
                "not on the device yet"
            )
        count = torch.tensor(float(count or 0), dtype=torch.float64, device=device)
        average = torch.tensor(float(average or 0), dtype=dtype, device=device)
        shared["step"], shared["average"] = count, average
        return average, count

    @staticmethod
    def settings(groups: list[dict[str, Any]]) -> tuple[list[float | Tensor], list[float]]:
        """Step size and weight decay of each parameter, given the group of each. A step size that
        is a tensor elsewhere than on the kernels' device is the number it is now."""
        sizes = [group["lr"] for group in groups]
        there = device_type()
        lr = [s if isinstance(s, Tensor) and s.device.type == there else float(s) for s in sizes]
        return lr, [float(group["weight_decay"]) for group in groups]

    def _advance(self, groups: list[_Group], average: Tensor | None, count: int | Tensor) -> Tensor:
        """Moves the parameters; returns the new average."""
        decayed = [
            _decayed(params, grads, group["weight_decay"])
            for group, (params, grads) in zip(self.param_groups, groups, strict=True)
        ]
        gradients = [g for grads in decayed for g in grads]
        device = gradients[0].device
        dtype = _average_dtype(gradients)
        norms = [n.to(device) for n in torch._foreach_norm(gradients, dtype=dtype)]
        squared = torch.stack(norms).square().sum()

        first = self.param_groups[0]
        alpha, eps = first["alpha"], first["eps"]
        fresh = squared * (1 - alpha)
        new = fresh if average is None else average.to(device) * alpha + fresh
        denominator = (new / (1 - alpha**count)).sqrt_().add_(eps)
        for group, (params, _), grads in zip(self.param_groups, groups, decayed, strict=True):
            size = group["lr"] / denominator
            for p, g in zip(params, grads, strict=True):
                p.addcmul_(g, size.to(p.device, p.dtype), value=-1.0)
        return new

    def _advance_compiled(self, groups: list[_Group], average: Tensor | None, count: int) -> Tensor:
        """The same in one call of a compiled operator."""
        params = [p for params, _ in groups for p in params]
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        average = torch.zeros((), dtype=dtype) if average is None else average.to("cpu", dtype)
        each = [g for g, (params, _) in zip(self.param_groups, groups, strict=True) for _ in params]
        new = group_rmsprop_on_cpu_(
            params,
            [g for _, grads in groups for g in grads],
            average,
            [float(g["lr"]) for g in each],
            [float(g["weight_decay"]) for g in each],
            self.param_groups[0]["alpha"],
            self.param_groups[0]["eps"],
            count,
        )
        torch.autograd.graph.increment_version(params)
        return new

    def state_dict(self) -> dict[str, Any]:
        """The state as it is now; later steps do not change it."""
        saved = super().state_dict()
        if _SHARED in saved["state"]:
            saved["state"][_SHARED] = _copied(saved["state"][_SHARED])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned, bit for bit; ``capturable`` stays as it was."""
        capturable = self.param_groups[0]["capturable"]
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["capturable"] = capturable
        state = cast(Any, self.state)
        if _SHARED in state:  # a copy: the saved dictionary may feed another optimizer
            state[_SHARED] = _copied(state[_SHARED])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved before there was such a setting
            group.setdefault("capturable", None)


def _copied(shared: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in shared.items()}


def _average_dtype(gradients: list[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)


def _with_gradients(group: dict[str, Any]) -> _Group:
    """The group's parameters that have gradients, and these."""
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    if any(g.is_sparse for g in grads):
        raise RuntimeError("GroupRMSprop: sparse gradients are not supported")
    return params, grads


def _decayed(params: list[Tensor], grads: list[Tensor], weight_decay: float) -> list[Tensor]:
    if weight_decay == 0 or not params:
        return grads
    return list(torch._foreach_add(grads, params, alpha=weight_decay))


def _compiled(groups: list[_Group]) -> bool:
    """Whether the compiled operator can take the step: ordinary contiguous tensors of one dtype
    that it computes in, on the CPU, and neither another backend asked for nor a trace under way."""
    spec = _ordinary(groups, torch.device("cpu"))
    return spec is not None and why_not_taken("cpp", spec) is None


def _kernels_take(groups: list[_Group], settings: list[dict[str, Any]]) -> bool:
    """Whether CUDA kernels take the step: the same, on one GPU."""
    sizes = [group["lr"] for group in settings if isinstance(group["lr"], Tensor)]
    if any(s.dtype not in _FLOATS for s in sizes):
        return False
    device = next(t.device for group in groups for some in group for t in some)
    spec = _ordinary(groups, device)
    return spec is not None and why_not_taken("cuda", spec) is None


def _ordinary(groups: list[_Group], device: torch.device) -> Spec | None:
    """What is to be computed, if all tensors are ordinary ones on the device."""
    if torch.compiler.is_compiling():
        return None
    tensors = [t for group in groups for some in group for t in some]
    dtype = tensors[0].dtype
    ordinary = all(
        type(t) in (Tensor, Parameter)
        and t.dtype == dtype
        and t.device == device
        and t.is_contiguous()
        for t in tensors
    )
    return Spec("group_rmsprop", dtype, device.type) if ordinary else None
