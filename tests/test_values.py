"""Values of every operation on every case, and what holds for them whatever the numbers."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(target, op, case, dtype):
    target.require(op, dtype)
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, dtype, target.device)
    )
    actual = function(*arguments)
    assert actual.dtype == dtype
    assert actual.device.type == target.device
    assert not actual.requires_grad
    expected, scale = testing.exact(function, arguments)
    testing.assert_matches(actual, expected, dtype, "forward", scale)


def test_result_shapes(target, op, case):
    target.require(op)
    layout = case.layout
    lead = list(layout.mode_dims) if op == "full_tensor" else [case.batch]
    trail = [] if layout.out_features == 1 else [layout.out_features]
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, torch.float64, target.device)
    )
    assert list(function(*arguments).shape) == lead + trail


@pytest.mark.parametrize("case", [c for c in testing.cases() if c.fits("full_tensor")], ids=str)
def test_operations_agree(target, case):
    """One-hot vectors are indices, and both read the end tensor."""
    for op in testing.OPS:
        target.require(op)
    layout = case.layout
    inputs = testing.make_inputs(case, torch.float64, target.device)
    weights, indices = list(inputs.weights), inputs.indices
    vectors = [
        torch.nn.functional.one_hot(indices[:, n], d).double()
        for n, d in enumerate(layout.mode_dims)
    ]
    entries = hk.evaluate_at(case.tree, weights, indices, layout=layout)
    tensor = hk.full_tensor(case.tree, weights, layout=layout)
    testing.assert_matches(
        hk.evaluate(case.tree, weights, vectors, layout=layout), entries, torch.float64, "forward"
    )
    testing.assert_matches(tensor[tuple(indices.unbind(1))], entries, torch.float64, "forward")


def test_linear_in_each_vector(target, case):
    target.require("evaluate")
    inputs = testing.make_inputs(case, torch.float64, target.device)
    vectors = (
        list(inputs.vectors.unbind(1))
        if isinstance(inputs.vectors, torch.Tensor)
        else list(inputs.vectors)
    )
    last = vectors[-1]

    def value(x):
        return hk.evaluate(case.tree, inputs.weights, [*vectors[:-1], x], layout=case.layout)

    other = last.flip(-1)
    testing.assert_matches(
        value(2 * last + other), 2 * value(last) + value(other), torch.float64, "forward"
    )


@pytest.mark.parametrize("op", ["evaluate", "evaluate_at"])
@pytest.mark.parametrize("case", [c for c in testing.cases() if c.batch > 1], ids=str)
def test_rows_do_not_depend_on_the_batch_around_them(target, op, case):
    """The first row alone gives what it gives in its batch."""
    target.require(op)
    inputs = testing.make_inputs(case, torch.float64, target.device)
    packed = isinstance(inputs.vectors, torch.Tensor)
    first = inputs.vectors[:1] if packed else tuple(v[:1] for v in inputs.vectors)
    alone = testing.Inputs(inputs.weights, first, inputs.indices[:1])
    function, arguments = testing.operation(op, case, inputs)
    single, few = testing.operation(op, case, alone)
    _, scale = testing.exact(single, few)
    testing.assert_matches(single(*few), function(*arguments)[:1], torch.float64, "forward", scale)
