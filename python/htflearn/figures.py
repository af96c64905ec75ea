"""Figures, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from htflearn.files import whole_file
from htflearn.learned import risen

__all__ = [
    "COLOURS",
    "FORMATS",
    "SMOKE",
    "draw_dynamics",
    "draw_norms",
    "new_figure",
    "save_figure",
    "shape_of",
    "stamp",
]

FORMATS: dict[str, dict[str, None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Suffix -> metadata that would tell two equal pictures apart."""

SMOKE = "smoke run, not a result"
"""Stands on all that is made of a run whose sizes only show that everything works."""

# Okabe and Ito: tells apart under every common colour blindness, and in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_REST = "#B0B0B0"
_TITLES = {
    "mf": "Matrix factorization",
    "tf": "Tensor factorization",
    "htf": "Hierarchical tensor factorization",
}
_NOT_LEARNED = {
    "nothing": "nothing was learned",
    "entries": "only the entries given were fitted",
}
_QUANTITY = {"mf": "singular value", "tf": "component norm", "htf": "local component norm"}


def draw_dynamics(panels: list[dict[str, Any]], path: Path) -> None:
    """Component norms against iterations, a panel for each factorization, as a PNG.

    Args:
        panels: as :func:`htflearn.dynamics.run_panel` returns them; of several series the first in
            which a component has risen is drawn, or the first.
        path: the file, replaced as a whole.

    Raises:
        OSError: it cannot be written.
    """
    figure = new_figure(4.4 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
    if any(panel["settings"]["smoke"] for panel in panels):
        stamp(figure, SMOKE)
    save_figure(figure, path)


def draw_norms(
    iterations: Sequence[int],
    norms: Sequence[Sequence[float]],
    path: str | Path,
    title: str = "",
    quantity: str = "component norm",
    sort: bool = True,
) -> None:
    """What a tracker recorded, against iterations: the components that have risen in colour, the
    others in gray.

    Args:
        iterations: ``[T]``, of the logged norms.
        norms: ``[T, R]``, for example of :class:`htflearn.LocalComponentNorms` at one node.
        path: ``.png``, ``.svg`` or ``.pdf``, replaced as a whole.
        title: above the axes.
        quantity: label of the vertical axis.
        sort: as the tracker's. Sorted norms are named by their rank, from 1; unsorted ones, each a
            curve of its own, by the number of their component, from 0.

    Raises:
        OSError: it cannot be written.

    Example:
        >>> draw_norms([0, 10, 20], [[0.1, 0.1], [0.1, 3.0], [0.2, 4.0]], "n.png", sort=False)
    """
    figure = new_figure(4.8, 3.6)
    axis = figure.subplots()
    first = 1 if sort else 0
    _draw_norms(axis, iterations, norms, risen(iterations, norms), first)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(quantity)
    save_figure(figure, Path(path))


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches, whose texts and axes do not overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def stamp(figure: Any, text: str) -> None:
    """Writes a transparent text across a figure, over everything, as large as it fits.

    Args:
        figure: of matplotlib.
        text: one line.
    """
    width, height = figure.get_size_inches()
    # Slanted, and at most 80% of the width; a letter is about 0.6 font sizes wide.
    angle = min(20.0, math.degrees(math.atan2(0.5 * height, width)))
    size = min(0.8 * 72 * width / (0.6 * len(text)), 0.16 * 72 * height)
    figure.text(
        0.5, 0.5, text, rotation=angle, fontsize=size, color=COLOURS[3], alpha=0.3,
        ha="center", va="center", weight="bold", zorder=10,
    )  # fmt: skip


def shape_of(setting: dict[str, Any], times: str = "×") -> str:
    """The shape of a tensor of equal modes, in words where it has many.

    Args:
        setting: with ``dim`` and ``order``.
        times: between two dimensions.

    Example:
        >>> shape_of({"dim": 8, "order": 3}), shape_of({"dim": 2, "order": 8})
        ('8 × 8 × 8', '8 modes of 2')
    """
    if setting["order"] > 4:
        return f"{setting['order']} modes of {setting['dim']}"
    return f" {times} ".join([str(setting["dim"])] * setting["order"])


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure, whole or not at all.

    Args:
        figure: of matplotlib.
        path: the file, replaced as a whole; its suffix, one of :data:`FORMATS`, says in which
            format. The same figure gives the same bytes.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import rc_context

    kind = path.suffix.lower()
    with whole_file(path) as draft, rc_context({"svg.hashsalt": "htf"}):
        figure.savefig(draft, format=kind[1:], metadata=FORMATS[kind])


def _draw_panel(axis: Any, panel: dict[str, Any]) -> None:
    settings = panel["settings"]
    series = next((s for s in panel["series"] if s["components"]), panel["series"][0])
    name = settings["panel"]
    _draw_norms(axis, series["iterations"], series["norms"], series["components"])
    title = f"{_TITLES[name]}\n{shape_of(settings)}, rank {settings['rank']}, "
    title += f"{settings['samples']:,} entries given"
    if panel["learned"] == "target":
        axis.set_title(title, fontsize=10)
    else:
        axis.set_title(f"{title}\n{_NOT_LEARNED[panel['learned']]}", fontsize=10, color=COLOURS[3])
    axis.set_ylabel(_QUANTITY[name] + (f" at {series['name']}" if name == "htf" else ""))


def _draw_norms(
    axis: Any,
    iterations: Sequence[int],
    norms: Sequence[Sequence[float]],
    components: Sequence[dict[str, Any]],
    first: int = 1,
) -> None:
    """Curves against iterations, those of the components in colour, numbered from ``first``."""
    curves = list(zip(*norms, strict=True))
    learned = [component["curve"] for component in components]
    others = [i for i in range(len(curves)) if i not in learned]
    for i in others:
        axis.plot(iterations, curves[i], color=_REST, linewidth=1.0)
    for place in reversed(range(len(learned))):  # the largest on top
        curve, colour = curves[learned[place]], COLOURS[place % len(COLOURS)]
        axis.plot(iterations, curve, color=colour, linewidth=1.8)
        rose = list(iterations).index(components[place]["rose"])
        axis.plot(iterations[rose], curve[rose], "o", color=colour, markersize=4.5)
    axis.set_xlabel("iteration")
    axis.set_xlim(0, max(iterations[-1], 1))
    axis.set_ylim(0, 1.05 * max(max(curve) for curve in curves) or 1.0)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.locator_params(axis="x", nbins=6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    names = [
        (curves[i][-1], str(first + i), COLOURS[place % len(COLOURS)])
        for place, i in enumerate(learned)
    ]
    if others:
        rest = "others" if learned else "all"
        names.append((max(curves[i][-1] for i in others), rest, "#808080"))
    _label_ends(axis, names)


def _label_ends(axis: Any, names: list[tuple[float, str, str]]) -> None:
    """Names curves where they end, moved apart so that no name hides another.

    Args:
        axis: of the curves.
        names: where each ends, its name and its colour, the largest first.
    """
    top = axis.get_ylim()[1]
    gap, below = 0.055 * top, -1.0 * top
    for end, text, colour in sorted(names):
        below = max(end, below + gap)
        axis.annotate(
            text,
            (1.0, below),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
        )
