"""Where the nodes of a mode tree are drawn: the root on top, the leaves in a row at the bottom.

Leaves are a unit apart in the order of a depth-first walk, an interior node is halfway between its
outermost children, and an edge goes straight up from its child and turns in the gap beneath its
parent. So edges never cross, and nothing narrower than a unit is ever hidden by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass

import htfkernels as hk

__all__ = ["LEAST_HEIGHT", "Places", "Sizes", "place_tree"]

LEAST_HEIGHT = 2.95
"""Of a picture, since its key is as high."""

_MOST_LEAVES, _MOST_LEVELS = 32, 32
# For so many leaves: their distance, font, height of a curve.
_CARDS = ((8, 1.2, 7.5, 0.52), (16, 0.86, 6.5, 0.40), (32, 0.62, 5.5, 0.34))
_LINE = 1.25
_LEAST_GAP, _MOST_GAP = 0.2, 1.0
_MARKERS_WIDTH, _MARKERS_HEIGHT, _LEAF_DISTANCE = (6.0, 14.0), (2.6, 7.0), 0.22
_LEAF_TEXT = 0.5
_LARGEST_RADIUS, _SMALLEST_RADIUS = 0.07, 0.008


@dataclass(frozen=True)
class Sizes:
    """How large things are drawn, in inches (fonts in points).

    Attributes:
        cards: whether there is a card with a curve at each node; else there are markers.
        unit: between two leaves.
        font: of the text on a card.
        card_width, card_height: of a card with a curve, 0 without.
        empty_height: of the card of a node that was not measured.
        ports: width within which the edges from below meet a node.
    """

    cards: bool
    unit: float
    font: float
    card_width: float
    card_height: float
    empty_height: float
    ports: float


@dataclass(frozen=True)
class Places:
    """Where nodes are, by their index, in inches.

    Attributes:
        sizes: of what is drawn.
        x, y: centre of each node.
        half: half the height of each node's card; 0 with markers.
        radius: of each node's marker; 0 with cards.
        turns: for each level but the leaves' the height at which edges from below turn.
        width, height: of everything.
    """

    sizes: Sizes
    x: list[float]
    y: list[float]
    half: list[float]
    radius: list[float]
    turns: list[float]
    width: float
    height: float


def place_tree(tree: hk.ModeTree, measured: Collection[int]) -> Places:
    """Decides on sizes and places.

    Args:
        tree: any mode tree.
        measured: indices of the nodes of which there is a curve to draw.

    Example:
        >>> places = place_tree(hk.ModeTree.balanced(4), range(6))
        >>> places.sizes.cards, places.x[4] == (places.x[0] + places.x[1]) / 2
        (True, True)
    """
    cards = tree.order <= _MOST_LEAVES and tree.depth <= _MOST_LEVELS
    columns = _columns(tree)
    reach = [0.0] * tree.depth  # of the widest edge into a node of the level
    for node in tree.interior:
        ends = [abs(columns[c.index] - columns[node.index]) for c in node.children]
        reach[node.level - 1] = max(reach[node.level - 1], *ends)
    if cards:
        _, unit, font, curve = next(c for c in _CARDS if tree.order <= c[0])
        line = _LINE * font / 72
        gaps = [min(_LEAST_GAP + 0.07 * r * unit, _MOST_GAP) for r in reach]
        drawn = [any(n.index in measured for n in nodes) for nodes in tree.levels]
        others = sum(gaps) + line * sum(2.0 if d else 1.3 for d in drawn)
        if any(drawn):  # taller curves, where that leaves no page empty
            curve = min(max((LEAST_HEIGHT - others) / sum(drawn), curve), 2 * curve)
        sizes = Sizes(True, unit, font, 0.86 * unit, curve + 2 * line, 1.3 * line, 0.7 * unit)
        half = [
            (sizes.card_height if n.index in measured else sizes.empty_height) / 2
            for n in tree.nodes
        ]
        side, bottom, top = sizes.card_width / 2 + 0.03, 0.03, 0.03
    else:
        unit = min(max(_LEAF_DISTANCE * tree.order, _MARKERS_WIDTH[0]), _MARKERS_WIDTH[1])
        unit = min(unit / tree.order, 1.0)
        high = min(max(0.62 * tree.depth, _MARKERS_HEIGHT[0]), _MARKERS_HEIGHT[1])
        sizes = Sizes(False, unit, 0.0, 0.0, 0.0, 0.0, min(0.12, 0.6 * unit))
        half = [0.0] * len(tree.nodes)
        gaps = [high / tree.depth] * tree.depth
        side, bottom, top = max(unit / 2, 0.3), _LEAF_TEXT, 0.12
    centres, turns = [], []
    edge = bottom
    for level, nodes in enumerate(tree.levels):
        if level:
            turns.append(edge)
            edge += gaps[level - 1]
        high = max(half[n.index] for n in nodes)
        centres.append(edge + high)
        edge += 2 * high
    x = [side + unit * column for column in columns]
    radius = [0.0] * len(x)
    if not cards:
        room = min(0.4 * gaps[0], _LARGEST_RADIUS)
        radius = [
            max(min(0.3 * c * unit, room), _SMALLEST_RADIUS) for c in _clearance(tree, columns)
        ]
    return Places(
        sizes=sizes,
        x=x,
        y=[centres[node.level] for node in tree.nodes],
        half=half,
        radius=radius,
        turns=turns,
        width=2 * side + unit * (tree.order - 1),
        height=edge + top,
    )


def _columns(tree: hk.ModeTree) -> list[float]:
    """Where nodes are from left to right, leaves at whole numbers."""
    columns = [0.0] * len(tree.nodes)
    for column, mode in enumerate(tree.root.modes):
        columns[mode] = float(column)
    for node in tree.interior:
        below = [columns[c.index] for c in node.children]
        columns[node.index] = (min(below) + max(below)) / 2
    return columns


def _clearance(tree: hk.ModeTree, columns: list[float]) -> list[float]:
    """How far each node is from the next node or edge of its level."""
    crossing: list[list[float]] = [[] for _ in tree.levels]
    for node in tree.nodes:
        above = tree.depth + 1 if node.parent is None else node.parent.level
        for level in range(node.level, above):
            crossing[level].append(columns[node.index])
    found = [0.0] * len(columns)
    for level, nodes in enumerate(tree.levels):
        row = sorted(crossing[level])
        for node in nodes:
            at = columns[node.index]
            i = bisect_left(row, at)
            around = [abs(at - row[j]) for j in (i - 1, i + 1) if 0 <= j < len(row)]
            found[node.index] = min(around, default=float(tree.order))
    return found
