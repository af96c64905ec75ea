"""Powers of two: exact, and what they leave is near 1."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.spectra.balance import balance, scaled
from htfkernels.tree import ModeTree

F64 = torch.float64


def by_node(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(layout.shape(n), generator=generator, dtype=F64) for n in layout.tree.nodes]


def apply(tree, weights):
    powers, total = balance(tree, weights)
    return [scaled(w, p) for w, p in zip(weights, powers, strict=True)], total


@pytest.mark.parametrize("exponent", [-1060, -1022, -3, 0, 1, 1022, 1023])
def test_scaled(exponent):
    """Exact wherever the result is a number."""
    x = torch.tensor([1.25, -1.0, 0.0], dtype=F64)
    expected = torch.tensor([1.25 * 2.0**exponent, -(2.0**exponent), 0.0], dtype=F64)
    assert torch.equal(scaled(x, torch.tensor(exponent)), expected)
    assert torch.equal(scaled(expected, torch.tensor(-exponent)), x)
    assert torch.equal(scaled(x[:2], torch.tensor(5000)), x[:2] * torch.inf)
    assert torch.equal(scaled(x[:2], torch.tensor(-5000)), x[:2] * 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_same_tensor(seed):
    """But for a power of two, and near 1."""
    tree = testing.random_tree(5, seed)
    layout = hk.Layout.make(tree, 3, 4, out_features=2)
    weights = by_node(layout, seed)
    expected = hk.full_tensor(tree, dict(zip(tree.nodes, weights, strict=True)))
    small = [w * 2.0**-200 for w in weights]
    near, total = apply(tree, small)
    for w, v in zip(weights, near, strict=True):
        assert torch.equal(torch.frexp(w).mantissa, torch.frexp(v).mantissa)
    tensor = hk.full_tensor(tree, dict(zip(tree.nodes, near, strict=True)))
    assert 0.5 <= tensor.norm() < 1
    power = int(total) + 200 * len(weights)
    testing.assert_matches(tensor * 2.0**power, expected, F64, "backward")
    again, unit = apply(tree, near)
    assert int(unit) == 0
    assert all(torch.equal(a, b) for a, b in zip(again, near, strict=True))


def test_terms_that_cancel():
    """To 2^-40 of themselves: Gram matrices lose that, and sometimes its sign, and what meets it
    must be near 1 nevertheless."""
    tree = ModeTree.from_nested(((0,), *range(1, 40)))
    one, difference = torch.ones(1, 1, dtype=F64), torch.tensor([[1.0], [-1.0]], dtype=F64)
    negative = 0
    for seed in range(20):
        torch.manual_seed(seed)
        first = torch.randn(3, 1, dtype=F64) * torch.tensor([1, 1 + 2**-40], dtype=F64)
        near, _ = apply(tree, [first, *([one.expand(64, 1)] * 39), difference, one])
        negative += bool(near[-2].T @ (near[0].T @ near[0] @ near[-2]) < 0)
        assert 0.5 < torch.stack(near[1:40]).norm(dim=1).prod() < 2
    assert negative > 0
