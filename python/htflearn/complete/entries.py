"""Known entries of a tensor, whatever file they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from htflearn.errors import UserError

__all__ = ["Entries", "Predict"]

Predict = Callable[[np.ndarray], np.ndarray]
"""Indices ``[M, N]`` int64 -> predicted entries ``[M]`` float64, in the units of the file."""

LARGEST_TENSOR = 2**62


@dataclass(frozen=True)
class Entries:
    """Known entries of a tensor of order N.

    Attributes:
        dims: ``D_n`` for each mode.
        indices: ``[M, N]`` int64, where entries are known, each place once.
        values: ``[M]`` float64.
        names: a name for each mode.
        whole: entries that differ in none of the first ``whole`` modes are known, hidden and held
            out together: the colours of a pixel. N where every entry stands for itself.
        neighbours: modes whose neighbouring positions are neighbours in the world, such as the rows
            of a picture.
        integer: whether entries are whole numbers.
        low, high: bounds of the entries, or None.
        hidden_indices, hidden_values: entries that were known, and were hidden for a demonstration.
        notes: what the reader of the result should know, a sentence each.
    """

    dims: tuple[int, ...]
    indices: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    whole: int
    neighbours: tuple[int, ...] = ()
    integer: bool = False
    low: float | None = None
    high: float | None = None
    hidden_indices: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    hidden_values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.hidden_values):
            none = np.zeros((0, len(self.dims)), np.int64)
            object.__setattr__(self, "hidden_indices", none)

    def checked(self) -> Entries:
        """The same, if they make a tensor that can be completed.

        Raises:
            UserError: a tensor without entries or too large to index, no known entries, or some
                that are not finite.
        """
        total = prod(self.dims)
        if total == 0 or not self.dims:
            raise UserError(f"expected a tensor with entries, got the shape {list(self.dims)}")
        if total >= LARGEST_TENSOR:
            raise UserError(
                f"expected a tensor of fewer than 2**62 entries, got the shape {list(self.dims)}"
            )
        if not len(self.values):
            raise UserError(f"all {total} entries are missing; there is nothing to learn from")
        infinite = np.flatnonzero(~np.isfinite(self.values))
        if len(infinite):
            where = self.indices[infinite[0]].tolist()
            raise UserError(
                f"expected finite entries, got {self.values[infinite[0]]} at index {where}"
            )
        return self

    def check_enough(self, shape: tuple[int, ...]) -> None:
        """Raises a UserError where fewer entries are known than a tensor of rank one and this shape
        has free numbers, ``sum_n (D_n - 1) + 1``."""
        needed, known = sum(shape) - len(shape) + 1, len(self.values)
        if known < needed:
            raise UserError(
                f"too few known entries: a tensor of shape {list(shape)} needs at least {needed} "
                f"of {prod(self.dims)}, got {known}"
            )

    def split(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The known entries in two parts, at random.

        Args:
            fraction: of the entries (pixels) that go into the second part.
            seed: of the choice.

        Returns:
            positions in ``values``: those of the first part, those of the second.
        """
        _, unit = np.unique(
            np.ravel_multi_index(tuple(self.indices[:, : self.whole].T), self.dims[: self.whole]),
            return_inverse=True,
        )
        units = int(unit.max()) + 1
        chosen = np.zeros(units, bool)
        count = min(max(round(fraction * units), 1), units)
        chosen[np.random.default_rng(seed).permutation(units)[:count]] = True
        second = chosen[unit]
        return np.flatnonzero(~second), np.flatnonzero(second)

    def hide(self, fraction: float, seed: int) -> Entries:
        """The same tensor with some known entries hidden.

        Args:
            fraction: of the known entries (pixels) to hide, between 0 and 1.
            seed: of the choice.

        Raises:
            UserError: the fraction is not between 0 and 1.
        """
        if not 0 < fraction < 1:
            raise UserError(f"--hide expects a fraction between 0 and 1, got {fraction:g}")
        kept, hidden = self.split(fraction, seed)
        return replace(
            self,
            indices=self.indices[kept],
            values=self.values[kept],
            hidden_indices=self.indices[hidden],
            hidden_values=self.values[hidden],
        )

    def finish(self, predicted: np.ndarray) -> np.ndarray:
        """Predicted entries as the file can hold them: rounded where entries are whole numbers,
        clipped where they are bounded."""
        if self.low is not None or self.high is not None:
            predicted = np.clip(predicted, self.low, self.high)
        return np.rint(predicted) if self.integer else predicted
