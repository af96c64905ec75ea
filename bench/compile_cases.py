"""What the compile gate launches: the Triton launchers, on sizes of ``htf bench`` and awkward ones.

A case is a name and a function of nothing; :func:`cases` yields them all. What decides a launch's
machine code is the dtype, the tile configuration (chosen by ranks, mode dimensions and batch),
which gradients are wanted, and of every size whether it is 1 or divisible by 16. Another model is a
line in :func:`models`; a launcher of another kind is a function beside :func:`_evaluate`.

Tensors are as large as the real ones and never written, so that they take addresses and no memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htfkernels import IndexPlan, Layout, ModeTree
from htfkernels.testing import random_tree

Case = tuple[str, Callable[[], object]]


class Numbers(NamedTuple):
    """A dtype, and how its products are rounded."""

    name: str
    dtype: torch.dtype
    precision: str = "ieee"


IEEE = Numbers("float32", torch.float32)
TF32 = Numbers("tf32", torch.float32, "tf32")
TF32X3 = Numbers("tf32x3", torch.float32, "tf32x3")
BF16 = Numbers("bfloat16", torch.bfloat16)
FP16 = Numbers("float16", torch.float16)
FP64 = Numbers("float64", torch.float64)
ALL = (IEEE, TF32, TF32X3, BF16, FP16, FP64)
MAIN = (IEEE, TF32, BF16)


class Model(NamedTuple):
    """A layout and a batch for some operations.

    Attributes:
        name: for messages.
        ops: what is run on it: of "evaluate", "slog", "at", "planned" and "tensor".
        layout, batch: the sizes.
        numbers: what it is run in.
        each: whether gradients of the weights alone and of the vectors alone are asked for too.
        aligned: whether tensors start at multiples of 16 bytes.
    """

    name: str
    ops: tuple[str, ...]
    layout: Layout
    batch: int
    numbers: tuple[Numbers, ...]
    each: bool = False
    aligned: bool = True


def _balanced(order: int, dim: int, rank: int, **more: Any) -> Layout:
    return Layout.make(ModeTree.balanced(order), dim, rank, **more)


def _ragged(order: int) -> Layout:
    tree, draw = random_tree(order, 0), random.Random(0)
    dims = [draw.randint(3, 17) for _ in range(order)]
    return Layout.make(tree, dims, {node: draw.randint(7, 61) for node in tree.interior})


@lru_cache(maxsize=1)
def models() -> tuple[Model, ...]:
    """All models: first those of ``htf bench``, then shapes and layouts that are none of theirs."""
    vectors, indices, tensor = ("evaluate",), ("at", "planned"), ("tensor",)
    everything = (*vectors, *indices, *tensor)
    logarithm = ("slog",)
    cp = Layout.make(ModeTree.flat(3), 16, 256, root="sum")
    mf = Layout.make(ModeTree.chain(3), 64, 64, root="sum")
    return (
        Model("wide", vectors, _balanced(256, 64, 128), 512, ALL, each=True),
        Model("medium", vectors, _balanced(64, 16, 64), 1024, MAIN),
        Model("deep", vectors, _balanced(1024, 8, 32), 256, (TF32, FP64)),
        Model("small", vectors, _balanced(16, 8, 16), 1024, (IEEE, BF16)),
        Model("ragged", vectors, _ragged(100), 300, (IEEE, TF32)),
        # Of the largest model only a few nodes: the others are launched with them.
        Model("huge", vectors, _balanced(8, 64, 256), 4096, (TF32, TF32X3, BF16)),
        Model("paper", indices, _balanced(4, 8, 512), 2048, ALL),
        Model("completion", indices, _balanced(6, 50, 32), 1_000_000, (IEEE, TF32)),
        Model("dense", tensor, _balanced(8, 8, 32), 1, ALL),
        Model("repeated", ("planned",), _balanced(4, 4, 16), 2048, (TF32,)),
        Model("odd", everything, _balanced(4, 5, 17), 300, MAIN),
        Model("unaligned", vectors, _balanced(8, 16, 64), 256, (TF32,), aligned=False),
        # As many leaves' vectors as a kernel that forms their messages has room for.
        Model("grid", vectors, Layout.make(ModeTree.grid(16, 16), 64, 128), 512, (TF32, BF16)),
        Model("longest", vectors, _balanced(8, 128, 128), 512, (TF32, BF16)),
        Model("one sample", (*vectors, "at"), _balanced(8, 16, 64), 1, (IEEE,)),
        Model("outputs", everything, _balanced(4, 8, 32, out_features=10), 256, (TF32,)),
        Model("shared", vectors, _balanced(8, 16, 64, share_weights=True), 256, (IEEE,)),
        Model("cp", everything, cp, 1024, (TF32,)),
        Model("mf", everything, mf, 1024, (IEEE,)),
        Model("wide", logarithm, _balanced(256, 64, 128), 512, ALL, each=True),
        Model("small", logarithm, _balanced(16, 8, 16), 1024, MAIN),
        Model("ragged", logarithm, _ragged(100), 300, (IEEE, TF32)),
        Model("huge", logarithm, _balanced(8, 64, 256), 4096, (TF32, TF32X3, BF16)),
        Model("widest", logarithm, _balanced(4, 64, 512), 256, ALL),
        Model("outputs", logarithm, _balanced(4, 8, 32, out_features=10), 256, (TF32, BF16)),
        Model("mf", logarithm, mf, 1024, (IEEE,)),
    )


def cases(chosen: Iterable[Model] | None = None) -> Iterator[Case]:
    """``(name, run)`` for each call of a launcher, on some models or all."""
    makers = {
        "evaluate": _evaluate,
        "slog": _slog,
        "at": _at,
        "planned": _planned,
        "tensor": _tensor,
    }
    for model in models() if chosen is None else chosen:
        for numbers in model.numbers:
            for op in model.ops:
                for what, run in makers[op](model, numbers):
                    yield f"{op} {what}, {model.name}, {numbers.name}", run


def _launcher(op: str, name: str, numbers: Numbers) -> Callable[..., Any]:
    """A function of an operation's Triton module, imported when it is called."""

    def run(*arguments: Any) -> Any:
        module = import_module(f"htfkernels.ops.{op}.triton")
        return getattr(module, name)(*arguments, precision=numbers.precision)

    return run


