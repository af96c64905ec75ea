"""Singular values of the matricization with any set of modes as rows, without the tensor.

The modes of a set are those of a few whole subtrees, and so are the others. What the rest of the
tree costs depends on how the two kinds lie in it: :func:`spectrum_cost` says so beforehand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htfkernels.arguments import shown
from htfkernels.functional import check_same
from htfkernels.runtime.autograd import only_once
from htfkernels.runtime.finite import all_finite
from htfkernels.spectra.balance import balance, scaled
from htfkernels.spectra.matricizations import check_method
from htfkernels.spectra.mode_cores import Tensors, best_center, core_matrix, svd_flops
from htfkernels.spectra.mode_grams import Doubled, gram_flops, gram_matrix, plan_gram
from htfkernels.tree import ModeTree, Node
from htfkernels.tree.checks import as_int, format_modes
from htfkernels.tree.layout import Layout

__all__ = ["LIMIT", "Cost", "Work", "matricization_spectrum", "spectrum_cost"]

_log = logging.getLogger("htfkernels")


class Work(NamedTuple):
    """What a computation takes.

    Attributes:
        flops: additions and multiplications.
        bytes: of the largest intermediate result; two to four times as much lives at once, and up
            to eight times where gradients are wanted.
    """

    flops: float
    bytes: float

    def within(self, limit: Work) -> bool:
        """Whether neither number is larger than the limit's."""
        return self.flops <= limit.flops and self.bytes <= limit.bytes

    def __str__(self) -> str:
        size, unit = Decimal(self.bytes), "bytes"
        for larger in ("KiB", "MiB", "GiB", "TiB"):
            if size >= 1024:
                size, unit = size / 1024, larger
        amount = f"{size:.1e}" if size >= 10**4 else f"{size:.3g}"
        return f"{Decimal(self.flops):.1e} flops and {amount} {unit}"


LIMIT = Work(flops=5 * 10**11, bytes=2**30)
"""What is affordable by default: about a minute on two cores, with about 4 GiB in all."""


@dataclass(frozen=True)
class Cost:
    """What the singular values of one matricization take by either method.

    Attributes:
        modes: the rows' modes, ascending.
        order: number of modes of the tensor.
        qr, gram: work of the methods, without gradients; with them it is about three times as much.
    """

    modes: tuple[int, ...]
    order: int
    qr: Work
    gram: Work

    def __str__(self) -> str:
        return (
            f"rows {format_modes(self.modes)} of {self.order} modes: "
            f'{self.qr} by "qr", {self.gram} by "gram"'
        )


def matricization_spectrum(
    tree: ModeTree,
    weights: Mapping[Node, Tensor],
    modes: Iterable[int],
    method: str = "auto",
    max_cost: tuple[float, float] | float | None = None,
) -> Tensor:
    """Singular values of the matricization with any set of modes as rows, in the tree or not.

    ``"qr"`` contracts cores ``[a, b, R]`` between orthonormal bases of the rows and of the columns
    (:mod:`htfkernels.spectra.mode_cores`), made small by QR after each step, and takes the singular
    values of the ``[a, b]`` that is left. Errors are about 1e-15 of the largest value. ``"gram"``
    takes the roots of the eigenvalues of ``M M^T`` or ``M^T M``, whichever is smaller
    (:mod:`htfkernels.spectra.mode_grams`). It needs less where few rows are spread among many
    columns, or few columns among rows, but its errors are about 1e-7 of the largest value.

    Both compute in float64, and carry powers of two apart, so that nothing overflows on the way.
    Both are differentiable once, with finite derivatives also where singular values coincide or
    vanish: there a subgradient is taken (0 at those that ``"gram"`` cannot tell from 0).

    Args:
        tree: the mode tree.
        weights: ``[R_in, R_out]`` for every node.
        modes: the rows' modes; the outputs, where there are several, are columns.
        method: ``"qr"``, ``"gram"``, or ``"auto"``: the first of these that is affordable. The one
            taken is logged.
        max_cost: the most that is affordable, flops and bytes of the largest intermediate (a
            :class:`Work`), by default :data:`LIMIT`; a number of flops alone has the bytes in the
            default's proportion.

    Returns:
        ``[K]``, descending, in the weights' dtype.

    Raises:
        ValueError: ``modes`` is empty, or names a mode twice or one that is not there; there is no
            such method, or it is not affordable; ``max_cost`` is not made of numbers; the weights
            are not real floating point of one dtype on one device.
        torch.linalg.LinAlgError: a weight is infinite or not a number. Under ``torch.vmap`` all
            singular values are NaN then.

    Example:
        >>> model = HTF(ModeTree.balanced(8), mode_dims=2, ranks=3)
        >>> even = model.matricization_spectrum([0, 2, 4, 6])
        >>> bool(even.norm().isclose(model.full_tensor().norm()))
        True
    """
    check_method("matricization_spectrum", method)
    by_node = [weights[n] for n in tree.nodes]
    check_same("matricization_spectrum", by_node, None)
    shapes = tuple((int(w.shape[0]), int(w.shape[1])) for w in by_node)
    plan = _plan(tree, shapes, _rows("matricization_spectrum", tree, modes))
    limit = _limit(max_cost)
    works = {"qr": plan.cost.qr, "gram": plan.cost.gram}
    names = list(works) if method == "auto" else [method]
    chosen = next((name for name in names if works[name].within(limit)), None)
    if chosen is None:
        raise ValueError(
            f"matricization_spectrum: {plan.cost}, more than {limit}; "
            "max_cost=(flops, bytes) raises the limit"
        )
    _log.info('matricization_spectrum: "%s" for %s', chosen, plan.cost)
    dtype = weights[tree.root].dtype
    finite = all_finite(by_node)
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and not bool(finite):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "matricization_spectrum: a weight is infinite or not a number"
        )
    double = [_OnceDifferentiable.apply(w).double() for w in by_node]
    powers, total = balance(tree, double)
    near = [scaled(w, p) for w, p in zip(double, powers, strict=True)]
    values = _by_qr(plan, near) if chosen == "qr" else _by_gram(plan, near)
    values = scaled(values, total).to(dtype)
    return torch.where(finite, values, torch.nan) if transformed else values


