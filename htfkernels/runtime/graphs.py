"""What PyTorch has to know of the registered operators to put them into graphs.

The import of ``htfkernels._C`` registers their schemas and CPU kernels. Fake kernels and autograd
formulas make them work under ``torch.compile``. A backward has no derivative there: double backward
works in eager mode alone (:mod:`htfkernels.runtime.autograd`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from htfkernels.runtime.compiled import MISSING, ops
from htfkernels.runtime.cuda_module import device_type
from htfkernels.runtime.operations import Operation, load
from htfkernels.runtime.precision import float32_precision

__all__ = ["fake", "register_in_graphs", "without_gradient"]

Fake = Callable[..., Any]


def fake(name: str) -> Callable[[Fake], Fake]:
    """Registers the fake kernel of an operator, where there is the operator."""
    return (lambda f: f) if MISSING else torch.library.register_fake(f"htfkernels::{name}")


def without_gradient(name: str) -> None:
    """Says of an operator that whoever calls it differentiates it himself."""

    def no_gradient(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "htfkernels: this operator has no derivative of its own; call matricization_spectra, "
            "renyi2_ranks or stable_ranks of a model"
        )

    if not MISSING:
        torch.library.register_autograd(
            f"htfkernels::{name}", no_gradient, setup_context=_save_nothing
        )


def register_in_graphs(operation: Operation) -> None:
    """Fake kernels, autograd formulas and GPU kernels of a differentiable operation's operators.

    A graph keeps the backend that it was traced with, so CUDA C++ has operators of its own, with
    the same schemas: ``evaluate_cuda`` and so on.
    """
    if MISSING:
        return
    fakes = _fakes(operation)
    for name, made in fakes.items():
        torch.library.register_fake(f"htfkernels::{name}")(made)
    _register_formulas(operation, "")
    if "triton" in operation.traced:
        for name in operation.operators:
            kernel = _from(operation.backends["triton"].module, name)
            torch.library.register_kernel(f"htfkernels::{name}", "cuda", kernel)
    if "cuda" in operation.traced:
        for name in (operation.name, f"{operation.name}_backward"):
            copy = f"htfkernels::{name}_cuda"
            schema = str(getattr(ops, name).default._schema)
            torch.library.define(copy, schema[schema.index("(") :])
            torch.library.register_fake(copy)(fakes[name])
            kernel = _from(operation.backends["cuda"].module, name)
            torch.library.register_kernel(copy, device_type(), kernel)
        _register_formulas(operation, "_cuda")


def _from(module: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(load(module), name)(*args, precision=float32_precision())

    return run


def _fakes(operation: Operation) -> dict[str, Fake]:
    def forward(weights: list[Tensor], *rest: Any) -> Tensor:
        rows, out_features = rest[0].shape[0] if operation.data else rest[-2], rest[-1]
        return weights[0].new_empty((rows,) if out_features == 1 else (rows, out_features))

    def keeping(weights: list[Tensor], *rest: Any) -> list[Tensor]:
        like = weights[0]
        wide = like.device.type == "cpu" and like.dtype != torch.float64
        size = torch.library.get_ctx().new_dynamic_size()
        kept = like.new_empty(size, dtype=torch.float32 if wide else like.dtype)
        return [forward(weights, *rest), kept]

    def backward(grad: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
        tensors = [*weights, rest[0]] if operation.data == "differentiable" else weights
        return [t.new_empty(t.shape if n else (0,)) for t, n in zip(tensors, rest[-1], strict=True)]

    made = (forward, keeping, backward) if operation.keeps else (forward, backward)
    return dict(zip(operation.operators, made, strict=True))


def _register_formulas(operation: Operation, suffix: str) -> None:
    name = f"htfkernels::{operation.name}"
    torch.library.register_autograd(
        f"{name}{suffix}", _formula(operation, suffix), setup_context=_save
    )
    torch.library.register_autograd(
        f"{name}_backward{suffix}", _no_second, setup_context=_save_nothing
    )


def _formula(operation: Operation, suffix: str) -> Callable[..., Any]:
    def formula(ctx: Any, grad: Tensor) -> Any:
        backward = getattr(ops, f"{operation.name}_backward{suffix}")
        weights, rest = ctx.saved_tensors[: ctx.count], list(ctx.saved_tensors[ctx.count :])
        by_data = operation.data == "differentiable"
        needs = [*ctx.needs_input_grad[0], *((ctx.needs_input_grad[1],) if by_data else ())]
        if operation.keeps:
            rest.insert(bool(operation.data), grad.new_empty(0))
        grads = backward(grad, list(weights), *rest, [int(n) for n in needs])
        found = [g if n else None for g, n in zip(grads, needs, strict=True)]
        others = [None] * (len(ctx.needs_input_grad) - 1)
        if by_data:
            others[0] = found.pop()
        return found, *others

    return formula


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    weights, *rest = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *(t for t in rest if isinstance(t, Tensor)))


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "htfkernels: this is a second derivative of a compiled or directly called operator, which "
        "is not supported; call the model without torch.compile (double backward works in eager "
        "mode)"
    )
