"""Long modes split into short ones, scale by scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from htflearn.errors import UserError
from htflearn.options import shown, whole_numbers

__all__ = ["LONG", "Split", "factors_of", "parse_factors"]

LONG = 16
"""Modes of at least this length are split; shorter ones are short as they are."""

_PRIMES = (2, 3, 5)


@dataclass(frozen=True)
class Split:
    """A tensor of the shape ``dims`` seen as one of shorter modes.

    A mode of length ``f_1 f_2 ... f_k`` becomes ``k`` digits, ``f_1`` the coarsest:
    ``i = ((j_1 f_2 + j_2) f_3 + j_3) ...``. Digits of the same scale, counted from the finest, of
    all split modes make one mode, so that neighbours in the picture (in the volume) meet in the
    finest mode first. A mode whose length is no such product is padded; padding is cropped away by
    :meth:`join`.

    Attributes:
        dims: ``D_n`` of the tensor as it is.
        factors: for each mode its factors, coarsest first; a mode that stays whole has one.

    Example:
        >>> split = Split((512, 512, 3), ((64, 8), (64, 8), (3,)))
        >>> split.shape
        (4096, 64, 3)
    """

    dims: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for mode, (d, factors) in enumerate(zip(self.dims, self.factors, strict=True)):
            if prod(factors) < d:
                raise ValueError(
                    f"Split: the factors {list(factors)} make {prod(factors)} positions, mode "
                    f"{mode} has {d}"
                )

    @cached_property
    def is_trivial(self) -> bool:
        """Whether every mode stays whole."""
        return all(len(f) == 1 for f in self.factors)

    @cached_property
    def padded(self) -> tuple[int, ...]:
        """Lengths with padding."""
        return tuple(prod(f) for f in self.factors)

    @cached_property
    def scales(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The new modes, coarsest first, each as the digits ``(mode, place in its factors)`` that
        it is made of; then the modes that stay whole."""
        depth = max((len(f) for f in self.factors if len(f) > 1), default=0)
        scales = [
            tuple(
                (n, len(f) - 1 - scale)
                for n, f in enumerate(self.factors)
                if len(f) > 1 and scale < len(f)
            )
            for scale in reversed(range(depth))
        ]
        whole: list[tuple[tuple[int, int], ...]] = [
            ((n, 0),) for n, f in enumerate(self.factors) if len(f) == 1
        ]
        return tuple(scales + whole)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """``D_n`` of the new modes."""
        return tuple(prod(self.factors[n][k] for n, k in digits) for digits in self.scales)

    @property
    def num_scales(self) -> int:
        """How many of the new modes are made of digits; they come first."""
        return sum(1 for digits in self.scales if len(self.factors[digits[0][0]]) > 1)

    def split(self, indices: Tensor) -> Tensor:
        """Indices ``[M, N]`` in ``dims`` -> ``[M, len(shape)]`` in ``shape``, int64."""
        columns = []
        for digits in self.scales:
            column = torch.zeros_like(indices[:, 0])
            for n, k in digits:
                factor, below = self.factors[n][k], prod(self.factors[n][k + 1 :])
                column = column * factor + indices[:, n] // below % factor
            columns.append(column)
        return torch.stack(columns, dim=1)

    def join(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape ``shape`` -> the one of ``dims``; differentiable."""
        digits = [digit for scale in self.scales for digit in scale]
        place = {digit: i for i, digit in enumerate(digits)}
        order = [place[n, k] for n, f in enumerate(self.factors) for k in range(len(f))]
        tensor = tensor.reshape([self.factors[n][k] for n, k in digits]).permute(order)
        tensor = tensor.reshape(self.padded)
        return tensor[tuple(slice(d) for d in self.dims)]

    def digit_side(self, mode: int) -> int:
        """How far apart, at most, along a split axis, two positions are that differ in nothing
        coarser than this new mode: its own factor times all finer ones."""
        sides = [prod(self.factors[n][k:]) for n, k in self.scales[mode]]
        return max(sides)


def factors_of(length: int) -> tuple[int, ...]:
    """Prime factors, the largest first, of the least number from ``length`` on with none beyond 5.

    Example:
        >>> factors_of(512), factors_of(451)
        ((2, 2, 2, 2, 2, 2, 2, 2, 2), (5, 3, 2, 2, 2, 2, 2))
    """
    number = length
    while True:
        rest, found = number, list[int]()
        for p in _PRIMES:
            while rest % p == 0:
                rest //= p
                found.append(p)
        if rest == 1:
            return tuple(reversed(found)) or (1,)
        number += 1


def parse_factors(text: str, dims: Sequence[int]) -> Split:
    """The split that ``--factors`` asks for.

    Args:
        text: factors for every mode from :data:`LONG` on, the coarsest first, such as ``8,8,8``;
            one of them may be ``auto``: as large as it must be.
        dims: ``D_n``.

    Raises:
        UserError: the text is no such list, or makes too few positions.
    """
    parts = [part.strip() for part in text.split(",")]
    numbers = [p for p in parts if p != "auto"]
    given = whole_numbers(",".join(numbers)) if numbers else []
    if parts.count("auto") > 1 or given is None or any(f < 2 for f in given):
        raise UserError(
            "--factors expects whole numbers from 2 on, coarsest first, one of them may be auto, "
            f"such as auto,8, got {shown(text)}"
        )
    factors: list[tuple[int, ...]] = []
    for mode, d in enumerate(dims):
        if d < LONG:
            factors.append((d,))
            continue
        coarsest = -(-d // prod(given))
        filled = [coarsest if p == "auto" else int(p) for p in parts]
        chosen: list[int] = []
        for f in reversed(filled):  # no coarser than the mode is long
            need = -(-d // prod(chosen))
            if need > 1 and f > 1:
                chosen.insert(0, min(f, need))
        if prod(chosen) < d:
            raise UserError(
                f"--factors {shown(text)} makes {prod(chosen)} positions, but mode {mode} has {d}"
            )
        factors.append(tuple(chosen))
    return Split(tuple(dims), tuple(factors))
