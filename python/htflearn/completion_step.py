"""A step of a tensor completion as one operator: forward, loss, gradients and optimizer."""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import optimizer as torch_optimizer

import htfkernels as hk
from htfkernels.training import (
    Spec,
    completion_step_,
    float32_precision,
    refusal,
    requested,
    why_not_taken,
)
from htflearn.losses import LOSSES, Loss, loss_function
from htflearn.optim import GroupRMSprop
from htflearn.tasks import CompletionTask

__all__ = ["CompletionStep", "of_task"]

_log = logging.getLogger("htflearn")


class CompletionStep:
    """A step of training on all known entries of a tensor, for loops of one's own.

    With ``p`` the model's entries at the indices and ``y`` the values::

        loss = mean of f(p - y)
        the optimizer's step by the gradients of the loss

    On a GPU (backend ``"cuda"``, :class:`htflearn.GroupRMSprop`) that is one operator of a handful
    of kernels, which a CUDA graph can hold: forward, loss, gradients and the optimizer's step, with
    the numbers of the ordinary step but for rounding. Elsewhere, and where the step has more to it
    (:attr:`why_not`), it is the ordinary one: ``loss.backward()`` and ``optimizer.step()``. Which
    it is, is decided when the object is made, on the backend that is asked for then.

    In a loop of one's own, steps are captured after the first one: each replay of the graph is a
    step then, and writes its loss into the tensor that the captured call returned.

    A fused step moves the weights in place, counts and averages in the optimizer's state as the
    optimizer does (its ``state_dict`` is the same), and reads ``lr`` and ``weight_decay`` of its
    groups, the weights' ``requires_grad`` and the values at each call. Gradients stay in its own
    memory: afterwards the ``grad`` of all the optimizer's parameters is None. Hooks of the
    optimizer that run before a step have no gradients to see and rule a fused one out; so do those
    that run after it, but for those with an attribute ``reads_gradients`` that is False.

    Args:
        model: on the device where it is trained.
        indices: ``[M, N]`` int64, or an :class:`htfkernels.IndexPlan` of them.
        values: ``[M]``, of the dtype of the model's weights.
        optimizer: of the model's weights.
        loss: a name of :data:`htflearn.LOSSES`, or ``(prediction, target) -> scalar``.

    Raises:
        ValueError: there is no loss of that name, the numbers of indices and values differ, or the
            index plan is of another tree or on another device than the model.

    Attributes:
        why_not: why steps are not fused, in one sentence, or None where they are.

    Example:
        >>> model = hk.HTF(hk.ModeTree.balanced(4), mode_dims=8, ranks=16)
        >>> step = CompletionStep(model, indices, values, GroupRMSprop(model.parameters()))
        >>> losses = [step() for _ in range(1000)]
    """

    def __init__(
        self,
        model: hk.HTF,
        indices: Tensor | hk.IndexPlan,
        values: Tensor,
        optimizer: torch.optim.Optimizer,
        loss: str | Loss = "l2",
    ) -> None:
        self.plan = indices if isinstance(indices, hk.IndexPlan) else model.index_plan(indices)
        device = model.weights[0].device
        if self.plan.layout != model.layout or self.plan.lists.device != device:
            raise ValueError(
                "CompletionStep: the index plan is of another tree, other dimensions or another "
                f"device ({self.plan.lists.device}) than the model ({device})"
            )
        if values.dim() != 1 or len(values) != len(self.plan):
            raise ValueError(
                f"CompletionStep: values must be [{len(self.plan)}], one for each index tuple, got "
                f"{list(values.shape)}"
            )
        self.model, self.values, self.optimizer = model, values, optimizer
        self.loss_function = loss_function(loss)
        self.why_not: str | None = (
            _other_optimizer(optimizer)
            or _other_model(model, optimizer)
            or _other_loss(self.loss_function, values, model)
            or _other_backend(model)
        )
        self._arrived: Tensor | None = None
        # Kernels of another float32 precision, which may be in force at a step, are other ones.
        self._by_name = requested() == "cuda"
        self._taken = {float32_precision(): True}

    def __call__(self) -> Tensor:
        """Takes a step.

        Returns:
            the loss before it, ``[]``, on the device and without gradients.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = None
        if self.why_not is None and self._takes_precision():
            # As the closure, so that hooks and schedulers see a step; it finds no gradients.
            taken: Any = self.optimizer.step(self._fused)  # type: ignore[arg-type]
            return taken
        loss = self.loss_function(self.model.at(self.plan), self.values)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _takes_precision(self) -> bool:
        precision = float32_precision()
        if precision not in self._taken:
            reason = None if self._by_name else refusal("cuda", _spec(self.model))
            self._taken[precision] = reason is None
        return self._taken[precision]

    def _fused(self) -> Tensor:
        optimizer: Any = self.optimizer
        weights = list(self.model.weights)
        first = weights[0]
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        needs = [p.requires_grad for p in weights]
        groups = [group_of.get(id(p), optimizer.param_groups[0]) for p in weights]
        average, count = optimizer.state_on(first.device, first.dtype, exactly=True)
        if self._arrived is None or self._arrived.device != first.device:
            self._arrived = torch.zeros(1, dtype=torch.int32, device=first.device)
        lr, weight_decay = optimizer.settings(groups)
        loss = completion_step_(
            self.model.layout,
            self.plan,
            [p.detach() for p in weights],
            needs,
            self.values,
            _NAMES[self.loss_function],
            average,
            count,
            self._arrived,
            lr,
            weight_decay,
            groups[0]["alpha"],
            groups[0]["eps"],
            precision=float32_precision(),
        )
        torch.autograd.graph.increment_version(
            [p for p, n in zip(weights, needs, strict=True) if n]
        )
        return loss


_NAMES: dict[Any, str] = {function: name for name, function in LOSSES.items()}


def of_task(
    model: Any, task: Any, optimizer: torch.optim.Optimizer, regularizer: Any, batch_size: Any
) -> CompletionStep | None:
    """The fused step of a task, or None where there is none; the log says which, and why not.

    Args:
        model, task, optimizer: what is trained.
        regularizer: added to the loss, or None.
        batch_size: None where all steps are on all samples.
    """
    reason = _other_task(model, task, regularizer, batch_size)
    step = None
    if reason is None:
        step = CompletionStep(model, task.indices, task.values, optimizer, task.loss_function)
        reason = step.why_not
    if reason is None:
        _log.info("steps are fused: forward, loss, gradients and optimizer in one operator")
        return step
    device = next((p.device.type for g in optimizer.param_groups for p in g["params"]), "cpu")
    if device == "cuda" or requested() == "cuda":
        _log.info("steps are not fused: %s", reason)
    return None


def _other_task(model: Any, task: Any, regularizer: Any, batch_size: Any) -> str | None:
    name = type(task).__name__
    if not isinstance(task, CompletionTask):
        return f"the task is a {name}, and the steps that are fused are a completion's"
    if not all(_is_own(task, CompletionTask, method) for method in ("loss", "predict")):
        return f"{name} has a loss of its own"
    if batch_size is not None:
        return f"every step is on other rows (batch_size {batch_size})"
    if regularizer is not None:
        return "there is a regularizer"
    if not isinstance(model, hk.HTF):
        return f"the model is a {type(model).__name__}, not an HTF"
    return None


def _is_own(thing: Any, kind: type, method: str) -> bool:
    """Whether a method is the class's, neither overridden nor replaced in the object."""
    return getattr(getattr(thing, method), "__func__", None) is getattr(kind, method)


