"""The picture of ``htf spectra``: readable for every tree, whole or not there at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from PIL import Image
from spectra_runs import caterpillar, existing, htf, ok

import htfkernels as hk
from htfkernels.testing import random_tree
from htflearn import matrix_factorization
from htflearn.checkpoint import save_model
from htflearn.spectra.figure import _figure
from htflearn.spectra.measure import measure
from htflearn.spectra.places import place_tree

PICTURES: dict[str, Callable[[], hk.HTF]] = {
    "balanced4": lambda: hk.HTF(hk.ModeTree.balanced(4), 8, 64),
    "balanced32": lambda: hk.HTF(hk.ModeTree.balanced(32), 4, 16),
    "halves8": lambda: hk.HTF(hk.ModeTree.halves(8), 4, 12, 3),
    "random9": lambda: hk.HTF(random_tree(9, 2), [2, 3, 5, 7, 1, 3, 4, 11, 6], 9, 2),
    "flat5": lambda: hk.HTF(hk.ModeTree.flat(5), 6, 20, root="sum"),
    "chain5": lambda: matrix_factorization(12, 10, 5, init_std=0.3),
    "zero": lambda: hk.HTF(hk.ModeTree.balanced(4), 4, 5, init_std=0.0),
    "numbers": lambda: hk.HTF(hk.ModeTree.balanced(2), 1, 1),
    "caterpillar20": lambda: hk.HTF(caterpillar(20), 3, 8),
    "caterpillar64": lambda: hk.HTF(caterpillar(64), 3, 8),
    "balanced64": lambda: hk.HTF(hk.ModeTree.balanced(64), 4, 12),
    "balanced256": lambda: hk.HTF(hk.ModeTree.balanced(256), 2, 3),
    "chain60": lambda: matrix_factorization(6, 5, 60, init_std=0.5),
}


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_of_a_picture_hides_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = _figure(measure(PICTURES[name]()), f"the run {name} in a long folder, iteration 1,000")
    whole, boxes = figure.bbox, []
    real = Text.draw

    def draw(text: Text, renderer: Any) -> None:
        real(text, renderer)
        if text.get_text().strip():
            boxes.append((text.get_text(), text.get_window_extent(renderer)))

    monkeypatch.setattr(Text, "draw", draw)
    figure.canvas.draw()
    assert len(boxes) > 10 and any("iteration 1,000" in text for text, _ in boxes)
    for i, (first, a) in enumerate(boxes):
        assert whole.x0 <= a.x0 and a.x1 <= whole.x1, first
        assert whole.y0 <= a.y0 and a.y1 <= whole.y1, first
        for second, b in boxes[:i]:
            across = min(a.x1, b.x1) - max(a.x0, b.x0)
            along = min(a.y1, b.y1) - max(a.y0, b.y0)
            # A few of the pixels around glyphs, of 160 an inch, may be shared.
            assert across < 3 or along < 3, (first, second)


def test_cards_are_apart_and_below_their_parents() -> None:
    for make in (random_tree(9, 2), random_tree(23, 3), caterpillar(20), hk.ModeTree.flat(32)):
        places = place_tree(make, range(len(make.nodes)))
        assert places.sizes.cards
        for node in make.nodes:
            i = node.index
            assert 0 < places.x[i] < places.width and 0 < places.y[i] < places.height
            if node.parent is not None:
                above = places.y[node.parent.index] - places.half[node.parent.index]
                assert places.y[i] + places.half[i] < above
            for other in make.nodes[:i]:
                j = other.index
                beside = abs(places.x[i] - places.x[j]) > places.sizes.card_width
                assert beside or abs(places.y[i] - places.y[j]) > places.half[i] + places.half[j]


@pytest.mark.parametrize("kind", ["png", "svg", "PDF"])
def test_picture(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path / "model", htf())
    saved = tmp_path / "model"
    path = tmp_path / "pictures" / f"tree.{kind}"
    for options in ([], ["--nodes", "0,3", "--rtol", "0.1"], []):
        before = path.read_bytes() if path.exists() else b""
        printed = ok(saved, "--out", path, *options)
        assert printed.splitlines()[-1] == f"written: {path}"
        assert existing(path.parent) == [path.name] and path.read_bytes() != before
    first = path.read_bytes()
    ok(saved, "--out", path)
    assert path.read_bytes() == first
    if kind == "png":
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.convert("L").getextrema()[0] < 60
    else:
        assert first.startswith(b"<?xml" if kind == "svg" else b"%PDF")
