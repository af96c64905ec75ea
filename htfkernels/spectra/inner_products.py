"""Inner products and norms of factorizations of one tree, from their weights, without the tensors.

All sums are float64, and every column of every matrix on the way carries its power of two apart:
neither the order of the tensor nor the sizes of the weights make them leave the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from htfkernels.ops.spectra import singular_values
from htfkernels.runtime.plan import plan_for
from htfkernels.scaled import leading, power, split
from htfkernels.spectra.output_mode import with_output_mode
from htfkernels.tree.layout import Layout

__all__ = ["Factors", "Number", "inner", "norm"]

Factors = tuple[Layout, Sequence[Tensor]]  # and the weights folded into the layout's groups
Term = tuple[float, Factors]


class Number(NamedTuple):
    """``mantissa * 2**exponent``, a scalar; only the mantissa has a gradient."""

    mantissa: Tensor
    exponent: Tensor

    def value(self, dtype: torch.dtype) -> Tensor:
        """The number itself: infinite or 0 where it is out of range."""
        mantissa, exponent = split(self.mantissa)
        exponent = (exponent + self.exponent).clamp(-1100, 1025)
        half = torch.floor(exponent / 2)
        return (mantissa * power(half, mantissa) * power(exponent - half, mantissa)).to(dtype)

    def logabs(self, dtype: torch.dtype) -> Tensor:
        """The logarithm of its magnitude; ``-inf``, and without gradient, for 0."""
        zero = self.mantissa.detach() == 0
        log = torch.where(zero, 1.0, self.mantissa).abs().log() + self.exponent * math.log(2.0)
        return torch.where(zero, -math.inf, log).to(dtype)


def inner(x: Factors, y: Factors) -> Number:
    """``<T_x, T_y>`` by cross-Gram matrices ``X_v``: of the frames of ``v`` in both models.

    ``X_leaf = W_x^T W_y``, ``X_v = W_x^T (Hadamard product of the children's X) W_y``; the answer
    is the trace of the root's, the outputs being one more mode. Of the root's, only the diagonal is
    computed.
    """
    tree, x, y = x[0].tree, _double(x), _double(y)
    grams: dict[int, _Scaled] = {}
    for nodes in _same_shaped([x[0], y[0]], lambda v: len(tree._children[v])):
        left, right = _stacked(x, nodes), _stacked(y, nodes)
        if nodes[0] < tree.order:
            left, rows = _unit_columns(left)
            right, columns = _unit_columns(right)
            gram = left.mT @ right
        else:
            children = zip(*(tree._children[v] for v in nodes), strict=True)
            p = _hadamard([_Scaled.stack(grams[c] for c in same) for same in children])
            left, rows = _columns_scaled(left, p.rows, p.matrix.any(-1))
            right, columns = _columns_scaled(right, p.columns, p.matrix.any(-2))
            if nodes[0] == tree.root.index:
                return _sum((left * (p.matrix @ right)).sum(-2)[0], (rows + columns)[0])
            gram = left.mT @ p.matrix @ right
        grams.update(zip(nodes, _balanced(gram, rows, columns).unbind(), strict=True))
    raise AssertionError("a tree has a root")


def _sum(terms: Tensor, exponents: Tensor) -> Number:
    """The sum of ``terms * 2**exponents``."""
    mantissas, own = split(terms)
    exponents = own + exponents
    largest = leading(mantissas, exponents, -1)
    return Number((mantissas * power(exponents - largest, terms)).sum(), largest.squeeze(-1))


def norm(terms: Sequence[Term]) -> Number:
    """``|| sum of c T ||``, accurate to rounding of the largest term.

    Its gradient is that of ``sqrt(sum of c c' <T, T'>)``, divided by the accurate value: where the
    sum cancels to ``d`` of its largest term, accurate to ``2**-52 / d``. It is 0 where nothing but
    rounding is left of the sum.
    """
    mantissa, exponent = value = (
        _norm_of_one(*terms[0]) if len(terms) == 1 else _norm_by_frames(terms)
    )
    if not torch.is_grad_enabled() or not any(w.requires_grad for _, f in terms for w in f[1]):
        return value
    products = [
        (c * d if x is y else 2 * c * d, inner(x, y), x is y)
        for i, (c, x) in enumerate(terms)
        for d, y in terms[: i + 1]
    ]
    sizes = [
        (c * p.mantissa.detach().clamp_min(0)).sqrt() * power(p.exponent / 2 - exponent, mantissa)
        for c, p, same in products
        if same
    ]
    rounding = torch.finfo(torch.float64).eps * len(terms[0][1][0].tree.nodes)
    known = ~(mantissa <= rounding * sum(sizes))  # NaN stays
    # Zero, with the derivatives of the squared norm: sqrt(1 + change) has those of the norm, of
    # any order, and keeps the value.
    change = sum(
        c
        * (p.mantissa - p.mantissa.detach())
        * power(torch.where(known, p.exponent - 2 * exponent, 0.0), mantissa)
        for c, p, _ in products
    )
    change = torch.where(known, change / torch.where(known, mantissa, 1.0).square(), 0.0)
    return Number(mantissa * torch.sqrt(1 + change), exponent)


@torch.no_grad()
def _norm_of_one(coefficient: float, factors: Factors) -> Number:
    """From the singular values at the root, its outputs being the columns."""
    layout, weights, root = with_output_mode(*factors)
    plan = plan_for("spectra", layout, weights[0].dtype, weights[0].device.type)
    root = min(root, layout.tree.root.index)
    values, exponents, *_ = singular_values(plan, weights, [root], gram=False)
    return Number(abs(coefficient) * values.norm(), exponents[0].double())


@torch.no_grad()
def _norm_by_frames(terms: Sequence[Term]) -> Number:
    """QR up the tree of the sum.

    Its frames are the terms' frames side by side, kept as triangular factors ``F`` with their Gram
    matrix: ``F_leaf = R([W_1 | W_2 ..])``, ``F_v = R([P_1 W_1 | P_2 W_2 ..])`` with ``[P_1 | P_2
    ..]`` the children's Khatri-Rao product. The root's is the sum in an orthonormal basis.
    """
    tree, factors = terms[0][1][0].tree, [_double(f) for _, f in terms]
    frames: dict[int, _Frame] = {}

    def below(v: int) -> list[_Frame]:
        return [frames[c] for c in tree._children[v]]

    def shapes(v: int) -> object:
        return tuple(f.matrix.shape for f in below(v))

    for nodes in _same_shaped([f[0] for f in factors], shapes):
        weights = [_stacked(f, nodes) for f in factors]
        if nodes[0] < tree.order:
            parts = [_Frame(*_unit_columns(w)) for w in weights]
        else:
            same = zip(*(below(v) for v in nodes), strict=True)
            product = _khatri_rao([_Frame.stack(child) for child in same])
            ranks = [w.shape[-2] for w in weights]
            pieces = zip(
                product.matrix.split(ranks, -1), product.columns.split(ranks, -1), strict=True
            )
            parts = [_times(_Frame(*piece), w) for piece, w in zip(pieces, weights, strict=True)]
        if nodes[-1] == tree.root.index:
            return _norm_of_root([c for c, _ in terms], parts)
        matrix, more = _unit_columns(torch.cat([p.matrix for p in parts], -1))
        columns = torch.cat([p.columns for p in parts], -1) + more
        frames.update(zip(nodes, _Frame(_triangle(matrix), columns).unbind(), strict=True))
    raise AssertionError("a tree has a root")


def _norm_of_root(coefficients: Sequence[float], parts: Sequence[_Frame]) -> Number:
    """Of the sum of the terms' messages ``[1, rows, outputs]``, once they have one exponent."""
    largest = leading(
        torch.cat([p.matrix.abs().amax(-2) for p in parts], -1),
        torch.cat([p.columns for p in parts], -1),
        -1,
    )
    total = torch.zeros_like(parts[0].matrix)
    for c, (matrix, columns) in zip(coefficients, parts, strict=True):
        total += c * matrix * power(columns - largest, matrix).unsqueeze(-2)
    return Number(torch.linalg.vector_norm(total), largest.squeeze())


# -- matrices with powers of two apart ------------------------------------------------------------


class _Scaled(NamedTuple):
    """Matrices ``2**rows * matrix * 2**columns``: ``[F, m, n]``, ``[F, m]``, ``[F, n]``."""

    matrix: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def stack(cls, parts: Iterable[_Scaled]) -> _Scaled:
        return cls(*(torch.stack(same) for same in zip(*parts, strict=True)))

    def unbind(self) -> Iterable[_Scaled]:
        return (_Scaled(*one) for one in zip(*(t.unbind(0) for t in self), strict=True))


class _Frame(NamedTuple):
    """Triangular factors of frames, ``matrix * 2**columns``: ``[F, m, n]`` and ``[F, n]``."""

    matrix: Tensor
    columns: Tensor

    @classmethod
    def stack(cls, parts: Iterable[_Frame]) -> _Frame:
        return cls(*(torch.stack(same) for same in zip(*parts, strict=True)))

    def unbind(self) -> Iterable[_Frame]:
        return (_Frame(*one) for one in zip(*(t.unbind(0) for t in self), strict=True))


def _times(frame: _Frame, weight: Tensor) -> _Frame:
    scaled, columns = _columns_scaled(weight, frame.columns, frame.matrix.any(-2))
    return _Frame(frame.matrix @ scaled, columns)


def _hadamard(factors: Sequence[_Scaled]) -> _Scaled:
    matrix, rows, columns = factors[0]
    own: Tensor | None = None  # each entry's: one that has fallen far behind may come back
    for i, factor in enumerate(factors[1:], start=1):
        matrix = matrix * factor.matrix
        rows, columns = rows + factor.rows, columns + factor.columns
        if i % 4 == 0:
            matrix, extra = split(matrix)
            own = extra if own is None else own + extra
    if own is not None:
        by_row = leading(matrix, own, -1)
        by_column = leading(matrix, own - by_row, -2)
        matrix = matrix * power(own - by_row - by_column, matrix)
        rows, columns = rows + by_row.squeeze(-1), columns + by_column.squeeze(-2)
    return _balanced(matrix, rows, columns)


def _balanced(matrix: Tensor, rows: Tensor, columns: Tensor) -> _Scaled:
    """The same with the largest magnitude of each column, and about that of each row, near 1."""
    matrix, by_row = _unit_columns(matrix.mT)
    matrix, by_column = _unit_columns(matrix.mT)
    return _Scaled(matrix, rows + by_row, columns + by_column)


def _unit_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``[.., m, n]`` with the largest magnitude of each column in [1/2, 1), and the exponents."""
    exponent = torch.frexp(matrix.detach().abs().amax(-2)).exponent.to(torch.float64)
    half = torch.floor(exponent / 2).unsqueeze(-2)  # in two steps: 2**-e may be out of range
    rest = half - exponent.unsqueeze(-2)
    return matrix * power(-half, matrix) * power(rest, matrix), exponent


def _columns_scaled(weight: Tensor, rows: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """``2**rows * weight [.., m, n]`` as unit columns and their exponents ``[.., n]``.

    Rows that are not ``live`` meet nothing but zeros: they do not count in the scale. A column of
    zeros has the scale of ones.
    """
    live = live.to(rows.dtype)
    mantissa, exponent = split(weight)
    exponent = exponent + rows.unsqueeze(-1)
    counted = mantissa * live.unsqueeze(-1)
    largest = leading(counted, exponent, -2).squeeze(-2)
    largest = torch.where(counted.any(-2), largest, leading(live, rows, -1))
    return mantissa * power(exponent - largest.unsqueeze(-2), mantissa), largest


# -- frames and folded weights --------------------------------------------------------------------


def _khatri_rao(frames: Sequence[_Frame]) -> _Frame:
    """Triangular factor of the frames' row-wise Khatri-Rao product."""
    matrix, columns = frames[0]
    for frame in frames[1:]:
        matrix, more = _unit_columns(_triangle_of_product(matrix, frame.matrix))
        columns = columns + frame.columns + more
    return _Frame(matrix, columns)


def _triangle_of_product(a: Tensor, b: Tensor, width: int = 32, room: int = 2**22) -> Tensor:
    """Triangular factor of the row-wise Khatri-Rao product of two triangles ``[F, at most R, R]``.

    Row ``(i, j)`` of the product begins with ``max(i, j)`` zeros. Taken ``width`` columns at a
    time, with the rows that begin there, QR has a sixth of the work of the whole product's, and
    of no more than ``2 R width`` rows at once; nor do more than about ``room`` entries exist.
    """
    most = max(1, room // (2 * width * a.shape[-1] ** 2))
    if len(a) > most:
        parts = zip(a.split(most), b.split(most), strict=True)
        return torch.cat([_triangle_of_product(x, y, width) for x, y in parts])

    def pair(rows: Tensor, others: Tensor) -> Tensor:
        return (rows[:, :, None] * others[:, None]).flatten(1, 2)

    done: list[Tensor] = []
    rest = a[:, :0]
    for start in range(0, max(a.shape[1], b.shape[1]), width):
        stop = start + width
        x, y = a[..., start:], b[..., start:]
        begin_here = [pair(x[:, start:stop], y[:, :stop]), pair(x[:, :start], y[:, start:stop])]
        rest = _triangle(torch.cat([rest, *begin_here], 1))
        done.append(torch.nn.functional.pad(rest[:, :width], (start, 0)))
        rest = rest[:, width:, width:]
    done.append(torch.nn.functional.pad(rest, (a.shape[-1] - rest.shape[-1], 0)))
    return torch.cat(done, 1)


def _triangle(matrix: Tensor) -> Tensor:
    """The upper triangular (or trapezoidal) matrix with the same Gram matrix."""
    return torch.linalg.qr(matrix, mode="r").R


def _same_shaped(layouts: Sequence[Layout], also: Callable[[int], object]) -> Iterator[list[int]]:
    """The nodes, children first, those of a level together whose weights have the same shapes in
    all layouts and for which ``also`` is the same; it is asked when the levels below are done."""
    for level in layouts[0].tree.levels:
        alike: dict[tuple[object, ...], list[int]] = {}
        for node in level:
            key = (*(layout.shape(node) for layout in layouts), also(node.index))
            alike.setdefault(key, []).append(node.index)
        yield from alike.values()


def _double(factors: Factors) -> Factors:
    return factors[0], [w.double() for w in factors[1]]


def _stacked(factors: Factors, nodes: list[int]) -> Tensor:
    """The weights ``[F, R_in, R_out]`` of same-shaped nodes of one level."""
    layout, weights = factors
    if nodes[0] not in layout.location:  # the root of a "sum"
        return weights[0].new_ones(1, *layout.shape(layout.tree.root))
    slots = [layout.location[v][1] for v in nodes]
    weight = weights[layout.location[nodes[0]][0]]
    return weight if slots == list(range(len(weight))) else weight[slots]
