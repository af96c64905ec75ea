"""Rank measures and norms of singular values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import htfkernels as hk
from htfkernels import testing

F64 = torch.float64


def quasi_norm(s):
    return hk.schatten_norm(s, 0.5)


MEASURES = [
    hk.effective_rank,
    hk.renyi2_rank,
    hk.stable_rank,
    hk.entanglement_entropy,
    hk.nuclear_norm,
    lambda s: hk.schatten_norm(s, 2),
    quasi_norm,
    lambda s: hk.schatten_norm(s, 7),
    lambda s: hk.schatten_norm(s, math.inf),
]
RANKS = MEASURES[:3]


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients(measure):
    s = torch.tensor([[3.0, 2.0, 1.0], [1e-3, 5.0, 1e-2]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(measure, s)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_gradients_are_finite(measure, dtype):
    """Where singular values vanish, coincide, or lie at the ends of the range."""
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 8
    rows = [[0, 0, 0], [1, 1, 1], [2, 0, 0], [tiny, 0, tiny], [huge, huge, 1], [1, tiny, 0]]
    if measure is quasi_norm:  # whose derivative grows without bound towards 0
        rows = rows[:4]
    s = torch.tensor(rows, dtype=dtype, requires_grad=True)
    value = measure(s)
    assert bool(value.isfinite().all())
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("measure", RANKS)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.sampled_from([1e-290, 1e-8, 1e290]))
def test_ranks_are_ranks(measure, values, scale):
    """Between 1 and the number of positive singular values, the same at every scale."""
    s = torch.tensor(values, dtype=F64)
    s = torch.where(s > 1e-9, s, torch.zeros_like(s))  # far from underflow at every scale
    rank = measure(s)
    count = int((s > 0).sum())
    slack = 1 + 10 * torch.finfo(F64).eps
    assert min(count, 1) / slack <= rank <= count * slack
    testing.assert_matches(measure(s * scale), rank, F64, "backward")
    testing.assert_matches(measure(s.flip(0)), rank, F64, "backward")


def test_flat_spectra_have_all_ranks_alike():
    s = torch.full((7,), 0.3, dtype=F64)
    for measure in RANKS:
        testing.assert_matches(measure(s), torch.tensor(7, dtype=F64), F64, "backward")
    entropy = torch.tensor(math.log(7), dtype=F64)
    testing.assert_matches(hk.entanglement_entropy(s), entropy, F64, "backward")


def test_values():
    s = torch.tensor([[4.0, 2.0, 2.0], [1.0, 0, 0], [0, 0, 0]], dtype=F64)

    def check(value, expected):
        testing.assert_matches(value, torch.tensor(expected, dtype=F64), F64, "backward")

    check(hk.renyi2_rank(s), [24**2 / (256 + 16 + 16), 1, 0])
    check(hk.stable_rank(s), [24 / 16, 1, 0])
    p, q = 16 / 24, 4 / 24
    check(hk.entanglement_entropy(s), [-p * math.log(p) - 2 * q * math.log(q), 0, 0])
    check(hk.nuclear_norm(s), [8, 1, 0])
    check(hk.schatten_norm(s, 1), [8, 1, 0])
    check(hk.schatten_norm(s, 2), [24**0.5, 1, 0])
    check(hk.schatten_norm(s, 0.5), [(2 + 2 * 2**0.5) ** 2, 1, 0])
    check(hk.schatten_norm(s, math.inf), [4, 1, 0])


def test_no_singular_values():
    for measure in [*MEASURES, hk.numerical_rank]:
        assert measure(torch.empty(2, 0)).tolist() == [0, 0]


def test_integers_that_no_float_holds_are_infinite():
    values, huge = torch.tensor([3.0, 4.0]), 10**400
    assert hk.schatten_norm(values, huge) == 4
    assert hk.numerical_rank(values, tol=huge) == hk.numerical_rank(values, rtol=huge) == 0


def test_bad_arguments():
    s = torch.ones(3)
    with pytest.raises(ValueError, match="p must be a positive number, got 0"):
        hk.schatten_norm(s, 0)
    with pytest.raises(ValueError, match="tol or rtol, got both"):
        hk.numerical_rank(s, tol=1.0, rtol=1.0)
    with pytest.raises(ValueError, match="must be a number of at least 0, got nan"):
        hk.numerical_rank(s, rtol=math.nan)


def test_effective_rank():
    ones = torch.ones(7, dtype=F64)
    testing.assert_matches(hk.effective_rank(ones), torch.tensor(7, dtype=F64), F64, "backward")
    testing.assert_matches(
        hk.effective_rank(ones * 1e-200), torch.tensor(7, dtype=F64), F64, "backward"
    )
    one = torch.tensor([3.0, 0, 0], dtype=F64)
    testing.assert_matches(hk.effective_rank(one), torch.tensor(1, dtype=F64), F64, "backward")
    p = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    expected = torch.tensor(2**1.5, dtype=F64)
    testing.assert_matches(hk.effective_rank(p), expected, F64, "backward")
    testing.assert_matches(hk.effective_rank(12 * p), expected, F64, "backward")


def test_rank_measures_of_batches():
    s = torch.tensor([[4.0, 2.0, 2.0], [1.0, 0, 0], [0, 0, 0]], dtype=F64)
    expected = torch.tensor([2**1.5, 1, 0], dtype=F64)
    testing.assert_matches(hk.effective_rank(s), expected, F64, "backward")
    assert hk.numerical_rank(s).tolist() == [3, 1, 0]
    assert hk.numerical_rank(s, tol=3.0).tolist() == [1, 0, 0]
    assert hk.numerical_rank(s.float()).tolist() == [3, 1, 0]


def test_numerical_rank_drops_rounding():
    eps = torch.finfo(F64).eps
    s = torch.tensor([1.0, 1e-10, eps / 2], dtype=F64)
    assert hk.numerical_rank(s) == 2
    assert hk.numerical_rank(s, tol=0.0) == 3
    assert hk.numerical_rank(s, tol=1e-9) == 1
    assert hk.numerical_rank(1e3 * s, rtol=1e-9) == 1


@pytest.mark.parametrize("measure", [*RANKS, hk.nuclear_norm, hk.numerical_rank])
def test_values_that_are_none(measure):
    for bad, came in ((None, "NoneType"), ([1.0], "list"), (torch.ones(2).long(), "int64")):
        with pytest.raises(ValueError, match=f"{measure.__name__}: s must be .* got .*{came}"):
            measure(bad)
