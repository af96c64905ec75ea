"""Sharded weights: FSDP2 gathers them for the methods that it knows of."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import htfkernels as hk
from htfkernels import testing

METHODS = {
    "evaluate_at": ("at", (torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0], [0, 0, 0, 0]]),)),
    "slog": ("slog", (torch.ones(5, 4, 3),)),
    "full_tensor": ("full_tensor", ()),
}


def check(rank: int, world: int, file: str) -> None:
    """In each process: refused in words, right where it is registered, gradients too."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        model = hk.HTF(hk.ModeTree.balanced(4), 3, [5, 4])
        whole = copy.deepcopy(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        for op, (name, arguments) in METHODS.items():
            with pytest.raises(RuntimeError, match=f"^{op}: .*sharded .*register_fsdp_forward"):
                getattr(model, name)(*arguments)
            register_fsdp_forward_method(model, name)
            for m in (model, whole):
                m.zero_grad()  # before FSDP replaces the sharded parameters by gathered ones
            found, expected = (getattr(m, name)(*arguments) for m in (model, whole))
            found, expected = (v[1] if isinstance(v, tuple) else v for v in (found, expected))
            assert torch.equal(found, expected)
            for value in (found, expected):
                value.square().sum().backward()
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                testing.assert_matches(p.grad.full_tensor(), q.grad, torch.float32, "backward")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_one_process(tmp_path: Path) -> None:
    check(0, 1, str(tmp_path / "store"))


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(check, args=(2, str(tmp_path / "store")), nprocs=2)
