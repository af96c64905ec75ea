"""Graphs that are traced with the CUDA C++ kernels run them, forward and backward."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import cuda_module as module

ON = module.device_type()
REASON = module.why_not(ON)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

CASE = {case.name: case for case in testing.cases()}["primes"]


def launches() -> int:
    name = "_C_emulated" if module.emulated() else "_C_cuda"
    return int(import_module(f"htfkernels.{name}").launches())


@pytest.mark.parametrize("op", ["evaluate", "evaluate_at", "evaluate_at_planned"])
def test_compiled_graphs(op: str) -> None:
    inputs = testing.make_inputs(CASE, torch.float32, ON)
    if op == "evaluate_at_planned":
        plan = hk.IndexPlan.make(CASE.layout, inputs.indices)

        def function(*weights: torch.Tensor) -> torch.Tensor:
            return hk.evaluate_at(CASE.tree, weights, plan, layout=CASE.layout)

        arguments = inputs.weights
    else:
        function, arguments = testing.operation(op, CASE, inputs)
    leaves = [a.detach().requires_grad_() for a in arguments]
    with hk.use_backend("cuda"):
        eager = function(*leaves)
        expected = torch.autograd.grad(eager.sum(), leaves)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        value = compiled(*leaves)
    before = launches()
    found = torch.autograd.grad(value.sum(), leaves)
    assert launches() > before
    torch.testing.assert_close(value, eager)
    torch.testing.assert_close(found, expected)
    before = launches()
    compiled(*leaves)  # keeps the backend it was traced with
    assert launches() > before


def test_operators() -> None:
    inputs = testing.make_inputs(CASE, torch.float64, ON)
    x = torch.cat(tuple(inputs.vectors), dim=1)
    weights = [w.requires_grad_() for w in inputs.weights]
    arguments = (weights, x.requires_grad_(), CASE.layout.program, CASE.layout.out_features)
    torch.library.opcheck(torch.ops.htfkernels.evaluate_cuda.default, arguments)
