"""What was reached: numbers for a file, a table for the terminal, panels for the eye."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

import htfkernels as hk
from htflearn.complete.files import Source, Write
from htflearn.complete.fit import Fitted, Problem
from htflearn.complete.images import ImageSource
from htflearn.complete.quantize import Split
from htflearn.errors import Extras

__all__ = ["make_report", "picture_writer", "print_report", "report_writer"]

_GRAY, _GAP, _CAPTION = 127, 8, 22
# Above it, triangular factors of matricizations get larger than they are worth.
_LARGEST_QR = 128


def make_report(
    source: Source,
    result: Path,
    options: Any,
    problem: Problem,
    fitted: list[Fitted],
    baselines: int,
    began: float,
    extras: Extras,
) -> dict[str, Any]:
    """Everything worth knowing of a run, as JSON holds it.

    Args:
        source: the input.
        result: where the completed tensor goes.
        options: :class:`htflearn.complete.run.Options`.
        problem: the data.
        fitted: the HTF, then those it is compared with.
        baselines: how many of these there should have been.
        began: when the run did, by ``time.monotonic``.
        extras: told of ranks that cannot be computed; the report then has none.

    Returns:
        errors are root mean squared ones in the units of the file; ``relative`` divides by the
        error of the mean.
    """
    entries, htf = problem.entries, fitted[0]
    held = np.full(len(problem.held), problem.mean)
    hidden_mean = problem.mean_everywhere(entries.hidden_indices)
    models = [_scores("mean", problem, problem.error(held), hidden_mean)]
    models[0] |= {"parameters": 1, "seconds": 0.0}
    for model in fitted:
        scores = _scores(model.name, problem, model.error, model.predict(entries.hidden_indices))
        models.append(
            scores
            | {
                "parameters": model.parameters,
                "ranks": _distinct(model.model.layout.ranks),
                "shape": list(model.split.shape),
                "weight_decay": model.weight_decay,
                "iterations": model.iterations,
                "best_iteration": model.best_iteration,
                "stopped_by": model.reason,
                "seconds": model.seconds,
            }
        )
    for scores in models:
        for key in ("held_out", "hidden"):
            if f"{key}_rmse" in scores and models[0][f"{key}_rmse"] > 0:
                scores[f"{key}_relative"] = scores[f"{key}_rmse"] / models[0][f"{key}_rmse"]
    ranks: list[dict[str, Any]] = []
    with extras.making("the ranks"):
        ranks = _ranks(htf)
    known, hidden = len(entries.values), len(entries.hidden_values)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    return {
        "input": str(source.path),
        "kind": source.kind,
        "output": str(result),
        "shape": list(entries.dims),
        "names": list(entries.names),
        "entries": prod(entries.dims),
        "known": known,
        "hidden": hidden,
        "missing": prod(entries.dims) - known - hidden,
        "held_out": len(problem.held),
        "split_shape": list(htf.split.shape),
        "modes": _describe(htf.split, entries.names),
        "tree": htf.model.tree.to_nested(),
        "models": models,
        "ranks": ranks,
        "notes": [
            *entries.notes,
            *source.notes(result),
            *_verdict(models, htf, baselines),
            *extras.sentences,
        ],
        "settings": settings,
        "version": hk.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": time.monotonic() - began,
    }


def _scores(name: str, problem: Problem, held_out: float, hidden: np.ndarray) -> dict[str, Any]:
    entries = problem.entries
    scores: dict[str, Any] = {"name": name, "held_out_rmse": held_out}
    if len(hidden):
        squared = float(np.mean(np.square(hidden - entries.hidden_values)))
        scores["hidden_rmse"] = math.sqrt(squared)
        if entries.whole < len(entries.dims) or entries.high in (255.0, 65535.0):
            peak = entries.high or 1.0
            share = len(hidden) / (len(hidden) + len(entries.values))
            scores["hidden_psnr"] = _psnr(squared, peak)
            scores["picture_psnr"] = _psnr(squared * share, peak)
    return scores


def _psnr(squared: float, peak: float) -> float | None:
    return 10 * math.log10(peak**2 / squared) if squared > 0 else None


def _verdict(models: list[dict[str, Any]], htf: Fitted, baselines: int) -> list[str]:
    if not baselines:
        order = htf.model.tree.order
        return [f"on this tree of {order} modes HTF is a CP; there is no other to compare with"]
    key = "hidden_rmse" if "hidden_rmse" in models[0] else "held_out_rmse"
    best = min(models, key=lambda m: m[key])
    if best["name"] == "HTF":
        return []
    cells = "hidden entries" if key == "hidden_rmse" else "entries held out"
    return [f"{best['name']} did better than HTF on the {cells}; the result is HTF's"]


def _distinct(ranks: tuple[int, ...]) -> list[int]:
    return sorted(set(ranks))


def _describe(split: Split, names: tuple[str, ...]) -> list[str]:
    """For each new mode what it is made of, such as ``rows 64 x columns 64``."""
    return [
        " x ".join(f"{names[n]} {split.factors[n][k]}" for n, k in digits)
        for digits in split.scales
    ]


@torch.no_grad()
def _ranks(htf: Fitted) -> list[dict[str, Any]]:
    """Of the matricization at every interior node but the root; where the root is alone, at every
    leaf."""
    model = htf.model
    tree = model.tree
    nodes = [n for n in tree.interior if not n.is_root] or list(tree.leaves)
    # Float64, so that a numerical rank is one of the model, not of the arithmetic.
    weights = {node: model.node_weight(node).double() for node in tree.nodes}
    widest = max(model.layout.ranks)
    method, tol = ("qr", None) if widest <= _LARGEST_QR else ("gram", 1e-7)  # what a Gram tells
    spectra = hk.spectra.matricization_spectra(tree, weights, nodes, method)
    total = prod(htf.split.shape)
    found = []
    for node in nodes:
        rows = prod(htf.split.shape[n] for n in node.modes)
        s = spectra[node][: min(rows, total // rows)]
        above = node.parent if node.is_leaf else node
        assert above is not None  # a leaf is never the root
        found.append(
            {
                "modes": list(node.modes),
                "rows": rows,
                "columns": total // rows,
                "local_rank": model.layout.ranks[above.index - tree.order],
                "effective_rank": float(hk.effective_rank(s)),
                "rank_above_1_percent": int(hk.numerical_rank(s, float(s.max()) * 0.01)),
                "numerical_rank": int(hk.numerical_rank(s, tol and float(s.max()) * tol)),
                "singular_values": s[:32].tolist(),
            }
        )
    return found


def report_writer(numbers: dict[str, Any]) -> Write:
    """What writes the numbers as JSON."""
    text = json.dumps(_finite(numbers), indent=2) + "\n"

    def write(to: Path) -> None:
        to.write_text(text)

    return write


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture_writer(source: ImageSource, htf: Fitted, smooth: bool) -> Write:
    """What draws the picture as given, as completed, and the truth where pixels were hidden."""
    shown = source.shown()
    high = source.entries.high or max(float(np.nanmax(source.pixels)), 1e-30)
    panels = {
        f"{shown.mean():.0%} of the pixels": np.where(
            shown if source.pixels.ndim == 2 else shown[..., None],
            _eight(source.pixels, high),
            _GRAY,
        ),
        "completed by HTF": _eight(source.completed(htf.predict, smooth), high),
    }
    if len(source.entries.hidden_values):
        panels["truth"] = _eight(source.pixels, high)

    def write(to: Path) -> None:
        from PIL import Image, ImageDraw, ImageFont

        height, width = source.pixels.shape[:2]
        font = ImageFont.load_default(_CAPTION - 8)
        across = len(panels) * (width + _GAP) - _GAP
        sheet = Image.new("RGB", (across, height + _CAPTION), "white")
        draw = ImageDraw.Draw(sheet)
        for n, (caption, pixels) in enumerate(panels.items()):
            left = n * (width + _GAP)
            sheet.paste(Image.fromarray(pixels.astype(np.uint8)).convert("RGB"), (left, _CAPTION))
            draw.text((left + 2, 2), caption, fill="black", font=font)
        sheet.save(to)

    return write


def _eight(pixels: np.ndarray, high: float) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else np.clip(pixels * (255.0 / high), 0, 255)


def print_report(numbers: dict[str, Any]) -> None:
    """Prints two tables: what the models reach, and the ranks found."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    models, hidden = numbers["models"], numbers["hidden"]
    shape = " x ".join(map(str, numbers["shape"]))
    counts = f"{numbers['known']:,} known ({numbers['held_out']:,} held out)"
    counts += f", {hidden:,} hidden" if hidden else ""
    console.print(f"{numbers['input']}: {shape}, {counts}", highlight=False)
    table = Table(caption="in parentheses: of the error of the mean", caption_justify="left")
    table.add_column("")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "weights": lambda m: f"{m['parameters']:,}",
        "RMSE,\nheld out": lambda m: _error(m, "held_out"),
    }
    if hidden:
        columns["RMSE,\nhidden"] = lambda m: _error(m, "hidden")
        if "hidden_psnr" in models[0]:
            columns["PSNR,\nhidden"] = lambda m: _decibel(m["hidden_psnr"])
            columns["PSNR,\npicture"] = lambda m: _decibel(m["picture_psnr"])
    columns["seconds"] = lambda m: f"{m['seconds']:.1f}"
    for name in columns:
        table.add_column(name, justify="right")
    for model in models:
        table.add_row(model["name"], *(cell(model) for cell in columns.values()))
    console.print(table)

    modes = [f"{n}: {what}" for n, what in enumerate(numbers["modes"])]
    ranks = Table(
        title="ranks found (HTF)",
        title_justify="left",
        caption="; ".join(modes),
        caption_justify="left",
    )
    for name in ("matricization", "shape", "local rank", "effective", "above 1%", "numerical"):
        ranks.add_column(name, justify="left" if name == "matricization" else "right")
    for node in numbers["ranks"]:
        ranks.add_row(
            "{" + ",".join(map(str, node["modes"])) + "}",
            f"{node['rows']} x {node['columns']}",
            str(node["local_rank"]),
            f"{node['effective_rank']:.1f}",
            str(node["rank_above_1_percent"]),
            str(node["numerical_rank"]),
        )
    if numbers["ranks"]:
        console.print(ranks)
    for note in numbers["notes"]:
        console.print(f"note: {note}", highlight=False)


def _error(model: dict[str, Any], key: str) -> str:
    share = model.get(f"{key}_relative")
    text = f"{model[f'{key}_rmse']:.4g}"
    return text if share is None else f"{text} ({share:.1%})"


def _decibel(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2f}"
