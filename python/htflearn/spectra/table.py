"""Spectra as a table for the terminal: a row for each node, or for each level of a large tree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import htfkernels as hk
from htflearn.spectra.measure import Measured, NodeSpectrum
from htflearn.trackers import node_label

__all__ = ["LARGEST_TABLE", "describe", "level_groups", "short_label", "table"]

LARGEST_TABLE = 40
"""Nodes, above which the table has a row for each level."""

_LARGEST_LEVELS = 20
_LONGEST_LABEL = 24
_LARGEST_COUNT = 10**6


def table(
    measured: Measured,
    top: int | None = None,
    every: bool = False,
    title: str = "",
    most: int = LARGEST_TABLE,
) -> Any:
    """A table of the ranks.

    Args:
        measured: the spectra.
        top: how many singular values of each node are shown, in place of the largest alone.
        every: a row for each node, however many there are.
        title: above everything else.
        most: nodes, above which there is a row for each level instead.

    Returns:
        what rich prints.
    """
    from rich.console import Group
    from rich.text import Text

    whole = every or len(measured.spectra) <= most
    lines = [line for line in (title, describe(measured.layout)) if line]
    ranks = measured.hierarchical_rank
    if ranks is not None:
        lines.append(f"hierarchical rank: {_tuple(ranks, every)}")
    shown = _of_nodes(measured, top) if whole else _of_levels(measured)
    notes = [_tolerances(measured)]
    if not whole:
        notes.append(
            "ranks: smallest/median/largest of the level; --all or --nodes shows single nodes"
        )
    return Group(Text("\n".join(lines)), shown, Text("\n".join(notes), style="dim"))


def describe(layout: hk.Layout) -> str:
    """A model in a line.

    Example:
        >>> describe(hk.HTF(hk.ModeTree.balanced(4), 8, [16, 4]).layout)
        'order 4, 7 nodes, mode dimensions 8, local ranks 4 to 16'
    """
    tree = layout.tree
    parts = [
        f"order {tree.order}",
        f"{len(tree.nodes)} nodes",
        f"mode dimensions {_span(layout.mode_dims)}",
        f"local ranks {_span(layout.ranks)}",
    ]
    if layout.out_features > 1:
        parts.append(f"{layout.out_features} outputs")
    if layout.share_weights:
        parts.append("shared weights")
    return ", ".join(parts)


def short_label(node: hk.Node, longest: int = _LONGEST_LABEL) -> str:
    """The node's name; where that is long, its first modes and their number.

    Example:
        >>> short_label(hk.ModeTree.halves(32).node(range(0, 32, 2)), 12)
        '{0,2,4,… 16}'
    """
    label = node_label(node)
    if len(label) <= longest:
        return label
    modes, after = label[1:].split("}")
    end = f",… {len(node.modes)}}}"
    kept = modes[: max(longest - len(end) - 1, 1)]
    # Cut between two runs of modes, so that no number is cut.
    if modes[len(kept) : len(kept) + 1] != ",":
        kept = kept.rpartition(",")[0] or modes.partition(",")[0]
    return f"{{{kept}{end}{after}"


def level_groups(
    spectra: Sequence[NodeSpectrum], most: int = _LARGEST_LEVELS
) -> list[tuple[str, list[NodeSpectrum]]]:
    """The spectra by level, the leaves first; neighbouring levels of interior nodes together where
    there are many.

    Args:
        spectra: of nodes of one tree.
        most: groups at most.

    Returns:
        the level or the levels, and what was measured there.
    """
    levels = sorted({s.node.level for s in spectra})
    leaves = [levels[:1]] if levels[:1] == [0] else []
    above = levels[len(leaves) :]
    size = math.ceil(len(above) / max(most - len(leaves), 1)) or 1
    parts = leaves + [above[i : i + size] for i in range(0, len(above), size)]
    names = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]
    place = {level: i for i, part in enumerate(parts) for level in part}
    groups: list[tuple[str, list[NodeSpectrum]]] = [(name, []) for name in names]
    for s in spectra:
        groups[place[s.node.level]][1].append(s)
    return groups


def _of_nodes(measured: Measured, top: int | None) -> Any:
    columns: dict[str, Callable[[NodeSpectrum], str]] = {
        "rows": lambda s: _count(s.rows),
        "R": lambda s: "-" if s.local_rank is None else str(s.local_rank),
        "bound": lambda s: str(s.bound),
    }
    if top is None:
        columns["sigma_1"] = lambda s: _scientific(s, 0)
    columns |= {
        "numer-\nical": lambda s: str(s.numerical_rank),
        "effec-\ntive": lambda s: f"{s.effective_rank:.2f}",
        "stable": lambda s: f"{s.stable_rank:.2f}",
        "Rényi-2": lambda s: f"{s.renyi2_rank:.2f}",
        "entropy": lambda s: f"{s.entanglement_entropy:.3f}",
    }
    if top is not None:
        columns["singular values"] = lambda s: " ".join(
            _scientific(s, i) for i in range(min(top, len(s.values)))
        )
    made = _table("node", columns)
    for s in measured.spectra:
        made.add_row(short_label(s.node), *(cell(s) for cell in columns.values()))
    return made


def _of_levels(measured: Measured) -> Any:
    columns: dict[str, Callable[[list[NodeSpectrum]], str]] = {
        "nodes": lambda group: str(len(group)),
        "bound": lambda group: _span([s.bound for s in group]),
        "numerical": lambda group: _spread([s.numerical_rank for s in group]),
        "effective": lambda group: _spread([s.effective_rank for s in group]),
        "stable": lambda group: _spread([s.stable_rank for s in group]),
        "Rényi-2": lambda group: _spread([s.renyi2_rank for s in group]),
    }
    made = _table("level", columns)
    for name, group in level_groups(measured.spectra):
        made.add_row(name, *(cell(group) for cell in columns.values()))
    return made


def _table(first: str, names: Any) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column(first, overflow="fold")
    for name in names:
        made.add_column(name, justify="left" if name == "singular values" else "right")
    return made


def _tolerances(measured: Measured) -> str:
    rtols = sorted({s.rtol for s in measured.spectra})
    text = " to ".join(f"{rtol:.2g}" for rtol in dict.fromkeys((rtols[0], rtols[-1])))
    way = "" if measured.method == "auto" else f"; method {measured.method}"
    return f"numerical rank: above {text} of the largest singular value; entropy in nats{way}"


def _tuple(ranks: tuple[int, ...], every: bool) -> str:
    """The tuple; a long one with its repetitions counted and, unless all is wanted, its end cut."""
    if every or len(ranks) <= LARGEST_TABLE:
        return f"({', '.join(map(str, ranks))})"
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][0] == rank:
            runs[-1][1] += 1
        else:
            runs.append([rank, 1])
    parts = [str(rank) if times == 1 else f"{rank} x {times}" for rank, times in runs]
    more = [f"... {len(ranks)} in all"] if len(parts) > LARGEST_TABLE else []
    return f"({', '.join([*parts[:LARGEST_TABLE], *more])})"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _spread(values: Sequence[float]) -> str:
    form = "{:.0f}" if isinstance(values[0], int) else "{:.1f}"
    parts = [form.format(v) for v in (min(values), statistics.median(values), max(values))]
    return parts[0] if len(set(parts)) == 1 else "/".join(parts)


def _count(number: int) -> str:
    """A number, which may be far beyond what a float holds."""
    return f"{number:,}" if number < _LARGEST_COUNT else _power(math.log10(number), 1)


def _scientific(s: NodeSpectrum, i: int) -> str:
    value = float(s.values[i])
    if not s.log2_scale or not value:
        return f"{value:.3g}"
    exponent = math.log10(value) + s.log2_scale * math.log10(2)
    return f"{10**exponent:.3g}" if abs(exponent) < 300 else _power(exponent, 2)


def _power(exponent: float, digits: int) -> str:
    whole = math.floor(exponent)
    return f"{10 ** (exponent - whole):.{digits}f}e{whole:+03d}"
