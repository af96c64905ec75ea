"""GroupRMSprop's step and the loss on the device: against the formula in float64, the same bits in
both orders of threads, bad arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import htfkernels as hk
from htfkernels import testing
from htfkernels.ops.group_rmsprop.cuda import group_rmsprop_
from htfkernels.runtime import cuda_module as module
from htflearn import GroupRMSprop
from htflearn.losses import LOSSES

ON = module.device_type()
REASON = module.why_not(ON)
pytestmark: Any = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Empty first, last and between; smaller than 16 bytes, odd, more than a block's round.
SHAPES = [(0,), (), (3, 5), (0, 4), (17,), (2, 2048), (5, 11, 101), (0,)]
ALPHA, EPS = 0.9, 1e-3


def drawn(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64).to(ON, dtype) for s in shapes]


class Step:
    """Arguments of one step, with numbers that differ between parameters."""

    def __init__(self, dtype: torch.dtype, shapes: list[tuple[int, ...]] | None = None) -> None:
        shapes = SHAPES if shapes is None else shapes
        wide = torch.promote_types(dtype, torch.float32)
        self.params, self.grads = drawn(dtype, shapes), drawn(dtype, shapes)
        self.average = torch.tensor(2.5, dtype=wide, device=ON)
        self.count = torch.tensor(3.0, dtype=torch.float64, device=ON)
        self.lr: list[Any] = [0.3 / (i + 1) for i in range(len(shapes))]
        self.decay = [0.1 * (i % 2) for i in range(len(shapes))]

    def formula(self) -> tuple[list[Tensor], float]:
        return testing.group_rmsprop(
            self.params, self.grads, float(self.average), int(self.count) + 1,
            [float(x) for x in self.lr], self.decay, ALPHA, EPS,
        )  # fmt: skip

    def take(self) -> list[Tensor]:
        group_rmsprop_(
            self.params, self.grads, self.average, self.count, self.lr, self.decay,
            ALPHA, EPS,
        )  # fmt: skip
        return [*self.params, self.average, self.count]

    def check(self, dtype: torch.dtype) -> None:
        expected, average = self.formula()
        count = float(self.count)
        self.take()
        eps = torch.finfo(self.average.dtype).eps
        assert float(self.average) == pytest.approx(average, rel=4 * eps)
        assert float(self.count) == count + 1
        for p, e in zip(self.params, expected, strict=True):
            # bfloat16 is rounded once: to the nearest, but where float32's error crosses a tie.
            bound = torch.finfo(dtype).eps * (0.51 if dtype == torch.bfloat16 else 2)
            assert bool(((p.cpu().double() - e).abs() <= bound * e.abs() + 4 * eps).all())


def both_orders(run: Callable[[], list[Tensor]]) -> None:
    if not module.emulated():
        assert equal(run(), run())
        return
    from htfkernels import _C_emulated

    forward = run()
    _C_emulated.set_backward(True)
    try:
        assert equal(forward, run())
    finally:
        _C_emulated.set_backward(False)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_formula(dtype: torch.dtype) -> None:
    Step(dtype).check(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_move(dtype: torch.dtype) -> None:
    Step(dtype, [(0,), (3, 0)]).check(dtype)


def test_more_parameters_than_a_launch_has() -> None:
    Step(torch.float32, [(i % 7, 3) for i in range(101)]).check(torch.float32)


def test_parameters_without_elements_in_the_last_launch() -> None:
    Step(torch.float32, [(3,)] * 48 + [(0,)] * 5).check(torch.float32)
    Step(torch.float32, [(0,)] * 50 + [(3,)]).check(torch.float32)


def test_more_partial_sums_than_every_block_adds_up() -> None:
    Step(torch.float32, [(1,)] * 4200).check(torch.float32)


def test_more_elements_than_blocks_have_in_a_round() -> None:
    """Two rounds, and an end within 16 bytes."""
    step = Step(torch.float64, [(1024 * 512 + 1027,), (5,)])
    step.check(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_does_not_matter(dtype: torch.dtype) -> None:
    step = Step(dtype)
    expected = [p.clone() for p in step.params]
    memory = [torch.zeros(p.numel() + 1, dtype=dtype, device=ON) for p in step.params]
    shifted = [m[1:].view(p.shape) for m, p in zip(memory, expected, strict=True)]
    for s, p in zip(shifted, expected, strict=True):
        s.copy_(p)
    again = Step(dtype)
    again.params, again.grads = shifted, step.grads
    assert equal(step.take(), again.take())
    assert all(m[0] == 0 for m in memory)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_a_step_size_on_the_device(kind: torch.dtype) -> None:
    step = Step(torch.float32)
    step.lr[2] = torch.tensor(0.25, dtype=kind, device=ON)
    step.lr[5] = torch.tensor(0.125, dtype=kind, device=ON)
    step.check(torch.float32)


def test_parameters_that_share_memory_change_one_after_the_other() -> None:
    step = Step(torch.float64, [(200,), (200,)])
    memory = torch.randn(300, dtype=torch.float64, device=ON)
    expected = memory.cpu().clone()
    step.params, step.decay = [memory[:200], memory[100:]], [0.0, 0.0]
    squares = sum(float(g.square().sum()) for g in step.grads)
    corrected = (0.9 * 2.5 + 0.1 * squares) / (1 - 0.9**4)
    for at, g, lr in zip((0, 100), step.grads, step.lr, strict=True):
        expected[at : at + 200] -= lr / (math.sqrt(corrected) + EPS) * g.cpu()
    step.take()
    assert torch.allclose(memory.cpu(), expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        return Step(dtype).take()

    both_orders(run)


def test_bad_arguments() -> None:
    step = Step(torch.float32)
    with pytest.raises(RuntimeError, match=r"grads\[2\] must be of the shape of its parameter"):
        step.grads[2] = step.grads[2][:1].contiguous()
        step.take()
    step = Step(torch.float32)
    with pytest.raises(RuntimeError, match=r"average must be one number of dtype Float"):
        step.average = step.average.double()
        step.take()
    step = Step(torch.float32)
    with pytest.raises(RuntimeError, match=r"params\[1\] must be a contiguous tensor of dtype"):
        step.params[1] = step.params[1].double()
        step.take()
    step = Step(torch.float32)
    with pytest.raises(RuntimeError, match=r"lr and weight_decay must have an entry for each"):
        step.decay.pop()
        step.take()


# -- the optimizer --------------------------------------------------------------------------------


def walked(backend: str, dtype: torch.dtype, tensor_lr: bool = False) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(1)
    params = [nn.Parameter(p) for p in drawn(dtype, [(3, 4), (5,), (2, 2, 2)])]
    lr: Any = torch.tensor(0.3, device=ON) if tensor_lr else 0.3
    groups = [{"params": params[:2], "lr": lr, "weight_decay": 0.1}, {"params": params[2:]}]
    optimizer = GroupRMSprop(groups, lr=0.05, alpha=ALPHA, eps=EPS, capturable=True)
    with hk.use_backend(backend):
        for _ in range(10):
            for p in params:
                p.grad = torch.randn(p.shape, dtype=torch.float64).to(p.device, p.dtype)
            optimizer.step()
    return optimizer, [p.detach() for p in params]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_optimizer_takes_it(
    dtype: torch.dtype, tensor_lr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = module.call
    monkeypatch.setattr(module, "call", lambda name, *a: (calls.append(name), real(name, *a))[1])
    optimizer, found = walked("cuda", dtype, tensor_lr)
    assert calls == ["group_rmsprop_"] * 10
    reference, expected = walked("reference", dtype, tensor_lr)
    assert len(calls) == 10
    eps = torch.finfo(dtype).eps
    for a, b in zip(found, expected, strict=True):
        # bfloat16 is rounded once here and several times there.
        assert float((a.double() - b.double()).norm()) <= 10 * eps * float(b.double().norm())
    ours, theirs = (o.state_dict()["state"]["shared"] for o in (optimizer, reference))
    assert ours["step"].dtype == theirs["step"].dtype == torch.float64
    assert ours["average"].dtype == theirs["average"].dtype
    assert int(ours["step"]) == int(theirs["step"]) == 10
    assert float(ours["average"]) == pytest.approx(float(theirs["average"]), rel=1e-2)


def test_without_memory() -> None:
    """alpha = 0: the average is the last sum of squares."""
    found = []
    for backend in ("cuda", "reference"):
        p = nn.Parameter(torch.ones(5, dtype=torch.float64, device=ON))
        optimizer = GroupRMSprop([p], lr=0.1, alpha=0.0, capturable=True)
        with hk.use_backend(backend):
            for number in range(3):
                p.grad = torch.full_like(p, number + 1.0)
                optimizer.step()
        found.append(p.detach())
    assert torch.allclose(*found, rtol=1e-14)
    assert torch.allclose(found[0], torch.full_like(found[0], 1 - 0.3 / 5**0.5), rtol=1e-5)


# -- the loss -------------------------------------------------------------------------------------


def loss_of(p: Tensor, y: Tensor, name: str) -> list[Tensor]:
    arrived = torch.zeros(1, dtype=torch.int32, device=ON)
    found = module.call("completion_loss", p, y, arrived, list(LOSSES).index(name))
    assert int(arrived) == 0
    return list(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 255, 2048, 4096 * 5 + 300])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, batch: int, dtype: torch.dtype) -> None:
    p, y = (2 * torch.randn(batch, dtype=dtype) for _ in range(2))
    y[0] = p[0]
    if batch > 1:
        p[1] = y[1] + 1  # a corner of Huber's
    exact = p.double().clone().requires_grad_()
    expected = LOSSES[name](exact, y.double())
    (grad,) = torch.autograd.grad(expected, exact)
    loss, found = loss_of(p.to(ON), y.to(ON), name)
    eps = torch.finfo(dtype).eps
    assert loss.shape == () and loss.dtype == found.dtype == dtype
    assert float(loss) == pytest.approx(float(expected.detach()), rel=8 * eps)
    scale = float((p.detach().abs() + y.abs()).max()) / batch
    assert float((found.cpu().double() - grad).abs().max()) <= 4 * eps * scale


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_threads_changes_no_loss(name: str) -> None:
    p, y = (torch.randn(9000, device=ON) for _ in range(2))
    both_orders(lambda: loss_of(p, y, name))


def test_a_loss_that_is_not_finite_shows() -> None:
    p = torch.tensor([1.0, float("nan")], device=ON)
    for name in LOSSES:
        loss, grad = loss_of(p, torch.zeros_like(p), name)
        assert bool(loss.isnan()) and bool(grad[1].isnan()) and bool(grad[0].isfinite())


def test_bad_arguments_of_the_loss() -> None:
    p = torch.zeros(3, device=ON)
    with pytest.raises(RuntimeError, match=r"must be contiguous \[B\], B > 0.*Float \[3\] and"):
        loss_of(p, torch.zeros(2, device=ON), "l2")
