"""Running a differentiable operation, with whatever differentiation the context asks for.

A :class:`Kernel` runs the operators of an operation (:class:`htfkernels.runtime.operations.
Operation`) on folded weights and optional data. Around it stand two pairs of ``autograd.Function``:
the classic form, cheap enough for a training loop of tiny steps, and the ``setup_context`` form,
which ``torch.func`` transforms need. The backward of a backward is the formula's, differentiated by
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from htfkernels.runtime import compiled
from htfkernels.runtime.operations import Operation, load
from htfkernels.runtime.plan import Plan
from htfkernels.runtime.precision import float32_precision
from htfkernels.tree.layout import Layout

__all__ = ["Kernel", "only_once", "run", "squeeze"]

Tensors = tuple[Tensor, ...]
Formula = Callable[..., Tensor]


def run(
    operation: Operation,
    plan: Plan,
    weights: Sequence[Tensor],
    data: Sequence[Tensor],
    fixed: tuple[Any, ...],
    formula: Formula,
) -> Tensor:
    """The result of an operation on the plan's backend.

    Args:
        operation: what is run.
        plan: backend and layout.
        weights, data, fixed: the arguments of its operator.
        formula: ``(*weights, *data)`` to the same result in differentiable PyTorch operations: the
            reference.
    """
    if plan.backend == "reference":
        return formula(*weights, *data)
    if torch.compiler.is_compiling():
        name = f"{operation.name}_cuda" if plan.backend == "cuda" else operation.name
        result: Tensor = getattr(compiled.ops, name)(list(weights), *data, *fixed)
        return result
    return _apply(Kernel(operation, plan, fixed, formula), *weights, *data)


class Kernel:
    """A compiled operation on one layout; the arguments are the folded weights, then the data.

    Attributes:
        reference: the formula, ``(*weights, *data)`` to the result.
        num_weights: how many of the arguments are weights.
    """

    def __init__(
        self, operation: Operation, plan: Plan, fixed: tuple[Any, ...], formula: Formula
    ) -> None:
        self.operation, self.fixed, self.reference = operation, fixed, formula
        self.num_weights = len(plan.layout.groups)
        self._module = operation.backends[plan.backend].module
        self._precision = float32_precision() if self._module else ""

    def _run(self, name: str, *args: Any) -> Any:
        if not self._module:
            return compiled.call(name, *args)
        return getattr(load(self._module), name)(*args, precision=self._precision)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The result of the operation."""
        n = self.num_weights
        result: Tensor = self._run(self.operation.name, tensors[:n], *tensors[n:], *self.fixed)
        return result

    def forward_keeping(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The result, and behind it what the backward pass need not compute again."""
        if not self.operation.keeps:
            return [self.forward(*tensors)]
        n, name = self.num_weights, f"{self.operation.name}_keeping"
        found: Sequence[Tensor] = self._run(name, tensors[:n], *tensors[n:], *self.fixed)
        return found

    def backward(
        self, grad: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool], *kept: Tensor
    ) -> Sequence[Tensor]:
        """Gradients of the arguments; an empty tensor where one is not needed. ``kept`` is what
        :meth:`forward_keeping` returned behind the result, or nothing."""
        n, operation = self.num_weights, self.operation
        held: tuple[Any, ...] = ()
        if operation.keeps == 1:
            held = kept or (grad.new_empty(0),)
        elif operation.keeps:
            held = (kept,)
        tables = (t for t in self.fixed if isinstance(t, Tensor))
        wanted = needs if operation.data == "differentiable" else needs[:n]
        name = f"{operation.name}_backward"
        grads: Sequence[Tensor] = self._run(
            name, grad, tensors[:n], *tensors[n:], *held, *tables, wanted
        )
        return grads if len(wanted) == len(needs) else [*grads, grad.new_empty(0)]

    def reference_backward(self, needs: Sequence[bool]) -> Callable[..., Tensors]:
        """``(grad, *tensors) -> gradients of the needed tensors``, in differentiable operations."""

        def run(grad: Tensor, *tensors: Tensor) -> Tensors:
            wanted = [i for i, n in enumerate(needs) if n]

            def partial(*chosen: Tensor) -> Tensor:
                full = list(tensors)
                for i, t in zip(wanted, chosen, strict=True):
                    full[i] = t
                return self.reference(*full)

            pull = torch.func.vjp(partial, *(tensors[i] for i in wanted))[1]
            return tuple(pull(grad))

        return run


def _apply(kernel: Kernel, *tensors: Tensor) -> Tensor:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _TransformForward.apply(kernel, *tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "htfkernels: torch.jit.trace cannot record the derivatives of a compiled backend; "
                'trace under hk.use_backend("reference"), or under torch.no_grad(), or use '
                "torch.export.export"
            )
        return _Forward.apply(kernel, *tensors)
    return kernel.forward(*tensors)


def squeeze(layout: Layout, result: Tensor) -> Tensor:
    """``[B, 1]`` as ``[B]``."""
    return result.squeeze(-1) if layout.out_features == 1 else result


def only_once(what: str, arguments: Sequence[Tensor], grads: Tensors) -> Tensors:
    """Gradients that raise when they are differentiated with respect to the arguments. PyTorch's
    ``once_differentiable`` lets those pass as constants whose cotangent is a constant: a wrong
    second derivative in silence."""
    if not torch.is_grad_enabled():
        return grads
    return _OnlyOnce.apply(what, len(arguments), *arguments, *grads)


class _OnlyOnce(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(what: str, count: int, *tensors: Tensor) -> Tensors:
        return tuple(g.view_as(g) for g in tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.what = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(f"htfkernels: {ctx.what} have no second derivatives")


def _optional(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if n else None for g, n in zip(grads, needs, strict=True))


class _Forward(Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *tensors: Tensor) -> Tensor:
        ctx.kernel = kernel
        result, *kept = kernel.forward_keeping(*tensors)
        ctx.save_for_backward(*tensors, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        saved, count = ctx.saved_tensors, len(needs)
        tensors, kept = saved[:count], saved[count:]
        if torch.is_grad_enabled():
            return (None, *_optional(_Backward.apply(ctx.kernel, needs, grad, *tensors), needs))
        grads = ctx.kernel.backward(grad, tensors, needs, *kept)
        return (None, *(grads if all(needs) else _optional(grads, needs)))


class _Backward(Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, needs: Sequence[bool], grad: Tensor, *tensors: Tensor
    ) -> Tensors:
        ctx.kernel, ctx.needs = kernel, needs
        ctx.save_for_backward(grad, *tensors)
        return tuple(kernel.backward(grad, tensors, needs))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (
            None,
            None,
            *_second(
                ctx.kernel, ctx.needs, ctx.saved_tensors, cotangents, ctx.needs_input_grad[2:]
            ),
        )


def _second(
    kernel: Kernel,
    needs: Sequence[bool],
    saved: Tensors,
    cotangents: Sequence[Tensor],
    second: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the backward's arguments ``(grad, *tensors)``, by the reference."""
    chosen = [i for i, n in enumerate(second) if n]

    def run(*arguments: Tensor) -> Tensors:
        full = list(saved)
        for i, t in zip(chosen, arguments, strict=True):
            full[i] = t
        return kernel.reference_backward(needs)(*full)

    pull = torch.func.vjp(run, *(saved[i] for i in chosen))[1]
    grads = iter(pull(tuple(c for c, n in zip(cotangents, needs, strict=True) if n)))
    return tuple(next(grads) if n else None for n in second)


class _TransformForward(Function):
    @staticmethod
    def forward(kernel: Kernel, *tensors: Tensor) -> Tensor:
        return kernel.forward(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kernel = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        return (
            None,
            *_optional(
                _TransformBackward.apply(ctx.kernel, needs, grad, *ctx.saved_tensors), needs
            ),
        )

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        return _directional(ctx.kernel.reference, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], kernel: Kernel, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        dims = in_dims[1:]
        weights, data = kernel.num_weights, dims[kernel.num_weights :]
        if all(d is None for d in dims[:weights]) and data:
            folded = [
                _fold(t, d, info.batch_size) for t, d in zip(tensors[weights:], data, strict=True)
            ]
            out = _TransformForward.apply(kernel, *tensors[:weights], *folded)
            return out.reshape(info.batch_size, out.shape[0] // info.batch_size, *out.shape[1:]), 0
        each = [
            _TransformForward.apply(kernel, *_slices(tensors, dims, b))
            for b in range(info.batch_size)
        ]
        return torch.stack(each), 0


class _TransformBackward(Function):
    @staticmethod
    def forward(kernel: Kernel, needs: Sequence[bool], grad: Tensor, *tensors: Tensor) -> Tensors:
        return tuple(kernel.backward(grad, tensors, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.kernel, ctx.needs = inputs[0], inputs[1]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (
            None,
            None,
            *_second(
                ctx.kernel, ctx.needs, ctx.saved_tensors, cotangents, ctx.needs_input_grad[2:]
            ),
        )

    @staticmethod
    def jvp(ctx: Any, _kernel: None, _needs: None, *tangents: Tensor | None) -> Tensors:
        grads = iter(
            _directional(ctx.kernel.reference_backward(ctx.needs), ctx.saved_tensors, tangents)
        )
        empty = ctx.saved_tensors[0].new_empty(0)
        return tuple(next(grads) if n else empty for n in ctx.needs)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        kernel: Kernel,
        needs: Sequence[bool],
        grad: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensors, tuple[int, ...]]:
        dims = in_dims[2:]
        weights = kernel.num_weights
        if all(d is None for d in dims[1 : 1 + weights]) and not any(needs[:weights]):
            rows = [
                _fold(t, d, info.batch_size)
                for t, d in zip(
                    (grad, *tensors[weights:]), (dims[0], *dims[1 + weights :]), strict=True
                )
            ]
            out = _TransformBackward.apply(kernel, needs, rows[0], *tensors[:weights], *rows[1:])
            split = [
                o.reshape(info.batch_size, o.shape[0] // info.batch_size, *o.shape[1:]) for o in out
            ]
            return tuple(split), (0,) * len(split)
        each = [
            _TransformBackward.apply(kernel, needs, *_slices((grad, *tensors), dims, b))
            for b in range(info.batch_size)
        ]
        return tuple(torch.stack(g) for g in zip(*each, strict=True)), (0,) * len(tensors)


def _directional(
    function: Callable[..., Any], primals: Tensors, tangents: Sequence[Tensor | None]
) -> Any:
    """The derivative of ``function`` at ``primals`` along the tangents that are there."""
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def run(*moved: Tensor) -> Any:
        full = list(primals)
        for i, t in zip(moving, moved, strict=True):
            full[i] = t
        return function(*full)

    return torch.func.jvp(
        run, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
    )[1]


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A batched ``[V, B, ...]`` as ``[V B, ...]``; an unbatched tensor is repeated."""
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.flatten(0, 1)


def _slices(tensors: Sequence[Tensor], dims: Sequence[int | None], b: int) -> list[Tensor]:
    return [t if d is None else t.select(d, b) for t, d in zip(tensors, dims, strict=True)]
