"""Dashed snakes that keep clear of each other: where they lie, and how they are drawn.

Points are (row, column) in pixels, a pixel's centre at whole numbers. A snake of n dashes is the
array ``[2 * n, 2]`` of its dashes' tips in order. For placing, a snake is a string of points along
it, so close that the distances between points of two snakes tell whether these are clear of each
other. Ends where dots may go keep others farther away than the rest of a snake does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from htflearn.errors import UserError

__all__ = ["Measures", "Snakes", "draw", "lay_out"]

_LAYOUTS = 1000  # tries at a whole picture
_FIRST, _SECOND = 16, 1024  # proposals for the two long snakes
_AT_ONCE = 32  # of them that are looked at together
_POOLS = 12  # rounds of proposals for the distractors


@dataclass(frozen=True)
class Measures:
    """Every measure of a picture, in pixels: what they mean is told where they are set, in
    :class:`htflearn.locality.pathfinder.PathfinderSetting`."""

    canvas: int
    padding: float
    path_length: int
    dash_length: float
    gap: float
    thickness: float
    clearance: float
    continuity: float
    contrast: tuple[float, ...]
    distractors: int
    distractor_length: int
    dot_radius: float
    alike: bool


class Snakes(NamedTuple):
    """Where the snakes of a picture lie.

    Attributes:
        targets: ``[2, 2 * path_length, 2]``. The first one's ends and the second one's start are
            where dots may go: both pairs with the first one's start are equally far apart.
        distractors: ``[distractors, 2 * distractor_length, 2]``.
    """

    targets: np.ndarray
    distractors: np.ndarray


class _String(NamedTuple):
    """The points along a snake: point i lies at ``fraction[i]`` of the way from tip ``tip[i]`` to
    the next. ``end``: 1 where a dot may go, else 0. ``first``, ``second``: the pairs of points that
    keep apart."""

    tip: np.ndarray
    fraction: np.ndarray
    end: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def points(self, snakes: np.ndarray) -> np.ndarray:
        """Of snakes ``[snakes, tips, 2]``, ``[snakes, points, 2]``."""
        here, following = snakes[:, self.tip], snakes[:, self.tip + 1]
        return here + self.fraction[:, None] * (following - here)


def lay_out(rng: np.random.Generator, measures: Measures) -> Snakes:
    """Places two long snakes and the distractors at random, all clear of each other.

    Args:
        rng: only its uniform numbers are used.
        measures: of the picture.

    Returns:
        the snakes.

    Raises:
        UserError: no place was found in a bounded number of tries.

    Example:
        >>> measures = PathfinderSetting(path_length=9).measures
        >>> lay_out(np.random.default_rng(0), measures).targets.shape
        (2, 18, 2)
    """
    for _ in range(_LAYOUTS):
        targets = _place_targets(rng, measures)
        if targets is None:
            continue
        distractors = _place_distractors(rng, measures, targets)
        if distractors is not None:
            return Snakes(targets, distractors)
    raise UserError(
        f"no place for two paths of {measures.path_length} dashes and {measures.distractors} "
        f"distractors of {measures.distractor_length} was found in {_LAYOUTS} tries on a canvas of "
        f"{measures.canvas}; give fewer or shorter ones, or a larger canvas"
    )


def draw(
    snakes: Snakes, dots: np.ndarray, rng: np.random.Generator, measures: Measures
) -> np.ndarray:
    """Draws snakes and dots, antialiased, white on black.

    Args:
        snakes: as :func:`lay_out` places them.
        dots: centres ``[dots, 2]``.
        rng: draws each dash's contrast where there are several levels.
        measures: of the picture.

    Returns:
        the picture, uint8 ``[canvas, canvas]``.

    Example:
        >>> snakes = lay_out(rng, measures)
        >>> draw(snakes, snakes.targets[0, [0, -1]], rng, measures).dtype
        dtype('uint8')
    """
    dashes = np.concatenate([s.reshape(-1, 2, 2) for s in snakes])
    levels = np.full(len(dashes), measures.contrast[0])
    if len(measures.contrast) > 1:
        choice = rng.random(len(dashes)) * len(measures.contrast)
        levels = np.asarray(measures.contrast)[choice.astype(np.int64)]
    image = np.zeros((measures.canvas, measures.canvas), np.uint8)
    # The round caps reach the tips: what is drawn is as long as the dash.
    inset = measures.thickness / 2 / measures.dash_length * (dashes[:, 1] - dashes[:, 0])
    _stamp(image, dashes[:, 0] + inset, dashes[:, 1] - inset, measures.thickness / 2, levels)
    _stamp(image, dots, dots, measures.dot_radius, np.ones(len(dots)))
    return image


def _stamp(
    image: np.ndarray, starts: np.ndarray, ends: np.ndarray, radius: float, levels: np.ndarray
) -> None:
    """Brightens the pixels within ``radius`` of the segments, those on the edge in part."""
    middles, along = (starts + ends) / 2, (ends - starts) / 2
    squared = (along**2).sum(1)[:, None, None]
    reach = int(np.ceil(np.sqrt(squared.max(initial=0.0)) + radius + 1))
    corner = np.rint(middles).astype(np.int64) - reach
    offsets = np.arange(2 * reach + 1)
    rows = (corner[:, :1] - middles[:, :1] + offsets)[:, :, None]
    columns = (corner[:, 1:] - middles[:, 1:] + offsets)[:, None, :]
    down, right = along[:, 0, None, None], along[:, 1, None, None]
    nearest = np.clip((rows * down + columns * right) / np.maximum(squared, 1e-12), -1.0, 1.0)
    distance = np.hypot(rows - nearest * down, columns - nearest * right)
    which, i, j = np.nonzero(distance < radius + 0.5)
    cover = np.minimum(radius + 0.5 - distance[which, i, j], 1.0)
    values = np.rint(255.0 * cover * levels[which]).astype(np.uint8)
    np.maximum.at(image, (corner[which, 0] + i, corner[which, 1] + j), values)


def _place_targets(rng: np.random.Generator, measures: Measures) -> np.ndarray | None:
    string, apart = _string(measures, measures.path_length, True), _apart(measures)
    first, fits = _scatter(rng, _walks(rng, _FIRST, measures.path_length, measures), measures)
    points = string.points(first)
    fits &= _clear_of_itself(points, string, apart)
    if not fits.any():
        return None
    chosen = int(fits.argmax())
    # As far from the first snake's start as that one's end is: how far the dots are apart then
    # tells nothing about which of the two pairs they are.
    distance = np.hypot(*(first[chosen, -1] - first[chosen, 0]))
    angle = 2 * np.pi * rng.random(_SECOND)
    start = first[chosen, 0] + distance * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    second = start[:, None] + _walks(rng, _SECOND, measures.path_length, measures)
    low, high = measures.padding, measures.canvas - 1 - measures.padding
    second = second[((second >= low) & (second <= high)).all(axis=(1, 2))]
    if measures.alike:
        # Dashes at the ends of one snake tend to lie along the line between these; of the places
        # for the second snake the one most like it leaves the least to see without following paths.
        start, end = first[chosen, :2], first[chosen, :-3:-1]
        unlike = np.abs(_facing(start, second[:, :2]) - _facing(start, end[None])).sum(axis=1)
        second = second[unlike.argsort(kind="stable")]
    for begin in range(0, len(second), _AT_ONCE):
        some = second[begin : begin + _AT_ONCE]
        others = string.points(some)
        fits = _clear_of_itself(others, string, apart)
        fits &= _clear(others, points[chosen], apart[string.end[:, None], string.end])
        if fits.any():
            return np.stack([first[chosen], some[fits.argmax()]])
    return None


def _facing(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How much an end dash, ``[outer and inner tip, 2]``, and each of others, ``[n, 2, 2]``, lie
    along the line between their outer tips: two cosines ``[n, 2]``, in order."""
    line = others[:, 0] - one[0]
    inwards = others[:, 1] - others[:, 0]
    along = (line * (one[1] - one[0])).sum(axis=1), -(line * inwards).sum(axis=1)
    cosines = np.stack(along, axis=1)
    lengths = np.sqrt((line**2).sum(axis=1) * (inwards**2).sum(axis=1))
    return np.sort(cosines / lengths[:, None], axis=1)


