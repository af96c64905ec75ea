"""The registered operators of the compiled module, and what PyTorch has to know of them.

Loading this module loads ``htfkernels._C``, whose import registers the schemas and CPU kernels.
Fake kernels and autograd formulas make the operators work under ``torch.compile``. The formula of
a backward
is not differentiable there: double backward is an eager affair (:mod:`htfkernels.ops.autograd`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import htfkernels._C  # noqa: F401
from htfkernels.cuda.module import device_type
from htfkernels.precision import float32_precision

__all__ = ["ops"]

ops = torch.ops.htfkernels


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "htfkernels: this is a second derivative of a compiled or directly called operator, which "
        "is not supported; call the model without torch.compile (double backward works in eager "
        "mode)"
    )


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "htfkernels: this operator has no derivative of its own; call matricization_spectra, "
        "renyi2_ranks or stable_ranks of a model"
    )


def _ignore(ctx: Any, inputs: Any, output: Any) -> None:
    pass


_fakes: dict[str, Callable[..., Any]] = {}


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a fake kernel, and keeps it for the operator's copy."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _fakes[name] = function
        torch.library.register_fake(f"htfkernels::{name}")(function)
        return function

    return register


def _fake_gradients(tensors: Sequence[Tensor], needs: Sequence[int]) -> list[Tensor]:
    return [t.new_empty(t.shape if n else (0,)) for t, n in zip(tensors, needs, strict=True)]


def _result(like: Tensor, rows: Any, out_features: int) -> Tensor:
    return like.new_empty((rows,) if out_features == 1 else (rows, out_features))


# -- evaluate -------------------------------------------------------------------------------------


@_fake("evaluate")
def _(weights: list[Tensor], x: Tensor, program: Tensor, out_features: int) -> Tensor:
    return _result(x, x.shape[0], out_features)


def _kept(like: Tensor, elements: Any) -> Tensor:
    wide = like.device.type == "cpu" and like.dtype != torch.float64
    return like.new_empty(elements, dtype=torch.float32 if wide else like.dtype)


@_fake("evaluate_keeping")
def _(weights: list[Tensor], x: Tensor, program: Tensor, out_features: int) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return [_result(x, x.shape[0], out_features), _kept(x, size)]


@_fake("evaluate_backward")
def _(
    grad: Tensor,
    weights: list[Tensor],
    x: Tensor,
    kept: Tensor,
    program: Tensor,
    needs: list[int],
) -> list[Tensor]:
    return _fake_gradients([*weights, x], needs)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    weights, *rest = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *(t for t in rest if isinstance(t, Tensor)))


def _evaluate_formula(suffix: str) -> Callable[..., Any]:
    def formula(ctx: Any, grad: Tensor) -> Any:
        backward = getattr(ops, f"evaluate_backward{suffix}")
        *weights, x, program = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        kept = grad.new_empty(0)
        grads = backward(grad, weights, x, kept, program, [int(n) for n in needs])
        *by_weight, by_x = (g if n else None for g, n in zip(grads, needs, strict=True))
        return by_weight, by_x, None, None

    return formula


torch.library.register_autograd("htfkernels::evaluate", _evaluate_formula(""), setup_context=_save)
torch.library.register_autograd("htfkernels::evaluate_backward", _no_second, setup_context=_ignore)


# -- evaluate_at ----------------------------------------------------------------------------------


@_fake("evaluate_at")
def _(weights: list[Tensor], indices: Tensor, program: Tensor, out_features: int) -> Tensor:
    return _result(weights[0], indices.shape[0], out_features)


@_fake("evaluate_at_keeping")
def _(weights: list[Tensor], indices: Tensor, program: Tensor, out_features: int) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return [_result(weights[0], indices.shape[0], out_features), _kept(weights[0], size)]


@_fake("evaluate_at_backward")
def _(
    grad: Tensor,
    weights: list[Tensor],
    indices: Tensor,
    kept: Tensor,
    program: Tensor,
    needs: list[int],
) -> list[Tensor]:
    return _fake_gradients(weights, needs)


def _evaluate_at_formula(suffix: str) -> Callable[..., Any]:
    def formula(ctx: Any, grad: Tensor) -> Any:
        backward = getattr(ops, f"evaluate_at_backward{suffix}")
        *weights, indices, program = ctx.saved_tensors
        needs = ctx.needs_input_grad[0]
        kept = grad.new_empty(0)
        mask = [int(n) for n in needs]
        grads = backward(grad, weights, indices, kept, program, mask)
        return [g if n else None for g, n in zip(grads, needs, strict=True)], None, None, None

    return formula


torch.library.register_autograd(
    "htfkernels::evaluate_at", _evaluate_at_formula(""), setup_context=_save
)
torch.library.register_autograd(
    "htfkernels::evaluate_at_backward", _no_second, setup_context=_ignore
)


# -- evaluate_at_planned --------------------------------------------------------------------------


@_fake("evaluate_at_planned")
def _(
    weights: list[Tensor],
    program: Tensor,
    table: Tensor,
    lists: Tensor,
    batch: int,
    out_features: int,
) -> Tensor:
    return _result(weights[0], batch, out_features)


@_fake("evaluate_at_planned_keeping")
def _(
    weights: list[Tensor],
    program: Tensor,
    table: Tensor,
    lists: Tensor,
    batch: int,
    out_features: int,
) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return [_result(weights[0], batch, out_features), _kept(weights[0], size)]


@_fake("evaluate_at_planned_backward")
def _(
    grad: Tensor,
    weights: list[Tensor],
    kept: Tensor,
    program: Tensor,
    table: Tensor,
    lists: Tensor,
    needs: list[int],
) -> list[Tensor]:
    return _fake_gradients(weights, needs)


def _evaluate_at_planned_formula(suffix: str) -> Callable[..., Any]:
    def formula(ctx: Any, grad: Tensor) -> Any:
        backward = getattr(ops, f"evaluate_at_planned_backward{suffix}")
        *weights, program, table, lists = ctx.saved_tensors
        needs = ctx.needs_input_grad[0]
        mask, kept = [int(n) for n in needs], grad.new_empty(0)
        grads = backward(grad, weights, kept, program, table, lists, mask)
        by_weight = [g if n else None for g, n in zip(grads, needs, strict=True)]
        return by_weight, None, None, None, None, None

    return formula


torch.library.register_autograd(
    "htfkernels::evaluate_at_planned", _evaluate_at_planned_formula(""), setup_context=_save
)
torch.library.register_autograd(
    "htfkernels::evaluate_at_planned_backward", _no_second, setup_context=_ignore
)


# -- full_tensor ----------------------------------------------------------------------------------


@torch.library.register_fake("htfkernels::full_tensor")
def _(weights: list[Tensor], program: Tensor, entries: int, out_features: int) -> Tensor:
    return _result(weights[0], entries, out_features)


@torch.library.register_fake("htfkernels::full_tensor_backward")
def _(grad: Tensor, weights: list[Tensor], program: Tensor, needs: list[int]) -> list[Tensor]:
    return _fake_gradients(weights, needs)


def _full_tensor_backward(ctx: Any, grad: Tensor) -> Any:
    *weights, program = ctx.saved_tensors
    needs = ctx.needs_input_grad[0]
    grads = ops.full_tensor_backward(grad, weights, program, [int(n) for n in needs])
    return [g if n else None for g, n in zip(grads, needs, strict=True)], None, None, None


torch.library.register_autograd(
    "htfkernels::full_tensor", _full_tensor_backward, setup_context=_save
)
torch.library.register_autograd(
    "htfkernels::full_tensor_backward", _no_second, setup_context=_ignore
)


# -- group_rmsprop_ -------------------------------------------------------------------------------
# Writes into its first argument; it has no gradient.


@torch.library.register_fake("htfkernels::group_rmsprop_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    average: Tensor,
    lr: list[float],
    weight_decay: list[float],
    alpha: float,
    eps: float,
    step: int,
) -> Tensor:
    return torch.empty_like(average)


# -- spectra --------------------------------------------------------------------------------------
# Sizes depend on the program; differentiated by htfkernels.spectra, which computes what it needs.


@torch.library.register_fake("htfkernels::spectral_factors")
def _(
    weights: list[Tensor], program: Tensor, wanted: list[int], gram: int, keep: int
) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    nodes = size()
    return [
        weights[0].new_empty(size(), dtype=torch.float64),
        weights[0].new_empty(size(), dtype=torch.float64),
        program.new_empty(nodes, 10),
        program.new_empty(size()),
    ]


@torch.library.register_fake("htfkernels::factor_values")
def _(frames: Tensor, environments: Tensor, table: Tensor, wanted: list[int]) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return [frames.new_empty(size), table.new_empty(len(wanted))]


@torch.library.register_fake("htfkernels::trace_ranks")
def _(weights: list[Tensor], program: Tensor, wanted: list[int], stable: int) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    return [
        weights[0].new_empty(len(wanted), dtype=torch.float64),
        weights[0].new_empty(size(), dtype=torch.float64),
        program.new_empty(size()),
    ]


@torch.library.register_fake("htfkernels::trace_ranks_backward")
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


@torch.library.register_fake("htfkernels::matricization_pullback")
def _(
    weights: list[Tensor],
    program: Tensor,
    wanted: list[int],
    left: list[Tensor],
    right: list[Tensor],
    weight: list[Tensor],
    exponents: list[Tensor],
    scales: list[int],
) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


@torch.library.register_fake("htfkernels::small_svd")
def _(matrices: Tensor) -> list[Tensor]:
    count, p, q = matrices.shape
    k = min(p, q)
    return [matrices.new_empty(s) for s in ((count, p, k), (count, k), (count, q, k))]


for _name in (
    "spectral_factors",
    "factor_values",
    "trace_ranks",
    "trace_ranks_backward",
    "matricization_pullback",
    "small_svd",
):
    torch.library.register_autograd(f"htfkernels::{_name}", _no_gradient, setup_context=_ignore)


# -- on CUDA tensors ------------------------------------------------------------------------------
# What a compiled graph calls; eagerly, the modules of the backends are called directly. A graph
# keeps the backend that it was traced with, so CUDA C++ has operators of its own, with the same
# schemas: evaluate_cuda and so on.

_IN_TRITON = {
    "evaluate": ("evaluate", "evaluate_keeping", "evaluate_backward"),
    "evaluate_at": (
        "evaluate_at",
        "evaluate_at_keeping",
        "evaluate_at_backward",
        "evaluate_at_planned",
        "evaluate_at_planned_keeping",
        "evaluate_at_planned_backward",
    ),
    "full_tensor": ("full_tensor", "full_tensor_backward"),
}
_IN_CUDA = {
    "evaluate": ("evaluate", "evaluate_backward"),
    "evaluate_at": (
        "evaluate_at",
        "evaluate_at_backward",
        "evaluate_at_planned",
        "evaluate_at_planned_backward",
    ),
}
_FORMULAS = {
    "evaluate": _evaluate_formula,
    "evaluate_at": _evaluate_at_formula,
    "evaluate_at_planned": _evaluate_at_planned_formula,
}


def _in(backend: str, op: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        module = import_module(f"htfkernels.ops.{op}.{backend}")
        return getattr(module, name)(*args, precision=float32_precision())

    return run


for _op, _names in _IN_TRITON.items():
    for _name in _names:
        torch.library.register_kernel(f"htfkernels::{_name}", "cuda", _in("triton", _op, _name))

for _op, _names in _IN_CUDA.items():
    for _name in _names:
        _copy = f"htfkernels::{_name}_cuda"
        _schema = str(getattr(ops, _name).default._schema)
        torch.library.define(_copy, _schema[_schema.index("(") :])
        torch.library.register_fake(_copy)(_fakes[_name])
        torch.library.register_kernel(_copy, device_type(), _in("cuda", _op, _name))
        _formula, _context = (
            (_FORMULAS[_name]("_cuda"), _save) if _name in _FORMULAS else (_no_second, _ignore)
        )
        torch.library.register_autograd(_copy, _formula, setup_context=_context)
