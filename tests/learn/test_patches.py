"""Pairs of patches: every allowed pair equally often, none that is not, the same ones again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htflearn.locality.patches import (
    AdjacentSquares,
    FixedPatches,
    Pair,
    Patch,
    RandomSquares,
    check_patches,
    gap,
    square_grid,
)


def pixels(patch: Patch) -> set[tuple[int, int]]:
    return set(product(range(patch.top, patch.bottom), range(patch.left, patch.right)))


def distance(a: Patch, b: Patch) -> int:
    """Pixels between the nearest rows or columns, found pixel by pixel."""
    nearest = min(max(abs(i - k), abs(j - n)) for (i, j), (k, n) in product(pixels(a), pixels(b)))
    return nearest - 1


def shares_a_side(a: Patch, b: Patch) -> bool:
    touching = [
        p for p, q in product(pixels(a), pixels(b)) if abs(p[0] - q[0]) + abs(p[1] - q[1]) == 1
    ]
    return len(touching) == a.bottom - a.top


def every_pair(height: int, width: int, size: int, allowed: Callable[[Patch, Patch], bool]):
    squares = [
        Patch(i, j, i + size, j + size)
        for i in range(height - size + 1)
        for j in range(width - size + 1)
    ]
    return {
        (a, b) for a, b in product(squares, squares) if not pixels(a) & pixels(b) and allowed(a, b)
    }


class Each:
    """In place of random numbers: every number once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.next, self.count = 0, 0
        monkeypatch.setattr(torch, "randint", self.randint)

    def randint(self, high: int, size: tuple, generator: torch.Generator) -> torch.Tensor:
        self.count, self.next = high, self.next + 1
        return torch.tensor(self.next - 1)


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [(1, 0, None), (2, 0, None), (2, 1, None), (2, 1, 2), (2, 0, 0), (3, 2, 2), (1, 4, None)],
)
@pytest.mark.parametrize(("height", "width"), [(5, 8), (6, 6), (3, 9)])
def test_each_pair_once(height, width, size, low, high, monkeypatch) -> None:
    """The numbers that are drawn, uniformly, are the allowed pairs one to one."""
    expected = every_pair(
        height,
        width,
        size,
        lambda a, b: low <= distance(a, b) and (high is None or distance(a, b) <= high),
    )
    sampler = RandomSquares(size, low, high)
    check_each(sampler, height, width, expected, monkeypatch)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(5, 8), (6, 6), (3, 9)])
def test_each_adjacent_pair_once(height, width, size, monkeypatch) -> None:
    expected = every_pair(height, width, size, shares_a_side)
    check_each(AdjacentSquares(size), height, width, expected, monkeypatch)


def check_each(sampler, height: int, width: int, expected: set[Pair], monkeypatch) -> None:
    if not expected:
        with pytest.raises(ValueError, match=f"no such pair fits into an image of {height} x"):
            sampler.sample(height, width)
        return
    each = Each(monkeypatch)
    found = [sampler.sample(height, width)]
    found += [sampler.sample(height, width) for _ in range(each.count - 1)]
    assert Counter(found) == Counter(expected)


@pytest.mark.parametrize("sampler", [RandomSquares(2, 1, 3, seed=7), AdjacentSquares(2, seed=7)])
def test_uniform(sampler: RandomSquares) -> None:
    counts = Counter(sampler.sample(5, 6) for _ in range(20000))
    allowed = shares_a_side if isinstance(sampler, AdjacentSquares) else None
    pairs = every_pair(5, 6, 2, allowed or (lambda a, b: 1 <= distance(a, b) <= 3))
    assert set(counts) == pairs
    expected = 20000 / len(pairs)
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    # Mean len - 1, variance twice that: four standard deviations, and the seed is fixed.
    freedom = len(pairs) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


@given(
    size=st.integers(1, 6),
    low=st.integers(0, 12),
    more=st.one_of(st.none(), st.integers(0, 5)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**31),
)
def test_distances(
    size: int, low: int, more: int | None, shape: tuple[int, int], seed: int
) -> None:
    high = None if more is None else low + more
    sampler = RandomSquares(size, low, high, seed)
    # Two squares fit beside each other, or one below the other.
    if min(shape) < size or max(shape) < 2 * size + low:
        with pytest.raises(ValueError, match="no such pair fits"):
            sampler.sample(*shape)
        return
    for _ in range(5):
        a, b = check_patches(*sampler.sample(*shape), *shape)
        assert a.bottom - a.top == a.right - a.left == b.bottom - b.top == b.right - b.left == size
        assert low <= gap(a, b) and (high is None or gap(a, b) <= high)


@given(size=st.integers(1, 5), shape=st.tuples(st.integers(10, 30), st.integers(5, 30)))
def test_adjacent(size: int, shape: tuple[int, int]) -> None:
    sampler = AdjacentSquares(size, seed=3)
    for _ in range(5):
        a, b = check_patches(*sampler.sample(*shape), *shape)
        assert shares_a_side(a, b)