def _place_distractors(
    rng: np.random.Generator, measures: Measures, targets: np.ndarray
) -> np.ndarray | None:
    asked, dashes = measures.distractors, measures.distractor_length
    string, apart = _string(measures, dashes, False), _apart(measures)
    target = _string(measures, measures.path_length, True)
    obstacles = target.points(targets).reshape(-1, 2)
    ends = np.tile(target.end, 2)
    placed: list[np.ndarray] = []
    for _ in range(_POOLS):
        if len(placed) == asked:
            break
        proposed = _walks(rng, 4 * (asked - len(placed)), dashes, measures)
        snakes, fits = _scatter(rng, proposed, measures)
        points = string.points(snakes)
        fits &= _clear_of_itself(points, string, apart)
        fits &= _clear(points, obstacles, apart[0, ends])
        snakes, points = snakes[fits], points[fits]
        while len(snakes) and len(placed) < asked:
            placed.append(snakes[0])
            obstacles = np.concatenate([obstacles, points[0]])
            ends = np.concatenate([ends, string.end])
            free = _clear(points, points[0], apart[0, 0])
            snakes, points = snakes[free], points[free]
    if len(placed) < asked:
        return None
    return np.array(placed).reshape(asked, 2 * dashes, 2)


def _walks(rng: np.random.Generator, number: int, dashes: int, measures: Measures) -> np.ndarray:
    """Snakes ``[number, 2 * dashes, 2]`` that start at the origin and turn at every gap."""
    turns = (2 * rng.random((number, dashes)) - 1) * measures.continuity
    turns[:, 0] *= np.pi / measures.continuity  # where it sets out for
    headings = np.cumsum(turns, axis=1)
    angles = np.empty((number, 2 * dashes - 1))
    angles[:, ::2] = headings
    angles[:, 1::2] = (headings[:, 1:] + headings[:, :-1]) / 2
    lengths = np.where(np.arange(2 * dashes - 1) % 2, measures.gap, measures.dash_length)
    snakes = np.zeros((number, 2 * dashes, 2))
    np.cumsum(lengths * np.sin(angles), axis=1, out=snakes[:, 1:, 0])
    np.cumsum(lengths * np.cos(angles), axis=1, out=snakes[:, 1:, 1])
    return snakes


