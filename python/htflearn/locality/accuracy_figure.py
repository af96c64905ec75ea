"""The paper's figure: accuracy against distance, with and without the regularizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.figures import COLOURS, save_figure
from htflearn.locality.setting import DISTANCE

__all__ = ["accuracy_rows", "draw_accuracy"]

_TITLES = {"isc": "Is Same Class", "pathfinder": "Pathfinder"}
_MARKERS = ("o", "s", "D", "^", "v", "P")


def accuracy_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over the seeds, a row for each coefficient and distance.

    Args:
        results: see :func:`htflearn.locality.training.train`.

    Returns:
        rows with ``coefficient``, ``distance``, ``mean`` and ``std`` (with n - 1; None for one
        seed) of the test accuracy, ``train`` (mean train accuracy), ``change`` and ``seeds``.

    Example:
        >>> results = [{"coefficient": 0.0, "distance": 40, "seed": seed, "change": None,
        ...     "test_accuracy": 0.5 + seed / 50, "train_accuracy": 1.0} for seed in range(3)]
        >>> accuracy_rows(results)[0]["mean"]
        0.52
    """
    rows = []
    keys = sorted({(r["coefficient"], r["distance"]) for r in results})
    for coefficient, distance in keys:
        group = [r for r in results if (r["coefficient"], r["distance"]) == (coefficient, distance)]
        test = np.array([r["test_accuracy"] for r in group])
        changes = [r["change"] for r in group if r["change"] is not None]
        rows.append(
            {
                "coefficient": coefficient,
                "distance": distance,
                "mean": float(test.mean()),
                "std": float(test.std(ddof=1)) if len(test) > 1 else None,
                "train": float(np.mean([r["train_accuracy"] for r in group])),
                "change": float(np.mean(changes)) if changes else None,
                "seeds": len(group),
            }
        )
    return rows


def draw_accuracy(results: Sequence[dict[str, Any]], task: str, path: Path) -> None:
    """Test accuracy against distance, a curve for each coefficient: means and standard deviations
    over the seeds, and a dot for each training.

    Args:
        results: see :func:`htflearn.locality.training.train`.
        task: ``"isc"`` or ``"pathfinder"``.
        path: the file, replaced as a whole.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    rows = accuracy_rows(results)
    distances = sorted({row["distance"] for row in rows})
    span = max(distances) - min(distances) or 1
    coefficients = sorted({row["coefficient"] for row in rows})
    for i, coefficient in enumerate(coefficients):
        mine = [row for row in rows if row["coefficient"] == coefficient]
        colour = COLOURS[i % len(COLOURS)]
        # Side by side, so that one curve's bars do not hide another's.
        shift = 0.012 * span * (i - (len(coefficients) - 1) / 2)
        axis.errorbar(
            [row["distance"] + shift for row in mine],
            [100 * row["mean"] for row in mine],
            [100 * (row["std"] or 0.0) for row in mine],
            color=colour,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            linewidth=1.8,
            capsize=3,
            label=_label(coefficient),
        )
        dots = [r for r in results if r["coefficient"] == coefficient]
        axis.plot(
            [r["distance"] + shift for r in dots],
            [100 * r["test_accuracy"] for r in dots],
            ".",
            color=colour,
            alpha=0.5,
            markersize=7,
            markeredgewidth=0,
        )
    axis.axhline(50, color="#808080", linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate(
        "chance",
        (1, 50),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color="#808080",
    )
    axis.set_title(f"{_TITLES[task]}: {_seeds({row['seeds'] for row in rows})}", fontsize=10)
    axis.set_xticks(distances)
    axis.set_xlabel(DISTANCE[task])
    axis.set_ylabel("test accuracy (%)")
    lowest = min(100 * (row["mean"] - (row["std"] or 0.0)) for row in rows)
    highest = max(100 * r["test_accuracy"] for r in results)
    axis.set_ylim(min(46.0, lowest - 2), min(102.0, highest + 12))  # room for the legend
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def _label(coefficient: float) -> str:
    return f"regularized, coefficient {coefficient:g}" if coefficient else "not regularized"


def _seeds(counts: set[int]) -> str:
    fewest, most = min(counts), max(counts)
    if most == 1:
        return "one seed"
    many = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    return f"mean and deviation of {many}"
