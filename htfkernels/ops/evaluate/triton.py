"""``evaluate`` and its backward in Triton kernels, level by level.

The functions have the names, arguments and results of the compiled operators. A forward pass goes
through the launches of :class:`htfkernels.triton.tables.Tables`, a backward pass through the same
launches in reverse. The buffer of all messages is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.tree.program import Step
from htfkernels.triton import configs, fused, ragged, uniform
from htfkernels.triton.launch import check_size
from htfkernels.triton.memory import empty
from htfkernels.triton.reduce import gradients
from htfkernels.triton.tables import Fused, Needed, Ragged, Tables, Uniform, Visit, tables_of
from htfkernels.triton.tiles import input_precision

__all__ = ["evaluate", "evaluate_backward", "evaluate_keeping"]


def evaluate(
    weights: Sequence[Tensor], x: Tensor, program: Tensor, out_features: int, *, precision: str
) -> Tensor:
    """``x [B, sum D_n] -> [B, out_features]``, or ``[B]`` where that is 1."""
    return evaluate_keeping(weights, x, program, out_features, precision=precision)[0]


def evaluate_keeping(
    weights: Sequence[Tensor], x: Tensor, program: Tensor, out_features: int, *, precision: str
) -> list[Tensor]:
    """The result, and the messages."""
    check_size("evaluate", x.shape[0], "samples")
    weights, x = [w.contiguous() for w in weights], x.contiguous()
    tables = _tables(program, x, precision)
    result = empty((x.shape[0], out_features), x)
    buffer = _messages(tables, weights, x, result, precision)
    return [result.squeeze(-1) if out_features == 1 else result, buffer]


def evaluate_backward(
    grad: Tensor, weights: Sequence[Tensor], x: Tensor, kept: Tensor, program: Tensor,
    needs: Sequence[int | bool], *, precision: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the weights and of ``x``; an empty tensor where ``needs`` is 0. Without the
    messages of the forward pass (``kept`` is empty) they are computed again."""
    check_size("evaluate", x.shape[0], "samples")  # of several gradients together, more than before
    weights, x, grad = [w.contiguous() for w in weights], x.contiguous(), grad.contiguous()
    tables = _tables(program, x, precision)
    rows = x.shape[0]
    if kept.numel() == 0:
        kept = _messages(tables, weights, x, empty((rows, tables.root.cols), x), precision)
    needed = tables.needed(needs)
    backward = _Backward(tables, weights, x, kept, grad, needed, precision)
    for visit in needed.visits:
        backward.visit(visit)
    return backward.finish()


def _tables(program: Tensor, x: Tensor, precision: str) -> Tables:
    return tables_of(program, x, (x.dtype, input_precision(x.dtype, precision)))


def _messages(
    tables: Tables, weights: Sequence[Tensor], x: Tensor, result: Tensor, precision: str
) -> Tensor:
    """All messages of a forward pass but the root's, which goes into ``result``."""
    rows = x.shape[0]
    buffer = empty(tables.width * rows, x)
    pack = ragged.pack_of(tables)
    packed = pack.weights(weights)
    for launched in tables.launches:
        if isinstance(launched, Ragged):
            ragged.forward(tables, launched, x, buffer, pack, packed, result, precision)
            continue
        node = launched.first
        target = result if node.parent < 0 else buffer[launched.column * rows :]
        weight = weights[node.group]
        if isinstance(launched, Fused):
            leaf = weights[launched.leaf.group]
            fused.forward(launched, x, leaf, weight, target, precision)
        else:
            source, stride, unit = _operands(node, x, buffer)
            uniform.forward(launched, source, stride, unit, weight, target, rows, precision)
    return buffer


def _operands(node: Step, x: Tensor, buffer: Tensor) -> tuple[Tensor, int, int]:
    """Where the operands of a node are: the tensor, the step between rows, the unit of columns."""
    return (x, x.shape[1], 1) if node.is_leaf else (buffer, node.rows, x.shape[0])


