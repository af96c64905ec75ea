"""What the nodes of a tree tell each other about a matricization, rows and columns apart.

A message is a core ``[a, b, R]`` between orthonormal bases of the rows (``a``) and of the columns
(``b``) on the sender's side; ``R`` is the receiver's rank. Where cores meet they are multiplied:
Kronecker product in ``a`` and ``b``, Hadamard product in ``r``. Along an edge they are multiplied
by its weight, upwards, or by its transpose, downwards: the outputs are columns above the root, and
the cores may meet at any node. After each step QR leaves ``a <= b R`` and ``b <= a R``.

Everything is written once, for :class:`Tensors` and for :class:`Sizes`, which says beforehand what
it takes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htfkernels.tree import ModeTree, Node

__all__ = [
    "Size",
    "Sizes",
    "Tensors",
    "best_center",
    "core_matrix",
    "joined",
    "svd_flops",
    "upward",
]


class Tensors:
    """Cores ``[a, b, R]``, kept small.

    Args:
        weights: ``[R_in, R_out]`` for each node of ``tree.nodes``.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights

    def shape(self, core: Tensor) -> tuple[int, ...]:
        return core.shape

    def width(self, i: int, down: bool) -> int:
        """Rank of what comes along the edge above node ``i``."""
        return self.weights[i].shape[0 if down else 1]

    def leaf(self, i: int, is_row: bool) -> Tensor:
        """A mode: ``[D, 1, R]`` or ``[1, D, R]``."""
        return self._small(self.weights[i][:, None] if is_row else self.weights[i][None])

    def outputs(self) -> Tensor:
        """The outputs, columns like a mode's, as the root sees them."""
        return self._small(self.weights[-1].T[None])

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """Cores that meet."""
        both = x[:, None, :, None] * y[None, :, None, :]
        return self._small(both.flatten(2, 3).flatten(0, 1))

    def along(self, x: Tensor, i: int, down: bool) -> Tensor:
        """A core behind the edge above node ``i``."""
        return self._small(x @ self._weight(i, down))

    def product_along(self, x: Tensor, y: Tensor, i: int, down: bool) -> Tensor:
        """Both at once, for edges that are narrower behind: the product is never that large."""
        moved = x[..., None] * self._weight(i, down)
        both = torch.einsum("abrs,cdr->acbds", moved, y)
        return self._small(both.flatten(2, 3).flatten(0, 1))

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """The last two cores, summed over the index that they share: ``[a a', b b']``."""
        return torch.einsum("abr,cdr->acbd", x, y).flatten(2).flatten(0, 1)

    def _weight(self, i: int, down: bool) -> Tensor:
        return self.weights[i].T if down else self.weights[i]

    def _small(self, core: Tensor) -> Tensor:
        a, b, r = core.shape
        if a > b * r:
            return _triangle(core.flatten(1)).unflatten(1, (b, r))
        if b > a * r:
            return _triangle(core.transpose(0, 1).flatten(1)).unflatten(1, (a, r)).transpose(0, 1)
        return core


def _triangle(tall: Tensor) -> Tensor:
    """``Q^T tall``, square, for an orthonormal basis ``Q`` of the columns of a tall matrix.

    With ``Q`` a constant, first derivatives of singular values are exact: ``d sigma = u^T dM v``,
    and the singular vectors are in the span of the bases. The derivative of QR itself needs
    ``R^-1``, which may not be there.
    """
    if not (torch.is_grad_enabled() and tall.requires_grad):
        return torch.linalg.qr(tall, mode="r").R
    return torch.linalg.qr(tall.detach()).Q.T @ tall


class Size(NamedTuple):
    """Stands for a core, or for the matrix in the end (``r = 1``).

    Attributes:
        a, b, r: its shape.
        flops: of all that it was made of.
        largest: number of elements of the largest tensor on the way.
    """

    a: int
    b: int
    r: int
    flops: int
    largest: int


