"""Spectra drawn on the mode tree: decay curves at the nodes, or, where the tree is too large for
that, coloured markers with decay curves for each level beneath.

All lengths are inches: the tree's axes have one data unit to the inch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.figures import save_figure
from htflearn.spectra.measure import Measured, NodeSpectrum
from htflearn.spectra.places import LEAST_HEIGHT, Places, Sizes, place_tree
from htflearn.spectra.table import describe, level_groups, short_label

__all__ = ["draw_spectra"]

_INK, _FAINT, _EDGE, _FRAME = "#1A1A1A", "#6B7280", "#C3CAD2", "#D5DAE0"
_LINE = 1.25  # of text, in font sizes
_SMALLEST = 1e-16  # nothing of float64 is to be seen below it, relative to the largest
_WIDEST_EDGE, _THINNEST_EDGE = 6.0, 0.25
_MARGIN, _TITLE, _SIDE = 0.15, 0.56, 1.45
_LEAST_WIDTH = 3.7
_PANEL, _PANEL_GAP, _PANEL_LABELS, _MOST_PANELS = 1.15, 0.12, 0.62, 12
_AXIS, _LEAST_PANEL = 0.55, 0.85
_GROUND, _CUT = "#F4F6F8", "#D55E00"
_SAMPLE = (1.0, 0.75, 0.6, 0.5, 0.3)
_KEY_OF_CARDS = """beneath: numerical /
effective rank
dashed: where the
numerical rank ends
edges: effective rank"""
_KEY_OF_MARKERS = """at nodes: numerical
above effective rank
edges: effective rank

