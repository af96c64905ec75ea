"""First and second derivatives of every operation."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import dispatch


def cotangent(op, case, dtype, device, seed=0):
    """A gradient of the result, of mean 1 as the inputs are."""
    layout = case.layout
    lead = list(layout.mode_dims) if op == "full_tensor" else [case.batch]
    trail = [] if layout.out_features == 1 else [layout.out_features]
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(lead + trail, generator=generator, dtype=torch.float64)
    return (1 + 0.5 * normal).to(device, dtype)


def small(op, case, target):
    target.require(op)
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, torch.float64, target.device)
    )
    return function, tuple(a.requires_grad_() for a in arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients(target, op, case, dtype):
    target.require(op, dtype)
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, dtype, target.device)
    )
    given = (cotangent(op, case, dtype, target.device), *arguments)
    run = testing.gradients(function)
    actual = run(*given)
    assert all(g.dtype == dtype and g.device.type == target.device for g in actual)
    expected, scale = testing.exact(run, given)
    testing.assert_matches(actual, expected, dtype, "backward", scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_derivatives(target, op, case, dtype):
    target.require(op, dtype)
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, dtype, target.device)
    )
    _, directions = testing.operation(
        op, case, testing.make_inputs(case, dtype, target.device, seed=1)
    )
    given = (cotangent(op, case, dtype, target.device), *directions, *arguments)
    run = testing.second(function)
    expected, scale = testing.exact(run, given)
    testing.assert_matches(run(*given), expected, dtype, "second", scale)


def test_gradcheck(target, op, small_case):
    function, arguments = small(op, small_case, target)
    assert torch.autograd.gradcheck(function, arguments)


def test_gradgradcheck(target, op, small_case):
    function, arguments = small(op, small_case, target)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_only_what_is_needed(target, op, small_case):
    """Every subset of arguments may require gradients; the others get none."""
    target.require(op)
    function, arguments = testing.operation(
        op, small_case, testing.make_inputs(small_case, torch.float64, target.device)
    )
    given = cotangent(op, small_case, torch.float64, target.device)
    expected, scale = testing.exact(testing.gradients(function), (given, *arguments))
    masks = range(1, 2 ** len(arguments))
    if dispatch.interpreted():  # slow: each argument alone, all but it, and all of them
        masks = {1 << i for i in range(len(arguments))}
        masks |= {2 ** len(arguments) - 1 - m for m in (0, *masks)} - {0}
    for mask in masks:
        needed = [bool(mask >> i & 1) for i in range(len(arguments))]
        leaves = [
            a.detach().clone().requires_grad_(n) for a, n in zip(arguments, needed, strict=True)
        ]
        function(*leaves).backward(given)
        for leaf, n, e, s in zip(leaves, needed, expected, scale, strict=True):
            assert (leaf.grad is not None) == n
            if n:
                testing.assert_matches(leaf.grad, e, torch.float64, "backward", s)


def test_second_derivatives_of_only_some(target, op, small_case):
    """A second derivative by one argument of the gradient of another."""
    target.require(op)
    function, arguments = testing.operation(
        op, small_case, testing.make_inputs(small_case, torch.float64, target.device)
    )

    def mixed(i, j):
        leaves = [a.detach().clone() for a in arguments]
        leaves[i].requires_grad_()
        leaves[j].requires_grad_()
        (first,) = torch.autograd.grad(function(*leaves).sum(), leaves[i], create_graph=True)
        total = (
            first.sum() + 0 * leaves[j].sum()
        )  # the form may be linear: then the graph ends here
        return torch.autograd.grad(total, leaves[j])[0]

    last = len(arguments) - 1
    for i, j in {(0, last), (last, 0), (0, 0), (last, last)}:
        actual = mixed(i, j)
        with hk.use_backend("reference"):
            expected = mixed(i, j)
        testing.assert_matches(actual, expected, torch.float64, "second")


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=lambda g: g.__name__)
def test_no_graph_without_gradients(target, op, small_case, guard):
    function, arguments = small(op, small_case, target)
    with guard():
        out = function(*arguments)
    assert not out.requires_grad
    assert torch.equal(out, function(*arguments))


def test_backward_twice(target, op, small_case):
    function, arguments = small(op, small_case, target)
    out = function(*arguments)
    once = torch.autograd.grad(out.sum(), arguments, retain_graph=True)
    again = torch.autograd.grad(out.sum(), arguments)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), arguments)


def test_backward_outside_the_backend_block(target, op, small_case):
    function, arguments = small(op, small_case, target)
    out = function(*arguments).sum()
    other = "auto" if target.backend == "reference" else "reference"
    with hk.use_backend(other):
        outside = torch.autograd.grad(out, arguments)
    inside = torch.autograd.grad(function(*arguments).sum(), arguments)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_writing_into_an_argument_before_backward(target, op, small_case):
    """Either it is noticed, or the gradient does not depend on what was overwritten."""
    function, arguments = small(op, small_case, target)
    expected = torch.autograd.grad(function(*arguments).sum(), arguments)
    noticed = 0
    for i in range(len(arguments)):
        leaves = [a.detach().clone().requires_grad_() for a in arguments]
        out = function(*leaves).sum()
        with torch.no_grad():
            leaves[i].mul_(2)
        try:
            actual = torch.autograd.grad(out, leaves)
        except RuntimeError as error:
            assert "modified" in str(error) and "inplace" in str(error)
            noticed += 1
        else:
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert noticed or target.backend == "reference"


def test_arguments_are_left_alone(target, op, case):
    target.require(op)
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, torch.float64, target.device)
    )
    before = [a.clone() for a in arguments]
    testing.gradients(function)(cotangent(op, case, torch.float64, target.device), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
