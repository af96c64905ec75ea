"""Regularizers: scalars to add to a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

import htfkernels as hk

__all__ = ["RANK_MEASURES", "RankRegularizer"]

RANK_MEASURES = ("renyi2", "stable", "effective", "entropy", "nuclear")

_OF_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "effective": hk.effective_rank,
    "entropy": hk.entanglement_entropy,
    "nuclear": hk.nuclear_norm,
}


class RankRegularizer:
    """Raises or lowers the matricization ranks of a model while it learns::

        -+ coefficient * mean over nodes of measure(singular values of M_v)

    with the minus sign for ``target="raise"``. The singular values come from the factors, so the
    order of the tensor does not matter. ``"renyi2"`` and ``"stable"`` take no decomposition and are
    cheap enough for every step of a training (the first has second derivatives too); the others
    cost a singular value decomposition at each node.

    Args:
        measure: ``"renyi2"``, ``"stable"`` (see :meth:`htfkernels.HTF.renyi2_ranks` and
            ``stable_ranks``), ``"effective"``, ``"entropy"``, ``"nuclear"``
            (:func:`htfkernels.effective_rank`, ``entanglement_entropy``, ``nuclear_norm``), or a
            function of singular values ``[K] -> scalar``. The nuclear norm alone depends on the
            tensor's size.
        target: ``"raise"`` or ``"lower"``.
        coefficient: not negative.
        nodes: which nodes; by default all but the root.

    Raises:
        ValueError: an argument that is none of these; called with a model that is no
            :class:`htfkernels.HTF` and has none as its attribute ``htf`` (as
            :class:`htflearn.ConvAC` has), it raises a TypeError.

    Example:
        >>> model = hk.HTF(hk.ModeTree.balanced(4), 3, 5)
        >>> regularize = RankRegularizer("renyi2", "raise", 0.1)
        >>> loss = model(torch.randn(8, 4, 3)).square().mean() + regularize(model)
        >>> loss.backward()
    """

    def __init__(
        self,
        measure: str | Callable[[Tensor], Tensor] = "renyi2",
        target: Literal["raise", "lower"] = "raise",
        coefficient: float = 1.0,
        nodes: Iterable[hk.Node] | None = None,
    ) -> None:
        if isinstance(measure, str) and measure not in RANK_MEASURES:
            raise ValueError(
                f"RankRegularizer: measure must be one of {', '.join(RANK_MEASURES)} or a function "
                f"of singular values, got {measure!r}"
            )
        if target not in ("raise", "lower"):
            raise ValueError(f'RankRegularizer: target must be "raise" or "lower", got {target!r}')
        if not (coefficient >= 0 and math.isfinite(coefficient)):
            raise ValueError(
                f"RankRegularizer: coefficient must be finite and not negative, got {coefficient}"
                + (' (target="lower" turns the sign)' if coefficient < 0 else "")
            )
        self.nodes = None if nodes is None else list(nodes)
        if self.nodes == []:
            raise ValueError("RankRegularizer: nodes is empty")
        self.measure, self.target, self.coefficient = measure, target, coefficient

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, a scalar that is differentiable with respect to the model's weights."""
        ranks = self.ranks(model)
        mean = torch.stack([*ranks.values()]).mean()
        return mean * (-self.coefficient if self.target == "raise" else self.coefficient)

    def ranks(self, model: nn.Module) -> dict[hk.Node, Tensor]:
        """The measure at each node."""
        name = type(model).__name__
        model = model if isinstance(model, hk.HTF) else getattr(model, "htf", model)
        if not isinstance(model, hk.HTF):
            raise TypeError(
                f"RankRegularizer: expected a htfkernels.HTF, got a {name}; a "
                "wrapped model has it as an attribute (.module of DistributedDataParallel)"
            )
        if self.measure == "renyi2":
            return model.renyi2_ranks(self.nodes)
        if self.measure == "stable":
            return model.stable_ranks(self.nodes)
        spectra = model.matricization_spectra(self.nodes)
        if callable(self.measure):
            return {node: self.measure(s) for node, s in spectra.items()}
        # The nuclear norm alone sees the true size.
        return spectra.measure(_OF_VALUES[self.measure], relative=self.measure != "nuclear")

    def __repr__(self) -> str:
        return f"RankRegularizer({self.measure!r}, {self.target!r}, {self.coefficient})"
