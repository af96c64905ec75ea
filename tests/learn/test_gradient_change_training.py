"""The gradient-change regularizer in a training: batch norm, accumulation, DDP, the loop."""

from __future__ import annotations

import importlib
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from htflearn.locality.gradient_change import InputGradientChange, input_gradient_change
from htflearn.locality.patches import FixedPatches, RandomSquares
from htflearn.locality.resnets import small_resnet

F64 = torch.float64
A, B = (0, 1, 3, 3), (4, 5, 8, 8)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.Softplus(), nn.Linear(12, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 7, padding=3), nn.Softplus(), nn.Flatten(), nn.Linear(256, 6), mlp_end()
    )


def mlp_end() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Linear(6, 3))


def batch(count: int = 6, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 2, 8, 8, generator=generator).to(dtype), torch.arange(count) % 3


def grads(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def close(found: object, expected: object) -> None:
    """float64 on both sides, the same operations in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def patch_gradients(
    model: nn.Module, x: Tensor, y: Tensor, passes: str = "two", scale: float = 1.0
) -> list[Tensor]:
    """Of the images and of those with a replaced patch, written out in plain PyTorch."""
    replaced = x.clone()
    for i in range(len(x)):
        replaced[i, :, B[0] : B[2], B[1] : B[3]] = x[(i + 1) % len(x), :, B[0] : B[2], B[1] : B[3]]
    both = [(x, y), (replaced, y)]
    g: list[Tensor] = []
    for images, labels in both if passes == "two" else [map(torch.cat, zip(*both, strict=True))]:
        images = images.detach().requires_grad_()
        logits = model(images)[range(len(images)), labels]
        (whole,) = torch.autograd.grad(logits.sum() * scale, images, create_graph=True)
        g += whole[:, :, A[0] : A[2], A[1] : A[3]].flatten(1).split(len(x))
    return g


# -- batch normalization --------------------------------------------------------------------------


@pytest.mark.parametrize("passes", ["auto", "two"])
def test_batch_norm_in_training(passes: str) -> None:
    model = small_resnet(2, 3).to(F64)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = batch()
    g = patch_gradients(model, x, y)
    expected = nn.functional.cosine_similarity(*g, dim=1, eps=0).abs().mean()
    expected.backward()
    wanted, after = grads(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(start)
    model.zero_grad()
    found = input_gradient_change(model, x, y, A, B, passes=passes)
    found.backward()
    close(found, expected)
    close(grads(model), wanted)
    # The running statistics move as in two passes, once each.
    close(dict(model.state_dict()), after)
    assert model.bn1.num_batches_tracked == 2


def test_one_pass_normalizes_both_together() -> None:
    model = small_resnet(2, 3).to(F64)
    x, y = batch()
    two = input_gradient_change(model, x, y, A, B)
    moved = model.bn1.num_batches_tracked.clone()
    one = input_gradient_change(model, x, y, A, B, passes="one")
    assert (moved, model.bn1.num_batches_tracked) == (2, 3)
    assert abs(one - two) > 1e-4
    model.eval()
    values = [input_gradient_change(model, x, y, A, B, passes=p) for p in ("auto", "one", "two")]
    close(values[1:], values[:1] * 2)


def test_auto_sees_batch_statistics() -> None:
    """Also in eval() where a layer keeps no running ones, and through torch.compile."""
    x, y = batch()
    norm = nn.BatchNorm2d(2, track_running_stats=False).to(F64)
    model = nn.Sequential(norm, mlp().to(F64)).eval()
    two, auto, one = (
        input_gradient_change(model, x, y, A, B, passes=p) for p in ("two", "auto", "one")
    )
    assert two == auto != one
    compiled = torch.compile(model, backend="eager")
    assert input_gradient_change(compiled, x, y, A, B) == two


def test_dropout_draws_twice() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 1))
    x, _ = batch(dtype=torch.float32)
    for passes in ("one", "two"):
        assert input_gradient_change(model, x, None, A, B, passes=passes) < 0.9
        # A linear model: nothing interacts.
        alone = input_gradient_change(model.eval(), x, None, A, B, passes=passes)
        torch.testing.assert_close(alone, torch.ones(()), rtol=0, atol=1e-6)
        model.train()


# -- training loops -------------------------------------------------------------------------------


def test_gradients_only_by_backward() -> None:
    model = mlp().to(F64)
    x, y = batch()
    first = input_gradient_change(model, x, y, A, B)
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None and not x.requires_grad
    # Accumulated over two micro-batches: the sum.
    second = input_gradient_change(model, x.flip(0), y, A, B)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(
        first + second, parameters, retain_graph=True, materialize_grads=True
    )
    first.backward()
    second.backward()
    close(grads(model), list(wanted))


def test_without_gradients() -> None:
    model = mlp().to(F64)
    x, y = batch()
    expected = input_gradient_change(model, x, y, A, B)
    with torch.no_grad():
        found = input_gradient_change(model, x, y, A, B)
        logits, penalty = InputGradientChange(FixedPatches([A, B])).with_outputs(model, x, y)
    assert found == penalty == expected
    assert not (found.requires_grad or penalty.requires_grad or logits.requires_grad)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert input_gradient_change(model, x, y, A, B) == expected


@pytest.mark.parametrize("passes", ["one", "two"])
def test_channels_last(passes: str) -> None:
    x, y = batch()
    seen: list[Tensor] = []

    class Seeing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images

    model = nn.Sequential(Seeing(), conv().to(F64))
    expected = input_gradient_change(model, x, y, A, B, passes=passes)
    expected.backward()
    wanted = grads(model)
    model.zero_grad()
    model.to(memory_format=torch.channels_last)
    assert all(v.is_contiguous() for v in seen)
    seen.clear()
    x = x.to(memory_format=torch.channels_last)
    found = input_gradient_change(model, x, y, A, B, passes=passes)
    found.backward()
    assert seen and all(v.is_contiguous(memory_format=torch.channels_last) for v in seen)
    close(found, expected)
    close(grads(model), wanted)


def test_the_images_stay_as_they_are() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), mlp()).to(F64)
    x, y = batch()
    before = x.clone()
    input_gradient_change(model, x, y, A, B).backward()
    assert torch.equal(x, before)
    leaf = x.clone().requires_grad_()
    input_gradient_change(model, leaf, y, A, B).backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("passes", ["one", "two"])
def test_with_outputs(passes: str) -> None:
    model = small_resnet(2, 3).to(F64).eval()
    x, y = batch()
    regularize = InputGradientChange(RandomSquares(2, 1), 2.5, passes=passes)
    state = regularize.state_dict()
    for _ in range(3):
        logits, penalty = regularize.with_outputs(model, x, y)
        regularize.load_state_dict(state)
        close(penalty, regularize(model, x, y))
        state = regularize.state_dict()
        close(logits, model(x))
        assert logits.requires_grad


def test_with_outputs_of_two_passes_are_those_of_a_plain_one() -> None:
    """With batch norm in training too."""
    model = small_resnet(2, 3).to(F64)
    x, y = batch()
    logits, _ = InputGradientChange(RandomSquares(2), 1.0).with_outputs(model, x, y)
    close(logits, model(x))


def test_coefficient() -> None:
    model = mlp().to(F64)
    x, y = batch()
    plain = input_gradient_change(model, x, y, A, B)
    close(InputGradientChange(FixedPatches([A, B]), 3.0)(model, x, y), 3 * plain)

    def never(images: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    sampler = RandomSquares(2)
    off = InputGradientChange(sampler, 0.0, every=2)
    before = sampler.state_dict()["generator"]
    assert off(never, x, y) == 0
    logits, penalty = off.with_outputs(model, x, y)
    assert penalty == 0
    close(logits, model(x))
    assert torch.equal(before, sampler.state_dict()["generator"])
    assert off.state_dict()["calls"] == 0


def test_every() -> None:
    """Lazily: at calls 0, 3, 6, .. three times as much."""
    model = mlp().to(F64)
    x, y = batch()
    full = InputGradientChange(RandomSquares(2), 0.5)
    lazy = InputGradientChange(RandomSquares(2), 0.5, every=3)
    calls = 0

    def counted(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(images)

    for step in range(7):
        if step == 4:  # goes on where it was
            resumed = InputGradientChange(RandomSquares(2, seed=5), 0.5, every=3)
            resumed.load_state_dict(lazy.state_dict())
            lazy = resumed
        before = calls
        if step % 2:
            logits, penalty = lazy.with_outputs(counted, x, y)
            close(logits, model(x))
            assert calls == before + 1
        else:
            penalty = lazy(counted, x, y)
            assert calls == before + (step % 3 == 0)
        if step % 3 == 0:
            close(penalty, 3 * full(model, x, y))
        else:
            assert penalty == 0 and not penalty.requires_grad
    assert repr(lazy).endswith("0.5, every=3)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
def test_dtype_of_a_penalty_of_zero(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 2, 8, 8, dtype=dtype)
    found = InputGradientChange(RandomSquares(2), 0.0)(mlp(), x, None)
    assert found.dtype == (F64 if dtype == F64 else torch.float32)


def test_a_training_raises_dependence() -> None:
    """What it is for: the penalty falls, and the loss with it."""
    torch.manual_seed(0)
    model = mlp()
    x, y = batch(24, torch.float32)
    regularize = InputGradientChange(FixedPatches([A, B]), 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    penalties, losses = [], []
    for _ in range(60):
        optimizer.zero_grad()
        logits, penalty = regularize.with_outputs(model, x, y)
        loss = nn.functional.cross_entropy(logits, y)
        (loss + penalty).backward()
        optimizer.step()
        penalties.append(penalty.item())
        losses.append(loss.item())
    assert penalties[-1] < 0.7 * penalties[0]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("library", ["torchvision.models", "timm.models"])
def test_models_of_other_libraries(library: str) -> None:
    try:
        models = importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch: the latter
        pytest.skip(f"{library}: {error}")
    model = models.resnet18(num_classes=3)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4) % 3
    value = input_gradient_change(model, x, y, (0, 0, 8, 8), (40, 40, 64, 64))
    assert 0 < value < 1
    value.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# -- several processes ----------------------------------------------------------------------------


def parallel_model(kind: str) -> nn.Module:
    torch.manual_seed(2)
    model = small_resnet(2, 3) if kind == "batch norm" else mlp()
    return model.to(F64)


def step(model, x: Tensor, y: Tensor, with_outputs: bool) -> None:
    regularize = InputGradientChange(FixedPatches([A, B]), 2.0)
    if with_outputs:
        logits, penalty = regularize.with_outputs(model, x, y)
    else:
        logits, penalty = model(x), regularize(model, x, y)
    (nn.functional.cross_entropy(logits, y) + penalty).backward()


RUNS = [
    (kind, with_outputs, wrapper)
    for kind in ("plain", "batch norm")
    for with_outputs in (True, False)
    for wrapper in ("ddp", "unused", "static", "compiled in ddp", "ddp in compiled")
    # Compiled models as far as the penalty shares their pass, which then runs as written.
    if "compiled" not in wrapper or (kind == "plain" and with_outputs)
]


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    found = []
    x, y = batch(12)
    mine = slice(6 * rank, 6 * rank + 6)
    for kind, with_outputs, wrapper in RUNS:
        model = parallel_model(kind)
        inside = torch.compile(model, backend="eager") if wrapper == "compiled in ddp" else model
        ddp = nn.parallel.DistributedDataParallel(
            inside, find_unused_parameters=wrapper == "unused", static_graph=wrapper == "static"
        )
        outside = torch.compile(ddp, backend="eager") if wrapper == "ddp in compiled" else ddp
        step(outside, x[mine], y[mine], with_outputs)
        found.append(grads(model))
    sync = nn.Sequential(nn.SyncBatchNorm(2), mlp()).to(F64)
    with pytest.raises(ValueError, match="SyncBatchNorm in training has no second derivatives"):
        input_gradient_change(sync, x, y, A, B)
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed(tmp_path: Path) -> None:
    """Both processes have the average of the gradients of their halves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    x, y = batch(12)
    for number, (kind, with_outputs, _) in enumerate(RUNS):
        halves = []
        for mine in (slice(0, 6), slice(6, 12)):
            model = parallel_model(kind)
            step(model, x[mine], y[mine], with_outputs)
            halves.append(grads(model))
        expected = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
        for rank in (0, 1):
            close(found[rank][number], expected)