def test_large_images() -> None:
    """As many pairs as do not fit into 32 bits."""
    sampler = RandomSquares(2, 500)
    assert gap(*check_patches(*sampler.sample(1024, 1024), 1024, 1024)) >= 500


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: RandomSquares(2, 1, seed=seed),
        lambda seed: AdjacentSquares(2, seed),
        lambda seed: FixedPatches([[(0, 0, 1, 1), (0, i, 1, i + 1)] for i in range(1, 9)], seed),
    ],
    ids=["random", "adjacent", "fixed"],
)
def test_the_same_again(make) -> None:
    def drawn(sampler, count: int = 12) -> list[Pair]:
        return [sampler.sample(10, 12) for _ in range(count)]

    torch.manual_seed(5)
    first = drawn(make(1))
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert drawn(make(1)) == first != drawn(make(2))
    # The global random numbers of a training are not touched.
    assert torch.equal(state, torch.get_rng_state())
    sampler = make(1)
    drawn(sampler, 5)
    resumed = make(9)
    resumed.load_state_dict(sampler.state_dict())
    assert drawn(resumed, 7) == first[5:]


def test_images_of_several_sizes() -> None:
    sampler, other = RandomSquares(2, seed=1), RandomSquares(2, seed=1)
    for shape in ((8, 8), (9, 5), (8, 8), (4, 20)):
        check_patches(*sampler.sample(*shape), *shape)
        assert other.sample(*shape)


def test_fixed() -> None:
    one = FixedPatches([(0, 0, 2, 2), (0, 5, 2, 7)])
    assert one.sample(8, 8) == (Patch(0, 0, 2, 2), Patch(0, 5, 2, 7))
    assert repr(one) == "FixedPatches([((0, 0, 2, 2), (0, 5, 2, 7))])"
    rows = torch.tensor([[0, 0, 2, 2], [0, 5, 2, 7]])
    assert FixedPatches(rows.tolist()).sample(8, 8) == one.sample(8, 8)
    assert FixedPatches(rows.numpy()).sample(8, 8) == one.sample(8, 8)
    pairs = [((0, 0, 1, 1), (0, i, 1, i + 1)) for i in range(1, 4)]
    several = FixedPatches(pairs)
    counts = Counter(several.sample(2, 4) for _ in range(600))
    assert set(counts) == {tuple(Patch(*p) for p in pair) for pair in pairs}
    # Binomial: 200 with a standard deviation of 12.
    assert all(abs(n - 200) < 50 for n in counts.values())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "expected two patches or a list of pairs"),
        ([(0, 0, 2, 2)], "expected two patches or a list of pairs"),
        ([[(0, 0, 2, 2), (4, 4, 6, 6), (7, 7, 8, 8)]], "expected two patches or a list of pairs"),
        ([(0, 0, 2, 2), (0, 1, 2, 3)], "overlap"),
        ([(0, 0, 2, 2), (0, 5, 0, 7)], "patch_b must be whole numbers"),
        ([(0, 0, 2, 2.5), (0, 5, 2, 7)], r"patch_a must be whole numbers .* got \(0, 0, 2, 2.5\)"),
        ([(-1, 0, 2, 2), (0, 5, 2, 7)], "patch_a .* outside the image"),
    ],
)
def test_bad_fixed_patches(pairs: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedPatches(pairs)


def test_fixed_patches_outside() -> None:
    with pytest.raises(ValueError, match=r"patch_b .* reaches outside the image of 8 x 6 pixels"):
        FixedPatches([(0, 0, 2, 2), (0, 5, 2, 7)]).sample(8, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "RandomSquares: size must be a whole number, 1 or more, got 0"),
        ((1.5,), "RandomSquares: size must be a whole number, 1 or more, got 1.5"),
        ((2, -1), "expected 0 <= min_distance <= max_distance, got min_distance -1"),
        ((2, 3, 2), "got min_distance 3 and max_distance 2"),
    ],
)
def test_bad_squares(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomSquares(*arguments)


def test_bad_adjacent_squares() -> None:
    with pytest.raises(ValueError, match=r"AdjacentSquares: size must be .* got 0"):
        AdjacentSquares(0)
    with pytest.raises(ValueError, match=r"AdjacentSquares\(5\): no such pair fits into an image"):
        AdjacentSquares(5).sample(9, 9)
    message = r"RandomSquares\(2, min_distance=7, max_distance=None\): no such pair"
    with pytest.raises(ValueError, match=message):
        RandomSquares(2, 7).sample(10, 10)


@given(
    st.lists(st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 4)] * 2), min_size=2, max_size=2)
)
def test_gap(corners: list[tuple[int, int, int, int]]) -> None:
    a, b = (Patch(i, j, i + h, j + w) for i, j, h, w in corners)
    assert gap(a, b) == gap(b, a)
    if pixels(a) & pixels(b):
        assert gap(a, b) < 0
        with pytest.raises(ValueError, match="overlap"):
            check_patches(a, b, 10, 10)
    else:
        assert gap(a, b) == distance(a, b)
        assert check_patches(list(a), b, 10, 10) == (a, b)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 8))
def test_square_grid(height: int, width: int, size: int) -> None:
    if (height // size) * (width // size) < 2:
        with pytest.raises(ValueError, match=f"at least two squares of {size} pixels must fit"):
            square_grid(height, width, size)
        return
    grid = square_grid(height, width, size)
    covered = [p for patch in grid for p in pixels(patch)]
    assert len(set(covered)) == len(covered) == len(grid) * size**2
    rows, columns = zip(*covered, strict=True)
    # Nothing more would fit, and what is left over is halved.
    for taken, whole in ((rows, height), (columns, width)):
        before, after = min(taken), whole - 1 - max(taken)
        assert before + after == whole % size
        assert 0 <= after - before <= 1
    assert grid == sorted(grid)


def test_bad_grids() -> None:
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"at least two squares of {size} pixels"):
            square_grid(8, 8, size)
