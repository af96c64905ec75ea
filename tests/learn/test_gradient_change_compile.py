"""The gradient-change regularizer and torch.compile: compiled models, compiled training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from htflearn.locality.gradient_change import InputGradientChange, input_gradient_change
from htflearn.locality.patches import FixedPatches, RandomSquares
from htflearn.locality.resnets import ResNet

A, B = (0, 1, 3, 3), (4, 5, 8, 8)
Step = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.Softplus(), nn.Linear(12, 3))


def in_place() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 4, 7, padding=3), nn.Tanh(), mlp_end())


def mlp_end() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 6), nn.SiLU(inplace=True), nn.Linear(6, 3))


def resnet() -> nn.Module:
    return ResNet([1], [4], 2, 3)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 2, 8, 8, generator=generator), torch.arange(count) % 3


def step_of(model: nn.Module, passes: str = "auto") -> Step:
    def step(x: Tensor, y: Tensor, a=A, b=B) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        return loss + 2 * input_gradient_change(model, x, y, a, b, passes=passes)

    return step


def outcome(model: nn.Module, step: Step, *arguments: object) -> list[Tensor]:
    """Loss, gradients, and the state afterwards; the model is as before."""
    start = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    loss = step(*arguments)
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    after = [v.clone() for v in model.state_dict().values()]
    model.load_state_dict(start)
    return [loss.detach(), *grads, *after]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """float32, the same operations fused in another way."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


also = pytest.mark.slow  # a second number of passes is traced as it is in the other networks


@pytest.mark.parametrize(
    ("make", "training", "passes"),
    [
        pytest.param(mlp, True, "one", id="mlp-one"),
        pytest.param(mlp, True, "two", id="mlp-two"),
        pytest.param(in_place, True, "one", id="in place-one", marks=also),
        pytest.param(in_place, True, "two", id="in place-two"),
        pytest.param(resnet, True, "one", id="resnet, training-one"),
        pytest.param(resnet, True, "two", id="resnet, training-two"),
        pytest.param(resnet, False, "one", id="resnet, eval-one"),
        pytest.param(resnet, False, "two", id="resnet, eval-two", marks=also),
    ],
)
def test_a_compiled_step(make, training: bool, passes: str) -> None:
    """One graph; running statistics of a batch norm move in it as without it."""
    model = make().train(training)
    step = step_of(model, passes)
    arguments = batch()
    if make is in_place:
        # A first layer in place changes the images of the plain pass.
        arguments = (arguments[0].relu(), arguments[1])
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = outcome(model, step, *arguments)
    close(outcome(model, fast, *arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [mlp, resnet], ids=["mlp", "resnet"])
def test_inductor(make) -> None:
    model = make()
    step = step_of(model)
    fast = torch.compile(step, fullgraph=True)
    close(outcome(model, fast, *batch()), outcome(model, step, *batch()))


@pytest.mark.slow
def test_patches_and_batches_change() -> None:
    """A compiled step takes the patches of a sampler, without a graph for each."""
    model = mlp()
    step = step_of(model)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    # The first other number is made a variable, and so is each that was equal to another before.
    fast = torch.compile(step, fullgraph=True, backend=count)
    sampler = RandomSquares(2, 1, seed=4)
    for size in (6, 6, 5, 6, 7, 6):
        arguments = *batch(size), *sampler.sample(8, 8)
        close(outcome(model, fast, *arguments), outcome(model, step, *arguments))
    assert count.frame_count <= 4


def test_derivatives_with_respect_to_images() -> None:
    model = mlp()

    def penalty(x: Tensor, y: Tensor) -> Tensor:
        return input_gradient_change(model, x, y, A, B)

    fast = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    x, y = batch()
    with torch.no_grad():
        close([fast(x, y)], [penalty(x, y)])
    x.requires_grad_()
    found, expected = (torch.autograd.grad(f(x, y), x) for f in (fast, penalty))
    close(list(found), list(expected))


class Breaking(nn.Module):
    """What torch.compile makes two graphs of."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.tanh()


@pytest.mark.parametrize("make", [mlp, pytest.param(resnet, marks=pytest.mark.slow)])
def test_a_model_of_several_graphs(make) -> None:
    """Where a step is not one graph, the penalty runs as written."""
    model = nn.Sequential(make(), Breaking())
    step = step_of(model)
    expected = outcome(model, step, *batch())
    close(outcome(model, torch.compile(step, backend="aot_eager"), *batch()), expected)


def test_autocast_in_a_compiled_step() -> None:
    model = mlp()

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step_of(model)(x, y)

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = outcome(model, fast, *batch()), outcome(model, step, *batch())
    # bfloat16, rounded in other places: 2^-8, of a loss of some 3.
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def compiled_outside(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compiled_inside(model: nn.Module) -> nn.Module:
    """Layer by layer."""
    return nn.Sequential(*(torch.compile(m, backend="aot_eager") for m in model))


@pytest.mark.parametrize("wrap", [compiled_outside, compiled_in_place, compiled_inside])
def test_a_compiled_model(wrap) -> None:
    """Its graphs have a first derivative only: the penalty takes the model as written."""
    torch.manual_seed(0)
    model = mlp()
    x, y = batch()
    expected = outcome(model, step_of(model), x, y)
    wrapped = wrap(model)
    close(outcome(model, step_of(wrapped), x, y), expected)
    regularize = InputGradientChange(FixedPatches([A, B]), 2.0)

    def shared(x: Tensor, y: Tensor) -> Tensor:
        logits, penalty = regularize.with_outputs(wrapped, x, y)
        return nn.functional.cross_entropy(logits, y) + penalty

    close(outcome(model, shared, x, y), expected)


def test_the_class_in_a_compiled_step() -> None:
    """It draws: the step is two graphs with the penalty, as written, in between."""
    model = mlp()
    regularize = InputGradientChange(FixedPatches([A, B]), 2.0)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y) + regularize(model, x, y)

    expected = outcome(model, step_of(model), *batch())
    close(outcome(model, torch.compile(step, backend="aot_eager"), *batch()), expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="compile input_gradient_change instead"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(*batch())


def test_bad_input_in_a_compiled_step() -> None:
    step = torch.compile(step_of(mlp()), fullgraph=True, backend="aot_eager")
    x, y = batch()
    with pytest.raises(Exception, match="reaches outside the image"):
        step(x, y, A, (4, 5, 9, 8))
    with pytest.raises(Exception, match="x must be images"):
        torch.compile(
            lambda x, y: input_gradient_change(lambda v: v, x, y, A, B),
            fullgraph=True,
            backend="aot_eager",
        )(x[0], y)
