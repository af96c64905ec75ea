"""Figures of norms against iterations: what they say is true, and nothing in them overlaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drawn_figures import keep_figures, texts_overlap

from htflearn import figures
from htflearn.figures import draw_dynamics, draw_norms
from htflearn.learned import risen

ITERATIONS = list(range(0, 3001, 100))
FLAT = [[0.003, 0.002, 0.002] for _ in ITERATIONS]
GROWING = [[3.0 * (it > 500), 2.0 * (it > 900) + 1e-3, 1e-3] for it in ITERATIONS]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    return keep_figures(monkeypatch, figures)


def panel(name: str, order: int, *series: list[list[float]], **changes: Any) -> dict[str, Any]:
    """What ``run_panel`` returns, as far as it is drawn."""
    settings = {"panel": name, "dim": 64, "order": order, "rank": 12, "samples": 1_000_000}
    return {
        "settings": settings | {"smoke": False} | changes.pop("settings", {}),
        "learned": "target",
        "series": [
            {
                "name": f"{{{i}-{i + 8}}}",
                "iterations": ITERATIONS,
                "norms": norms,
                "components": risen(ITERATIONS, norms),
            }
            for i, norms in enumerate(series)
        ],
        **changes,
    }


def labels(axis: Any) -> list[str]:
    """The names at the ends of the curves, from below."""
    return [text.get_text() for text in axis.texts]


@pytest.mark.parametrize(("order", "count"), [(2, 3), (4, 1), (8, 1), (16, 3)])
def test_panels_of_any_order(tmp_path: Path, drawn: list[Any], order: int, count: int) -> None:
    names = ("htf", "mf", "tf")[:count]
    draw_dynamics([panel(name, order, GROWING) for name in names], tmp_path / "d.png")
    (figure,) = drawn
    assert texts_overlap(figure) == []
    title = figure.axes[0].get_title()
    assert title.startswith("Hierarchical tensor factorization\n")
    shape = " × ".join(["64"] * order) if order <= 4 else f"{order} modes of 64"
    assert title.endswith(f"\n{shape}, rank 12, 1,000,000 entries given")
    assert all(labels(axis) == ["others", "2", "1"] for axis in figure.axes)


@pytest.mark.parametrize(
    ("learned", "says"),
    [("nothing", "nothing was learned"), ("entries", "only the entries given were fitted")],
)
def test_a_panel_that_did_not_learn_its_target_says_so(
    tmp_path: Path, drawn: list[Any], learned: str, says: str
) -> None:
    panels = [panel("htf", 8, FLAT, FLAT, learned=learned), panel("tf", 8, GROWING)]
    draw_dynamics(panels, tmp_path / "d.png")
    (figure,) = drawn
    assert texts_overlap(figure) == []
    flat, other = figure.axes
    assert flat.get_title().endswith(f"\n{says}") and says not in other.get_title()
    assert labels(flat) == ["all"], "no curve has risen"
    assert {line.get_color() for line in flat.lines} == {"#B0B0B0"}
    assert figure.texts == []


def test_the_series_in_which_something_has_risen(tmp_path: Path, drawn: list[Any]) -> None:
    draw_dynamics([panel("htf", 4, FLAT, GROWING, GROWING)], tmp_path / "d.png")
    assert drawn[0].axes[0].get_ylabel() == "local component norm at {1-9}"


def test_a_smoke_run_says_so(tmp_path: Path, drawn: list[Any]) -> None:
    panels = [panel(n, 3, GROWING, settings={"smoke": True}) for n in ("mf", "tf", "htf")]
    for some in (panels, panels[:1]):
        draw_dynamics(some, tmp_path / "d.png")
    for figure in drawn:
        (stamp,) = figure.texts
        assert stamp.get_text() == "smoke run, not a result"
        figure.canvas.draw()
        box, (width, height) = stamp.get_window_extent(), figure.canvas.get_width_height()
        assert 0 < box.x0 < box.x1 < width and 0 < box.y0 < box.y1 < height
        assert box.width > 0.5 * width, "large enough to be seen"


@pytest.mark.parametrize("sort", [True, False])
def test_norms_of_a_tracker(tmp_path: Path, drawn: list[Any], sort: bool) -> None:
    """Sorted curves are ranks from 1, others are components from 0."""
    norms = GROWING if sort else [row[::-1] for row in GROWING]
    draw_norms(ITERATIONS, norms, str(tmp_path / "n.svg"), "at the root", sort=sort)
    (figure,) = drawn
    assert texts_overlap(figure) == [] and (tmp_path / "n.svg").stat().st_size > 1000
    assert labels(figure.axes[0]) == ["others", *(("2", "1") if sort else ("1", "2"))]
    assert figure.axes[0].get_title() == "at the root"


def test_curves_of_zeros(tmp_path: Path, drawn: list[Any]) -> None:
    draw_norms([0, 1], [[0.0, 0.0], [0.0, 0.0]], tmp_path / "n.png")
    assert texts_overlap(drawn[0]) == []
