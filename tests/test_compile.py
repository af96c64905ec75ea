"""torch.compile: one graph, forward and first backward."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import htfkernels as hk
from htfkernels import testing


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = [
    c
    for c in testing.cases()
    if c.name in ("random7_outputs", "shared_mixed", "one_child_nodes_sum")
]


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(cpu_target, case):
    """All operations in one graph."""
    inputs = testing.make_inputs(case, torch.float32)
    calls = []
    for op in testing.OPS:
        cpu_target.require(op, torch.float32)
        calls.append(testing.operation(op, case, inputs))
    _, arguments = calls[testing.OPS.index("evaluate")]  # of the others, the first ones

    def everything(*given):
        return [function(*given[: len(own)]) for function, own in calls]

    def total(*given):
        return sum(out.sum() for out in everything(*given))

    fast = compiled(everything)
    for found, (function, own) in zip(fast(*arguments), calls, strict=True):
        expected, scale = testing.exact(function, own)
        testing.assert_matches(found, expected, torch.float32, "forward", scale)
    given = (torch.ones(()), *arguments)
    expected, scale = testing.exact(testing.gradients(total), given)
    gradients = testing.gradients(compiled(total))(*given)
    testing.assert_matches(gradients, expected, torch.float32, "backward", scale)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hk.HTF(testing.random_tree(5, 1), 3, 4, out_features=2)


def runs(model):
    """Ways to call a model, with their arguments."""
    yield model, torch.randn(7, 5, 3)
    yield model.at, torch.randint(3, (7, 5))


@pytest.mark.parametrize("which", [0, 1], ids=["vectors", "indices"])
def test_dynamic_batch_sizes(cpu_target, model, which):
    cpu_target.require("evaluate_at" if which else "evaluate", torch.float32)
    function, data = list(runs(model))[which]
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    for batch in (7, 3, 65, 300):
        x = data[:1].expand(batch, *data.shape[1:]).contiguous()
        torch.testing.assert_close(fast(x), function(x))
    assert count.frame_count == 1


def test_gradients_of_the_module(cpu_target, model):
    cpu_target.require("evaluate", torch.float32)
    x = torch.randn(7, 5, 3, requires_grad=True)
    fast = compiled(model)
    wanted = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    actual = torch.autograd.grad(fast(x).square().sum(), wanted)
    testing.assert_matches(actual, [e.double() for e in expected], torch.float32, "backward")


def test_only_what_is_needed(cpu_target, model):
    cpu_target.require("evaluate", torch.float32)
    model.weights[1].requires_grad_(False)
    compiled(model)(torch.randn(7, 5, 3)).sum().backward()
    assert [w.grad is None for w in model.weights] == [i == 1 for i in range(len(model.weights))]


def test_full_tensor_of_the_module(cpu_target, model):
    cpu_target.require("full_tensor", torch.float32)
    fast = compiled(lambda: model.full_tensor().square().sum())
    expected = torch.autograd.grad(model.full_tensor().square().sum(), list(model.parameters()))
    actual = torch.autograd.grad(fast(), list(model.parameters()))
    testing.assert_matches(actual, [e.double() for e in expected], torch.float32, "backward")


def test_autocast(cpu_target, model):
    cpu_target.require("evaluate", torch.bfloat16)
    x = torch.randn(7, 5, 3)

    def run(v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(v)

    out = compiled(run)(x)
    assert out.dtype == torch.bfloat16
    testing.assert_matches(out, run(x).double(), torch.bfloat16, "forward")


def test_a_training_step(cpu_target, model):
    """A compiled model trains as the model itself does."""
    cpu_target.require("evaluate", torch.float32)
    x, y = torch.randn(65, 5, 3), torch.randn(65, 2)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    ends = []
    for run in (model, compiled(model)):
        model.load_state_dict(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(run(x), y).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    for eager, fast in zip(*ends, strict=True):
        torch.testing.assert_close(fast, eager)


def test_double_backward_is_refused_in_words(cpu_target, model):
    """Compiled code has a first derivative only; asking for a second raises, in words."""
    cpu_target.require("evaluate", torch.float32)
    x = torch.randn(7, 5, 3, requires_grad=True)
    out = compiled(model)(x)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph|second derivative"):
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        first.square().sum().backward()


def test_bad_input_is_refused(cpu_target, model):
    cpu_target.require("evaluate_at", torch.float32)
    with pytest.raises(Exception, match="vectors must be"):
        compiled(model)(torch.randn(7, 5, 4))
    with pytest.raises((IndexError, RuntimeError), match="index"):
        compiled(model.at)(torch.full((7, 5), 3))


def test_the_backend_in_force_is_compiled_in(cpu_target, model):
    """The graph holds the operator of the backend asked for, or PyTorch's matrix products."""
    cpu_target.require("evaluate", torch.float32)
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(model, fullgraph=True, backend=record)(torch.randn(7, 5, 3))
    names = {str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"}
    assert ("htfkernels.evaluate.default" in names or "htfkernels.evaluate" in names) == (
        cpu_target.backend == "cpp"
    )


_FIRST_THING = """
import torch, htfkernels as hk
tree = hk.ModeTree.balanced(4)
layout = hk.Layout.make(tree, 3, 5)
weights = [torch.randn(g.shape, requires_grad=True) for g in layout.groups]

def run(x, i):
    return (hk.evaluate(tree, weights, x, layout=layout).sum()
            + hk.evaluate_at(tree, weights, i, layout=layout).sum()
            + hk.full_tensor(tree, weights, layout=layout).sum())

x, i = torch.randn(7, 4, 3), torch.randint(3, (7, 4))
torch.compile(run, fullgraph=True, backend="aot_eager")(x, i).backward()
actual = [w.grad for w in weights]
expected = torch.autograd.grad(run(x, i), weights)
for a, e in zip(actual, expected, strict=True):
    torch.testing.assert_close(a, e)
"""


def test_the_first_thing_a_process_does():
    """Nothing that an eager call would have set up is missing: no operator, no gradient."""
    run = subprocess.run([sys.executable, "-c", _FIRST_THING], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_inductor(cpu_target, model):
    for op in testing.OPS:
        cpu_target.require(op, torch.float32)
    x, indices = torch.randn(7, 5, 3, requires_grad=True), torch.randint(3, (7, 5))

    def everything(v, i):
        return model(v).square().sum() + model.at(i).sum() + model.full_tensor().square().sum()

    wanted = [x, *model.parameters()]
    expected = torch.autograd.grad(everything(x, indices), wanted)
    actual = torch.autograd.grad(compiled(everything, "inductor")(x, indices), wanted)
    testing.assert_matches(actual, [e.double() for e in expected], torch.float32, "backward")