def _other_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    name = type(optimizer).__name__
    if type(optimizer) is not GroupRMSprop:
        return f"the optimizer is {name}, and the one that is fused is GroupRMSprop"
    if not optimizer.capturable:
        return "GroupRMSprop is not made with capturable=True"
    before = (optimizer._optimizer_step_pre_hooks, torch_optimizer._global_optimizer_pre_hooks)
    after = (optimizer._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks)
    hooks = [*chain(*(h.values() for h in before))]
    hooks += [h for h in chain(*(h.values() for h in after)) if getattr(h, "reads_gradients", True)]
    if hooks:
        return "the optimizer has step hooks, which may look for gradients"
    sizes = [group["lr"] for group in optimizer.param_groups]
    if any(isinstance(s, Tensor) and s.dtype not in _FLOATS for s in sizes):
        return "a step size is a tensor of another dtype than float32 and float64"
    return None


_FLOATS = (torch.float32, torch.float64)


def _other_model(model: Any, optimizer: torch.optim.Optimizer) -> str | None:
    if not all(_is_own(model, hk.HTF, method) for method in ("at", "index_plan")):
        return f"{type(model).__name__} evaluates entries in a way of its own"
    if is_parametrized(model.weights):
        return "the model's weights are parametrized"
    if model.layout.out_features != 1:
        return f"the model has {model.layout.out_features} outputs"
    weights = list(model.weights)
    first = weights[0]
    for p in weights:
        if type(p) is not torch.nn.Parameter or not p.is_contiguous():
            return "the model's weights are not all contiguous parameters"
        if p.dtype != first.dtype or p.device != first.device:
            return "the model's weights are not all of one dtype on one device"
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return "a weight has hooks, which may look at gradients"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(p.requires_grad and id(p) not in held for p in weights):
        return "the optimizer does not have all of the model's weights"
    if not any(p.requires_grad for p in weights):
        return "none of the model's weights requires gradients"
    return None


def _other_loss(function: Loss, values: Tensor, model: Any) -> str | None:
    if function not in LOSSES.values():
        return "the loss is a function that only its user knows"
    first = model.weights[0]
    if values.dtype != first.dtype or values.device != first.device:
        return (
            f"the values are {values.dtype} on {values.device}, the weights {first.dtype} on "
            f"{first.device}"
        )
    if not values.is_contiguous() or values.requires_grad or type(values) is not Tensor:
        return "the values are no ordinary contiguous tensor"
    return None


def _other_backend(model: Any) -> str | None:
    kind = model.weights[0].device.type
    if requested() not in ("auto", "cuda"):
        return f"the backend {requested()!r} was asked for, and fused steps are the backend 'cuda'"
    if torch.is_autocast_enabled(kind):
        return "autocast is on"
    reason = why_not_taken("cuda", _spec(model))
    if requested() == "cuda":
        return reason
    return "the weights are on the CPU" if reason is not None and kind == "cpu" else reason


def _spec(model: Any) -> Spec:
    first, precision = model.weights[0], float32_precision()
    return Spec(
        "completion_step", first.dtype, first.device.type, model.layout, precision=precision
    )
