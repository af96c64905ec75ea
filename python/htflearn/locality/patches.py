"""Pairs of patches of an image: fixed ones, or random ones at distances that are allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

__all__ = [
    "AdjacentSquares",
    "FixedPatches",
    "Patch",
    "PatchSampler",
    "RandomSquares",
    "check_patches",
    "gap",
    "square_grid",
]


class Patch(NamedTuple):
    """A rectangle of pixels; ``bottom`` and ``right`` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int


Pair = tuple[Patch, Patch]


class PatchSampler(Protocol):
    """What :class:`htflearn.InputGradientChange` asks for two patches in every step."""

    def sample(self, height: int, width: int) -> Pair:
        """Two patches that do not overlap, inside an image of that size."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to draw on as if it had never stopped."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        ...


def gap(a: Sequence[int], b: Sequence[int]) -> int:
    """Pixels between two patches: the larger of the vertical and the horizontal gap.

    0 for neighbours that touch at a side or a corner, negative where they overlap.

    Args:
        a, b: (top, left, bottom, right).

    Example:
        >>> gap((0, 0, 2, 2), (0, 5, 2, 7))
        3
    """
    return max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])


def check_patches(a: Sequence[int], b: Sequence[int], height: int, width: int) -> Pair:
    """The two as :class:`Patch`.

    Args:
        a, b: (top, left, bottom, right).
        height, width: of the image, in pixels.

    Raises:
        ValueError: one is empty, reaches outside the image, or they overlap.
    """
    pair = _patch(a, "patch_a"), _patch(b, "patch_b")
    for name, patch in zip(("patch_a", "patch_b"), pair, strict=True):
        if patch.top < 0 or patch.left < 0 or patch.bottom > height or patch.right > width:
            raise ValueError(
                f"{name} (top, left, bottom, right) = {tuple(patch)} reaches outside the image of "
                f"{height} x {width} pixels"
            )
    if gap(*pair) < 0:
        raise ValueError(
            f"the patches {tuple(pair[0])} and {tuple(pair[1])} (top, left, bottom, right) overlap"
        )
    return pair


def _patch(patch: Sequence[int], name: str) -> Patch:
    values = tuple(int(v) for v in patch)
    whole = all(value == v for value, v in zip(values, patch, strict=True))
    if not whole or len(values) != 4 or values[0] >= values[2] or values[1] >= values[3]:
        raise ValueError(
            f"{name} must be whole numbers (top, left, bottom, right) with top < bottom and "
            f"left < right, got {tuple(patch)}"
        )
    return Patch(*values)


class FixedPatches:
    """The same two patches always, or one of several pairs drawn at random.

    Args:
        pairs: two patches, each (top, left, bottom, right), or a list of such pairs.
        seed: of the draws among several pairs.

    Raises:
        ValueError: no pair, an empty patch, or two that overlap.

    Example:
        >>> FixedPatches([(0, 0, 2, 2), (0, 5, 2, 7)]).sample(8, 8)[1].left
        5
    """

    def __init__(self, pairs: Sequence[Any], seed: int = 0) -> None:
        one = len(pairs) == 2 and all(len(p) == 4 for p in pairs)
        given = [pairs] if one else list(pairs)
        if not given or any(len(pair) != 2 for pair in given):
            raise ValueError("FixedPatches: expected two patches or a list of pairs of patches")
        endless = 1 << 62
        self.pairs = [check_patches(a, b, endless, endless) for a, b in given]
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self, height: int, width: int) -> Pair:
        """One of the pairs.

        Raises:
            ValueError: it reaches outside the image.
        """
        return check_patches(*self.pairs[self._draw()], height, width)

    def _draw(self) -> int:
        if len(self.pairs) == 1:
            return 0
        return int(torch.randint(len(self.pairs), (), generator=self._generator))

    def state_dict(self) -> dict[str, Any]:
        """The state of the random generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self._generator.set_state(state["generator"])

    def __repr__(self) -> str:
        return f"FixedPatches({[tuple(map(tuple, pair)) for pair in self.pairs]})"