def spectrum_cost(layout: Layout, modes: Iterable[int]) -> Cost:
    """What :func:`matricization_spectrum` takes, from the shapes alone.

    Args:
        layout: tree and shapes of a model (``model.layout``).
        modes: the rows' modes.

    Returns:
        flops and bytes of either method.

    Raises:
        ValueError: ``modes`` is empty, or names a mode twice or one that is not there.

    Example:
        >>> model = HTF(ModeTree.balanced(64), mode_dims=4, ranks=8)
        >>> print(spectrum_cost(model.layout, [5, 20, 50]).gram)
        1.8e+6 flops and 128 KiB
    """
    shapes = tuple(layout.shape(node) for node in layout.tree.nodes)
    return _plan(layout.tree, shapes, _rows("spectrum_cost", layout.tree, modes)).cost


def _rows(name: str, tree: ModeTree, modes: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(modes, Iterable):
        raise ValueError(f"{name}: modes must be a sequence of integers, got {shown(modes)}")
    rows = [as_int(f"{name}: a mode", m) for m in modes]
    if not rows or len(set(rows)) < len(rows) or not set(rows) <= set(range(tree.order)):
        raise ValueError(f"{name}: modes must be distinct, of 0..{tree.order - 1}, got {rows}")
    return tuple(sorted(rows))


def _limit(max_cost: tuple[float, float] | float | None) -> Work:
    if max_cost is None:
        return LIMIT
    given = max_cost if isinstance(max_cost, (tuple, list)) else (max_cost,)
    numbers = all(isinstance(x, (int, float)) and x >= 0 for x in given)
    if not numbers or len(given) not in (1, 2):
        raise ValueError(
            "matricization_spectrum: max_cost must be (flops, bytes) or a number of flops, none "
            f"negative, got {shown(max_cost)}"
        )
    if len(given) == 2:
        return Work(*given)
    return Work(given[0], given[0] * (LIMIT.bytes / LIMIT.flops))


class _OnceDifferentiable(torch.autograd.Function):
    """The identity. That bases depend on the weights, too, is left out of the first derivative,
    where it makes no difference; in the second it would, so there is none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return only_once("singular values", ctx.saved_tensors, (grad,))[0]


@dataclass(frozen=True)
class _Plan:
    """What is decided from the shapes.

    Attributes:
        tree, rows: whose matricization.
        center: where the cores of ``"qr"`` meet.
        count: number of singular values.
        doubled: the network of ``"gram"``.
        cost: what either takes.
    """

    tree: ModeTree
    rows: frozenset[int]
    center: Node
    count: int
    doubled: Doubled
    cost: Cost


@lru_cache(maxsize=64)
def _plan(tree: ModeTree, shapes: tuple[tuple[int, int], ...], modes: tuple[int, ...]) -> _Plan:
    rows = frozenset(modes)
    center, size = best_center(tree, rows, shapes)
    doubled = plan_gram(tree, rows, shapes)
    # Both balance the weights first, by Gram matrices of all nodes.
    inner, outputs = shapes[-1]
    balancing = gram_flops(tree.nodes[:-1], shapes) + 2 * inner * inner * outputs
    weight = max(max(d, r) * r for d, r in shapes)
    qr = Work(
        balancing + size.flops + svd_flops(size.a, size.b),
        8 * max(weight, size.largest),
    )
    gram = Work(
        balancing + doubled.flops + 4 * doubled.size**3 // 3,
        8 * max(weight, doubled.largest),
    )
    cost = Cost(modes, tree.order, qr, gram)
    return _Plan(tree, rows, center, min(size.a, size.b), doubled, cost)


def _by_qr(plan: _Plan, weights: list[Tensor]) -> Tensor:
    matrix: Tensor = core_matrix(plan.tree, plan.rows, Tensors(weights), plan.center)
    return torch.linalg.svdvals(matrix)


def _by_gram(plan: _Plan, weights: list[Tensor]) -> Tensor:
    gram = gram_matrix(plan.doubled, weights)
    squared = torch.linalg.eigvalsh(gram).flip(0)[: plan.count]
    # Below their rounding errors squares say nothing, and the root has no derivative at 0.
    noise = squared[:1] * plan.doubled.size * torch.finfo(torch.float64).eps
    known = (squared > noise) & (squared > 0)
    root = torch.where(known, squared, 1).sqrt()
    return torch.where(known, root, squared.detach().clamp_min(0).sqrt())
