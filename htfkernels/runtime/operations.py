"""The registry: which operations there are, and what each backend needs to run them.

An operation is described once, in its package ``htfkernels/ops/<operation>``, by an
:class:`Operation`. Who may run it (:mod:`htfkernels.runtime.dispatch`), its derivatives
(:mod:`htfkernels.runtime.autograd`), its operators in graphs of ``torch.compile``
(:mod:`htfkernels.runtime.graphs`) and the checks of its kernels (:mod:`htfkernels.verify`) follow
from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch

from htfkernels.tree.layout import Layout

__all__ = [
    "CPP_MATHS",
    "CUDA_MATHS",
    "FLOATS",
    "NO_FLOAT16",
    "OPERATIONS",
    "TRITON_MATHS",
    "Family",
    "Operation",
    "Runs",
    "families",
    "load",
    "register",
    "why_not",
]

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
NO_FLOAT16 = FLOATS - {torch.float16}
CPP_MATHS = ("ieee", "bfloat16", "float64")
CUDA_MATHS = ("ieee", "tf32", "tf32x3", "bfloat16", "float64")
TRITON_MATHS = (*CUDA_MATHS, "float16")


@dataclass(frozen=True)
class Family:
    """Kernels that are right or wrong together.

    Attributes:
        backend: whose they are.
        name: a word or two.
        maths: the ways of rounding in which they differ: a precision of float32, or another dtype.
    """

    backend: str
    name: str
    maths: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.backend} {self.name}"

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that run on these kernels."""
        return tuple(
            name
            for name, operation in OPERATIONS.items()
            if any(runs.family == self for runs in operation.backends.values())
        )

    def math(self, dtype: torch.dtype, precision: str) -> str:
        """The one of ``maths`` that numbers of a dtype are computed in."""
        name = precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        return name if name in self.maths else self.maths[0]


@dataclass(frozen=True)
class Runs:
    """How a backend runs an operation.

    Attributes:
        dtypes: of the numbers.
        module: where its functions are. They have the names and arguments of the compiled
            operators, and get the float32 precision; ``cpp`` has the operators themselves.
        limit: ``"module:function"``, which gives for ``(layout, dtype)`` one sentence that says why
            a layout is left to others, or None.
        family: the kernels, for ``htf verify``; ``auto`` takes those of a GPU only once they have
            been checked.
    """

    dtypes: frozenset[torch.dtype]
    module: str = ""
    limit: str = ""
    family: Family | None = None


@dataclass(frozen=True)
class Operation:
    """What there is to run.

    A differentiable operation ``name`` has the arguments ``(weights, *data, *fixed)``:

    - the folded weights;
    - at most one tensor of data;
    - what the layout and an index plan say. The last of these is ``out_features``; where there are
      no data, the number of rows stands before it.

    It has two or three operators::

        name(weights, *data, *fixed) -> result
        name_keeping(weights, *data, *fixed) -> [result, what the backward need not compute again]
        name_backward(grad, weights, *data, kept, *tensors among fixed, needs) -> gradients

    Without ``keeps`` there is no ``name_keeping``, and no ``kept``.

    Attributes:
        name: of the operation.
        backends: who can run it, beside the reference.
        data: whether there is a tensor of data, and ``"differentiable"`` if it has a gradient.
        keeps: how many tensors ``name_keeping`` returns behind the result; 0: there is none.
            Several are one argument of the backward operator, a tuple.
        traced: the backends whose kernels graphs of ``torch.compile`` call. If there are none, a
            graph is made of PyTorch's operations.
        reference_stands_in: whether the reference runs where a backend was asked for by name and
            cannot run the operation.
        faster: ``"module:function"``, which says for ``(layout, rows, dtype, precision)`` whether
            CUDA C++ is faster than Triton, and by what numbers.
    """

    name: str
    backends: Mapping[str, Runs] = field(hash=False)
    data: str = ""
    keeps: int = 1
    traced: tuple[str, ...] = ()
    reference_stands_in: bool = False
    faster: str = ""

    @property
    def operators(self) -> tuple[str, ...]:
        """The names of the operators of a differentiable operation."""
        keeping = (f"{self.name}_keeping",) if self.keeps else ()
        return (self.name, *keeping, f"{self.name}_backward")


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Adds an operation to the registry."""
    OPERATIONS[operation.name] = operation
    return operation


def why_not(backend: str, op: str, layout: Layout | None, dtype: torch.dtype) -> str | None:
    """None where a backend has kernels for an operation, else one sentence that says why not.
    Without a layout: whether it has any."""
    runs = OPERATIONS[op].backends.get(backend)
    if runs is None:
        others = sorted(name for name, o in OPERATIONS.items() if backend in o.backends)
        return f"{backend} has no {op}; it has {', '.join(others)}"
    if dtype not in runs.dtypes:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in runs.dtypes))
        return f"{backend} computes {op} in {names}, not in {dtype}"
    if layout is None or not runs.limit:
        return None
    reason: str | None = load(runs.limit)(layout, dtype)
    return reason


def families() -> tuple[Family, ...]:
    """All families of kernels, a GPU's first."""
    found = {r.family for o in OPERATIONS.values() for r in o.backends.values() if r.family}
    order = ("cuda", "triton", "cpp")
    return tuple(sorted(found, key=lambda f: (order.index(f.backend), f.name)))


@cache
def load(name: str) -> Any:
    """What ``"module:attribute"`` or ``"module"`` names, imported when it is first wanted."""
    module, _, attribute = name.partition(":")
    loaded = import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
