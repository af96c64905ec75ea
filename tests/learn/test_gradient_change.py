"""The gradient-change regularizer: its values and derivatives, numbers at the edge, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from htflearn.locality.gradient_change import (
    InputGradientChange,
    absolute_cosine,
    input_gradient_change,
    target_outputs,
)
from htflearn.locality.patches import FixedPatches, RandomSquares
from htflearn.locality.resnets import small_resnet

F64 = torch.float64
A, B = (0, 1, 3, 3), (4, 5, 8, 8)
DATA = Path(__file__).parents[1] / "data"
# Both sides in float64; derivatives of small cosines lose a few digits to cancellation.
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.Softplus(), nn.Linear(12, outputs))


def wide_conv(outputs: int = 3) -> nn.Module:
    """Every output sees the whole image, through two nonlinearities."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 7, padding=3),
        nn.Softplus(),
        nn.Conv2d(3, 4, 7, padding=3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, outputs),
    )


class InPlace(nn.Module):
    """ReLUs in place, the first of them on the images themselves."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(2, 6, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 5, padding=2),
            nn.SiLU(inplace=True),
        )
        self.last = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x).square().mean((2, 3)))


class Attention(nn.Module):
    """Rows of the image attend to one another."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(16, 24), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 1, 3).flatten(2)
        q, k, v = self.qkv(rows)[:, None].chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(attended.tanh().mean((1, 2)))


def group_norm(outputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 7, padding=3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), mlp_end(outputs)
    )


def mlp_end(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, outputs))


def resnet(outputs: int = 3) -> nn.Module:
    model = small_resnet(2, outputs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "conv": wide_conv,
    "resnet": resnet,
    "in place": InPlace,
    "attention": Attention,
    "group norm": group_norm,
}


