"""Figures, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from htflearn.files import whole_file

__all__ = ["COLOURS", "FORMATS", "draw_dynamics", "save_figure"]

FORMATS: dict[str, dict[str, None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Suffix -> metadata that would tell two equal pictures apart."""

# Okabe and Ito: tells apart under every common colour blindness, and in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_REST = "#B0B0B0"
_TITLES = {
    "mf": "Matrix factorization",
    "tf": "Tensor factorization",
    "htf": "Hierarchical tensor factorization",
}
_QUANTITY = {"mf": "singular value", "tf": "component norm", "htf": "local component norm"}


def draw_dynamics(panels: list[dict[str, Any]], path: Path) -> None:
    """Component norms against iterations, a panel for each factorization, as a PNG.

    Args:
        panels: as :func:`htflearn.dynamics.run_panel` returns them; of several series the first is
            drawn.
        path: the file, replaced as a whole.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(panels), 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
    save_figure(figure, path)


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
    settings, series = panel["settings"], panel["series"][0]
    name, iterations = settings["panel"], series["iterations"]
    curves = list(zip(*series["norms"], strict=True))
    learned = series["components"]
    for curve in curves[len(learned) :]:
        axis.plot(iterations, curve, color=_REST, linewidth=1.0)
    for i in reversed(range(len(learned))):  # the largest on top
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(iterations, curves[i], color=colour, linewidth=1.8)
        rose = iterations.index(learned[i]["rose"])
        axis.plot(iterations[rose], curves[i][rose], "o", color=colour, markersize=4.5)
    shape = " × ".join([str(settings["dim"])] * settings["order"])
    axis.set_title(
        f"{_TITLES[name]}\n{shape}, rank {settings['rank']}, {settings['samples']:,} entries given",
        fontsize=10,
    )
    axis.set_xlabel("iteration")
    axis.set_ylabel(_QUANTITY[name] + (f" at {series['name']}" if name == "htf" else ""))
    axis.set_xlim(0, max(iterations[-1], 1))
    axis.set_ylim(0, 1.05 * max(max(curve) for curve in curves))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.locator_params(axis="x", nbins=6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    _label_ends(axis, [curve[-1] for curve in curves], len(learned))


def _label_ends(axis: Any, ends: list[float], learned: int) -> None:
    """Names the curves where they end, moved apart so that no name hides another."""
    names = [(ends[i], str(i + 1), COLOURS[i % len(COLOURS)]) for i in range(learned)]
    if len(ends) > learned:
        names.append((ends[learned], "others", "#808080"))
    top = axis.get_ylim()[1]
    gap, below = 0.055 * top, -1.0 * top
    for end, text, colour in reversed(names):
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
