"""One step of a full-batch training, as a CUDA graph where that can be.

Steps of small factorizations are dozens of kernels of a few microseconds each: launching them one
by one takes longer than they do. A graph launches all of a step at once. Its iterations are those
of eager training: the first few are taken one by one, on the stream that the next is captured on (a
capture executes nothing), and from there on each is a replay.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from htflearn.optim import GroupRMSprop

__all__ = ["CudaGraph", "Graph", "GraphStep", "make_step", "waits"]

_log = logging.getLogger("htflearn")

WARM_UP = 3
"""Steps before the first capture: what is made at first use (index plans, the optimizer's state,
Triton kernels, workspaces) is there when the last of them begins, which is watched."""


class Graph(Protocol):
    """What holds a captured step."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """None where steps on the device can be captured, else the reason."""
        ...

    def run(self, step: Callable[[], None], watch: bool = False) -> str | None:
        """Takes a step now, as a later one will be captured; ``watch`` returns what in it cannot
        be."""
        ...

    def capture(self, step: Callable[[], None]) -> None:
        """Records a step in place of the one before, without executing it.

        Raises:
            RuntimeError: it cannot be recorded. Nothing has been executed then either.
        """
        ...

    def replay(self) -> None:
        """Executes what was recorded."""
        ...


class CudaGraph:
    """A step as a :class:`torch.cuda.CUDAGraph` with a memory pool of its own.

    Args:
        device: a CUDA device.
    """

    # Where CUDA breaks a capture off, PyTorch's allocator still refers to its graph.
    _broken: list[Any] = []  # noqa: RUF012

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph: Any = None

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the parameters are on {device.type}, and graphs are for CUDA devices"
        return None

    def run(self, step: Callable[[], None], watch: bool = False) -> str | None:
        found: list[str] = []
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with (
                torch.cuda.stream(self._stream),
                warnings.catch_warnings(),
                waits(found, watch),
            ):
                # torch.optim's warn of a step that could be captured and is not: it will be.
                warnings.filterwarnings("ignore", "This instance was constructed with capturable")
                step()
            here.wait_stream(self._stream)
        return found[0] if found else None

    def capture(self, step: Callable[[], None]) -> None:
        torch.cuda.synchronize(self._device)  # a replay may be under way
        self._graph = None  # its memory is free for the next
        graph, first = torch.cuda.CUDAGraph(), list[RuntimeError]()
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    try:
                        step()
                    except RuntimeError as error:
                        first.append(error)
                        raise
            except BaseException:
                CudaGraph._broken.append(graph)
                # torch.cuda.graph leaves its stream in force where it cannot end the capture, and
                # the error from there says only that there was one.
                torch.cuda.set_stream(here)
                if first:
                    raise first[0] from None
                raise
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def waits(found: list[str], watch: bool) -> Iterator[None]:
    """Collects the operations in the block that wait for the device.

    Args:
        found: gets a sentence for each.
        watch: False: collects nothing. Nor does it where the user has PyTorch tell of them.

    That they could not be captured would show in a capture too; but one that CUDA breaks off leaves
    allocator and random generators of some versions of PyTorch in disorder.
    """
    before = torch.cuda.get_sync_debug_mode()
    if not watch or before:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            found.append(f"it waits for the device in {warning.filename}, line {warning.lineno}")
        elif "Synchronization debug mode" not in text:  # that it is a prototype
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


class GraphStep:
    """A step that is captured and replayed.

    The graph is made anew when something changes that it has built in: a number in the optimizer's
    groups, a parameter, or where it lies. One ordinary step comes in between, so that a setting
    that changes at every step costs no capture at all.

    Args:
        step: one step: forward, backward and optimizer.
        optimizer: of the step.
        graph: what holds it.
        required: raises where the step cannot be captured, instead of going on without, with a
            warning in the log.

    Raises:
        RuntimeError: when called, and the step is required to be captured and cannot be.

    Example:
        >>> step = GraphStep(step, optimizer, CudaGraph(torch.device("cuda")))
        >>> for _ in range(1000):
        ...     step()
    """

    def __init__(
        self,
        step: Callable[[], None],
        optimizer: torch.optim.Optimizer,
        graph: Graph,
        required: bool = False,
    ) -> None:
        self._step, self._optimizer, self._required = step, optimizer, required
        self._graph: Graph | None = graph
        self._left, self._captured = WARM_UP, False
        self._built_in: list[Any] = []

    def __call__(self) -> None:
        if self._graph is None:
            self._step()
            return
        built_in = _built_in(self._optimizer)
        if not _same(built_in, self._built_in):
            self._built_in, self._captured = built_in, False
            self._left = max(self._left, 1)
        if self._left:
            self._left -= 1
            reason = self._graph.run(self._step, watch=not self._left)
            if reason is not None:
                self._give_up(reason)
            return
        if not self._captured and not self._capture(self._graph):
            self._step()
            return
        self._graph.replay()
        # Replayed kernels write past autograd, which has to know.
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        torch.autograd.graph.increment_version(params)

    def _capture(self, graph: Graph) -> bool:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                p.grad = None  # so that those of the graph lie in its own memory
        try:
            graph.capture(self._step)
        except RuntimeError as error:
            # CUDA's messages end in paragraphs of advice.
            self._give_up(str(error).strip().partition("\n")[0], error)
            return False
        self._captured = True
        return True

    def _give_up(self, reason: str, error: RuntimeError | None = None) -> None:
        self._graph = None
        if self._required:
            raise _refusal(reason) from error
        _log.warning("a step cannot be captured as a CUDA graph, and is taken eagerly: %s", reason)


def make_step(
    step: Callable[[Tensor | None], None],
    task: Any,
    optimizer: torch.optim.Optimizer,
    regularizer: Any,
    batch_size: int | None,
    wanted: bool | None,
    graph: type[Graph] = CudaGraph,
) -> Callable[[Tensor | None], None]:
    """The step, captured where that can be.

    Args:
        step: one step on rows of the task; None: on all.
        task, optimizer, regularizer: of the step.
        batch_size: None where all steps are on all rows.
        wanted: False: as it is; None: captured where it can be and is sure to do the same every
            time; True: captured.
        graph: what holds a step.

    Raises:
        RuntimeError: a captured step is wanted and cannot be.
    """
    if wanted is False:
        return step
    device = _device(optimizer)
    reason = graph.why_not(device) or _obstacle(optimizer, batch_size)
    if wanted and reason is not None:
        raise _refusal(reason)
    reason = reason or (None if wanted else _doubt(task, regularizer))
    if reason is not None:
        if device.type == "cuda":
            _log.info("steps are taken eagerly, not as a CUDA graph: %s", reason)
        return step
    captured = GraphStep(lambda: step(None), optimizer, graph(device), required=bool(wanted))
    return lambda rows: captured()


def _device(optimizer: torch.optim.Optimizer) -> torch.device:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return next((p.device for p in parameters), torch.device("cpu"))


def _refusal(reason: str) -> RuntimeError:
    return RuntimeError(f"cuda_graph=True was asked for, but a step cannot be captured: {reason}")


def _obstacle(optimizer: torch.optim.Optimizer, batch_size: int | None) -> str | None:
    """Why no graph can hold the steps, or None."""
    name, groups = type(optimizer).__name__, optimizer.param_groups
    if batch_size is not None:
        return f"every step is on other rows (batch_size {batch_size})"
    if any(p.device != _device(optimizer) for group in groups for p in group["params"]):
        return "the parameters are on several devices"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return f"{name} has step hooks, which a replay does not call"
    if type(optimizer) is torch.optim.SGD:
        return None
    if isinstance(optimizer, GroupRMSprop):
        able = optimizer.capturable
    else:
        able = all(group.get("capturable") for group in groups)
    return None if able else f"{name} is not made with capturable=True"


def _doubt(task: Any, regularizer: Any) -> str | None:
    """Why a captured step might not be what eager steps are, or None."""
    if not getattr(task, "capturable", False):
        return f"{type(task).__name__} does not say that its loss is capturable"
    if regularizer is not None and not getattr(regularizer, "capturable", False):
        return f"{type(regularizer).__name__} does not say that it is capturable"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is in use"
    return None


def _built_in(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a captured step does not read anew. Tensors are told apart by identity: their
    numbers are read from the device, but for those on the CPU, which count as numbers."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name == "params":
                for p in value:
                    found += (p, p.data_ptr(), p.requires_grad)
            elif isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
                found.append(value.item())
            else:
                found.append(value)
    return found


def _same(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    return all(
        x is y or not (isinstance(x, Tensor) or isinstance(y, Tensor) or x != y)
        for x, y in zip(a, b, strict=True)
    )