below: median of the
curves of a level, and
between which they lie;
median ranks
dashed: where the
numerical rank ends"""
_SMALL_TEXT = 5.5
_LABEL_WIDTH = 0.62  # of a digit, in font sizes, a little more than it is
_TITLE_WIDTH, _SMALLEST_TITLE = 0.56, 6.0  # of a letter, on average


def draw_spectra(measured: Measured, path: Path, title: str = "") -> None:
    """Draws the mode tree with the spectra of its nodes; colours tell how much of its bound the
    effective rank takes, the width of the edge above a node is proportional to it.

    Args:
        measured: the spectra; nodes that are not among them are drawn empty.
        path: ``.png``, ``.svg`` or ``.pdf``, replaced as a whole.
        title: in the first line.

    Raises:
        OSError: it cannot be written.
    """
    save_figure(_figure(measured, title), path)


def _figure(measured: Measured, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = place_tree(measured.layout.tree, {s.node.index for s in measured.spectra})
    tree_width = max(places.width, _LEAST_WIDTH)
    groups = []
    if not places.sizes.cards:
        panels = min(int((tree_width - _AXIS) / _LEAST_PANEL), _MOST_PANELS)
        groups = level_groups(measured.spectra, panels)
    tree_height = max(places.height, LEAST_HEIGHT)
    beneath = _PANEL + 2 * _PANEL_LABELS if groups else 0.0
    width = tree_width + _SIDE + 2 * _MARGIN
    height = _TITLE + tree_height + beneath + 2 * _MARGIN
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)

    def axes(left: float, bottom: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    bottom = _MARGIN + beneath
    tree = axes(_MARGIN, bottom, tree_width, tree_height)
    left, low = (tree_width - places.width) / 2, tree_height - places.height
    tree.set_xlim(-left, tree_width - left)
    tree.set_ylim(-low, tree_height - low)
    tree.axis("off")
    scale = _Scale(measured)
    _draw_edges(tree, measured, places)
    if places.sizes.cards:
        _draw_cards(tree, measured, places, scale)
    else:
        _draw_markers(tree, measured, places, scale)
        _draw_panels(axes, groups, tree_width, scale)
    side = _MARGIN + tree_width + 0.25
    _draw_key(figure, axes, side, bottom + tree_height, places.sizes, scale)
    _draw_title(figure, measured, title, width, height)
    return figure


class _Scale:
    """What all the curves have in common: the range of the logarithmic axis and the colours."""

    def __init__(self, measured: Measured) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import Normalize

        self.colours, self.norm = colormaps["viridis"], Normalize(0.0, 1.0)
        if measured.rtol:
            self.floor = min(measured.rtol, 0.1)
            return
        # No lower than there is something to see, down to rounding errors.
        lowest = min((s.rtol for s in measured.spectra), default=0.1) or 1.0
        for s in measured.spectra:
            curve = s.normalized
            lowest = min([lowest, *curve[curve > 0][-1:].tolist()])
        self.floor = min(max(10.0 ** math.floor(math.log10(lowest) - 0.1), _SMALLEST), 0.1)

    def colour(self, fraction: float) -> Any:
        return self.colours(self.norm(fraction))

    def heights(self, values: Any) -> Any:
        """Where values are between the floor (0) and 1 (1)."""
        clipped = np.clip(np.asarray(values, dtype=float), self.floor, 1.0)
        return 1.0 - np.log10(clipped) / math.log10(self.floor)

    def curve(self, s: NodeSpectrum) -> Any:
        return self.heights(s.normalized.numpy())


def _draw_edges(axes: Any, measured: Measured, places: Places) -> None:
    """Bands between the nodes, side by side where they meet, as wide as the ranks they carry."""
    from matplotlib.collections import PathCollection
    from matplotlib.path import Path as Curve

    tree = measured.layout.tree
    ranks = {s.node.index: s.effective_rank for s in measured.spectra}
    largest = max(ranks.values(), default=0.0)
    points = _WIDEST_EDGE / largest if largest else 0.0
    room = 72 * places.sizes.ports
    for node in tree.interior:
        total = sum(ranks.get(c.index, 0.0) for c in node.children)
        if total * points > room:
            points = room / total
    curves, widths = [], []
    codes = [Curve.MOVETO, Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    for node in tree.interior:
        drawn = [max(points * ranks.get(c.index, 0.0), _THINNEST_EDGE) for c in node.children]
        squeezed = min(1.0, room / sum(drawn)) / 72
        port = places.x[node.index] - sum(drawn) * squeezed / 2
        top = places.y[node.index] - places.half[node.index]
        order = sorted(range(len(drawn)), key=lambda i: places.x[node.children[i].index])
        for i in order:
            child = node.children[i].index
            x, end = places.x[child], port + drawn[i] * squeezed / 2
            port += drawn[i] * squeezed
            start = places.y[child] + places.half[child]
            turn = max(places.turns[node.level - 1], start)
            middle = (top + turn) / 2
            corners = [(x, start), (x, turn), (x, middle), (end, middle), (end, top)]
            curves.append(Curve(corners, codes))
            widths.append(drawn[i])
    axes.add_collection(
        PathCollection(
            curves,
            linewidths=widths,
            edgecolors=_EDGE,
            facecolors="none",
            capstyle="butt",
            zorder=1,
        )
    )


def _draw_cards(axes: Any, measured: Measured, places: Places, scale: _Scale) -> None:
    """At each node its name, its decay curve over the index, and its ranks."""
    from matplotlib.collections import LineCollection, PolyCollection

    sizes = places.sizes
    spectra = {s.node.index: s for s in measured.spectra}
    longest = int(sizes.card_width * 72 / (_LABEL_WIDTH * sizes.font))
    polygons, colours, outlines, dashes, backs, boxes = [], [], [], [], [], []
    for node in measured.layout.tree.nodes:
        x, y = places.x[node.index], places.y[node.index]
        left, bottom = x - sizes.card_width / 2, y - sizes.card_height / 2
        line = _LINE * sizes.font / 72
        name = short_label(node, longest)
        if len(name) > longest:
            name = name.replace(" level ", "·")
        s = spectra.get(node.index)
        if s is None:
            high = sizes.empty_height
            backs.append(_box(left, y - high / 2, sizes.card_width, high))
            _write(axes, x, y, name, sizes.font, _FAINT)
            continue
        backs.append(_box(left, bottom, sizes.card_width, sizes.card_height))
        low, high = bottom + line, sizes.card_height - 2 * line
        pad = 0.04 * sizes.card_width
        wide = sizes.card_width - 2 * pad
        boxes.append(_box(left + pad, low, wide, high))
        steps = np.repeat(scale.curve(s), 2) * high + low
        ends = np.linspace(left + pad, left + pad + wide, len(s.values) + 1)
        across = np.repeat(ends, 2)[1:-1]
        outline = np.stack([across, steps], axis=1)
        polygons.append([(left + pad, low), *outline, (left + pad + wide, low)])
        outlines.append(outline)
        colours.append(scale.colour(s.fraction))
        if s.rtol > scale.floor:
            at = low + float(scale.heights(s.rtol)) * high
            dashes.append([(left + pad, at), (left + pad + wide, at)])
        _write(axes, x, y + sizes.card_height / 2 - line / 2, name, sizes.font, _FAINT)
        ranks = f"{s.numerical_rank} / {_short(s.effective_rank)}"
        _write(axes, x, bottom + line / 2, ranks, sizes.font, _INK)
    axes.add_collection(
        PolyCollection(backs, facecolors="white", edgecolors=_FRAME, linewidths=0.7, zorder=2)
    )
    axes.add_collection(
        PolyCollection(boxes, facecolors=_GROUND, edgecolors="none", linewidths=0, zorder=3)
    )
    axes.add_collection(PolyCollection(polygons, facecolors=colours, linewidths=0, zorder=4))
    axes.add_collection(LineCollection(outlines, colors=_INK, linewidths=0.7, zorder=5))
    axes.add_collection(
        LineCollection(dashes, colors=_CUT, linewidths=0.6, linestyles=(0, (3, 2)), zorder=6)
    )


def _draw_markers(axes: Any, measured: Measured, places: Places, scale: _Scale) -> None:
    """At each node a coloured marker, and its ranks where there is room."""
    from matplotlib.collections import EllipseCollection

    spectra = {s.node.index: s for s in measured.spectra}
    nodes = measured.layout.tree.nodes
    drawn = [2 * places.radius[n.index] for n in nodes]
    faces = [
        scale.colour(spectra[n.index].fraction) if n.index in spectra else "white" for n in nodes
    ]
    axes.add_collection(
        EllipseCollection(
            drawn,
            drawn,
            [0.0] * len(nodes),
            units="xy",
            offsets=[(places.x[n.index], places.y[n.index]) for n in nodes],
            offset_transform=axes.transData,
            facecolors=faces,
            edgecolors=_INK,
            linewidths=[min(0.5, 4 * d) for d in drawn],
            zorder=3,
        )
    )
    line = _LINE * _SMALL_TEXT / 72
    if places.sizes.unit > line:
        for leaf in measured.layout.tree.leaves:
            if leaf.index in spectra:
                s = spectra[leaf.index]
                text = f"{s.numerical_rank} / {_short(s.effective_rank)}"
                below = places.y[leaf.index] - places.radius[leaf.index] - 0.04
                _write(axes, places.x[leaf.index], below, text, _SMALL_TEXT, _INK, upright=True)
    taken = np.array(
        [[places.x[n.index], places.y[n.index], places.radius[n.index]] for n in nodes]
    )
    taken = np.concatenate([taken, taken[:, 2:]], axis=1)  # centres, half widths, half heights
    for level in reversed(measured.layout.tree.levels[1:]):
        before, texts = taken, []
        inside = [spectra[n.index] for n in level if n.index in spectra]
        for s in inside:
            at = s.node.index
            lines = [str(s.numerical_rank), _short(s.effective_rank)]
            half = np.array([max(map(len, lines)) * _LABEL_WIDTH * _SMALL_TEXT / 144, line])
            right, up = places.radius[at] + half + 0.03
            sides = [(right, 0.0), (-right, 0.0)]
            # Where there are more at this height, it would not be clear whose it is.
            sides += [(-half[0], up)] if len(level) == 1 else []
            for aside, above in sides:
                centre = np.array([places.x[at] + aside, places.y[at] + above])
                apart = np.abs(taken[:, :2] - centre) >= taken[:, 2:] + half
                if bool(apart.any(axis=1).all()):
                    texts.append((*centre, "\n".join(lines)))
                    taken = np.concatenate([taken, [[*centre, *half]]])
                    break
        if 2 * len(texts) < len(inside):  # a few at the ends tell nothing of a level
            taken = before
            continue
        for x, y, text in texts:
            _write(axes, x, y, text, _SMALL_TEXT, _INK, halo=True)


def _draw_panels(
    axes: Any, groups: Sequence[tuple[str, list[NodeSpectrum]]], width: float, scale: _Scale
) -> None:
    """For each level the decay curves of its nodes: their median, and between which they lie."""
    left = _MARGIN + _AXIS
    wide = min((width - _AXIS) / len(groups) - _PANEL_GAP, 2.0)
    for i, (name, group) in enumerate(groups):
        panel = axes(left + i * (wide + _PANEL_GAP), _MARGIN + _PANEL_LABELS, wide, _PANEL)
        longest = max(len(s.values) for s in group)
        curves = np.full((len(group), longest), np.nan)
        for row, s in zip(curves, group, strict=True):
            row[: len(s.values)] = np.maximum(s.normalized.numpy(), scale.floor)
        ends = np.arange(longest + 1) + 0.5
        middle = np.nanmedian(curves, axis=0)
        low, high = np.nanmin(curves, axis=0), np.nanmax(curves, axis=0)
        fraction = float(np.median([s.fraction for s in group]))
        panel.stairs(high, ends, baseline=low, fill=True, color=scale.colour(fraction), alpha=0.45)
        panel.stairs(middle, ends, baseline=None, color=_INK, linewidth=1.1)
        rtol = max(s.rtol for s in group)
        if rtol > scale.floor:
            panel.axhline(rtol, color=_CUT, linewidth=0.6, linestyle=(0, (3, 2)))
        panel.set_yscale("log")
        panel.set_ylim(scale.floor, 1.6)
        panel.set_xlim(0.5, longest + 0.5)
        panel.set_xticks([1, longest] if longest > 1 else [1])
        panel.tick_params(labelsize=6.5, length=2, labelleft=i == 0, colors=_FAINT)
        panel.tick_params(which="minor", left=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color(_FRAME)
        ranks = np.median([(s.numerical_rank, s.effective_rank) for s in group], axis=0)
        count = f"{len(group)} node{'s' if len(group) > 1 else ''}"
        panel.set_title(
            f"{'levels' if '-' in name else 'level'} {name}\n{count}\n"
            f"{ranks[0]:.0f} / {_short(float(ranks[1]))}",
            fontsize=6.5,
            color=_INK,
            linespacing=1.25,
            pad=3,
        )
        if i == 0:
            panel.set_ylabel("singular value\n/ the largest", fontsize=6.5, color=_FAINT)
            panel.set_xlabel("index", fontsize=6.5, color=_FAINT, labelpad=1)


def _draw_key(figure: Any, axes: Any, left: float, top: float, sizes: Sizes, scale: _Scale) -> None:
    from matplotlib.cm import ScalarMappable

    bar = axes(left, top - 1.3, 0.13, 1.0)
    mappable = ScalarMappable(scale.norm, scale.colours)
    colours = figure.colorbar(mappable, cax=bar, ticks=[0, 0.5, 1])
    colours.outline.set_linewidth(0.4)
    bar.tick_params(labelsize=7, length=2, colors=_FAINT)
    bar.set_title("effective rank\n/ bound", fontsize=7, color=_INK, loc="left", pad=5)
    below = 1.5
    if sizes.cards:
        sample = axes(left, top - 2.06, 0.5, 0.3)
        sample.set_facecolor(_GROUND)
        sample.stairs(_SAMPLE, fill=True, color="#9AA3AD")
        sample.set_xlim(0.0, len(_SAMPLE))
        sample.set_xticks([])
        sample.set_xlabel("index, 1 to bound", fontsize=6.5, color=_FAINT, loc="left", labelpad=4)
        sample.set_ylim(0.0, 1.0)
        sample.set_yticks([0.0, 1.0], [_power_of_ten(scale.floor), "1"])
        sample.yaxis.tick_right()
        sample.tick_params(labelsize=6.5, length=2, pad=1, colors=_FAINT)
        sample.spines[:].set_color(_FRAME)
        sample.set_title(
            "singular values\n/ the largest", fontsize=7, color=_INK, loc="left", pad=4
        )
        below = 2.3
    text = axes(left, top - LEAST_HEIGHT, 1.0, LEAST_HEIGHT)
    text.axis("off")
    text.set_ylim(0.0, LEAST_HEIGHT)
    lines = _KEY_OF_CARDS if sizes.cards else _KEY_OF_MARKERS
    _write(text, 0.0, LEAST_HEIGHT - below, lines, 6.5, _FAINT, corner=True)


def _draw_title(figure: Any, measured: Measured, title: str, width: float, height: float) -> None:
    top = 1 - 0.12 / height
    heading = f"Singular values of the matricizations{': ' if title else ''}{title}"
    room = width - 2 * _MARGIN

    def fit(text: str, font: float) -> tuple[str, float]:
        """Smaller, then without its middle, where the figure is narrow."""
        width = _TITLE_WIDTH / 72
        font = max(min(font, room / (width * len(text))), _SMALLEST_TITLE)
        most = int(room / (width * font))
        if len(text) > most:
            text = f"{text[: most - most // 2 - 1]}…{text[-(most // 2) :]}"
        return text, font

    text, font = fit(heading, 9.5)
    figure.text(_MARGIN / width, top, text, fontsize=font, color=_INK, va="top")
    text, font = fit(describe(measured.layout), 7.5)
    place = (_MARGIN / width, top - 0.19 / height)
    figure.text(*place, text, fontsize=font, color=_FAINT, va="top")


def _box(left: float, bottom: float, wide: float, high: float) -> list[tuple[float, float]]:
    right, top = left + wide, bottom + high
    return [(left, bottom), (left, top), (right, top), (right, bottom)]


def _write(
    axes: Any,
    x: float,
    y: float,
    text: str,
    font: float,
    colour: str,
    upright: bool = False,
    halo: bool = False,
    corner: bool = False,
) -> None:
    """Text centred at a point; or hanging from it, upright; or right of and below it."""
    from matplotlib.patheffects import withStroke

    axes.text(
        x,
        y,
        text,
        fontsize=font,
        color=colour,
        ha="left" if corner else "center",
        va="top" if upright or corner else "center",
        rotation=90 if upright else 0,
        linespacing=1.1,
        path_effects=[withStroke(linewidth=1.4, foreground="white")] if halo else None,
        zorder=7,
    )


def _short(rank: float) -> str:
    return f"{rank:.2f}" if rank < 10 else f"{rank:.1f}" if rank < 100 else f"{rank:.0f}"


def _power_of_ten(value: float) -> str:
    exponent = math.log10(value)
    if abs(exponent - round(exponent)) < 1e-9:
        return f"$10^{{{round(exponent)}}}$"
    return f"{value:.0e}"
