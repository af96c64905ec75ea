"""What a run has learned, told from its start, its end and its target."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import htfkernels as hk

__all__ = ["LARGEST", "RISEN", "SHARE", "Evidence", "risen", "shares"]

LARGEST, RISEN, SHARE = 0.1, 2.0, 0.01
"""A component has risen where its norm ends above ``LARGEST`` of the largest and above ``RISEN``
times all norms of the start; it counts where its part of the end tensor is above ``SHARE`` of the
whole."""

_FALLEN = 0.95
"""A loss or an error has fallen where it ends below this fraction of what it was."""

_HARDLY_MOVED = 0.1
"""Weights that have learned have moved by about their norm."""

Learned = Literal["nothing", "entries", "target"]


def risen(iterations: Sequence[int], norms: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The components that have risen, the largest first.

    The norms may be sorted or not: a component has risen above all norms that there were at the
    start, and so above its own.

    Args:
        iterations: ``[T]``, of the logged norms.
        norms: ``[T, R]``.

    Returns:
        of each component its ``curve`` (its place in ``0 .. R - 1``), its final ``norm``, the
        largest norm at the ``start``, and when it ``rose``: the first iteration with half of the
        final norm.

    Example:
        >>> risen([0, 10, 20], [[0.1, 0.1], [0.1, 3.0], [0.2, 4.0]])
        [{'curve': 1, 'norm': 4.0, 'start': 0.1, 'rose': 10}]
    """
    final, start = norms[-1], max(norms[0])
    least = max(LARGEST * max(final), RISEN * start)
    return [
        {
            "curve": i,
            "norm": final[i],
            "start": start,
            "rose": next(
                it for it, n in zip(iterations, norms, strict=True) if n[i] >= final[i] / 2
            ),
        }
        for i in sorted(range(len(final)), key=lambda i: -final[i])
        if final[i] > least
    ]


@torch.no_grad()
def shares(model: hk.HTF, node: hk.Node, components: Sequence[int]) -> list[float]:
    """How much of the end tensor runs through local components: the norm of the end tensor without
    the node's other components, divided by the norm of the whole.

    Args:
        model: any factorization that does not share weights.
        node: an interior node.
        components: numbers ``r`` of its local components.

    Example:
        >>> model = tensor_factorization((3, 3, 3), components=1)
        >>> [round(share, 6) for share in shares(model, model.tree.root, [0])]
        [1.0]
    """
    whole = float(model.norm())
    if not whole:
        return [0.0] * len(components)
    part, child = copy.deepcopy(model), node.children[0]
    kept = model.node_weight(child)
    weight = part.node_weight(child)
    found = []
    for r in components:
        weight.zero_()
        weight[:, r] = kept[:, r]
        found.append(float(part.norm()) / whole)
    return found


@dataclass(frozen=True)
class Evidence:
    """What tells whether a completion has been learned, and what held it up.

    Attributes:
        loss: name of the train loss.
        start_loss, end_loss, zero_loss: the train loss at the start, at the end, and of a tensor of
            zeros.
        start_error, end_error: the end tensor's distance from the target relative to the target's
            norm; that of a tensor of zeros is 1.
        iterations: steps taken.
        moved: distance of the weights from their start, relative to their norm there.
        gradient_norm: of all weights together, at the end.
        optimizer, lr: its name and its step size.
        eps: a gradient's norm below which the optimizer's steps shrink with it; infinite for
            gradient descent.
        init_std, usual_std: of the initial weights, and by default.
    """

    loss: str
    start_loss: float
    end_loss: float
    zero_loss: float
    start_error: float
    end_error: float
    iterations: int
    moved: float
    gradient_norm: float
    optimizer: str
    lr: float
    eps: float
    init_std: float
    usual_std: float

    @property
    def learned(self) -> Learned:
        """``"target"`` where the relative error has fallen, below that of a tensor of zeros too;
        ``"entries"`` where only the train loss has; else ``"nothing"``."""
        if self.end_error < _FALLEN * min(self.start_error, 1.0):
            return "target"
        if self.end_loss < _FALLEN * min(self.start_loss, self.zero_loss):
            return "entries"
        return "nothing"

    def remarks(self) -> list[str]:
        """What was seen and what to change, in sentences; none where the target was learned."""
        if self.learned == "target":
            return []
        seen = (
            f"the train loss ({self.loss}) was {self.start_loss:.3g} at the start and is "
            f"{self.end_loss:.3g}, a tensor of zeros has {self.zero_loss:.3g}; the relative error "
            f"is {self.end_error:.2f}, a tensor of zeros has 1"
        )
        if self.learned == "entries":
            return [
                f"only the entries given were fitted, the target was not learned: {seen}",
                "try more --samples, or a smaller --init-std, which favours low rank",
            ]
        return [f"nothing was learned: {seen}", self._advice()]

    def _advice(self) -> str:
        if self.end_loss * _FALLEN > max(self.start_loss, self.zero_loss):
            return f"the loss has risen: try a smaller --lr than {self.lr:g}"
        if self.start_loss * _FALLEN > self.zero_loss:
            return (
                "the end tensor began farther from the target than zero is: try a smaller "
                f"--init-std than {self.init_std:g}"
            )
        longer = f"more --iterations than {self.iterations:,}"
        if self.moved > _HARDLY_MOVED:
            return f"the weights have moved: try {longer}, or another --seed or --optimizer"
        moved = f"moved by {self.moved:.1e} of their norm" if self.moved else "not moved"
        seen = f"the weights have {moved}; the gradient's norm is {self.gradient_norm:.1e}"
        if self.gradient_norm > self.eps:
            return f"{seen}: try a larger --lr than {self.lr:g}, or {longer}"
        if self.init_std < self.usual_std:
            larger = f"--init-std {self.usual_std:g}, the default at this order and width"
        else:
            larger = f"a larger --init-std than {self.init_std:g}"
        if self.optimizer == "sgd":
            other = "--optimizer grouprmsprop, whose steps are longer where gradients are small"
            return f"{seen}, and steps of sgd are as small: try {other}, or {larger}"
        shrink = f"below {self.eps:.0e} the steps of {self.optimizer} shrink with it"
        return f"{seen}, and {shrink}: try {larger}, or {longer}"
