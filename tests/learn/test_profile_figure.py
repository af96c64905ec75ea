"""Pictures of locality profiles: whole files, nothing that overlaps, extreme couplings."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_figures import keep_figures, texts_overlap

from htflearn.locality import profile_figure
from htflearn.locality.convac import ConvAC, far_first_tree
from htflearn.locality.patches import square_grid
from htflearn.locality.profile import LocalityProfile, locality_profile
from htflearn.locality.profile_figure import draw_profiles, draw_theory
from htflearn.locality.separation import SeparationRank


def made_up(scale: float, decay: float, size: int = 12) -> LocalityProfile:
    """Couplings that fall with the distance of centres, of 3 x 3 patches."""
    patches = tuple(square_grid(size, size, 3))
    corners = torch.tensor([p[:2] for p in patches], dtype=torch.float64)
    matrix = scale * torch.exp(-decay * torch.cdist(corners, corners))
    matrix.fill_diagonal_(torch.nan)
    counts = torch.full(matrix.shape, 8)
    return LocalityProfile(
        matrix, counts, patches, (size, size), tuple(range(len(patches))), samples=8
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    return keep_figures(monkeypatch, profile_figure)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("decay", [0.05, 1.5])
def test_profiles(tmp_path: Path, drawn: list[Any], count: int, decay: float) -> None:
    named = {f"model {i}": made_up(0.5 / (i + 1), decay) for i in range(count)}
    draw_profiles(named, tmp_path / "p.png", "Couplings")
    (figure,) = drawn
    assert texts_overlap(figure) == []
    assert all(text.get_text() == "Couplings" for text in figure.texts)
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in maps] == list(named)
    curve = figure.axes[0]
    assert curve.get_yscale() == ("log" if decay > 1 else "linear")
    rows = named["model 0"].by_distance()
    line = next(line for line in curve.lines if line.get_label() == "model 0")
    np.testing.assert_allclose(line.get_xdata(), [row.distance for row in rows])
    np.testing.assert_allclose(line.get_ydata(), [row.coupling for row in rows])
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_a_smoke_run_says_so(tmp_path: Path, drawn: list[Any]) -> None:
    draw_profiles({"plain": made_up(0.5, 0.2)}, tmp_path / "p.png", smoke=True)
    assert [text.get_text() for text in drawn[0].texts] == ["smoke run, not a result"]


def test_theory(tmp_path: Path, drawn: list[Any]) -> None:
    named = {}
    for name, tree in {"neighbours first": None, "far-apart first": far_first_tree(4, 4)}.items():
        torch.manual_seed(0)
        model = ConvAC((8, 8), 2, 3, [3, 4], 3, False, tree=tree)
        ranks = {p: model.matricization_ranks(p) for p in ("left/right", "even/odd")}
        named[name] = locality_profile(model, torch.randn(6, 1, 8, 8), patch=2), ranks
    draw_theory(named, tmp_path / "t.png", "ConvACs")
    (figure,) = drawn
    assert texts_overlap(figure) == []
    assert len(figure.axes) == 3
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert [label.split(":")[0] for label in legend] == ["left/right", "even/odd"]


def test_the_same_bytes_again(tmp_path: Path) -> None:
    for suffix in (".png", ".svg"):
        for name in ("a", "b"):
            draw_profiles({"m": made_up(0.1, 0.2)}, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_extreme_couplings(tmp_path: Path, drawn: list[Any]) -> None:
    some = made_up(0.5, 0.2)
    matrix = some.matrix.clone()
    matrix[:, 1:] = torch.nan
    one = LocalityProfile(matrix, some.counts, some.patches, some.size, (0,), 8)
    named = {"none": made_up(0.0, 1.0), "tiny": made_up(1e-14, 3.0), "one": one}
    draw_profiles(named, tmp_path / "p.png")
    draw_profiles({"none": made_up(0.0, 1.0)}, tmp_path / "q.png")
    zero = SeparationRank.of(torch.zeros(2, 5, dtype=torch.float64))
    draw_theory({"none": (made_up(0.0, 1.0), {"left/right": zero})}, tmp_path / "r.png")
    for figure in drawn:
        assert texts_overlap(figure) == []


def test_bad_arguments(tmp_path: Path) -> None:
    empty = made_up(0.1, 0.1)
    empty.matrix.fill_(torch.nan)
    with pytest.raises(ValueError, match="draw_profiles: there is nothing to draw"):
        draw_profiles({}, tmp_path / "p.png")
    with pytest.raises(ValueError, match="the profile 'm' has no coupling"):
        draw_profiles({"m": empty}, tmp_path / "p.png")
    with pytest.raises(ValueError, match="draw_theory: 'm' has no partition"):
        draw_theory({"m": (made_up(0.1, 0.1), {})}, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"torch": torch, "ConvAC": ConvAC, "locality_profile": locality_profile}
    done = doctest.testmod(profile_figure, extraglobs=known)
    assert done.attempted > 0 and done.failed == 0
