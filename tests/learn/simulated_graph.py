"""A CUDA graph on the CPU: the operations of a step, recorded with the very tensors they read and
wrote, and run again on these. Python is not run again, as it is not with a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")


class SimulatedGraph:
    """See :class:`htflearn.step.Graph`; ``events`` is what was asked of it, in order."""

    made: list[SimulatedGraph]

    def __init__(self, device: torch.device) -> None:
        self.events: list[str] = []
        self.recorded: list[tuple[Any, ...]] = []
        self.made.append(self)

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        return None

    def run(self, step: Callable[[], None], watch: bool = False) -> str | None:
        self.events.append("watched" if watch else "run")
        step()
        return None

    def capture(self, step: Callable[[], None]) -> None:
        self.events.append("capture")
        recorder = _Recorder()
        try:
            with recorder:
                step()
        finally:
            with torch.no_grad():
                for tensor, value in reversed(recorder.before):
                    tensor.copy_(value)
        self.recorded = recorder.recorded

    def replay(self) -> None:
        self.events.append("replay")
        with torch.no_grad():
            for func, args, kwargs, outputs in self.recorded:
                for old, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    """Records operations, and what tensors held that they wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, ...]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        # Index plans keep a table of integers on the host, whatever the device.
        if name in WAITING and args[0].is_floating_point():
            raise RuntimeError(f"{name} waits for the device\n\nand some advice")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
                self.before += [(t, t.clone()) for t in written]
        result = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, tree_leaves(result)))
        return result