def _scatter(
    rng: np.random.Generator, snakes: np.ndarray, measures: Measures
) -> tuple[np.ndarray, np.ndarray]:
    """Moves each snake anywhere off the border; with them, ``[snakes]``, which of them fit."""
    low = measures.padding - snakes.min(axis=1)
    high = measures.canvas - 1 - measures.padding - snakes.max(axis=1)
    place = low + (high - low) * rng.random(low.shape)
    return snakes + place[:, None], (low <= high).all(axis=1)


@lru_cache(maxsize=64)
def _string(measures: Measures, dashes: int, dotted: bool) -> _String:
    pieces = _pieces(measures)
    tip = np.concatenate([np.full(pieces[i % 2], i) for i in range(2 * dashes - 1)])
    within = [np.arange(pieces[i % 2]) / pieces[i % 2] for i in range(2 * dashes - 1)]
    tip = np.append(tip, 2 * dashes - 2)
    end = np.zeros(len(tip), np.int64)
    end[[0, -1]] = dotted
    first, second = np.triu_indices(len(tip), 1)
    far = tip[second] // 2 - tip[first] // 2 >= 2
    return _String(tip, np.append(np.concatenate(within), 1.0), end, first[far], second[far])


def _pieces(measures: Measures) -> tuple[int, int]:
    """How many a dash and a gap are divided into."""
    apart = measures.clearance + measures.thickness
    dash, gap = (np.ceil(3 * x / apart) for x in (measures.dash_length, measures.gap))
    return int(dash), int(gap)


@lru_cache(maxsize=64)
def _apart(measures: Measures) -> np.ndarray:
    """``[2, 2]``: least distance of points on different snakes, squared; 1 stands for ends."""
    dash, gap = _pieces(measures)
    half_step = max(measures.dash_length / dash, measures.gap / gap) / 2
    # A snake that comes close to a dot would seem to go on from there.
    around_dot = measures.dot_radius + measures.thickness / 2 + 1.5 * measures.clearance
    dots = max(2 * measures.dot_radius + measures.clearance, around_dot)
    # Where two segments are closest one of them ends, in a point, and the other has a point within
    # half a step of the place.
    between = np.hypot(measures.clearance + measures.thickness, half_step)
    around_dot = np.hypot(around_dot, half_step)
    return np.array([[between, around_dot], [around_dot, dots]]) ** 2


def _clear_of_itself(points: np.ndarray, string: _String, apart: np.ndarray) -> np.ndarray:
    rows, columns = points[:, :, 0], points[:, :, 1]
    squared = (rows[:, string.first] - rows[:, string.second]) ** 2
    squared += (columns[:, string.first] - columns[:, string.second]) ** 2
    least = apart[string.end[string.first], string.end[string.second]]
    return (squared >= least).all(axis=1)


def _clear(points: np.ndarray, obstacles: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Which snakes, ``[snakes, points, 2]``, keep the ``least`` squared distances, which broadcast
    to ``[points, obstacles]``, from ``[obstacles, 2]``."""
    squared = (points[:, :, None, 0] - obstacles[:, 0]) ** 2
    squared += (points[:, :, None, 1] - obstacles[:, 1]) ** 2
    return (squared >= least).all(axis=(1, 2))
