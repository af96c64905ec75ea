"""Figures as they are saved, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def keep_figures(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Any]:
    """The figures that a module saves from now on, as matplotlib's objects."""
    figures: list[Any] = []
    save = module.save_figure

    def keep(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(module, "save_figure", keep)
    return figures


def texts_overlap(figure: Any) -> list[tuple[str, str]]:
    """Pairs of titles, axis labels, texts and legends that lie upon each other, or beyond the
    figure."""
    from matplotlib.legend import Legend

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle] if figure._suptitle else []
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]
    for owner in (figure, *figure.subfigs, *figure.axes):
        for legend in owner.get_children():
            if isinstance(legend, Legend):
                boxes.append(("legend", legend.get_window_extent(renderer)))
    wrong = [
        (a[0], b[0]) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a[1].overlaps(b[1])
    ]
    width, height = figure.canvas.get_width_height()
    for name, box in boxes:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            wrong.append((name, "outside"))
    return wrong