def make(name: str, outputs: int = 3, batch: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = MODELS[name](outputs).to(F64)
    return model, torch.randn(batch, 2, 8, 8, dtype=F64), torch.arange(batch) * 2 % 3


def reference(model: nn.Module, x: Tensor, y: Tensor, a=A, b=B) -> Tensor:
    """Sample by sample, in PyTorch's words."""

    def gradient(image: Tensor, label: int) -> Tensor:
        def logit(v: Tensor) -> Tensor:
            out = model(v.clone()[None]).reshape(-1)
            return out[label] if len(out) > 1 else out[0]

        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            whole = torch.func.jacrev(logit)(image)
        return torch.cat([row[a[1] : a[3]] for channel in whole for row in channel[a[0] : a[2]]])

    inside = torch.zeros(x.shape[2:], dtype=torch.bool)
    inside[b[0] : b[2], b[1] : b[3]] = True
    total = torch.zeros((), dtype=F64)
    for i in range(len(x)):
        other = torch.where(inside, x[(i + 1) % len(x)], x[i])
        g = [gradient(image, int(y[i])) for image in (x[i], other)]
        total = total + nn.functional.cosine_similarity(*g, dim=0, eps=0).abs()
    return total / len(x)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_published_code(passes: str) -> None:
    """A degenerate case: the patches do not interact. What follows has some that do."""
    with np.load(DATA / "igc_conv_multiclass.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != "meta"}
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Softplus(),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(180, 4),
    ).double()
    model.load_state_dict(
        {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    )
    patches = [arrays[f"patch_{which}_tlbr"].tolist() for which in ("first", "second")]
    value = input_gradient_change(model, arrays["x"], arrays["y"], *patches, passes=passes)
    # Absolute: the gradients are zero to rounding.
    torch.testing.assert_close(value, arrays["reg"], rtol=0, atol=1e-10)
    value.backward()
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(grad, arrays[f"grad/{name}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("outputs", [3, 1])
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradients(name: str, outputs: int, passes: str) -> None:
    model, x, y = make(name, outputs)
    wanted = list(model.parameters())
    expected = reference(model, x, y)
    assert 0.01 < expected < 0.99999  # the patches interact
    found = input_gradient_change(model, x, y if outputs > 1 else None, A, B, passes=passes)
    torch.testing.assert_close(found, expected, **EXACT)
    gradients = torch.autograd.grad(found, wanted, materialize_grads=True)
    for got, want in zip(
        gradients, torch.autograd.grad(expected, wanted, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(got, want, **EXACT)
    assert max(float(g.abs().max()) for g in gradients) > 1e-4


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_finite_differences(name: str, passes: str) -> None:
    model, x, y = make(name, batch=2)
    names = [n for n, _ in model.named_parameters()]

    def value(*parameters: Tensor) -> Tensor:
        def call(images: Tensor) -> Tensor:
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(model, given, (images,))

        return input_gradient_change(call, x, y, A, B, passes=passes)

    start = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    # Differences of a step of 1e-6: their error is about 1e-10.
    assert torch.autograd.gradcheck(value, start, rtol=1e-6, atol=1e-8, fast_mode=True)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_derivatives_with_respect_to_images(passes: str) -> None:
    model, x, y = make("conv")
    x.requires_grad_()
    (found,) = torch.autograd.grad(input_gradient_change(model, x, y, A, B, passes=passes), x)
    (expected,) = torch.autograd.grad(reference(model, x, y), x)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_single_logit_in_either_shape() -> None:
    model, x, _ = make("mlp", 1)
    flat = nn.Sequential(model, nn.Flatten(0))
    assert model(x).shape == (4, 1)
    assert flat(x).shape == (4,)
    values = [input_gradient_change(m, x, None, A, B) for m in (model, flat)]
    assert torch.equal(*values)


def test_one_means_no_interaction() -> None:
    """Whatever one of the patches does to the output, as long as the others' does not matter."""
    rows = nn.Sequential(nn.Conv2d(2, 4, (1, 8)), nn.Softplus(), nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.randn(4, 2, 8, 8), torch.arange(4) % 3
    value = input_gradient_change(rows, x, y, (0, 0, 2, 2), (4, 0, 8, 8))
    # float32: a sum of 8 products, normalized.
    torch.testing.assert_close(value, torch.ones(()), rtol=0, atol=1e-6)
    assert input_gradient_change(rows, x, y, (0, 0, 2, 2), (0, 4, 2, 8)) < 0.999
    # In a batch of one, nothing is replaced.
    alone = input_gradient_change(rows, x[:1], y[:1], (0, 0, 2, 2), (0, 4, 2, 8))
    torch.testing.assert_close(alone, torch.ones(()), rtol=0, atol=1e-6)


# -- numbers at the edge --------------------------------------------------------------------------


def test_dead_units_count_as_zero() -> None:
    """Samples at which no ReLU is active have a gradient of zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.ReLU(), nn.Linear(9, 1)).to(F64)
    with torch.no_grad():
        model[1].weight.abs_()
    x = torch.randn(6, 2, 8, 8, dtype=F64)
    x[3] = -100
    value = input_gradient_change(model, x, None, A, B)
    kept = [i for i in range(6) if i != 3]
    expected = torch.stack([_cosine(model, x, i) for i in kept]).sum() / 6
    assert 0 < expected < 5 / 6
    torch.testing.assert_close(value, expected, **EXACT)
    value.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def _cosine(model: nn.Module, x: Tensor, i: int) -> Tensor:
    """Of one sample, 0 where a gradient is."""
    pair = x[i : i + 1].clone(), x[i : i + 1].clone()
    pair[1][:, :, B[0] : B[2], B[1] : B[3]] = x[(i + 1) % len(x)][:, B[0] : B[2], B[1] : B[3]]
    g = []
    for image in pair:
        image.requires_grad_()
        g.append(torch.autograd.grad(model(image).sum(), image)[0][:, :, A[0] : A[2], A[1] : A[3]])
    flat = [v.flatten() for v in g]
    if any(not bool(v.any()) for v in flat):
        return torch.zeros((), dtype=F64)
    return nn.functional.cosine_similarity(*flat, dim=0, eps=0).abs()


def test_all_dead() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.ReLU(), nn.Linear(9, 3))
    nn.init.constant_(model[1].bias, -1e4)
    value = input_gradient_change(model, torch.randn(4, 2, 8, 8), torch.arange(4) % 3, A, B)
    assert value == 0
    value.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e-20, 1.0, 1e20, 1e37])
def test_cosine_of_tiny_and_huge_rows(size: float) -> None:
    """As in float64, value and derivatives, where float32 holds these."""
    a, b = (torch.randn(5, 7) * size for _ in range(2))
    rows = [a.double().requires_grad_(), b.double().requires_grad_()]
    expected = nn.functional.cosine_similarity(*rows, dim=1, eps=0).abs()
    wanted = torch.autograd.grad(expected.sum(), rows)
    a.requires_grad_(), b.requires_grad_()
    found = absolute_cosine(a, b)
    # A few roundings of float32 in sums of 7.
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-7)
    for got, want in zip(torch.autograd.grad(found.sum(), (a, b)), wanted, strict=True):
        assert got.isfinite().all()
        # Relative to 1 / |row|: near a cosine of 1 the derivative is a difference.
        torch.testing.assert_close(got.double() * size, want * size, rtol=2e-6, atol=2e-6)


def test_cosine_across_sizes_and_signs() -> None:
    a, b = torch.randn(6, 9), torch.randn(6, 9)
    expected = nn.functional.cosine_similarity(a.double(), b.double()).abs()
    for scaled in (absolute_cosine(a * 1e30, b * 1e-30), absolute_cosine(-a, 3 * b)):
        torch.testing.assert_close(scaled.double(), expected, rtol=2e-6, atol=1e-7)
    mixed = torch.cat([a, torch.full((6, 1), 1e-30)], 1), torch.cat([b, torch.ones(6, 1)], 1)
    assert absolute_cosine(*mixed).isfinite().all()


@pytest.mark.parametrize("zero", [0.0, 1e-39, 1e-45])
def test_cosine_of_rows_that_are_zero(zero: float) -> None:
    a, b = torch.full((3, 4), zero), torch.randn(3, 4)
    a[1] = torch.arange(4.0)
    a.requires_grad_(), b.requires_grad_()
    found = absolute_cosine(a, b)
    assert found[0] == found[2] == 0 < found[1]
    for gradient in torch.autograd.grad(found.sum(), (a, b)):
        assert gradient.isfinite().all()
        assert not gradient[::2].any()
        assert gradient[1].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cosine_does_not_hide_overflow(bad: float) -> None:
    a = torch.randn(3, 4)
    a[1, 2] = bad
    found = absolute_cosine(a, torch.randn(3, 4))
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosine_of_half_precision(dtype: torch.dtype) -> None:
    """Their squares would vanish in float16: computed in float32, from rounded numbers."""
    a, b = (torch.randn(3, 5).mul(1e-4).to(dtype) for _ in range(2))
    found = absolute_cosine(a, b)
    assert found.dtype == torch.float32
    expected = nn.functional.cosine_similarity(a.double(), b.double(), eps=0).abs()
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-7)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (((0, 0, 9, 2), B), r"patch_a .* = \(0, 0, 9, 2\) reaches outside the image of 8 x 8"),
        ((A, (4, -1, 8, 8)), r"patch_b .* reaches outside"),
        (
            ((2, 2, 2, 4), B),
            r"patch_a must be .* top < bottom and left < right, got \(2, 2, 2, 4\)",
        ),
        ((A, (4, 5, 8)), "patch_b must be"),
        ((A, (4, 5, 7.5, 8)), "patch_b must be whole numbers"),
        (((0, 0, 5, 6), B), r"\(0, 0, 5, 6\) and \(4, 5, 8, 8\) .* overlap"),
    ],
)
def test_bad_patches(patches: tuple, message: str) -> None:
    model, x, y = make("mlp")
    with pytest.raises(ValueError, match=message):
        input_gradient_change(model, x, y, *patches)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 8, 8, dtype=F64),
        torch.zeros(4, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 2, 8, 8, dtype=F64),
    ],
)
def test_bad_images(x: Tensor) -> None:
    model, _, y = make("mlp")
    with pytest.raises(ValueError, match=r"x must be images \[B, C, H, W\] of real numbers, got"):
        input_gradient_change(model, x, y, A, B)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, r"with 3 logits, y must be classes \[4\], got None"),
        (torch.zeros(3).long(), r"y must be classes \[4\], got torch.int64 \[3\]"),
        (torch.zeros(4, 1).long(), r"got torch.int64 \[4, 1\]"),
        (torch.tensor(0), r"got torch.int64 \[\]"),
        (torch.zeros(4), r"got torch.float32 \[4\]"),
        (torch.zeros(4).bool(), r"got torch.bool \[4\]"),
        (torch.tensor([0, 1, 2, 3]), r"with 3 logits, classes are 0 .. 2, y has 3"),
        (torch.tensor([0, -1, 2, 1]), r"classes are 0 .. 2, y has -1"),
    ],
)
def test_bad_classes(y: Tensor | None, message: str) -> None:
    model, x, _ = make("mlp")
    with pytest.raises(ValueError, match=message):
        input_gradient_change(model, x, y, A, B, passes="two")
    # Of x and x' in one batch there are twice as many.
    with pytest.raises(ValueError, match=r"with 3 logits, (y must be|classes are)"):
        input_gradient_change(model, x, y, A, B, passes="one")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_classes_of_any_integers(dtype: torch.dtype) -> None:
    model, x, y = make("mlp")
    values = [input_gradient_change(model, x, v, A, B) for v in (y, y.to(dtype))]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("output", "came"),
    [
        (lambda x: {"logits": x}, "a dict"),
        (lambda x: (x, x), "a tuple"),
        (lambda x: x, r"a tensor \[8, 2, 8, 8\]"),
        (lambda x: x.sum(), r"a tensor \[\]"),
        (lambda x: x.flatten(1)[:3], r"a tensor \[3, 128\]"),
    ],
)
def test_bad_outputs(output: Callable, came: str) -> None:
    _, x, y = make("mlp")
    with pytest.raises(ValueError, match=rf"the model must give logits \[8, K\] .* gave {came}"):
        input_gradient_change(output, x, y, A, B)


def test_outputs_that_do_not_depend_on_x() -> None:
    _, x, y = make("mlp")
    constant = torch.zeros(8, 3, dtype=F64)
    for model in (lambda x: constant, lambda x: constant.clone().requires_grad_()):
        with pytest.raises(ValueError, match="the model's output does not depend on x"):
            input_gradient_change(model, x, y, A, B)


def test_inference_mode_is_refused() -> None:
    model, x, y = make("mlp")
    with torch.inference_mode(), pytest.raises(ValueError, match="needs derivatives"):
        input_gradient_change(model, x, y, A, B)


def test_bad_options() -> None:
    model, x, y = make("mlp")
    sampler = RandomSquares(2)
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"finite and not negative, got {bad}"):
            InputGradientChange(sampler, bad)
        with pytest.raises(ValueError, match=f"scale must be positive and finite, got {bad}"):
            InputGradientChange(sampler, scale=bad)
    for bad in (0, -2, 1.5):
        for name in ("every", "accumulation"):
            with pytest.raises(ValueError, match=f"{name} must be a whole number, .* got {bad}"):
                InputGradientChange(sampler, **{name: bad})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='passes must be "auto", "one" or "two", got \'both\''):
        InputGradientChange(sampler, passes="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="passes must be"):
        input_gradient_change(model, x, y, A, B, passes="three")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be positive"):
        input_gradient_change(model, x, y, A, B, scale=0)


def test_target_outputs() -> None:
    logits = torch.randn(4, 3)
    y = torch.tensor([2, 0, 1, 1])
    assert torch.equal(target_outputs(logits, y, 4), logits[torch.arange(4), y])
    assert target_outputs(logits[:, :1], None, 4).shape == (4,)


def test_fixed_patches_outside_the_image() -> None:
    model, x, y = make("mlp")
    with pytest.raises(ValueError, match="outside the image"):
        InputGradientChange(FixedPatches([(0, 0, 2, 2), (9, 9, 10, 10)]))(model, x, y)
