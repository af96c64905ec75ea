"""The gradient-change regularizer in half precision: autocast, gradient scaling, float16 models."""

from __future__ import annotations

import pytest
import torch
from test_gradient_change_training import A, B, batch, conv, grads, mlp, patch_gradients
from torch import Tensor, nn

from htflearn.locality.gradient_change import (
    InputGradientChange,
    absolute_cosine,
    input_gradient_change,
)
from htflearn.locality.patches import RandomSquares


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("make", [mlp, conv], ids=["mlp", "conv"])
def test_autocast(make, passes: str, dtype: torch.dtype) -> None:
    """What half precision does to the derivatives is PyTorch's doing: the same bits without us."""
    model = make()
    x, y = batch(dtype=torch.float32)
    scale = 1024.0 if dtype == torch.float16 else 1.0

    def written_out() -> Tensor:
        return absolute_cosine(*patch_gradients(model, x, y, passes, scale)).mean()

    def penalty() -> Tensor:
        return input_gradient_change(model, x, y, A, B, passes=passes)

    values, derivatives = [], []
    for compute in (penalty, written_out):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            logits = model(x)  # its casts of the weights are those that the penalty finds
            values.append(compute())
            loss = nn.functional.cross_entropy(logits, y) * 0 + values[-1]
        loss.backward()
        derivatives.append(grads(model))
    assert values[0].dtype == torch.float32
    assert torch.equal(*values)
    for found, wanted in zip(*derivatives, strict=True):
        assert found.isfinite().all() and torch.equal(found, wanted)
    # Both gradients have gone through some four roundings; a cosine moves by at most their sum.
    torch.testing.assert_close(values[0], penalty(), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("passes", ["one", "two"])
def test_autocast_against_float32(passes: str, dtype: torch.dtype) -> None:
    """The derivatives, through layers that PyTorch sums in float32 on every CPU.

    Not so convolutions: without AVX-512 their derivatives are partly summed in bfloat16, and with
    AMX (PyTorch 2.13) a kernel of 8 x 8 on 12 channels, as in these, gives wrong numbers.
    """
    model = mlp()
    x, y = batch(dtype=torch.float32)
    expected = input_gradient_change(model, x, y, A, B, passes=passes)
    expected.backward()
    wanted = grads(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        input_gradient_change(model, x, y, A, B, passes=passes).backward()
    # A derivative of a cosine is the difference of two unit vectors, as long as the sine: some
    # eight roundings, forth and back through two layers, weigh that much more.
    sine = (1 - expected.detach() ** 2).sqrt()
    bound = 8 * torch.finfo(dtype).eps / 2 / sine
    for found, want in zip(grads(model), wanted, strict=True):
        assert (found - want).norm() <= bound * want.norm()


def small_logits() -> nn.Module:
    """Gradients of some 1e-7, of which float16 holds two bits."""
    model = mlp()
    with torch.no_grad():
        model[-1].weight.mul_(1e-6)
    return model


def test_float16_keeps_small_gradients() -> None:
    model = small_logits()
    x, y = batch(dtype=torch.float32)
    expected = input_gradient_change(model, x, y, A, B)
    with torch.autocast("cpu", dtype=torch.float16):
        scaled = input_gradient_change(model, x, y, A, B)
        asked = input_gradient_change(model, x, y, A, B, scale=1024)
        plain = input_gradient_change(model, x, y, A, B, scale=1)
    assert scaled == asked
    # float16 of small, partly subnormal numbers.
    torch.testing.assert_close(scaled, expected, rtol=0, atol=2e-2)
    assert abs(plain - expected) > 5e-2


def test_what_runs_in_float32_under_autocast_stays_there() -> None:
    """Also on the way back to the images."""
    inner = small_logits()

    class Exempt(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return inner(images)

    x, y = batch(dtype=torch.float32)
    expected = input_gradient_change(inner, x, y, A, B)
    with torch.autocast("cpu", dtype=torch.float16):
        found = input_gradient_change(Exempt(), x, y, A, B)
    # float32, the same operations.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_gradient_scaler() -> None:
    model = mlp()
    x, y = batch(dtype=torch.float32)
    regularize = InputGradientChange(RandomSquares(2, 2), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits, penalty = regularize.with_outputs(model, x, y)
            loss = nn.functional.cross_entropy(logits, y) + penalty
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**10  # no step was skipped
    assert all(bool((p != b).any()) for p, b in zip(model.parameters(), before, strict=True))


def test_a_float16_model() -> None:
    """Without autocast: the scale goes by the outputs."""
    model = small_logits()
    x, y = batch(dtype=torch.float32)
    expected = input_gradient_change(model, x, y, A, B)
    found = input_gradient_change(model.half(), x.half(), y, A, B)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-2)
