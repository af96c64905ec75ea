"""The paper's figure: accuracy against distance, with and without the regularizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.figures import COLOURS, SMOKE, new_figure, save_figure, stamp
from htflearn.locality.setting import DISTANCE, TITLES, network_names

__all__ = ["accuracy_rows", "draw_accuracy"]

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
    figure = new_figure(5.6, 4.0)
    axis = figure.subplots()
    rows = accuracy_rows(results)
    distances = sorted({row["distance"] for row in rows})
    span = max(distances) - min(distances) or 1
    names = network_names(row["coefficient"] for row in rows)
    for i, (coefficient, name) in enumerate(names.items()):
        mine = [row for row in rows if row["coefficient"] == coefficient]
        colour = COLOURS[i % len(COLOURS)]
        # Side by side, so that one curve's bars do not hide another's.
        shift = 0.012 * span * (i - (len(names) - 1) / 2)
        axis.errorbar(
            [row["distance"] + shift for row in mine],
            [100 * row["mean"] for row in mine],
            [100 * (row["std"] or 0.0) for row in mine] if any(r["std"] for r in mine) else None,
            color=colour,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            linewidth=1.8,
            capsize=3,
            label=name,
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
    axis.set_title(f"{TITLES[task]}: {_seeds({row['seeds'] for row in rows})}", fontsize=10)
    axis.set_xticks(distances)
    axis.set_xlabel(DISTANCE[task])
    axis.set_ylabel("test accuracy (%)")
    # A deviation may reach beyond 100%, accuracies do not.
    ends = [100 * (row["mean"] + sign * (row["std"] or 0.0)) for row in rows for sign in (-1, 1)]
    ends += [100 * r["test_accuracy"] for r in results]
    low, high = min(46.0, *(e - 2 for e in ends)), max(54.0, *(e + 2 for e in ends))
    axis.set_ylim(low, high)
    axis.set_yticks([tick for tick in axis.get_yticks() if low <= tick <= min(high, 100.0)])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    if any(result.get("smoke") for result in results):
        stamp(figure, SMOKE)
    save_figure(figure, path)


def _seeds(counts: set[int]) -> str:
    fewest, most = min(counts), max(counts)
    if most == 1:
        return "one seed"
    many = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    return f"mean and deviation of {many}"
