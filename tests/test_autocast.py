"""bfloat16 by torch.autocast on the CPU."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_values_and_gradients(cpu_target, op, case):
    """Computed in bfloat16; gradients come back in the arguments' float32."""
    cpu_target.require(op, torch.bfloat16)
    function, arguments = testing.operation(op, case, testing.make_inputs(case, torch.bfloat16))
    arguments = [a.float() for a in arguments]
    with autocast():
        actual = function(*arguments)
    assert actual.dtype == torch.bfloat16
    expected, scale = testing.exact(function, arguments)
    testing.assert_matches(actual, expected, torch.bfloat16, "forward", scale)

    leaves = [a.requires_grad_() for a in arguments]
    with autocast():
        out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(g.dtype == torch.float32 for g in grads)
    expected, scale = testing.exact(testing.gradients(function), (torch.ones_like(out), *arguments))
    testing.assert_matches(grads, expected, torch.bfloat16, "backward", scale)


def test_same_as_calling_in_bfloat16(cpu_target, op, case):
    cpu_target.require(op, torch.bfloat16)
    function, arguments = testing.operation(op, case, testing.make_inputs(case, torch.bfloat16))
    with autocast():
        cast = function(*(a.float() for a in arguments))
    assert torch.equal(cast, function(*arguments))


def test_float64_is_left_alone(cpu_target, op):
    cpu_target.require(op)
    case = testing.cases()[0]
    function, arguments = testing.operation(op, case, testing.make_inputs(case, torch.float64))
    with autocast():
        cast = function(*arguments)
    assert cast.dtype == torch.float64
    assert torch.equal(cast, function(*arguments))


@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_of_either_dtype(cpu_target, vectors):
    """A layer before the model may already have made bfloat16 of them."""
    cpu_target.require("evaluate", torch.bfloat16)
    model = hk.HTF(hk.ModeTree.balanced(4), 3, 5)
    x = torch.randn(7, 4, 3).to(vectors).requires_grad_()
    with autocast():
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == vectors
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_mixed_dtypes_are_refused_without_autocast(cpu_target):
    cpu_target.require("evaluate", torch.float32)
    model = hk.HTF(hk.ModeTree.balanced(4), 3, 5)
    with pytest.raises(
        ValueError, match=r"evaluate: vectors are torch.bfloat16.*weights torch.float32"
    ):
        model(torch.randn(7, 4, 3, dtype=torch.bfloat16))


def test_a_training_step(cpu_target):
    cpu_target.require("evaluate", torch.bfloat16)
    torch.manual_seed(0)
    model = hk.HTF(hk.ModeTree.balanced(4), 3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(64, 4, 3), torch.zeros(64)
    losses = []
    for _ in range(20):
        with autocast():
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_slog(cpu_target):
    """The log-magnitude keeps its precision: it is not computed in bfloat16 sums of thousands."""
    model = hk.HTF(hk.ModeTree.balanced(4), 3, 8, dtype=torch.float32)
    x = torch.randn(7, 4, 3)
    sign, logabs = model.slog(x)
    with autocast():
        cast_sign, cast = model.slog(x)
    assert torch.equal(cast_sign, sign)
    testing.assert_matches(cast, logabs.double(), torch.bfloat16, "forward")
