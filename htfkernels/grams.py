"""Frames and environments of all nodes in differentiable PyTorch, folded by shape.

A node's matricization is ``M_v = U_v E_v^T``. Here a frame or an environment is kept as it is where
it has no more rows than columns, and as its Gram matrix otherwise; Gram matrices follow from
products alone::

    up:                  G_v = W_v^T (hadamard of the children's G) W_v
    down, child c of v:  H_c = (W_v H_v W_v^T) hadamard (G of c's siblings)

so that traces of ``G_v H_v``, whose eigenvalues are the squared singular values, cost no
decomposition, and neither do their derivatives.

Scale: the columns of every frame are divided by their norms and environments by their largest
entry, whose logarithms are carried apart. These divisors are constants: the tree with weights
``e^log_in W e^-log_out`` is the same tensor, so derivatives do not change.
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
from torch.autograd.function import once_differentiable

from htfkernels.layout import Layout

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
        frames: ``[F, rows, R]``, or Gram matrices ``[F, R, R]``; the frame is that times
            ``exp(frame_logs)`` (of a Gram matrix: the columns' factors on both sides).
        frames_explicit: whether they are frames.
        frame_logs: ``[F, R]``.
        environments: likewise; the environment is that times ``exp(-frame_logs)`` in its columns
            and ``exp(environment_logs)``.
        environments_explicit: whether they are environments.
        environment_logs: ``[F]``.
    """

    nodes: tuple[int, ...]
    frames: Tensor
    frames_explicit: bool
    frame_logs: Tensor
    environments: Tensor
    environments_explicit: bool
    environment_logs: Tensor


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
    logs: list[Tensor] = []
    scaled: list[Tensor] = []
    for b in batches:
        w = _weight(layout, weights, b)
        product: Tensor | None = None
        log_in = torch.zeros_like(w[:, :, 0]).detach()
        if b.children:
            below = [pick(frames) for pick in b.children]
            log_in = reduce(torch.add, [pick(logs) for pick in b.children])
            if not b.product_explicit:
                below = [_gram(x, e) for x, e in zip(below, b.child_explicit, strict=True)]
            product = reduce(_khatri_rao if b.product_explicit else torch.mul, below)
        frame, log, weight = _through_weight(product, b.product_explicit, w, log_in)
        frames.append(_gram(frame, True) if b.product_explicit and not b.explicit else frame)
        logs.append(log)
        scaled.append(weight)

    wanted = set(wanted)
    needed = _needed(batches, wanted)
    environments: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    sides = []
    for i in reversed(range(len(batches))):
        if i not in needed:
            continue
        b, w, frame, log = batches[i], scaled[i], frames[i], logs[i]
        if b.environment is None:
            scale = log.amax(-1)
            e = torch.diag_embed((log - scale[:, None]).exp())
        else:
            e, scale = b.environment(environments), b.environment(scales)
        if not wanted.isdisjoint(b.nodes):
            sides.append(Sides(b.nodes, frame, b.explicit, log, e, b.environment_explicit, scale))
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
    return _LargestEigenvalues.apply(p)


class _LargestEigenvalues(Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        projection, eps = p, torch.finfo(p.dtype).eps
        for _ in range(40):
            square = projection @ projection
            square = square / _positive(_trace(square))[:, None, None]
            change = (square - projection).abs().amax()
            projection = square
            if not bool(change > 4 * eps):
                break
        ctx.save_for_backward(projection)
        return (projection.mT * p).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projection,) = ctx.saved_tensors
        return grad[:, None, None] * projection.mT


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


def _through_weight(
    product: Tensor | None, explicit: bool, w: Tensor, log_in: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The frame, its columns' logarithms, and the weight with these scales taken in."""
    top = log_in.amax(-1, keepdim=True)
    rows = w * (log_in - top).exp()[:, :, None]
    size = _positive(rows.detach().abs().amax((1, 2), keepdim=True))
    rows, log = rows / size, (top[:, :, None] + size.log()).squeeze(1)
    frame, norms = _times(product, explicit, rows)
    if not bool((norms > _smallest(w.dtype)).all()):
        # Factors far apart: each column by its own largest entry, so that none underflows.
        entries = log_in[:, :, None] + w.detach().abs().log()
        own = entries.amax(1, keepdim=True).nan_to_num(neginf=0.0)
        factor = (log_in[:, :, None] - own).clamp(max=_exponents(w.dtype))
        half = (factor / 2).exp()
        rows, log = w * half * half, own.squeeze(1)
        frame, norms = _times(product, explicit, rows)
    norms = _positive(norms)
    frame = frame / norms[:, None, :]
    if not explicit:
        frame = frame / norms[:, :, None]
    return frame, log + norms.log(), rows / norms[:, None, :]


def _smallest(dtype: torch.dtype) -> float:
    return 1e-140 if dtype == torch.float64 else 1e-15


def _exponents(dtype: torch.dtype) -> float:
    return 1400.0 if dtype == torch.float64 else 170.0


def _times(product: Tensor | None, explicit: bool, w: Tensor) -> tuple[Tensor, Tensor]:
    if product is None:
        frame = w
    else:
        frame = product @ w if explicit else w.mT @ product @ w
    if explicit:
        return frame, frame.detach().square().sum(1).sqrt()
    return frame, frame.detach().diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


def _above(e: Tensor, b: _Batch, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``E W^T`` or its Gram matrix, its largest entry 1."""
    if b.environment_explicit:
        above = e @ w.mT
        size = _positive(above.detach().abs().amax((1, 2)))
        above = above / size[:, None, None]
        if not b.above_explicit:
            above = _gram(above, True)
    else:
        above = w @ e @ w.mT
        size = _positive(above.detach().diagonal(dim1=1, dim2=2).amax(-1)).sqrt()
        above = above / size[:, None, None] / size[:, None, None]
    return above, scale + size.log()


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
