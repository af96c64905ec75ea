"""Running lists of frames: schedules kept between calls, buffers, launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from htfkernels.runtime.memory import Kept
from htfkernels.schedule.frames import FrameList
from htfkernels.triton.gather_gradients import Backward, backward_schedule
from htfkernels.triton.gather_tables import Forward, Launch, forward_schedule
from htfkernels.triton.launch import launch
from htfkernels.triton.memory import empty
from htfkernels.triton.segments import add_parts, segment_gradient

__all__ = ["Evaluation", "Lists", "backward", "evaluation", "forward", "orders"]


class Evaluation:
    """A list of frames with its schedules in one dtype on one device."""

    def __init__(
        self, frames: FrameList, dtype: torch.dtype, precision: str, device: torch.device
    ) -> None:
        self.frames = frames
        self._how = (dtype, precision, device)
        self.forward: Forward = forward_schedule(frames, *self._how)
        self._backward: dict[tuple[bool, ...], Backward] = {}

    @cached_property
    def filler(self) -> Tensor:
        """What stands between the weights of two groups."""
        return torch.zeros(16, dtype=self._how[0], device=self._how[2])

    @cached_property
    def mode_dims(self) -> Tensor:
        """``[N]``, on the device."""
        leaves = sorted((s.mode, s.rows) for s in self.frames.steps if s.mode >= 0)
        return torch.tensor([rows for _, rows in leaves]).to(self._how[2])

    def backward(self, needs: Sequence[bool]) -> Backward:
        """The backward schedule for the groups that are needed."""
        key = tuple(bool(n) for n in needs)
        if key not in self._backward:
            self._backward[key] = backward_schedule(self.frames, *self._how, key)
        return self._backward[key]


class Lists(NamedTuple):
    """Where rows' ids are: a plan's lists, or a matrix of indices; and with what strides. For the
    backward pass also the rows' order by id, and where each id's rows start in it."""

    ids: Tensor
    row: int = 1
    mode: int = 1
    starts: Tensor | None = None
    orders: Tensor | None = None


_evaluations: Kept[Evaluation] = Kept()


def evaluation(
    owner: Tensor, like: Tensor, batch: int, precision: str, frames: Callable[[], FrameList]
) -> Evaluation:
    """The evaluation of a program or plan for tensors like this one, made at the first call."""

    def make() -> Evaluation:
        return Evaluation(frames(), like.dtype, precision, like.device)

    return _evaluations.of(owner, (like.dtype, like.device, batch, precision), make, like)


def orders(indices: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """``[N, longest]`` starts and ``[N, B]`` orders of the columns of indices ``[B, N]``."""
    listed, order = indices.t().contiguous().sort(dim=1, stable=True)
    every = torch.arange(longest, device=indices.device).expand(len(listed), -1).contiguous()
    return torch.searchsorted(listed, every), order


def forward(
    made: Evaluation, weights: Sequence[Tensor], result: Tensor, lists: Lists | None
) -> Tensor:
    """Writes the result; returns the buffer of weights and frames."""
    schedule = made.forward
    buffer = empty(schedule.buffer, weights[0])
    pieces = []
    for w in weights:  # each at a multiple of 16
        pieces += [w.reshape(-1), made.filler[: -w.numel() % 16]]
    torch.cat(pieces, out=buffer[: schedule.weights])
    for step in schedule.launches:
        ids = _lists(lists, step)
        messages = result if step.last else buffer
        args = (step.table, step.work, ids.ids, buffer, messages, ids.row, ids.mode)
        launch(step.kernel, step.programs, args, step.constants, step.config)
    return buffer


def _lists(lists: Lists | None, step: Launch) -> Lists:
    # On a grid nothing is read from it.
    return Lists(step.work, starts=step.work, orders=step.work) if lists is None else lists


def backward(
    made: Evaluation,
    grad: Tensor,
    buffer: Tensor,
    lists: Lists | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the folded weights, ``[0]`` where not needed."""
    schedule = made.backward(needs)
    grad = grad.contiguous()
    double = buffer.dtype == torch.float64
    weights, frames, parts = schedule.sizes
    to_weights, to_frames = empty(weights, buffer), empty(frames, buffer)
    to_parts = empty(parts, buffer, torch.float64 if double else torch.float32)
    for step in schedule.launches:
        ids = _lists(lists, step)
        grads = grad if step.last else to_frames
        spaces = (to_weights, to_frames, to_parts)
        strides = (ids.row, ids.mode)
        if step.kernel is add_parts:
            args = (step.table, step.work, to_parts, to_weights, to_frames)
        elif step.kernel is segment_gradient:
            given = (ids.ids, ids.starts, ids.orders, buffer, grads)
            args = (step.table, step.work, *given, *spaces, *strides)
        else:
            args = (step.table, step.work, ids.ids, buffer, grads, *spaces, *strides)
        launch(step.kernel, step.programs, args, step.constants, step.config)
    found = []
    for at, shape in zip(schedule.groups, schedule.shapes, strict=True):
        size = shape[0] * shape[1] * shape[2]
        found.append(to_weights[at : at + size].view(shape) if at >= 0 else buffer.new_empty(0))
    return found
