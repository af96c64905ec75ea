"""Locality profiles drawn: curves against distance, maps over the image, and spectra beside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import htfkernels as hk
from htflearn.figures import COLOURS, SMOKE, new_figure, save_figure, stamp
from htflearn.locality.patches import Patch
from htflearn.locality.profile import LocalityProfile
from htflearn.locality.separation import SeparationRank

__all__ = ["draw_profiles", "draw_theory"]

_FLAT = 2.5  # width over height from which on maps stand one above another
_MAPS_IN_A_ROW = 4
_LOG_FROM = 30.0  # the largest over the smallest coupling, from which an axis is logarithmic
_LEAST = 1e-6  # of the largest: lower couplings do not stretch a logarithmic axis
_UNMEASURED = "#E3E6EA"
_GRID = "#E6E6E6"
_MARKERS = "osD^vPX*"


def draw_profiles(
    named: Mapping[str, LocalityProfile],
    path: Path,
    title: str = "",
    place: tuple[float, float] | None = None,
    smoke: bool = False,
) -> None:
    """Coupling against distance, all models in one panel, and a map over the image for each.

    A curve is the mean over the pairs of patches at a distance, with two standard errors of that
    mean around it (as if pairs were independent). A map shows how strongly the gradient at each
    place depends on the outlined patch, the replaced one that is nearest to ``place``.

    Args:
        named: profiles by name, one or more; the names stand in the legend and above the maps.
        path: ``.png``, ``.svg`` or ``.pdf``, replaced as a whole.
        title: above all of it.
        place: row and column in pixels; by default the middle of the image.
        smoke: says on the figure that this is a smoke run.

    Raises:
        ValueError: there is no profile, or one without any coupling.
        OSError: it cannot be written.

    Example:
        >>> x = torch.randn(8, 1, 8, 8)
        >>> profile = locality_profile(lambda x: x.flatten(1).sum(1).square(), x, patch=2)
        >>> draw_profiles({"a square": profile}, Path("profile.png"))
    """
    _check("draw_profiles", named)
    flat = all(p.size[1] > _FLAT * p.size[0] for p in named.values())
    columns = 1 if flat else min(len(named), _MAPS_IN_A_ROW)
    rows = -(-len(named) // columns)
    wide, high = (4.6, max(3.6, 1.2 * rows)) if flat else (2.3 * columns, max(3.6, 2.6 * rows))
    figure = _titled(5.0 + wide + 0.6, high, title)
    curve, maps = figure.subfigures(1, 2, width_ratios=[5.0, wide + 0.6])
    _draw_curves(curve.subplots(), named)
    # Beside the axes: on a logarithmic one bands may cover all of them.
    curve.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=2)
    axes = maps.subplots(rows, columns, squeeze=False).ravel()
    centres = {name: _nearest(profile, place) for name, profile in named.items()}
    images, scale = _map_scale([p.heat_map(centres[name]) for name, p in named.items()])
    for axis, (name, profile), image in zip(axes, named.items(), images, strict=False):
        shown = axis.imshow(image, norm=scale, cmap=_colours(), interpolation="nearest")
        _outline(axis, profile.patches[centres[name]])
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(named) :]:
        axis.axis("off")
    bar = maps.colorbar(shown, ax=list(axes), shrink=0.8, pad=0.02)
    bar.set_label("coupling to the outlined patch", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    if smoke:
        stamp(figure, SMOKE)
    save_figure(figure, path)


def draw_theory(
    named: Mapping[str, tuple[LocalityProfile, Mapping[str, SeparationRank]]],
    path: Path,
    title: str = "",
) -> None:
    """What the ranks of partitions have to do with locality: profiles of several networks, and
    beside them, a panel for each network, the singular values of its partitions.

    Singular values are divided by the largest; a line is the median over the outputs, a band what
    lies between the least and the greatest. Numbers in the legends are medians of effective ranks.

    Args:
        named: by the network's name its profile, and its ranks by the partition's name (see
            :meth:`htflearn.ConvAC.matricization_ranks`).
        path: ``.png``, ``.svg`` or ``.pdf``, replaced as a whole.
        title: above all of it.

    Raises:
        ValueError: there is no network, one has no partition, or a profile without any coupling.
        OSError: it cannot be written.

    Example:
        >>> model, x = ConvAC((4, 4), 1, 2, [3, 5], 2), torch.randn(8, 1, 4, 4)
        >>> ranks = {"left/right": model.matricization_ranks("left/right")}
        >>> draw_theory({"circuit": (locality_profile(model, x, patch=1), ranks)}, Path("t.png"))
    """
    profiles = {name: profile for name, (profile, _) in named.items()}
    _check("draw_theory", profiles)
    for name, (_, ranks) in named.items():
        if not ranks:
            raise ValueError(f"draw_theory: {name!r} has no partition")
    figure = _titled(4.6 + 3.0 * len(named), 3.7, title)
    axes = figure.subplots(1, 1 + len(named), width_ratios=[4.6] + [3.0] * len(named))
    _draw_curves(axes[0], profiles)
    axes[0].legend(fontsize=8.5, frameon=False)
    axes[0].set_title("coupling of patches", fontsize=9.5)
    partitions = list(dict.fromkeys(p for _, ranks in named.values() for p in ranks))
    floor, longest = _spectra_range([r for _, ranks in named.values() for r in ranks.values()])
    for i, (axis, (name, (_, ranks))) in enumerate(zip(axes[1:], named.items(), strict=True)):
        for partition, rank in ranks.items():
            number = len(COLOURS) - 2 - partitions.index(partition)
            _draw_spectrum(axis, partition, rank, COLOURS[number % len(COLOURS)], floor)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(0.9, longest * 1.1)
        axis.set_ylim(floor, 2.0)
        axis.set_title(name, fontsize=9.5, color=COLOURS[i % len(COLOURS)])
        axis.set_xlabel("index", fontsize=9)
        if i == 0:
            axis.set_ylabel("singular value / largest", fontsize=9)
        else:
            axis.tick_params(labelleft=False)
        _plain(axis)
        axis.legend(
            title="partition: effective rank",
            title_fontsize=8,
            fontsize=8,
            loc="lower left",
            frameon=False,
            alignment="left",
        )
    save_figure(figure, path)


def _check(name: str, named: Mapping[str, LocalityProfile]) -> None:
    if not named:
        raise ValueError(f"{name}: there is nothing to draw")
    for label, profile in named.items():
        if bool(profile.matrix.isnan().all()):
            raise ValueError(f"{name}: the profile {label!r} has no coupling")


def _titled(width: float, height: float, title: str) -> Any:
    figure = new_figure(width, height)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw_curves(axis: Any, named: Mapping[str, LocalityProfile]) -> None:
    """Mean coupling against distance for each profile."""
    from matplotlib.ticker import MaxNLocator

    curves = {name: profile.by_distance() for name, profile in named.items()}
    low, _ = _range([row.coupling for rows in curves.values() for row in rows])
    top = 0.0
    for i, (name, rows) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        distances = [row.distance for row in rows]
        values = np.array([row.coupling for row in rows])
        errors = np.array([2 * row.deviation / math.sqrt(row.pairs) for row in rows])
        top = max(top, float((values + errors).max()))
        lower = np.maximum(values - errors, low or 0.0)
        axis.fill_between(distances, lower, values + errors, color=colour, alpha=0.18, linewidth=0)
        marker = _MARKERS[i % len(_MARKERS)]
        axis.plot(
            distances, values, marker, linestyle="-", color=colour, markersize=4.5, label=name
        )
    if low is not None:
        axis.set_yscale("log")
        axis.set_ylim(bottom=low)
    else:
        axis.set_ylim(0, 1.05 * top if top > 0 else 1.0)
    shown = sorted({row.distance for rows in curves.values() for row in rows})
    if len(shown) <= 8:
        axis.set_xticks(shown)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("pixels between two patches", fontsize=9)
    axis.set_ylabel("coupling: 1 − |cos|", fontsize=9)
    _plain(axis)


def _range(values: Sequence[float]) -> tuple[float | None, float]:
    """The lower end of a logarithmic axis, None for a linear one, and the largest value."""
    high = max(values)
    positive = [v for v in values if v > _LEAST * high]
    if not positive or high < _LOG_FROM * min(positive):
        return None, high
    return min(positive) / 2, high


def _map_scale(images: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
    from matplotlib.colors import LogNorm, Normalize

    values = [v for image in images for v in image[~np.isnan(image)].tolist()]
    low, high = _range(values or [0.0])
    if low is None:
        return images, Normalize(0.0, high or 1.0)
    # What is lower takes the lowest colour: only what was not measured is gray.
    return [np.where(image < low, low, image) for image in images], LogNorm(low, high)


def _nearest(profile: LocalityProfile, place: tuple[float, float] | None) -> int:
    """The replaced patch that is nearest to a place, or to the middle of the image."""
    row, column = place or (profile.size[0] / 2, profile.size[1] / 2)

    def away(index: int) -> float:
        p = profile.patches[index]
        return math.hypot((p.top + p.bottom) / 2 - row, (p.left + p.right) / 2 - column)

    return min(profile.replaced, key=away)


def _outline(axis: Any, patch: Patch) -> None:
    from matplotlib.patches import Rectangle

    corner = patch.left - 0.5, patch.top - 0.5
    size = patch.right - patch.left, patch.bottom - patch.top
    axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=COLOURS[3], linewidth=1.8))


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad=_UNMEASURED)


def _spectra_range(ranks: Sequence[SeparationRank]) -> tuple[float, int]:
    """The lower end of the axis of singular values, and the largest index that is seen on it."""
    lowest, longest = 0.1, 1
    for rank in ranks:
        middle = _normalized(rank)
        seen = middle[middle > 1e-12]
        lowest, longest = min([lowest, *seen[-1:]]), max(longest, len(seen))
    return 10.0 ** math.floor(math.log10(lowest) - 0.1), longest


def _normalized(rank: SeparationRank) -> np.ndarray:
    """Medians over the outputs of the singular values over the largest."""
    values = rank.singular_values.numpy()
    return np.median(values / np.maximum(values[:, :1], np.finfo(np.float64).tiny), axis=0)


def _draw_spectrum(
    axis: Any, partition: str, rank: SeparationRank, colour: str, floor: float
) -> None:
    values = rank.singular_values.numpy()
    curves = values / np.maximum(values[:, :1], np.finfo(np.float64).tiny)
    index = np.arange(1, values.shape[1] + 1)
    low, high = (np.maximum(edge, floor / 10) for edge in (curves.min(0), curves.max(0)))
    axis.fill_between(index, low, high, color=colour, alpha=0.18, linewidth=0)
    effective = float(hk.effective_rank(rank.singular_values).median())
    axis.plot(
        index,
        np.maximum(_normalized(rank), floor / 10),
        color=colour,
        linewidth=1.6,
        label=f"{partition}: {effective:.3g}",
    )


def _plain(axis: Any) -> None:
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