class RandomSquares:
    """Two squares that do not overlap, uniform over all pairs at an allowed distance.

    Args:
        size: side of the squares in pixels.
        min_distance: least :func:`gap` in pixels.
        max_distance: largest gap in pixels; None: as far as the image allows.
        seed: of the draws.

    Raises:
        ValueError: sizes or distances that are not possible.

    Example:
        >>> a, b = RandomSquares(2, min_distance=10, seed=1).sample(32, 32)
        >>> gap(a, b) >= 10
        True
    """

    def __init__(
        self,
        size: int = 2,
        min_distance: int = 0,
        max_distance: int | None = None,
        seed: int = 0,
    ) -> None:
        if size < 1 or size != int(size):
            raise ValueError(
                f"{type(self).__name__}: size must be a whole number, 1 or more, got {size}"
            )
        if min_distance < 0 or (max_distance is not None and max_distance < min_distance):
            raise ValueError(
                "RandomSquares: expected 0 <= min_distance <= max_distance, got min_distance "
                f"{min_distance} and max_distance {max_distance}"
            )
        self.size, self.min_distance, self.max_distance = size, min_distance, max_distance
        self._generator = torch.Generator().manual_seed(seed)
        self._image: tuple[int, int] | None = None

    def sample(self, height: int, width: int) -> Pair:
        """Two squares.

        Raises:
            ValueError: no two squares at such a distance fit into the image.
        """
        if self._image != (height, width):
            self._steps, self._ends = self._count(height, width)
            self._image = height, width
        size = self.size
        # A pair is a step from one corner to the other, and a place for both.
        place = int(torch.randint(int(self._ends[-1]), (), generator=self._generator))
        step = int(torch.searchsorted(self._ends, place, right=True))
        place -= int(self._ends[step - 1]) if step else 0
        down, across = self._steps[step].tolist()
        row, column = divmod(place, width - size + 1 - abs(across))
        row, column = row + max(-down, 0), column + max(-across, 0)
        return (
            Patch(row, column, row + size, column + size),
            Patch(row + down, column + across, row + down + size, column + across + size),
        )

    def _count(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The allowed steps ``[S, 2]`` and how many pairs the steps up to each have together."""
        rows, columns = height - self.size, width - self.size
        down = torch.arange(-max(rows, 0), max(rows, 0) + 1)[:, None]
        across = torch.arange(-max(columns, 0), max(columns, 0) + 1)[None, :]
        pairs = (rows + 1 - down.abs()).clamp(min=0) * (columns + 1 - across.abs()).clamp(min=0)
        pairs = pairs * self._allowed(down, across)
        found = pairs.nonzero()
        if len(found) == 0:
            raise ValueError(
                f"{self}: no such pair fits into an image of {height} x {width} pixels"
            )
        offset = torch.tensor([max(rows, 0), max(columns, 0)])
        return found - offset, pairs[tuple(found.T)].cumsum(0)

    def _allowed(self, down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
        gaps = torch.maximum(down.abs(), across.abs()) - self.size
        allowed = gaps >= self.min_distance
        return allowed if self.max_distance is None else allowed & (gaps <= self.max_distance)

    def state_dict(self) -> dict[str, Any]:
        """The state of the random generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self._generator.set_state(state["generator"])

    def __repr__(self) -> str:
        distances = f"min_distance={self.min_distance}, max_distance={self.max_distance}"
        return f"RandomSquares({self.size}, {distances})"


class AdjacentSquares(RandomSquares):
    """Two squares that share a side, uniform over all such pairs.

    Args:
        size: side of the squares in pixels.
        seed: of the draws.

    Raises:
        ValueError: the size is not positive.

    Example:
        >>> gap(*AdjacentSquares(4).sample(32, 32))
        0
    """

    def __init__(self, size: int = 2, seed: int = 0) -> None:
        super().__init__(size, 0, 0, seed)

    def _allowed(self, down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
        beside = (down == 0) & (across.abs() == self.size)
        return beside | ((across == 0) & (down.abs() == self.size))

    def __repr__(self) -> str:
        return f"AdjacentSquares({self.size})"


def square_grid(height: int, width: int, size: int) -> list[Patch]:
    """Squares side by side that cover an image, row by row; centred.

    Args:
        height, width: of the image, in pixels.
        size: side of the squares.

    Raises:
        ValueError: fewer than two fit.

    Example:
        >>> square_grid(4, 7, 3)
        [Patch(top=0, left=0, bottom=3, right=3), Patch(top=0, left=3, bottom=3, right=6)]
    """
    rows, columns = height // size if size > 0 else 0, width // size if size > 0 else 0
    if rows * columns < 2:
        raise ValueError(
            f"at least two squares of {size} pixels must fit into an image of {height} x {width}"
        )
    top, left = (height - rows * size) // 2, (width - columns * size) // 2
    return [
        Patch(top + i * size, left + j * size, top + (i + 1) * size, left + (j + 1) * size)
        for i in range(rows)
        for j in range(columns)
    ]
