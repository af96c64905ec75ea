"""The compiled operators, called directly with damaged arguments.

Real calls are recorded while public operations run on a random model. Then one of the arguments is
damaged (a field of a program or a table, a shape, a dtype, a number) and the operator is called
again: it may return anything or raise an error, but the process must live.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from drawing import draw_layout, draw_tensor, model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import htfkernels as hk
import htflearn

EXTREMES = (
    0,
    1,
    -1,
    2,
    -2,
    7,
    2**15,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**62,
    2**63 - 1,
    -(2**63),
)
REFUSED = (RuntimeError, ValueError, TypeError, IndexError, MemoryError, OverflowError)


class _Recording(TorchDispatchMode):
    """Keeps the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "htfkernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _evaluate(draw: random.Random, model: hk.HTF) -> None:
    vectors = [draw_tensor(draw, (5, d), model.weights[0].dtype) for d in model.layout.mode_dims]
    model(vectors).sum().backward()


def _evaluate_at(draw: random.Random, model: hk.HTF) -> None:
    indices = torch.tensor([[draw.randrange(d) for d in model.layout.mode_dims] for _ in range(40)])
    given = indices if draw.random() < 0.3 else model.index_plan(indices)
    model.at(given).sum().backward()


def _full_tensor(draw: random.Random, model: hk.HTF) -> None:
    model.full_tensor().sum().backward()


def _spectra(draw: random.Random, model: hk.HTF) -> None:
    found = model.matricization_spectra(method=draw.choice(("qr", "gram")))
    sum(s.sum() for s in found.values()).backward()


def _trace_ranks(draw: random.Random, model: hk.HTF) -> None:
    ranks = model.renyi2_ranks() if draw.random() < 0.5 else model.stable_ranks()
    sum(ranks.values()).backward()


def _frames(draw: random.Random, model: hk.HTF) -> None:
    model.principal_frames()


def _optimizer(draw: random.Random, model: hk.HTF) -> None:
    optimizer = htflearn.GroupRMSprop(model.parameters(), lr=0.01)
    model.full_tensor().sum().backward()
    optimizer.step()


CALLERS: tuple[Callable[[random.Random, hk.HTF], None], ...] = (
    _evaluate,
    _evaluate_at,
    _full_tensor,
    _spectra,
    _trace_ranks,
    _frames,
    _optimizer,
)
DAMAGES_PER_RECORDING = 16


def case(seed: int) -> str:
    """Damages one argument of one call; of every 16 cases in a row, the calls are the same."""
    func, args = _one_call(seed)
    draw = random.Random(seed)
    at = draw.randrange(len(args))
    damaged = [*args]
    if func._schema.arguments[at].name == "lists":
        # By contract an operator trusts what a plan's lists hold: only their kind and length are
        # damaged.
        damaged[at] = _reshaped(draw, args[at])
    else:
        damaged[at] = _damaged(draw, args[at])
    name = func._schema.name.removeprefix("htfkernels::")
    try:
        with torch.no_grad():
            func(*damaged)
    except REFUSED:
        return f"{name} refused"
    return f"{name} ran"


_recorded: tuple[int, list[tuple[Any, tuple[Any, ...]]]] = (-1, [])


def _one_call(seed: int) -> tuple[Any, tuple[Any, ...]]:
    global _recorded
    number = seed // DAMAGES_PER_RECORDING
    if _recorded[0] != number:
        _recorded = (number, _record(number))
    return random.Random(seed).choice(_recorded[1])


def _record(number: int) -> list[tuple[Any, tuple[Any, ...]]]:
    draw = random.Random(number)
    while True:
        layout = draw_layout(draw)
        dtype = draw.choice((torch.float64, torch.float32, torch.bfloat16))
        model = model_of(layout, [draw_tensor(draw, g.shape, dtype) for g in layout.groups])
        with _Recording() as recording, hk.use_backend("auto"):
            draw.choice(CALLERS)(draw, model)
        if recording.calls:
            # Weights and data are copied: an operator that writes must not change later cases.
            return [(func, _copied(args)) for func, args in recording.calls]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v) for v in value)
    return value


def _damaged(draw: random.Random, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        items = [*value]
        kind = draw.randrange(4)
        if not items or kind == 0:
            return items[:-1] if draw.random() < 0.5 else [*items, *items[:1]]
        if kind == 1:
            draw.shuffle(items)
            return items
        at = draw.randrange(len(items))
        items[at] = _damaged(draw, items[at])
        return items
    if isinstance(value, Tensor):
        return _damaged_tensor(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(EXTREMES)
    if isinstance(value, float):
        return draw.choice((0.0, -1.0, 1e300, float("nan"), float("inf")))
    return value


def _damaged_tensor(draw: random.Random, tensor: Tensor) -> Tensor:
    whole = not tensor.is_floating_point()
    if whole and tensor.numel() and draw.random() < 0.8:
        damaged = tensor.clone().reshape(-1)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            at = draw.randrange(len(damaged))
            old = int(damaged[at])
            info = torch.iinfo(tensor.dtype)
            new = draw.choice((*EXTREMES, old + 1, old - 1, 2 * old, int(draw.choice(damaged))))
            damaged[at] = min(max(new, info.min), info.max)
        return damaged.reshape(tensor.shape)
    return _reshaped(draw, tensor)


def _reshaped(draw: random.Random, tensor: Tensor) -> Tensor:
    kind = draw.randrange(7) if tensor.dim() else draw.choice((1, 2, 3))
    if kind == 0:
        return tensor[:0]
    if kind == 1:
        return tensor.reshape(-1)
    if kind == 2:
        return tensor[None]
    if kind == 3:
        return tensor.to(draw.choice((torch.float64, torch.float32, torch.int64, torch.int32)))
    if kind == 4:
        return torch.cat([tensor, tensor])
    if kind == 5:
        return tensor.transpose(0, -1) if tensor.dim() > 1 else tensor[:-1]
    return tensor[..., ::2]
