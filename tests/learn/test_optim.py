"""GroupRMSprop against the formula, and against the paper's code."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import htfkernels as hk
from htflearn import CompletionTask, GroupRMSprop

DATA = Path(__file__).parent.parent / "data"


def parameters(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (2, 2, 2)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(step: int, like: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in like]


def walk(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(params, gradients(step, params), strict=True):
            p.grad = g
        optimizer.step()


def naive(params: list[Tensor], steps: int, lrs: list[float], alpha: float, eps: float) -> None:
    v = 0.0
    for step in range(steps):
        grads = gradients(step, params)  # type: ignore[arg-type]
        total = sum(float((g**2).sum()) for g in grads)
        v = alpha * v + (1 - alpha) * total
        denominator = math.sqrt(v / (1 - alpha ** (step + 1))) + eps
        for p, g, lr in zip(params, grads, lrs, strict=True):
            p -= lr / denominator * g


def test_one_average_for_all_groups() -> None:
    params = parameters()
    expected = [p.detach().clone() for p in params]
    groups = [{"params": params[:2], "lr": 0.3}, {"params": params[2:]}]
    walk(GroupRMSprop(groups, lr=0.05, alpha=0.9, eps=1e-3), params, range(20))
    naive(expected, 20, [0.3, 0.3, 0.05], 0.9, 1e-3)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-13, atol=1e-14)


def test_weight_decay_is_part_of_the_gradient() -> None:
    p = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    p.grad = torch.tensor([0.5, 0.25], dtype=torch.float64)
    GroupRMSprop([p], lr=0.1, eps=0.0, weight_decay=0.5).step()
    g = torch.tensor([1.5, -0.25], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), torch.tensor([2.0, -1.0]).double() - 0.1 * g / g.norm())


def test_parameters_without_gradient_stay() -> None:
    params = parameters()
    before = params[1].detach().clone()
    optimizer = GroupRMSprop(params)
    optimizer.step()
    assert not optimizer.state_dict()["state"]
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through_file", [False, True])
def test_state_dict_continues_bit_for_bit(dtype: torch.dtype, through_file: bool) -> None:
    straight = parameters(dtype=dtype)
    walk(GroupRMSprop(straight), straight, range(20))

    first = parameters(dtype=dtype)
    optimizer = GroupRMSprop(first)
    walk(optimizer, first, range(9))
    saved = optimizer.state_dict()
    if through_file:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    other = GroupRMSprop(second, lr=7.0)
    other.load_state_dict(saved)
    walk(other, second, range(9, 20))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


def test_a_state_dict_is_not_shared() -> None:
    params, others = parameters(), parameters()
    optimizer, other = GroupRMSprop(params), GroupRMSprop(others)
    walk(optimizer, params, range(3))
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    expected = copy.deepcopy(other.state_dict())
    walk(optimizer, params, range(3, 6))
    assert str(other.state_dict()["state"]) == str(expected["state"])


def test_closure() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GroupRMSprop([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert p.square().sum().item() < 3.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"lr": -1.0}, "lr"), ({"alpha": 1.0}, "alpha"), ({"eps": -1.0}, "eps")],
)
def test_bad_settings(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GroupRMSprop(parameters(), **settings)


def test_groups_cannot_differ_in_alpha() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="alpha"):
        GroupRMSprop([{"params": params[:1], "alpha": 0.5}, {"params": params[1:]}])


def oracle_weights(data: Any, prefix: str, tree: hk.ModeTree) -> dict[hk.Node, Tensor]:
    keys = {n: f"{prefix}/{n.level}/{'-'.join(map(str, sorted(n.modes)))}" for n in tree.nodes}
    return {n: torch.from_numpy(data[key]) for n, key in keys.items()}


@pytest.mark.parametrize("name", ["gd", "grouprmsprop"])
def test_trajectories_of_the_papers_code(name: str, cpu_target: Any) -> None:
    cpu_target.require("full_tensor")
    data = np.load(DATA / f"trajectory_{name}.npz")
    meta = json.loads(str(data["meta"]))
    tree = hk.ModeTree.from_levels(meta["levels"])
    model = hk.HTF(tree, meta["mode_dims"], meta["widths"], dtype=torch.float64)
    with torch.no_grad():
        for node, weight in oracle_weights(data, "w0", tree).items():
            model.node_weight(node).copy_(weight)
    indices, values = torch.from_numpy(data["indices"]), torch.from_numpy(data["targets"])
    task = CompletionTask(indices, values, meta["mode_dims"])
    make = {"gd": torch.optim.SGD, "grouprmsprop": GroupRMSprop}[name]
    optimizer = make(model.parameters(), lr=meta["lr"])
    losses = []
    for _ in range(meta["steps"]):
        optimizer.zero_grad()
        loss = task.loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, data["loss"], rtol=1e-12)
    for node, weight in oracle_weights(data, "wT", tree).items():
        error = (model.node_weight(node) - weight).norm() / weight.norm()
        assert error.item() < 1e-12, node


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_compiled_and_plain_steps_agree(dtype: torch.dtype, weight_decay: float) -> None:
    """They round differently and share state: either goes on where the other stopped."""
    walked = []
    for first, second in (("auto", "auto"), ("reference", "reference"), ("auto", "reference")):
        params = parameters(dtype=dtype)
        groups = [{"params": params[:1], "lr": 0.02}, {"params": params[1:]}]
        optimizer = GroupRMSprop(groups, weight_decay=weight_decay)
        with hk.use_backend(first):
            walk(optimizer, params, range(10))
        with hk.use_backend(second):
            walk(optimizer, params, range(10, 20))
        average = optimizer.state_dict()["state"]["shared"]["average"]
        assert average.dtype == torch.promote_types(dtype, torch.float32)
        assert average.shape == ()
        walked.append([average, *params])
    for other in walked[1:]:
        for a, b in zip(walked[0], other, strict=True):
            assert (a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("kind", ["strides", "mixed dtypes", "half", "subclass"])
def test_what_the_compiled_step_does_not_take(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain formula runs, to its very bits."""

    class Other(Tensor):
        pass

    def make() -> list[nn.Parameter]:
        params = parameters(dtype=torch.float16 if kind == "half" else torch.float32)
        if kind == "strides":
            params[0] = nn.Parameter(params[0].detach().t())
        if kind == "mixed dtypes":
            params[1] = nn.Parameter(params[1].detach().double())
        if kind == "subclass":
            params[1] = nn.Parameter(params[1].detach().as_subclass(Other))
        return params

    walked = []
    for backend in ("auto", "reference"):
        with hk.use_backend(backend):
            params = make()
            optimizer = GroupRMSprop(params)
            monkeypatch.setattr(optimizer, "_advance_compiled", None)
            walk(optimizer, params, range(5))
            walked.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*walked, strict=True))


def test_a_step_is_seen_by_autograd(cpu_target: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    GroupRMSprop([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