class _Backward:
    """A backward pass: gradients of messages from the root down, of weights on the way."""

    def __init__(
        self, tables: Tables, weights: Sequence[Tensor], x: Tensor, buffer: Tensor, grad: Tensor,
        needed: Needed, precision: str,
    ) -> None:  # fmt: skip
        self.tables, self.weights, self.x, self.buffer = tables, weights, x, buffer
        self.grad, self.needed, self.needs, self.precision = grad, needed, needed.needs, precision
        self.grad_buffer = empty(buffer.shape, x)
        self.grad_x = empty(x.shape if self.needs[-1] else (0,), x)
        inputs = input_precision(x.dtype, precision)
        self.widest = configs.widest_backward(x.device, x.dtype, inputs)
        self.pack = ragged.pack_of(tables, self.widest)
        self.packed = self.pack.weights(weights)
        self.partial: dict[int, list[Tensor]] = {}
        self.later: list[Step] = []

    def visit(self, visit: Visit) -> None:
        """The gradients that a launch of the forward pass asks for."""
        launched = visit.launched
        if isinstance(launched, Ragged):
            self._ragged(launched, visit)
        elif isinstance(launched, Fused):
            if self.needs[-1]:
                self._unfused(launched)
            else:
                self._fused(launched)
        elif launched.fits_backward(self.widest):
            self._uniform(launched, self.buffer, self.grad_buffer, visit.deeper)
        else:
            self._ragged(launched.as_ragged, visit)

    def finish(self) -> list[Tensor]:
        """All gradients, once every launch had its visit."""
        if self.later:
            parts = ragged.weight_gradients(
                self.tables, self.later, self.x, self.buffer, self.grad, self.grad_buffer,
                self.precision,
            )  # fmt: skip
            for g, partial in parts.items():
                self._add(g, partial)
        found = []
        for g, weight in enumerate(self.weights):
            parts = self.partial.get(g)
            found.append(gradients(parts, weight) if parts else weight.new_empty(0))
        return [*found, self.grad_x]

    def _add(self, group: int, partial: Tensor | None) -> None:
        if partial is not None:
            self.partial.setdefault(group, []).append(partial)

    def _places(self, group: int) -> int:
        return len(self.tables.of_group[group]) if self.needs[group] else 0

    def _grad(self, node: Step, column: int) -> Tensor:
        if node.parent < 0:
            return self.grad
        return self.grad_buffer[column * self.x.shape[0] :]

    def _ragged(self, launched: Ragged, visit: Visit) -> None:
        self.later += visit.weights
        if visit.deeper:
            ragged.backward(
                self.tables, launched, self.needed, self.buffer, self.pack, self.packed, self.grad,
                self.grad_buffer, self.grad_x, self.x.shape, self.precision,
            )  # fmt: skip

    def _fused(self, launched: Fused) -> None:
        node, leaf = launched.first, launched.leaf
        both = fused.backward(
            launched, self.x, self.weights[leaf.group], self.weights[node.group],
            self._grad(node, launched.column), self._places(node.group),
            self._places(leaf.group), self.precision,
        )  # fmt: skip
        self._add(node.group, both[0])
        self._add(leaf.group, both[1])

    def _unfused(self, launched: Fused) -> None:
        """With the leaves' messages stored: gradients of vectors are sums over all of K, which a
        fused program has only a part of."""
        leaves, rows = launched.leaves, self.x.shape[0]
        source = empty(launched.width * rows, self.x)
        weight = self.weights[launched.leaf.group]
        uniform.forward(leaves, self.x, self.x.shape[1], 1, weight, source, rows, self.precision)
        grad_source = empty(source.shape, self.x)
        self._uniform(launched.parents, source, grad_source, True)
        self._uniform(leaves, source, grad_source, True)

    def _uniform(
        self, launched: Uniform, buffer: Tensor, grad_buffer: Tensor, deeper: bool
    ) -> None:
        node = launched.first
        source, stride, unit = _operands(node, self.x, buffer)
        target = self.grad_x if node.is_leaf else grad_buffer
        grad = (
            grad_buffer
            if buffer is not self.buffer and node.is_leaf
            else self._grad(node, launched.column)
        )
        partial = uniform.backward(
            launched, source, stride, unit, self.weights[node.group], grad,
            target if deeper else None, self._places(node.group), self.x.shape[0], self.precision,
        )  # fmt: skip
        self._add(node.group, partial)
