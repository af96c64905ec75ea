"""Steps of GroupRMSprop that a CUDA graph can hold: the formula, the state, its way between kinds
of optimizers and between devices."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import htfkernels as hk
from htflearn import GroupRMSprop

SHAPES = [(3, 4), (5,), (2, 2, 2)]


def parameters(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [nn.Parameter(d.to(device, dtype)) for d in drawn]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def walk(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(p.device, p.dtype)
        optimizer.step()


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 0.3, "weight_decay": 0.1}, {"params": params[2:]}]


def formula(steps: int, alpha: float, eps: float) -> list[Tensor]:
    params = [p.detach() for p in parameters()]
    v = 0.0
    for step in range(steps):
        decays, lrs = (0.1, 0.1, 0.0), (0.3, 0.3, 0.05)
        moves = [g + w * p for g, w, p in zip(gradients(step), decays, params, strict=True)]
        v = alpha * v + (1 - alpha) * sum(float(d.square().sum()) for d in moves)
        denominator = math.sqrt(v / (1 - alpha ** (step + 1))) + eps
        params = [p - lr / denominator * d for p, lr, d in zip(params, lrs, moves, strict=True)]
    return params


def error(found: list[Any], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((f.detach().cpu().double() - e).norm() / e.norm()) for f, e in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_the_formula(dtype: torch.dtype, capturable: bool) -> None:
    params = parameters(dtype)
    optimizer = GroupRMSprop(groups_of(params), lr=0.05, alpha=0.9, eps=1e-3, capturable=capturable)
    walk(optimizer, params, range(20))
    assert error(params, formula(20, 0.9, 1e-3)) < 8 * torch.finfo(dtype).eps


def test_many_steps_of_a_slow_average() -> None:
    """Where ``1 - alpha^t`` begins near 0 and ends at 1: the count is exact."""
    params = parameters(torch.float32)
    optimizer = GroupRMSprop(groups_of(params), lr=0.05, alpha=0.999, capturable=True)
    walk(optimizer, params, range(2000))
    assert optimizer.state_dict()["state"]["shared"]["step"].item() == 2000
    assert error(params, formula(2000, 0.999, 1e-6)) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_agrees_with_the_compiled_step(dtype: torch.dtype) -> None:
    walked = []
    for capturable in (None, True):
        params = parameters(dtype)
        optimizer = GroupRMSprop(groups_of(params), capturable=capturable)
        walk(optimizer, params, range(10))
        average = optimizer.state_dict()["state"]["shared"]["average"]
        assert average.dtype == torch.promote_types(dtype, torch.float32)
        walked.append([average, *params])
    for a, b in zip(*walked, strict=True):
        assert (a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()


def test_the_state_is_written_where_it_was() -> None:
    """What a graph has captured are addresses."""
    params = parameters()
    optimizer = GroupRMSprop(params, capturable=True)
    walk(optimizer, params, range(1))
    shared = dict(optimizer.state["shared"])  # type: ignore[call-overload]
    before = {name: tensor.clone() for name, tensor in shared.items()}
    walk(optimizer, params, range(1, 3))
    assert optimizer.state["shared"] == shared  # type: ignore[call-overload, comparison-overlap]
    assert all(optimizer.state["shared"][k] is v for k, v in shared.items())  # type: ignore[call-overload]
    assert shared["step"].item() == 3 and shared["average"] != before["average"]


def test_a_state_dict_keeps_its_values() -> None:
    params = parameters()
    optimizer = GroupRMSprop(params, capturable=True)
    walk(optimizer, params, range(2))
    saved = optimizer.state_dict()
    expected = copy.deepcopy(saved["state"])
    other = GroupRMSprop(parameters(), capturable=True)
    other.load_state_dict(saved)
    walk(optimizer, params, range(2, 4))
    assert saved["state"] == expected == other.state_dict()["state"]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_either_kind_goes_on_where_the_other_stopped(first: bool, later: bool) -> None:
    params = parameters()
    optimizer = GroupRMSprop(groups_of(params), lr=0.05, alpha=0.9, eps=1e-3, capturable=first)
    walk(optimizer, params, range(9))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = GroupRMSprop(groups_of(params), capturable=later)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.capturable is later
    walk(other, params, range(9, 20))
    assert error(params, formula(20, 0.9, 1e-3)) < 1e-14


def test_a_kind_goes_on_bit_for_bit() -> None:
    straight, params = parameters(torch.float32), parameters(torch.float32)
    walk(GroupRMSprop(straight, capturable=True), straight, range(20))
    optimizer = GroupRMSprop(params, capturable=True)
    walk(optimizer, params, range(9))
    other = GroupRMSprop(params, capturable=True)
    other.load_state_dict(optimizer.state_dict())
    walk(other, params, range(9, 20))
    assert all(torch.equal(a, b) for a, b in zip(straight, params, strict=True))


def test_a_state_dict_from_before_the_setting() -> None:
    params = parameters()
    optimizer = GroupRMSprop(params)
    walk(optimizer, params, range(2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["capturable"]
    other = GroupRMSprop(params, capturable=True)
    other.load_state_dict(saved)
    assert other.capturable and not optimizer.capturable
    old = optimizer.__getstate__()
    for group in old["param_groups"]:
        del group["capturable"]
    again = GroupRMSprop.__new__(GroupRMSprop)
    again.__setstate__(copy.deepcopy(old))
    assert not again.capturable


def test_it_outlives_pickling() -> None:
    optimizer = pickle.loads(pickle.dumps(GroupRMSprop(parameters(), capturable=True)))
    assert optimizer.capturable


def test_a_step_size_that_is_a_tensor_is_read_at_each_step() -> None:
    walked = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params = parameters()
        optimizer = GroupRMSprop(params, lr=lr, capturable=True)  # type: ignore[arg-type]
        walk(optimizer, params, range(3))
        if isinstance(lr, Tensor):
            lr.fill_(0.02)
        else:
            optimizer.param_groups[0]["lr"] = 0.02
        walk(optimizer, params, range(3, 6))
        walked.append(params)
    for a, b in zip(*walked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("capturable", [None, True])
def test_a_group_without_parameters(capturable: bool | None) -> None:
    params = parameters()
    groups = [{"params": []}, *groups_of(params)]
    optimizer = GroupRMSprop(groups, lr=0.05, alpha=0.9, eps=1e-3, capturable=capturable)
    walk(optimizer, params, range(20))
    assert error(params, formula(20, 0.9, 1e-3)) < 1e-14
    nothing = GroupRMSprop([{"params": []}], capturable=capturable)
    nothing.step()
    assert nothing.capturable is bool(capturable)


def test_groups_cannot_differ() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="capturable belongs to the one average"):
        GroupRMSprop([{"params": params[:1], "capturable": True}, {"params": params[1:]}])


def test_the_compiled_step_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = GroupRMSprop(params, capturable=True)
    monkeypatch.setattr(optimizer, "_advance_compiled", None)
    walk(optimizer, params, range(1))
    with hk.use_backend("cpp"):
        walk(optimizer, params, range(1, 2))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_formula_on_a_gpu_without_waiting_for_it(dtype: torch.dtype) -> None:
    params = parameters(dtype, "cuda")
    optimizer = GroupRMSprop(groups_of(params), lr=0.05, alpha=0.9, eps=1e-3)
    assert optimizer.capturable
    walk(optimizer, params, range(19))
    for p, g in zip(params, gradients(19), strict=True):
        p.grad = g.to(p.device, p.dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error(params, formula(20, 0.9, 1e-3)) < 8 * torch.finfo(dtype).eps


@cuda
@pytest.mark.gpu
def test_a_state_moves_between_devices() -> None:
    params = parameters()
    optimizer = GroupRMSprop(groups_of(params), lr=0.05, alpha=0.9, eps=1e-3)
    walk(optimizer, params, range(5))
    there = [nn.Parameter(p.detach().cuda()) for p in params]
    on_gpu = GroupRMSprop(groups_of(there))
    on_gpu.load_state_dict(optimizer.state_dict())
    walk(on_gpu, there, range(5, 12))
    back = [nn.Parameter(p.detach().cpu()) for p in there]
    last = GroupRMSprop(groups_of(back))
    last.load_state_dict(on_gpu.state_dict())
    walk(last, back, range(12, 20))
    assert error(back, formula(20, 0.9, 1e-3)) < 1e-14


@cuda
@pytest.mark.gpu
def test_a_first_step_cannot_be_captured() -> None:
    params = parameters(device="cuda")
    optimizer = GroupRMSprop(params)
    for p in params:
        p.grad = torch.ones_like(p)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="take a step before"), torch.cuda.stream(stream):
        with torch.cuda.graph(graph, stream=stream):
            optimizer.step()
