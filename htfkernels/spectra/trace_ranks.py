"""Ranks of matricizations from traces of products of Gram matrices, without decompositions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from htfkernels.functional import check_same
from htfkernels.runtime.compiled import call
from htfkernels.runtime.graphs import fake, without_gradient
from htfkernels.runtime.operations import CPP_MATHS, NO_FLOAT16, Family, Operation, Runs, register
from htfkernels.runtime.plan import Plan, plan_for
from htfkernels.spectra import grams
from htfkernels.spectra.matricizations import place_of, wanted_nodes
from htfkernels.spectra.output_mode import with_output_mode
from htfkernels.tree import Node
from htfkernels.tree.layout import Layout

__all__ = ["TRACE_RANKS", "run_trace_ranks"]

TRACE_RANKS = register(
    Operation(
        "trace_ranks",
        backends={"cpp": Runs(NO_FLOAT16, family=Family("cpp", "trace ranks", CPP_MATHS))},
    )
)


@fake("trace_ranks")
def _(weights: list[Tensor], program: Tensor, wanted: list[int], stable: int) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    return [
        weights[0].new_empty(len(wanted), dtype=torch.float64),
        weights[0].new_empty(size(), dtype=torch.float64),
        program.new_empty(size()),
    ]


@fake("trace_ranks_backward")
def _(
    grad: Tensor,
    weights: list[Tensor],
    program: Tensor,
    wanted: list[int],
    numbers: Tensor,
    exponents: Tensor,
    stable: int,
) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


without_gradient("trace_ranks")
without_gradient("trace_ranks_backward")


def run_trace_ranks(
    layout: Layout, weights: Sequence[Tensor], nodes: Iterable[Node] | None, stable: bool
) -> dict[Node, Tensor]:
    """See :meth:`htfkernels.HTF.renyi2_ranks` and ``stable_ranks``."""
    op = "stable_ranks" if stable else "renyi2_ranks"
    wanted = wanted_nodes(op, layout, nodes)
    check_same(op, weights, None)
    layout, weights, leaf = with_output_mode(layout, weights)
    places = [place_of(n, leaf) for n in wanted]
    indices = list(dict.fromkeys(places))
    dtype = weights[0].dtype
    plan = plan_for("trace_ranks", layout, dtype, weights[0].device.type)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if plan.backend == "reference" or transformed:
        ranks = _reference(layout, weights, indices, stable)
    elif torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        ranks = _TraceRanks.apply(plan, indices, stable, *weights)
    else:
        ranks = _call(plan, indices, stable, weights)[0]
    found = dict(zip(indices, ranks.to(dtype).unbind(0), strict=True))
    return {n: found[i] for n, i in zip(wanted, places, strict=True)}


def _call(
    plan: Plan, nodes: list[int], stable: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return call("trace_ranks", weights, plan.layout.program, nodes, int(stable))


def _reference(layout: Layout, weights: Sequence[Tensor], nodes: list[int], stable: bool) -> Tensor:
    """``rank = 1 / tr(P^2)``, or over the largest eigenvalue, for ``P`` with the eigenvalues
    ``sigma^2 / sum sigma^2``."""
    found: dict[int, Tensor] = {}
    double = [w.double() for w in weights]
    for sides in grams.frames_and_environments(layout, double, nodes):
        p = grams.squares(sides)
        u = grams.largest_eigenvalues(p) if stable else (p.mT * p).sum((1, 2))
        # P = 0 where the tensor is: rank 0, and no derivative.
        positive = u.detach() > 0
        ranks = torch.where(positive, 1 / torch.where(positive, u, 1), u)
        found.update(zip(sides.nodes, ranks.unbind(0), strict=True))
    return torch.stack([found[n] for n in nodes]) if nodes else double[0].new_empty(0)


class _TraceRanks(Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, nodes: list[int], stable: bool, *weights: Tensor) -> Tensor:
        ranks, numbers, exponents = _call(plan, nodes, stable, weights)
        ctx.plan, ctx.nodes, ctx.stable = plan, nodes, stable
        ctx.save_for_backward(numbers, exponents, *weights)
        return ranks

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        numbers, exponents, *weights = ctx.saved_tensors
        layout = ctx.plan.layout
        if torch.is_grad_enabled():  # to be differentiated again
            wanted = [w for w in weights if w.requires_grad]
            ranks = _reference(layout, weights, ctx.nodes, ctx.stable)
            found = iter(torch.autograd.grad(ranks, wanted, grad, create_graph=True))
            return (None, None, None, *(next(found) if w.requires_grad else None for w in weights))
        kept = (numbers, exponents, int(ctx.stable))
        return (
            None,
            None,
            None,
            *call("trace_ranks_backward", grad, weights, layout.program, ctx.nodes, *kept),
        )
