"""What is kept between calls: buffers of the compiled operators, and what is made for a tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from htfkernels.runtime import compiled

__all__ = ["Kept", "capturing", "keep_for_graph", "release_memory"]

T = TypeVar("T")
_captured: dict[int, object] = {}


def capturing(like: Tensor) -> bool:
    """Whether what runs on the tensor's device now is captured into a CUDA graph."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def keep_for_graph(like: Tensor, made: object) -> None:
    """Keeps for ever what a graph that is being captured on the tensor's device goes on reading."""
    if capturing(like):
        _captured[id(made)] = made


class Kept(Generic[T]):
    """What is made once for a tensor and a key: schedules, with their tables on a device.

    It is kept as long as the tensor lives, so that a call that was made before copies nothing to
    the device, and a CUDA graph can capture it; and for ever where one did, since the graph goes on
    reading the tables.

    Args:
        most: for how many keys of a tensor; the oldest goes first.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, owner: Tensor, key: Hashable, make: Callable[[], T], like: Tensor) -> T:
        """What was made for this tensor and key, or what ``make`` makes now; ``like`` is on the
        device where it is read."""
        made: dict[Hashable, T] = self._of.setdefault(owner, {})
        found = made.get(key)
        if found is None:
            if len(made) >= self._most:
                made.pop(next(iter(made)))
            found = made[key] = make()
        keep_for_graph(like, found)
        return found

    def clear(self) -> None:
        """Forgets everything; what a graph reads stays."""
        self._of.clear()


def release_memory() -> int:
    """Gives buffers that no tensor uses back to the operating system.

    The compiled operators keep their large buffers, and those of results that were freed, for the
    next call: up to 1 GiB, since fresh pages cost a training step more than what it computes into
    them. A program that is done with them can ask for their release.

    Returns:
        bytes released; 0 where the compiled module is not there.

    Example:
        >>> release_memory() >= 0
        True
    """
    return 0 if compiled.module is None else int(compiled.module.release_memory())
