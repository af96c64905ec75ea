"""Frames and environments of all nodes in differentiable PyTorch, folded by shape.

A node's matricization is ``M_v = U_v E_v^T``. Here a frame or an environment is kept as it is where
it has no more rows than columns, and as its Gram matrix otherwise; Gram matrices follow from
products alone::

    up:                  G_v = W_v^T (hadamard of the children's G) W_v
    down, child c of v:  H_c = (W_v H_v W_v^T) hadamard (G of c's siblings)

so that traces of ``G_v H_v``, whose eigenvalues are the squared singular values, cost no
decomposition, and neither do their derivatives.

Scale: the columns of every frame and every environment as a whole are divided by powers of two
that bring them near 1. These are constants: the tree with weights ``2^k_in W 2^-k_out`` is the same
tensor, so derivatives do not change. The exponents are whole numbers in the weights' dtype, whose
differences are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from htfkernels.runtime.autograd import only_once
from htfkernels.tree.layout import Layout

__all__ = ["Sides", "frames_and_environments", "largest_eigenvalues", "squares"]


@dataclass(frozen=True)
class _Pick:
    """Some slots of results side by side: which results, and where in them (None: all)."""

    sources: tuple[int, ...]
    at: slice | tuple[int, ...] | None

    def __call__(self, results: Sequence[Tensor] | dict[int, Tensor]) -> Tensor:
        parts = [results[s] for s in self.sources]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.at is None:
            return whole
        if isinstance(self.at, slice):
            return whole[self.at]
        return whole.index_select(0, torch.tensor(self.at, device=whole.device))


@dataclass(frozen=True)
class _Batch:
    """Nodes whose weights, children and environments have the same shapes.

    Attributes:
        nodes: their indices.
        weight: their weights in the group's (``group`` -1: the root of a ``"sum"``).
        children: for each position of a child, where the children's frames are.
        child_explicit: whether these frames are explicit.
        product_explicit, explicit: whether the children's product, the frame, is.
        environment: where the environments are; None at the root.
        environment_explicit, above_explicit: whether ``E`` is, ``E W^T`` is.
        first_result: of the children's environments, one for each position.
        below_explicit: whether the children's environments are.
    """

    nodes: tuple[int, ...]
    group: int
    weight: _Pick
    children: tuple[_Pick, ...]
    child_explicit: tuple[bool, ...]
    product_explicit: bool
    explicit: bool
    environment: _Pick | None
    environment_explicit: bool
    above_explicit: bool
    first_result: int
    below_explicit: tuple[bool, ...]


@dataclass(frozen=True)
class Sides:
    """Frames and environments of same-shaped nodes.

    Attributes:
        nodes: the nodes' indices.
        frames: ``[F, rows, R]``, or Gram matrices ``[F, R, R]``; a frame is that times
            ``2^frame_exponents``, a Gram matrix times that on both sides.
        frames_explicit: whether they are frames.
        frame_exponents: ``[F, R]``.
        environments: likewise; an environment is that times ``2^(environment_exponents -
            frame_exponents)``.
        environments_explicit: whether they are environments.
        environment_exponents: ``[F]``.
    """

    nodes: tuple[int, ...]
    frames: Tensor
    frames_explicit: bool
    frame_exponents: Tensor
    environments: Tensor
    environments_explicit: bool
    environment_exponents: Tensor


def frames_and_environments(
    layout: Layout, weights: Sequence[Tensor], wanted: Iterable[int]
) -> list[Sides]:
    """Both sides of the matricizations at some nodes, differentiable with respect to the weights.

    Args:
        layout: the tree and its shapes.
        weights: one ``[F, R_in, R_out]`` for each group, float32 or float64.
        wanted: indices of nodes.

    Returns:
        all batches that have a wanted node, with all of their nodes.
    """
    batches = _batches(layout)
    frames: list[Tensor] = []
    exponents: list[Tensor] = []
    scaled: list[Tensor] = []
    for b in batches:
        w = _weight(layout, weights, b)
        product: Tensor | None = None
        k_in = torch.zeros_like(w[:, :, 0])
        if b.children:
            below = [pick(frames) for pick in b.children]
            k_in = reduce(torch.add, [pick(exponents) for pick in b.children])
            if not b.product_explicit:
                below = [_gram(x, e) for x, e in zip(below, b.child_explicit, strict=True)]
            product = reduce(_khatri_rao if b.product_explicit else torch.mul, below)
        frame, k, weight = _through_weight(product, b.product_explicit, w, k_in)
        frames.append(_gram(frame, True) if b.product_explicit and not b.explicit else frame)
        exponents.append(k)
        scaled.append(weight)

    wanted = set(wanted)
    needed = _needed(batches, wanted)
    environments: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    sides = []
    for i in reversed(range(len(batches))):
        if i not in needed:
            continue
        b, w, frame, k = batches[i], scaled[i], frames[i], exponents[i]
        if b.environment is None:
            scale = k.amax(-1)
            e = torch.diag_embed((k - scale[:, None]).exp2())
        else:
            e, scale = b.environment(environments), b.environment(scales)
        if not wanted.isdisjoint(b.nodes):
            sides.append(Sides(b.nodes, frame, b.explicit, k, e, b.environment_explicit, scale))
        if not b.children:
            continue
        above, scale = _above(e, b, w, scale)
        below = [pick(frames) for pick in b.children]
        for j, x in enumerate(_environments(above, below, b)):
            environments[b.first_result + j] = x
            scales[b.first_result + j] = scale
    return sides


def squares(sides: Sides) -> Tensor:
    """``[F, n, n]`` with the eigenvalues ``sigma^2 / sum sigma^2`` of ``M_v`` (zero where ``M_v``
    is), and further zeros; not always symmetric."""
    f, e = sides.frames, sides.environments
    if sides.frames_explicit and sides.environments_explicit:
        m = f @ e.mT
        p = m @ m.mT if m.shape[1] <= m.shape[2] else m.mT @ m
    elif sides.frames_explicit:
        p = f @ e @ f.mT
    elif sides.environments_explicit:
        p = e @ f @ e.mT
    else:
        p = f @ e
    trace = _trace(p)
    # Where it is 0, so is p.
    return p / torch.where(trace.detach() > 0, trace, torch.ones_like(trace))[:, None, None]


def largest_eigenvalues(p: Tensor) -> Tensor:
    """``[F, n, n]``, similar to positive semidefinite matrices of trace 1 or zero -> ``[F]``.

    Squared again and again, with the trace kept at 1, such a matrix tends to the projection onto
    the eigenspace of its largest eigenvalue over that space's dimension; the eigenvalue is the
    trace with it, and so is its derivative (a second one would need more). Eigenvalues that 40
    squarings cannot tell apart agree to rounding.
    """
    return _LargestEigenvalues.apply(p)[0]


class _LargestEigenvalues(Function):
    @staticmethod
    def forward(p: Tensor) -> tuple[Tensor, Tensor]:
        projection, eps = p, torch.finfo(p.dtype).eps
        for _ in range(40):
            square = projection @ projection
            square = square / _positive(_trace(square))[:, None, None]
            change = (square - projection).abs().amax()
            projection = square
            if not bool(change > 4 * eps):
                break
        return (projection.mT * p).sum((1, 2)), projection

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
        p, projection = ctx.saved_tensors
        result = grad.detach()[:, None, None] * projection.mT
        return only_once("stable ranks", (p,), (result,))[0]


def _trace(p: Tensor) -> Tensor:
    return p.diagonal(dim1=1, dim2=2).sum(-1)


# -- steps of the recursion -----------------------------------------------------------------------


def _weight(layout: Layout, weights: Sequence[Tensor], b: _Batch) -> Tensor:
    if b.group < 0:
        return torch.ones_like(weights[-1][:1, :1, :1]).expand(1, layout.ranks[-1], 1)
    return b.weight([*weights])


def _khatri_rao(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, :, None, :] * y[:, None, :, :]).flatten(1, 2)


def _gram(x: Tensor, explicit: bool) -> Tensor:
    return x.mT @ x if explicit else x


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


def _exponent(x: Tensor) -> Tensor:
    """``k`` with ``2^(k-1) <= x < 2^k``, 0 where ``x`` is 0."""
    return torch.frexp(x).exponent.to(x.dtype)


def _through_weight(
    product: Tensor | None, explicit: bool, w: Tensor, k_in: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The frame, its columns' exponents, and the weight with these scales taken in."""
    top = k_in.amax(-1, keepdim=True)
    size = _exponent(w.detach().abs().amax((1, 2)))[:, None]
    scaled, k = w * (k_in - top - size).exp2()[:, :, None], (top + size).expand(-1, w.shape[2])
    frame, norms = _times(product, explicit, scaled)
    if not bool((norms > _smallest(w.dtype)).all()):
        # Factors far apart: each column by its own largest entry, so that none underflows.
        entries = torch.where(w == 0, -torch.inf, k_in[:, :, None] + _exponent(w.detach().abs()))
        k = entries.amax(1).nan_to_num(neginf=0.0)
        by = (k_in[:, :, None] - k[:, None, :]).clamp(max=2 * _largest(w.dtype))
        half = (by / 2).floor()
        scaled = w * half.exp2() * (by - half).exp2()
        frame, norms = _times(product, explicit, scaled)
    grown = _exponent(norms)
    shrink = (-grown).exp2()
    frame = frame * shrink[:, None, :]
    if not explicit:
        frame = frame * shrink[:, :, None]
    return frame, k + grown, scaled * shrink[:, None, :]


