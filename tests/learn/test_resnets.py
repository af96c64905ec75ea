"""Residual networks: sizes, shapes, the same networks as in other libraries."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch
from torch import nn

from htflearn.locality.resnets import NETWORKS, ResNet, resnet18, resnet34, small_resnet


@pytest.mark.parametrize(
    ("make", "count"), [(resnet18, 11_689_512), (resnet34, 21_797_672)], ids=["18", "34"]
)
def test_numbers_of_parameters(make, count: int) -> None:
    with torch.device("meta"):
        model = make(3, 1000)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("channels", "classes"), [(1, 1), (3, 2), (3, 10)])
@pytest.mark.parametrize("name", NETWORKS)
def test_shapes(name: str, classes: int, channels: int) -> None:
    with torch.device("meta"):
        model = NETWORKS[name](channels, classes)
        for height, width in ((32, 64), (33, 47)):
            out = model(torch.empty(4, channels, height, width))
            assert out.shape == ((4,) if classes == 1 else (4, classes))


def test_strides() -> None:
    """The large stem takes a quarter of the sides, every stage but the first half of the rest."""
    with torch.device("meta"):
        large, small = resnet18(), small_resnet(3)
        images = torch.empty(1, 3, 224, 224)
        assert large.pool(large.conv1(images)).shape == (1, 64, 56, 56)
        assert large.stages(large.pool(large.conv1(images))).shape == (1, 512, 7, 7)
        assert small.stages(small.conv1(images)).shape == (1, 64, 7, 7)
        assert small_resnet(3, stages=4).stages(small.conv1(images)).shape == (1, 64, 14, 14)


def test_a_small_one_learns() -> None:
    model = small_resnet(1, 2)
    x = torch.randn(16, 1, 16, 16)
    y = torch.arange(16) % 2
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_a_block_adds_its_input() -> None:
    """With convolutions of zero a stage of equal widths is a ReLU."""
    model = ResNet([2], [4], channels=1).eval()
    for name, parameter in model.stages.named_parameters():
        if "conv" in name:
            nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(model.stages(x), x.relu())


def test_channels_last() -> None:
    model = small_resnet(3, 5).to(torch.float64).eval()
    x = torch.randn(2, 3, 20, 24, dtype=torch.float64)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    # float64, sums in another order.
    torch.testing.assert_close(model(last), expected, rtol=1e-10, atol=1e-12)
    assert model.stages(model.conv1(last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("library", ["torchvision.models", "timm.models"])
@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_as_in_other_libraries(name: str, library: str) -> None:
    """Tensors of the same shapes, in the same order, that compute the same."""
    try:
        models = importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch: the latter
        pytest.skip(f"{library}: {error}")
    theirs = getattr(models, name)().eval()
    ours = NETWORKS[name](3, 1000).eval()
    state, mine = theirs.state_dict(), ours.state_dict()
    assert Counter(v.shape for v in state.values()) == Counter(v.shape for v in mine.values())
    ours.load_state_dict(dict(zip(mine, state.values(), strict=True)))
    x = torch.randn(2, 3, 64, 64)
    # float32: the same operations.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], [8]), r"as many blocks as widths, .* got blocks \[1, 1\], widths \[8\]"),
        (([], []), "as many blocks as widths"),
        (([1, 0], [8, 8]), "all sizes positive"),
        (([1], [8], 0), "0 channels"),
        (([1], [8], 3, -1), "-1 classes"),
        (([1], [8], 3, 1, "huge"), 'stem must be "large" or "small", got \'huge\''),
    ],
)
def test_bad_sizes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(*arguments)


@pytest.mark.parametrize("stages", [1, 4, 5])
def test_how_far_a_small_one_sees(stages: int) -> None:
    """Pixels of a row that change an output in the middle."""
    model = small_resnet(stages=stages).double().eval()
    for block in model.modules():
        if isinstance(block, nn.Conv2d):
            nn.init.ones_(block.weight)
    x = torch.zeros(1, 1, 1, 448, dtype=torch.float64, requires_grad=True)
    y = model.stages(torch.relu(model.bn1(model.conv1(x + 1))))
    (grad,) = torch.autograd.grad(y[0, 0, 0, y.shape[3] // 2], x)
    assert int((grad != 0).sum()) == {1: 11, 4: 95, 5: 191}[stages]


def test_stages_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"stages must be in 1\.\.5, got 6"):
        small_resnet(stages=6)