def _empty(model: Model, dtype: torch.dtype, *shape: int) -> Tensor:
    size = 1
    for extent in shape:
        size *= extent
    first = 0 if model.aligned else 1
    return torch.empty(size + first, dtype=dtype)[first:].view(shape)


def _weights(model: Model, numbers: Numbers) -> list[Tensor]:
    return [_empty(model, numbers.dtype, *group.shape) for group in model.layout.groups]


def _grad(model: Model, numbers: Numbers, rows: int) -> Tensor:
    outputs = model.layout.out_features
    shape = (rows,) if outputs == 1 else (rows, outputs)
    return _empty(model, numbers.dtype, *shape)


@lru_cache(maxsize=4)
def _indices(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    columns = [
        torch.randint(d, (model.batch,), generator=generator) for d in model.layout.mode_dims
    ]
    return torch.stack(columns, dim=1)


@lru_cache(maxsize=4)
def _plan(model: Model) -> IndexPlan:
    return IndexPlan.make(model.layout, _indices(model))


def _backward(
    keeping: Callable[[], Sequence[Tensor]],
    backward: Callable[[Tensor, list[bool]], Any],
    wanted: dict[str, list[bool]],
    dtype: torch.dtype,
) -> Iterator[Case]:
    """A training step, which keeps what its forward pass computed; and a backward pass that was
    given nothing, as in a compiled graph."""
    for name, needs in wanted.items():
        yield f"step ({name})", lambda needs=needs: backward(keeping()[1], needs)
    needs = wanted["all"]
    yield "backward (all, nothing kept)", lambda: backward(torch.empty(0, dtype=dtype), needs)


def _wanted(model: Model, with_vectors: bool) -> dict[str, list[bool]]:
    """Which gradients are asked for: of each group of weights, then of the vectors."""
    leaf = [group.level == 0 for group in model.layout.groups]
    every, none = [True] * len(leaf), [False] * len(leaf)
    wanted = {"all": (every, True)}
    if with_vectors:
        wanted["weights"] = (every, False)
    if model.each:
        wanted["leaves"] = (leaf, False)
        wanted["interior"] = ([not of_leaf for of_leaf in leaf], False)
        if with_vectors:
            wanted["vectors"] = (none, True)
    return {
        name: [*weights, vectors] if with_vectors else weights
        for name, (weights, vectors) in wanted.items()
    }


def _evaluate(model: Model, numbers: Numbers) -> Iterator[Case]:
    launcher = partial(_launcher, "evaluate", numbers=numbers)
    layout, weights = model.layout, _weights(model, numbers)
    x = _empty(model, numbers.dtype, model.batch, layout.offsets[-1])
    program, grad = layout.program, _grad(model, numbers, model.batch)
    arguments = (weights, x, program, layout.out_features)
    yield "forward", lambda: launcher("evaluate")(*arguments)
    yield from _backward(
        lambda: launcher("evaluate_keeping")(*arguments),
        lambda kept, needs: launcher("evaluate_backward")(grad, weights, x, kept, program, needs),
        _wanted(model, with_vectors=True),
        numbers.dtype,
    )


def _slog(model: Model, numbers: Numbers) -> Iterator[Case]:
    launcher = partial(_launcher, "slog", numbers=numbers)
    layout, weights = model.layout, _weights(model, numbers)
    x = _empty(model, numbers.dtype, model.batch, layout.offsets[-1])
    program, grad = (
        layout.program,
        _empty(model, numbers.dtype, model.batch, layout.out_features, 2),
    )
    arguments = (weights, x, program, layout.out_features)
    yield "forward", lambda: launcher("slog")(*arguments)
    backward = launcher("slog_backward")
    for name, needs in _wanted(model, with_vectors=True).items():
        yield (
            f"step ({name})",
            lambda needs=needs: backward(
                grad, weights, x, launcher("slog_keeping")(*arguments)[1:], program, needs
            ),
        )


def _at(model: Model, numbers: Numbers) -> Iterator[Case]:
    launcher = partial(_launcher, "evaluate_at", numbers=numbers)
    layout, weights, indices = model.layout, _weights(model, numbers), _indices(model)
    program, grad = layout.program, _grad(model, numbers, model.batch)
    arguments = (weights, indices, program, layout.out_features)
    backward = launcher("evaluate_at_backward")
    yield "forward", lambda: launcher("evaluate_at")(*arguments)
    yield from _backward(
        lambda: launcher("evaluate_at_keeping")(*arguments),
        lambda kept, needs: backward(grad, weights, indices, kept, program, needs),
        _wanted(model, with_vectors=False),
        numbers.dtype,
    )


def _planned(model: Model, numbers: Numbers) -> Iterator[Case]:
    launcher = partial(_launcher, "evaluate_at", numbers=numbers)
    layout, weights, plan = model.layout, _weights(model, numbers), _plan(model)
    grad = _grad(model, numbers, model.batch)
    fixed = (layout.program, plan.table, plan.lists)
    arguments = (weights, *fixed, model.batch, layout.out_features)
    backward = launcher("evaluate_at_planned_backward")
    yield "forward", lambda: launcher("evaluate_at_planned")(*arguments)
    yield from _backward(
        lambda: launcher("evaluate_at_planned_keeping")(*arguments),
        lambda kept, needs: backward(grad, weights, kept, *fixed, needs),
        _wanted(model, with_vectors=False),
        numbers.dtype,
    )


def _tensor(model: Model, numbers: Numbers) -> Iterator[Case]:
    launcher = partial(_launcher, "full_tensor", numbers=numbers)
    layout, weights = model.layout, _weights(model, numbers)
    entries = layout.num_entries // layout.out_features
    arguments = (weights, layout.program, entries, layout.out_features)
    yield "forward", lambda: launcher("full_tensor")(*arguments)
    grad = _grad(model, numbers, entries)
    backward = launcher("full_tensor_backward")
    for name, needs in _wanted(model, with_vectors=False).items():
        yield (
            f"backward ({name})",
            lambda needs=needs: backward(grad, weights, layout.program, needs),
        )