def _smallest(dtype: torch.dtype) -> float:
    return 1e-140 if dtype == torch.float64 else 1e-15


def _largest(dtype: torch.dtype) -> float:
    return 1000.0 if dtype == torch.float64 else 120.0


def _times(product: Tensor | None, explicit: bool, w: Tensor) -> tuple[Tensor, Tensor]:
    if product is None:
        frame = w
    else:
        frame = product @ w if explicit else w.mT @ product @ w
    if explicit:
        return frame, frame.detach().square().sum(1).sqrt()
    return frame, frame.detach().diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


def _above(e: Tensor, b: _Batch, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``E W^T`` or its Gram matrix, its largest entry near 1."""
    if b.environment_explicit:
        above = e @ w.mT
        size = _exponent(above.detach().abs().amax((1, 2)))
        above = above * (-size).exp2()[:, None, None]
        if not b.above_explicit:
            above = _gram(above, True)
    else:
        above = w @ e @ w.mT
        diagonal = above.detach().diagonal(dim1=1, dim2=2)
        size = _exponent(diagonal.amax(-1).clamp_min(0).sqrt())
        above = above * (-2 * size).exp2()[:, None, None]
    return above, scale + size


def _environments(above: Tensor, below: list[Tensor], b: _Batch) -> list[Tensor]:
    """The environments of the children, position by position."""
    if len(below) == 1:
        return [above]
    if all(b.below_explicit):
        return [_khatri_rao(above, below[1 - j]) for j in range(2)]
    grams = [_gram(x, e) for x, e in zip(below, b.child_explicit, strict=True)]
    whole = _gram(above, b.above_explicit)
    if len(below) == 2:
        return [
            _khatri_rao(above, below[1 - j]) if b.below_explicit[j] else whole * grams[1 - j]
            for j in range(2)
        ]
    after = [grams[-1]]  # products of the last ones
    for g in reversed(grams[1:-1]):
        after.append(g * after[-1])
    results = [whole * after[-1]]
    for j, g in enumerate(grams[:-1]):
        whole = whole * g
        results.append(whole * after[-2 - j] if j + 2 < len(grams) else whole)
    return results


def _needed(batches: Sequence[_Batch], wanted: set[int]) -> set[int]:
    """The batches with wanted nodes, and those that their environments come from."""
    maker = {b.first_result + j: i for i, b in enumerate(batches) for j in range(len(b.children))}
    needed: set[int] = set()
    for i, b in enumerate(batches):
        if i in needed or not wanted.isdisjoint(b.nodes):
            needed.add(i)
            if b.environment is not None:
                needed.update(maker[s] for s in b.environment.sources)
    return needed


# -- the batches of a layout ----------------------------------------------------------------------


@lru_cache(maxsize=64)
def _batches(layout: Layout) -> tuple[_Batch, ...]:
    """Leaves first; nodes of a batch are all of one level."""
    tree = layout.tree
    children, parents, count = tree._children, tree.parents, len(tree.parents)
    rows, product_rows = [0] * count, [0] * count  # 0: a Gram matrix
    for v in range(count):
        r_in, r_out = layout.shape(tree.nodes[v])
        if v < tree.order:
            product_rows[v] = r_in
        else:
            together = prod(rows[c] for c in children[v])
            product_rows[v] = together if together <= r_in else 0
        rows[v] = product_rows[v] if product_rows[v] <= r_out else 0
    above, outside = [0] * count, [0] * count
    order = {
        v: tuple(sorted(children[v], key=lambda c: (rows[c] == 0, rows[c]))) for v in range(count)
    }
    for v in reversed(range(count)):
        r_in, r_out = layout.shape(tree.nodes[v])
        if parents[v] < 0:
            outside[v] = r_out
        else:
            siblings = [c for c in children[parents[v]] if c != v]
            together = above[parents[v]] * prod(rows[c] for c in siblings)
            outside[v] = together if len(siblings) <= 1 and together <= r_out else 0
        above[v] = outside[v] if outside[v] <= r_in else 0

    keys: dict[tuple[int, int, tuple[int, ...], tuple[int, ...], int], list[int]] = {}
    for v in range(count):
        group = layout.location.get(v, (-1, 0))[0]
        kinds = tuple(rows[c] for c in order[v])
        inside = tuple(outside[c] for c in order[v])
        key = (tree.nodes[v].level, group, kinds, inside, outside[v])
        keys.setdefault(key, []).append(v)

    place: dict[int, tuple[int, int]] = {}  # node -> batch, slot
    result: dict[int, tuple[int, int]] = {}  # node -> result of its environment, slot
    made: list[tuple[list[int], int]] = []  # nodes of a batch, its first result
    first = 0
    for key in sorted(keys, key=lambda k: (k[0], keys[k][0])):
        nodes = keys[key]
        place.update({v: (len(made), i) for i, v in enumerate(nodes)})
        arity = len(order[nodes[0]])
        for j in range(arity):
            result.update({order[v][j]: (first + j, i) for i, v in enumerate(nodes)})
        made.append((nodes, first))
        first += arity
    batches = []
    for nodes, at in made:
        v = nodes[0]
        group = layout.location.get(v, (-1, 0))[0]
        slots = [(group, layout.location[n][1]) for n in nodes] if group >= 0 else [(0, 0)]
        batches.append(
            _Batch(
                tuple(nodes),
                group,
                _pick(slots, {g: layout.groups[g].count for g in range(len(layout.groups))}),
                tuple(
                    _pick(
                        [place[order[n][j]] for n in nodes],
                        {i: len(m[0]) for i, m in enumerate(made)},
                    )
                    for j in range(len(order[v]))
                ),
                tuple(rows[c] > 0 for c in order[v]),
                product_rows[v] > 0,
                rows[v] > 0,
                None
                if parents[v] < 0
                else _pick([result[n] for n in nodes], _result_sizes(made, order)),
                outside[v] > 0,
                above[v] > 0,
                at,
                tuple(outside[c] > 0 for c in order[v]),
            )
        )
    return tuple(batches)


def _result_sizes(
    made: list[tuple[list[int], int]], order: dict[int, tuple[int, ...]]
) -> dict[int, int]:
    return {at + j: len(nodes) for nodes, at in made for j in range(len(order[nodes[0]]))}


def _pick(where: list[tuple[int, int]], sizes: dict[int, int]) -> _Pick:
    sources = tuple(dict.fromkeys(source for source, _ in where))
    start, total = {}, 0
    for source in sources:
        start[source] = total
        total += sizes[source]
    at = [start[source] + slot for source, slot in where]
    if at == list(range(total)):
        return _Pick(sources, None)
    step = at[1] - at[0] if len(at) > 1 else 1
    if step > 0 and at == list(range(at[0], at[0] + step * len(at), step)):
        return _Pick(sources, slice(at[0], at[-1] + 1, step))
    return _Pick(sources, tuple(at))
