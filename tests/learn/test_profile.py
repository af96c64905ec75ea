"""Locality profiles and separation ranks against their definitions, pair by pair."""

from __future__ import annotations

import doctest
import json
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import htfkernels as hk
from htflearn.locality import profile as profile_module
from htflearn.locality import separation as separation_module
from htflearn.locality.gradient_change import input_gradient_change
from htflearn.locality.patches import gap
from htflearn.locality.profile import LocalityProfile, evaluating, locality_profile
from htflearn.locality.resnets import ResNet
from htflearn.locality.separation import separation_rank

F64 = torch.float64


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.LazyLinear(outputs),
    ).to(F64)
    model(torch.randn(8, 2, 7, 9, dtype=F64))  # also sets the running statistics
    return model


def images(count: int = 5, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(count, 2, 7, 9, dtype=dtype, generator=torch.Generator().manual_seed(1))


def pair_by_pair(model: nn.Module, x: Tensor, y: Tensor | None, p: LocalityProfile) -> Tensor:
    """What :func:`locality_profile` is for, with one evaluation for each pair."""
    found = torch.full_like(p.matrix, math.nan)
    for a in range(len(p.patches)):
        for b in set(p.replaced) - {a}:
            change = input_gradient_change(model, x, y, p.patches[a], p.patches[b])
            found[a, b] = 1 - change.item()
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_equals_the_definition(batch_size: int) -> None:
    model, x, y = network(), images(), torch.tensor([0, 2, 1, 1, 0])
    found = locality_profile(model, x, y, patch=2, batch_size=batch_size)
    assert len(found.patches) == 3 * 4 and found.samples == 5 and found.size == (7, 9)
    expected = pair_by_pair(model.eval(), x, y, found)
    torch.testing.assert_close(found.matrix, expected, rtol=0, atol=1e-12, equal_nan=True)
    assert bool((found.counts + 5 * torch.eye(12, dtype=torch.int64) == 5).all())


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_only_logit_or_the_predicted_class(outputs: int) -> None:
    model, x = network(outputs).eval(), images()
    y = None if outputs == 1 else model(x).argmax(1)
    found = locality_profile(model, x, patch=3)
    expected = pair_by_pair(model, x, y, found)
    torch.testing.assert_close(found.matrix, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_some_patches_replaced() -> None:
    model, x = network(), images()
    whole = locality_profile(model, x, patch=2)
    some = locality_profile(model, x, patch=2, replaced=3, seed=4)
    assert some.replaced == locality_profile(model, x, patch=2, replaced=3, seed=4).replaced
    others = {locality_profile(model, x, patch=2, replaced=3, seed=s).replaced for s in range(5)}
    assert len(others) > 1 and len(some.replaced) == 3
    assert torch.equal(some.matrix[:, some.replaced].isnan().sum(0), torch.ones(3).long())
    rest = [b for b in range(12) if b not in some.replaced]
    assert bool(some.matrix[:, rest].isnan().all())
    torch.testing.assert_close(
        some.matrix[:, some.replaced], whole.matrix[:, some.replaced], equal_nan=True
    )
    assert sum(row.pairs for row in some.by_distance()) == 3 * 11


def test_number_of_gradients() -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.flatten(1).sum(1).square()

    locality_profile(counted, images(), patch=2)
    assert calls == 12 + 1


def test_zero_gradients() -> None:
    """Left: the first pixel; right: the last one, and a switch. The middle does nothing."""
    x = torch.tensor([[1.0, 0.3, 1.0], [2.0, 0.3, -1.0], [3.0, 0.3, 1.0]])[:, None, None, :]

    def model(x: Tensor) -> Tensor:
        return x[:, 0, 0, 0] * (x[:, 0, 0, 2] > 0) + x[:, 0, 0, 2]

    found = locality_profile(model, x, patch=1)
    # The switch goes on or off for the first two images, and stays on for the third.
    assert float(found.matrix[0, 2]) == pytest.approx(2 / 3) and int(found.counts[0, 2]) == 3
    # The second image's gradient is zero, whatever the middle is.
    assert float(found.matrix[0, 1]) == 0 and int(found.counts[0, 1]) == 2
    assert bool(found.matrix[1].isnan().all()) and not bool(found.counts[1].any())
    assert [tuple(row) for row in found.by_distance()][1] == pytest.approx((1, 1 / 3, 0.4714045, 2))


def test_a_sum_over_patches_couples_nothing_and_a_product_neighbours() -> None:
    def separate(x: Tensor) -> Tensor:
        return x.sin().sum((1, 2, 3))

    def neighbours(x: Tensor) -> Tensor:
        return (x[..., 1:] * x[..., :-1].square()).sum((1, 2, 3))

    x = torch.randn(20, 3, 1, 8, dtype=F64)
    assert float(locality_profile(separate, x, patch=1).matrix.nan_to_num().max()) < 1e-15
    rows = locality_profile(neighbours, x, patch=1).by_distance()
    assert rows[0].coupling > 0.1 and all(row.coupling < 1e-15 for row in rows[1:])
    assert locality_profile(neighbours, x, patch=1).half_distance() == 1
    assert locality_profile(lambda x: x.flatten(1).sum(1).square(), x, patch=1).half_distance() is (
        None
    )


def test_leaves_the_model_as_it_was() -> None:
    model = network().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    modes = [m.training for m in model.modules()]
    x = images()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            locality_profile(model, x.clone(), patch=3)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not x.requires_grad
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes


def test_dtype_and_memory_format() -> None:
    exact = locality_profile(network(), images(), patch=2).matrix
    single = network().float()
    for x in (images(), images().float(), images().float().to(memory_format=torch.channels_last)):
        found = locality_profile(single, x, patch=2).matrix
        assert found.dtype == F64
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_far_smaller_couplings_than_single_precision_rounds_to() -> None:
    def model(x: Tensor) -> Tensor:
        return x.sum((1, 2, 3)) + 1e-5 * (x[:, 0, 0, 0] * x[:, 0, 0, 3])

    x = torch.randn(40, 2, 1, 4)
    found, exact = (locality_profile(model, x.to(t), patch=1).matrix for t in (torch.float32, F64))
    assert 1e-12 < float(exact[0, 3]) < 1e-9
    torch.testing.assert_close(found[0, 3], exact[0, 3], rtol=0.05, atol=0)


def test_a_residual_network() -> None:
    torch.manual_seed(0)
    model = ResNet([1, 1], [4, 8], channels=2, classes=3)
    rows = locality_profile(model, images(8, torch.float32), patch=1, replaced=6).by_distance()
    assert rows[0].distance == 0 and rows[0].coupling > rows[-1].coupling > 0


def test_heat_map_table_and_json() -> None:
    found = locality_profile(network(), images(), patch=2, replaced=5)
    which = found.replaced[2]
    image = found.heat_map(which)
    assert image.shape == (7, 9) and math.isnan(image[6, 8])  # the margin: 6 x 8 of 7 x 9
    for index, patch in enumerate(found.patches):
        inside = torch.from_numpy(image[patch.top : patch.bottom, patch.left : patch.right])
        expected = found.matrix[index, which].expand_as(inside)
        torch.testing.assert_close(inside, expected, equal_nan=True)
    mean = found.heat_map()
    assert mean[0, 0] == pytest.approx(float(found.matrix[0].nanmean()))
    unmeasured = next(b for b in range(12) if b not in found.replaced)
    with pytest.raises(ValueError, match=r'expected "mean" or one of the replaced patches \d'):
        found.heat_map(unmeasured)
    table = found.table("couplings")
    assert table.row_count == len(found.by_distance()) and table.title == "couplings"
    saved = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert saved["matrix"][which][which] is None and saved["replaced"] == list(found.replaced)
    assert saved["by_distance"][0]["distance"] == 0


def test_distances_are_gaps() -> None:
    found = locality_profile(network(), images(), patch=2)
    pairs = [(a, b) for a in range(12) for b in range(12) if a != b]
    for row in found.by_distance():
        values = torch.stack(
            [
                found.matrix[a, b]
                for a, b in pairs
                if gap(found.patches[a], found.patches[b]) == row.distance
            ]
        )
        assert (row.pairs, row.coupling) == (len(values), pytest.approx(float(values.mean())))
        assert row.deviation == pytest.approx(float(values.std()))


def test_bad_profiles() -> None:
    model, x = network(), images()
    with pytest.raises(ValueError, match=r"two or more \[M, C, H, W\] .* got torch.int64 \[5, 2"):
        locality_profile(model, x.long())
    with pytest.raises(ValueError, match=r"got torch.float64 \[1, 2, 7, 9\]"):
        locality_profile(model, x[:1])
    with pytest.raises(ValueError, match=r"labels must be classes \[5\], got torch.int64 \[4\]"):
        locality_profile(model, x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least two squares of 5 pixels must fit"):
        locality_profile(model, x, patch=5)
    with pytest.raises(ValueError, match=r"replaced must be in 1..12, .* got 13"):
        locality_profile(model, x, patch=2, replaced=13)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        locality_profile(model, x, batch_size=0)
    with pytest.raises(ValueError, match="output does not depend on the images"):
        locality_profile(lambda x: torch.ones(len(x)), x, patch=2)
    with pytest.raises(ValueError, match="gradients are not finite"):
        locality_profile(lambda x: (x * math.inf).sum((1, 2, 3)), x, patch=2)
    with pytest.raises(ValueError, match=r"the model must give logits \[5, K\]"):
        locality_profile(nn.Identity(), x, patch=2)


def planted(rank: int) -> Callable[[Tensor], Tensor]:
    """Sums of products of functions of the left 4 and of the right 5 columns."""
    random = torch.Generator().manual_seed(2)
    left = torch.randn(2 * 7 * 4, rank, dtype=F64, generator=random) / 5
    right = torch.randn(2 * 7 * 5, rank, dtype=F64, generator=random) / 5

    def model(x: Tensor) -> Tensor:
        u, v = (x[..., :4].flatten(1) @ left).sin(), (x[..., 4:].flatten(1) @ right).cos()
        return torch.stack([(u * v).sum(1), u[:, 0] * v[:, 0]], 1)

    return model


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_separation_rank_of_planted_functions(rank: int) -> None:
    left = torch.arange(9).expand(7, 9) < 4
    found = separation_rank(planted(rank), images(12), left, batch_size=50)
    assert found.singular_values.shape == (2, 12)
    assert found.numerical_rank.tolist() == [rank, 1]
    assert float(found.effective_rank[1]) == pytest.approx(1)
    other = separation_rank(planted(rank), images(12), ~left)  # F is transposed
    torch.testing.assert_close(found.singular_values, other.singular_values)
    one = separation_rank(planted(rank), images(12), left, output=1)
    torch.testing.assert_close(one.singular_values, found.singular_values[1:])
    assert int(separation_rank(planted(rank), images(12), left, rtol=1.0).numerical_rank[0]) == 0
    json.dumps(found.to_dict(), allow_nan=False)


def test_separation_rank_is_of_the_matrix_it_says() -> None:
    model, x = network().train(), images(4)
    mask = torch.rand(7, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    found = separation_rank(model, x, mask)
    assert model.training
    model.eval()
    with torch.no_grad():
        rows = [
            torch.stack([model(torch.where(mask, a, b)[None])[0] for b in x]) for a in x
        ]  # m of [m, K]
    matrix = torch.stack(rows).permute(2, 0, 1)
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(found.effective_rank, hk.effective_rank(found.singular_values))


def test_bad_separation_ranks() -> None:
    model, x = network(), images()
    mask = torch.zeros(7, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="both regions must have pixels"):
        separation_rank(model, x, mask)
    with pytest.raises(ValueError, match="both regions must have pixels"):
        separation_rank(model, x, ~mask)
    mask[0] = True
    with pytest.raises(ValueError, match=r"mask must be bool \[7, 9\], got torch.float32 \[7, 9\]"):
        separation_rank(model, x, mask.float())
    with pytest.raises(ValueError, match=r"mask must be bool \[7, 9\], got torch.bool \[6, 9\]"):
        separation_rank(model, x, mask[1:])
    with pytest.raises(ValueError, match="two or more"):
        separation_rank(model, x[:1], mask)
    with pytest.raises(ValueError, match=r"output must be in 0..2, got 3"):
        separation_rank(model, x, mask, output=3)
    with pytest.raises(ValueError, match=r"must give \[25, K\] or \[25\] .* gave \[25, 2, 7, 9\]"):
        separation_rank(nn.Identity(), x, mask)
    with pytest.raises(ValueError, match="outputs are not finite"):
        separation_rank(lambda x: x.sum((1, 2, 3)) / 0, x, mask)


@pytest.mark.parametrize("module", [profile_module, separation_module])
def test_examples(module: ModuleType) -> None:
    known = {"torch": torch, "nn": nn}
    done = doctest.testmod(module, extraglobs=known)
    assert done.attempted > 0 and done.failed == 0
