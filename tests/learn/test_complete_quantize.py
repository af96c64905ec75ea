"""Splitting of long modes, automatic trees and ranks."""

from __future__ import annotations

import doctest
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import htfkernels as hk
from htfkernels.tree.layout import Layout
from htflearn.complete import quantize
from htflearn.complete.quantize import Split, factors_of, parse_factors
from htflearn.complete.trees import automatic_ranks, automatic_tree, make_ranks, make_tree
from htflearn.errors import UserError


def whole(*dims: int) -> Split:
    return Split(dims, tuple((d,) for d in dims))


def positions(dims: tuple[int, ...]) -> torch.Tensor:
    return torch.cartesian_prod(*(torch.arange(d) for d in dims)).reshape(-1, len(dims))


def check_inverse(split: Split) -> None:
    """Numbering the padded tensor's entries: `split` finds the entry that `join` puts there."""
    numbers = torch.arange(prod(split.shape)).reshape(split.shape)
    joined = split.join(numbers)
    assert tuple(joined.shape) == split.dims
    found = numbers[tuple(split.split(positions(split.dims)).T)]
    assert torch.equal(found, joined.flatten())
    assert len(set(found.tolist())) == prod(split.dims)


@pytest.mark.parametrize(
    ("dims", "factors"),
    [
        ((8, 8), ((2, 2, 2), (2, 2, 2))),
        ((16, 8, 3), ((2, 8), (8,), (3,))),
        ((7, 11), ((2, 2, 2), (4, 3))),  # both padded
        ((12, 4), ((3, 2, 2), (2, 2))),  # scales of different number
        ((5, 6, 7), ((5,), (6,), (7,))),
        ((9,), ((3, 3),)),
        ((1, 30), ((1,), (5, 3, 2))),
    ],
)
def test_join_is_the_inverse_of_split(
    dims: tuple[int, ...], factors: tuple[tuple[int, ...], ...]
) -> None:
    check_inverse(Split(dims, factors))


@given(st.lists(st.integers(1, 45), min_size=1, max_size=3))
def test_prime_factors_split_exactly(dims: list[int]) -> None:
    factors = tuple(factors_of(d) for d in dims)
    for d, f in zip(dims, factors, strict=True):
        assert prod(f) >= d and max(f) <= 5 and list(f) == sorted(f, reverse=True)
        assert prod(f) <= max(d + 1, d * 1.25)
    check_inverse(Split(tuple(dims), factors))


def test_neighbours_of_a_photo_meet_in_the_finest_mode() -> None:
    split = Split((512, 512, 3), (factors_of(512), factors_of(512), (3,)))
    assert split.shape == (4,) * 9 + (3,)
    a, b = split.split(torch.tensor([[6, 10, 0], [7, 11, 0]]))
    assert (a != b).nonzero().flatten().tolist() == [8]


def test_parse_factors() -> None:
    assert parse_factors("auto,8", (512, 100, 3)).factors == ((64, 8), (13, 8), (3,))
    assert parse_factors("8,8,8", (512, 20, 16)).factors == ((8, 8, 8), (3, 8), (2, 8))
    assert parse_factors("64", (16,)).factors == ((16,),)
    for text in ("8,8", "auto,auto", "x", "1,8", "", "8,-1"):
        with pytest.raises(UserError):
            parse_factors(text, (512, 3))


def test_factors_must_reach() -> None:
    with pytest.raises(ValueError, match="mode 1 has 9"):
        Split((4, 9), ((2, 2), (2, 4)))


def test_automatic_trees() -> None:
    assert automatic_tree(whole(1797, 8, 8)).to_nested() == (0, (1, 2))
    assert automatic_tree(whole(9, 512, 512)).to_nested() == ((0, 1), 2)
    assert automatic_tree(whole(4, 4, 4, 4)).to_nested() == ((0, 1), (2, 3))
    assert automatic_tree(whole(7, 9)).to_nested() == (0, 1)
    photo = parse_factors("auto,8", (512, 512, 3))
    assert automatic_tree(photo).to_nested() == (0, (1, 2))
    primes = Split((512, 512, 3), (factors_of(512), factors_of(512), (3,)))
    assert automatic_tree(primes).to_nested() == (((0, 1, 2), (3, 4, 5)), ((6, 7, 8), 9))
    assert automatic_tree(Split((64,), ((2,) * 6,))).order == 6


@pytest.mark.parametrize("dims", [(1797, 8, 8), (30, 40), (4,) * 9 + (3,), (5,) * 5])
def test_automatic_ranks_keep_to_the_budget(dims: tuple[int, ...]) -> None:
    tree = automatic_tree(whole(*dims))
    for budget in (3_000, 30_000):
        ranks = automatic_ranks(tree, dims, budget)
        count = Layout.make(tree, dims, ranks, root="sum").num_parameters
        assert count <= budget or ranks[tree.root] == 1
        for node, rank in ranks.items():
            assert rank <= prod(dims[n] for n in node.modes)


def test_ranks_given() -> None:
    tree = hk.ModeTree.balanced(4)
    assert set(make_ranks("7", tree, (3,) * 4, 0).values()) == {7}
    assert make_ranks("5,2", tree, (3,) * 4, 0)[tree.root] == 2


def test_trees_by_name() -> None:
    for name in ("balanced", "halves", "flat"):
        assert make_tree(name, whole(3, 4, 5, 6)) == getattr(hk.ModeTree, name)(4)


def test_examples() -> None:
    names = {"Split": Split, "factors_of": factors_of}
    done = doctest.testmod(quantize, extraglobs=names)
    assert done.attempted > 0 and done.failed == 0