class Sizes:
    """The same steps as :class:`Tensors`, on shapes alone.

    Args:
        shapes: ``(R_in, R_out)`` for each node of ``tree.nodes``.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self.shapes = shapes

    def shape(self, core: Size) -> tuple[int, ...]:
        return core[:3]

    def width(self, i: int, down: bool) -> int:
        return self.shapes[i][0 if down else 1]

    def leaf(self, i: int, is_row: bool) -> Size:
        d, r = self.shapes[i]
        return _made(d, 1, r, 0) if is_row else _made(1, d, r, 0)

    def outputs(self) -> Size:
        r, outputs = self.shapes[-1]
        return _made(1, outputs, r, 0)

    def product(self, x: Size, y: Size) -> Size:
        a, b, r = x.a * y.a, x.b * y.b, x.r
        return _made(a, b, r, a * b * r, x, y)

    def along(self, x: Size, i: int, down: bool) -> Size:
        s = self.width(i, down)
        return _made(x.a, x.b, s, 2 * x.a * x.b * x.r * s, x)

    def product_along(self, x: Size, y: Size, i: int, down: bool) -> Size:
        s = self.width(i, down)
        moved = x.a * x.b * x.r * s
        x = x._replace(flops=x.flops + moved, largest=max(x.largest, moved))
        a, b = x.a * y.a, x.b * y.b
        return _made(a, b, s, 2 * a * b * x.r * s, x, y)

    def matrix(self, x: Size, y: Size) -> Size:
        a, b = x.a * y.a, x.b * y.b
        flops = x.flops + y.flops + 2 * a * b * x.r
        return Size(a, b, 1, flops, max(x.largest, y.largest, a * b))


def _made(a: int, b: int, r: int, flops: int, *of: Size) -> Size:
    largest = max(a * b * r, *(x.largest for x in of), 0)
    flops += sum(x.flops for x in of)
    if a > b * r:
        return Size(b * r, b, r, flops + _qr_flops(a, b * r), largest)
    if b > a * r:
        return Size(a, a * r, r, flops + _qr_flops(b, a * r), largest)
    return Size(a, b, r, flops, largest)


def _qr_flops(m: int, n: int) -> int:
    """Of the triangular factor of a tall matrix (Golub & Van Loan, 5.2)."""
    return 2 * m * n * n - 2 * n**3 // 3


def svd_flops(m: int, n: int) -> int:
    """Of the singular values alone (Golub & Van Loan, 8.6)."""
    few, many = sorted((m, n))
    return 4 * many * few * few - 4 * few**3 // 3


def joined(run: Any, cores: Sequence[Any], count: int = 1) -> list[Any]:
    """Multiplies cores that meet, the smallest first, until ``count`` are left."""
    heap = [(math.prod(run.shape(core)), i, core) for i, core in enumerate(cores)]
    heapq.heapify(heap)
    for i in range(len(cores), 2 * len(cores) - count):
        product = run.product(heapq.heappop(heap)[2], heapq.heappop(heap)[2])
        heapq.heappush(heap, (math.prod(run.shape(product)), i, product))
    return [core for *_, core in sorted(heap, key=lambda entry: entry[:2])]


def _at_most_two(run: Any, cores: Sequence[Any]) -> list[Any]:
    """The cores that meet at a node, multiplied until two are left, the smaller one first: the
    rows' with each other before all, and the columns', which stay within ``R`` elements."""
    if len(cores) > 2:
        rows = [core for core in cores if run.shape(core)[1] == 1]
        rest = [core for core in cores if run.shape(core)[1] > 1]
        columns = [core for core in rest if run.shape(core)[0] == 1]
        if max(len(rows), len(columns)) < len(cores):
            both = [core for core in rest if run.shape(core)[0] > 1]
            cores = both + [c for side in (rows, columns) if side for c in joined(run, side)]
    return joined(run, cores, min(2, len(cores)))


def _sent(run: Any, cores: Sequence[Any], i: int, down: bool = False) -> Any:
    """The cores that meet at one end of the edge above node ``i``, as one at the other end."""
    x, *others = _at_most_two(run, cores)
    if not others:
        return run.along(x, i, down)
    if run.width(i, down) < run.width(i, not down):
        return run.product_along(x, *others, i, down)
    return run.along(run.product(x, *others), i, down)


def upward(
    rows: frozenset[int], run: Any, nodes: Iterable[Node], keep: bool = False
) -> dict[int, Any]:
    """What comes up from nodes.

    Args:
        rows: the rows' modes.
        run: a :class:`Tensors` or a :class:`Sizes`.
        nodes: whole subtrees, children before parents.
        keep: whether to return all, not only those that no other was made of.

    Returns:
        cores, by the nodes' indices.
    """
    cores: dict[int, Any] = {}
    take = cores.__getitem__ if keep else cores.pop
    for node in nodes:
        i = node.index
        if node.is_leaf:
            cores[i] = run.leaf(i, i in rows)
        else:
            cores[i] = _sent(run, [take(c.index) for c in node.children], i)
    return cores


def core_matrix(tree: ModeTree, rows: frozenset[int], run: Any, center: Node) -> Any:
    """The matricization between orthonormal bases, ``[a, b]``, all cores meeting at one interior
    node."""
    path = [center]
    while (parent := path[-1].parent) is not None:
        path.append(parent)
    passed = {node.index for node in path}
    cores = upward(rows, run, (n for n in tree.nodes if n.index not in passed))
    above = run.outputs()
    for node, below in pairwise(reversed(path)):
        others = [cores.pop(c.index) for c in node.children if c != below]
        above = _sent(run, [above, *others], below.index, down=True)
    met = [above, *(cores.pop(c.index) for c in center.children)]
    return run.matrix(*_at_most_two(run, met))


def best_center(
    tree: ModeTree, rows: frozenset[int], shapes: Sequence[tuple[int, int]]
) -> tuple[Node, Size]:
    """The node where cores should meet, and the matrix, by trying them on shapes: all nodes with
    rows and columns below, in trees of few children; else those that lead to the largest cores."""
    run = Sizes(shapes)
    cores = upward(rows, run, tree.nodes[:-1], keep=True)
    waiting: list[tuple[Node, list[Size]]] = [(tree.root, [])]
    found: list[tuple[int, Node, Size]] = []
    steps = 0
    while waiting and steps <= 4 * len(tree.nodes):
        node, sent = waiting.pop()
        above = _sent(run, sent, node.index, down=True) if sent else run.outputs()
        met = {c: cores[c.index] for c in node.children}
        size: Size = run.matrix(*_at_most_two(run, [above, *met.values()]))
        found.append((size.flops + svd_flops(size.a, size.b), node, size))
        steps += 2 * (1 + len(met))
        for child in sorted(met, key=lambda c: math.prod(met[c][:3])):
            if not child.is_leaf and min(met[child][:2]) > 1:
                waiting.append((child, [above, *(core for c, core in met.items() if c != child)]))
    return min(found, key=lambda entry: entry[0])[1:]
