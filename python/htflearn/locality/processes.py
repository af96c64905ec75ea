"""Several processes that train one network, as ``torchrun`` starts them, or must not."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from htflearn.errors import UserError

__all__ = ["ALONE", "Processes", "joined", "only_one"]

_PATIENCE = 10.0


@dataclass(frozen=True)
class Processes:
    """This process among those that train a network together.

    Attributes:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, its gradients averaged over the processes."""
        return network if self.count == 1 else nn.parallel.DistributedDataParallel(network)

    def wait(self) -> None:
        """For the others."""
        if self.count > 1:
            torch.distributed.barrier()

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Each number, summed over the processes."""
        if self.count == 1:
            return list(numbers)
        cuda = torch.distributed.get_backend() == "nccl"
        total = torch.tensor(numbers, dtype=torch.float64, device="cuda" if cuda else "cpu")
        torch.distributed.all_reduce(total)
        return total.tolist()


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes that ``torchrun`` started with this one, or this one alone.

    Args:
        device: ``"cpu"`` or ``"cuda"``; of a node's GPUs each process gets one.

    Raises:
        UserError: a node has more processes than GPUs, or they do not find each other.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield ALONE, device
        return
    place = device
    if device.startswith("cuda"):
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"process {local} of this node has no GPU of its own, there are {gpus}")
        torch.cuda.set_device(local)
        place = f"cuda:{local}"
    try:
        torch.distributed.init_process_group("nccl" if place != device else "gloo")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes of torchrun do not find each other: {error}") from error
    try:
        group = torch.distributed
        yield Processes(group.get_rank(), group.get_world_size()), place
    finally:
        torch.distributed.destroy_process_group()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder that they would write into, too; the system lets them
    in again when this one ends, however it ends. On a file system that has no locks it does not.

    Args:
        folder: made where it is missing; gets a file ``.lock``.

    Raises:
        UserError: another process is in it, and stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab", opener=_no_link) as file:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # perhaps of a process that is ending
                if time.monotonic() - began > _PATIENCE:
                    raise UserError(f"another process is at work in {folder}") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
