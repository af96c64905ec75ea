"""Spectra as something to be timed: what is right, how far off a result is, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import htfkernels as hk

__all__ = [
    "LARGEST_TENSOR",
    "TOLERANCES",
    "error",
    "exact",
    "multiply_adds",
    "num_values",
    "relative",
    "total",
]

LARGEST_TENSOR = 2**22
"""Entries of a tensor that may be formed."""

TOLERANCES = {
    "forward-qr": 1e-10,
    "forward-gram": 1e-7,
    "forward-renyi2": 1e-7,
    "backward-effective": 1e-4,
    "backward-renyi2": 1e-7,
}
"""For each pass how far a result may be off, relative to a node's largest singular value, to its
rank, or to the largest number of a gradient. With 1e-10 and 1e-7 a method has to hold this for
every tree: Gram matrices have squares of singular values to rounding, so they are in the second
class whatever they are off here. Derivatives of effective ranks by plain Gram matrices are off by
up to 1e-5."""


def exact(model: hk.HTF, which: str) -> list[Tensor]:
    """What every implementation is held against: singular values by QR on the reference backend,
    in float64, ranks of these and derivatives through them.

    Args:
        model: of float64 weights.
        which: the pass.

    Returns:
        of each node but the root the singular values, or the rank; or a gradient for each weight.
    """
    with hk.use_backend("reference"), torch.set_grad_enabled(which.startswith("backward")):
        values = model.matricization_spectra(method="qr")
        if which.startswith("backward"):
            rank = hk.effective_rank if which == "backward-effective" else hk.renyi2_rank
            return list(torch.autograd.grad(total(rank, values), list(model.weights)))
    if which == "forward-renyi2":
        return [hk.renyi2_rank(s) for s in values.values()]
    return list(values.values())


def total(rank: Callable[[Tensor], Tensor], spectra: Mapping[hk.Node, Tensor]) -> Tensor:
    """The sum of a rank over nodes, those with equally many singular values at once."""
    by_length: dict[int, list[Tensor]] = {}
    for s in spectra.values():
        by_length.setdefault(len(s), []).append(s)
    return torch.stack([rank(torch.stack(s)).sum() for s in by_length.values()]).sum()


def error(which: str, result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far a pass's result is off, in the sense of :data:`TOLERANCES`.

    Args:
        which: the pass.
        result: as :func:`exact` returns it; some zeros more or less than there should be among
            singular values do not count.
        expected: what :func:`exact` returns.
    """
    if len(result) != len(expected):
        return float("inf")
    if which not in ("forward-qr", "forward-gram"):
        return relative(result, expected)
    width = max(len(s) for s in (*result, *expected))

    def padded(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.pad(s.detach(), (0, width - len(s))) for s in values])

    right = padded(expected)
    return _largest((padded(result) - right).abs() / right[:, :1])


def relative(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error, relative to the largest number of its tensor; infinite where shapes
    differ."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float("inf")
        worst = max(worst, _largest((a.detach().double() - e).abs() / e.abs().max().clamp(1e-300)))
    return worst


def _largest(off: Tensor) -> float:
    return float(off.nan_to_num(nan=torch.inf).max())


def num_values(layout: hk.Layout) -> int:
    """The number of singular values of all nodes but the root."""
    frames, environments, _ = _shapes(layout)
    return sum(min(frames[i], environments[i]) for i in environments)


def multiply_adds(layout: hk.Layout) -> int | None:
    """Of all singular values by QR decompositions, where every interior node has two children.

    Counted are, as the engine does them,

    - Householder reductions of Khatri-Rao products. A row that begins at column ``s`` of ``n``
      takes ``(n - s)^2``. In the product of two triangular factors the row ``(i, j)`` begins at
      ``max(i, j)``, which makes ``n^4 / 6``: three of these for an interior node, its frame's and
      its children's environments'. Of a triangular and a rectangular factor of ``b`` rows it is
      ``b n^3 / 3``, of rectangular ones ``a b n^2``;
    - what frames and environments are multiplied with and brought back to a triangle, ``O(R^3)``;
    - ``F E^T``, and ``4/3 K^3`` for its bidiagonal form.

    An implementation that takes these products for dense does up to six times as much as it is
    credited with.
    """
    if any(len(node.children) != 2 for node in layout.tree.interior):
        return None
    return _shapes(layout)[2]


def _shapes(layout: hk.Layout) -> tuple[dict[int, int], dict[int, int], int]:
    """Rows of the frames and environments of all nodes but the root, and the multiply-adds."""
    tree = layout.tree
    work = 0
    frames: dict[int, int] = {}
    environments: dict[int, int] = {tree.root.index: layout.out_features}
    for node in tree.nodes[:-1]:
        rows, cols = layout.shape(node)
        if not node.is_leaf:
            product = [frames[c.index] for c in node.children]
            rows, more = _shrunk(product, rows)
            work += more + rows * layout.shape(node)[0] * cols
        frames[node.index] = min(rows, cols)
        work += _householder(rows, cols) if rows >= cols else 0
    for node in reversed(tree.interior):
        rows, cols = layout.shape(node)
        above = environments[node.index]
        work += above * rows * cols + (_householder(above, rows) if above >= rows else 0)
        above = min(above, rows)
        for child in node.children:
            others = [frames[c.index] for c in node.children if c != child]
            environments[child.index], more = _shrunk([above, *others], rows)
            work += more
    del environments[tree.root.index]
    for i, e in environments.items():
        f, rank = frames[i], layout.shape(tree.nodes[i])[1]
        work += f * e * rank + (_householder(max(f, e), min(f, e)) if f != e else 0)
        work += 4 * min(f, e) ** 3 // 3
    return frames, environments, work


def _shrunk(factors: list[int], n: int) -> tuple[int, int]:
    """Rows of a Khatri-Rao product of ``n`` columns, at most ``n``, and the multiply-adds of
    bringing it down to that; a factor of ``n`` rows is triangular."""
    rows, work = factors[0], 0
    for more in factors[1:]:
        if rows * more > n:
            free = [r for r in (rows, more) if r < n]
            if len(free) == 2:
                work += rows * more * n * n
            elif len(free) == 1:
                work += free[0] * n**3 // 3
            else:
                work += n**4 // 6
        rows = min(rows * more, n)
    return rows, work


def _householder(rows: int, cols: int) -> int:
    return cols * cols * rows - cols**3 // 3
