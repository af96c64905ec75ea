"""``htf locality``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from htflearn.errors import Incomplete, UserError
from htflearn.figures import SMOKE
from htflearn.locality.accuracy_figure import accuracy_rows
from htflearn.locality.grid import How, run_grid
from htflearn.locality.setting import DISTANCE, PRESETS, TASKS, Setting, network_names
from htflearn.options import shown

__all__ = ["locality"]

_INTEGER = re.compile(r"-?\d{1,18}")


def locality(
    task: Annotated[str, typer.Argument(help="isc (Is Same Class) or pathfinder.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of everything; htf-locality-TASK by default. One that holds a grid "
            "already is refused, unless --resume is given."
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="paper: for a GPU; laptop: 2 cores, 20 minutes; smoke: seconds."),
    ] = "laptop",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier call was interrupted.")
    ] = False,
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Make the data and sheet.png; train nothing.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled images for isc: a folder of CIFAR-10, MNIST or Fashion-MNIST files, or "
            "of a folder of images for each class. Nothing is downloaded."
        ),
    ] = None,
    distances: Annotated[
        str | None,
        typer.Option(help="Pixels between the images, or dashes of a path: 0,40,80."),
    ] = None,
    coefficients: Annotated[
        str | None, typer.Option(help="Of the regularizer: 0,1. 0 trains without.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="One training for each: 0,1,2.")] = None,
    canvas: Annotated[
        str | None, typer.Option(help="Height x width that images are made with: 224x224.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Size to average images (isc) or pictures (pathfinder) to."),
    ] = None,
    train_size: Annotated[int | None, typer.Option(help="Training samples.")] = None,
    test_size: Annotated[int | None, typer.Option(help="Test samples.")] = None,
    network: Annotated[str | None, typer.Option(help="resnet18, resnet34 or small.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of each training.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Step size.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of the steps.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the weights.")] = None,
    test_every: Annotated[int | None, typer.Option(help="Epochs between two tests.")] = None,
    every: Annotated[
        int | None,
        typer.Option(help="Regularize at every so-manyth step, so many times as strongly."),
    ] = None,
    patch: Annotated[
        int | None, typer.Option(help="Side of the squares that are regularized (pathfinder).")
    ] = None,
    alike: Annotated[
        bool | None,
        typer.Option(help="Paths placed so that the dashes under the dots tell less."),
    ] = None,
    amp: Annotated[str | None, typer.Option(help="off, float16 or bfloat16.")] = None,
    channels_last: Annotated[bool | None, typer.Option(help="Memory format.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Trainings at once; by default one for each core or GPU.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of each training on a CPU.")] = None,
    engine: Annotated[
        str, typer.Option(help="joblib (this machine) or submitit (a cluster, by Slurm).")
    ] = "joblib",
    engine_option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for submitit, for example timeout_min=600. Repeatable."),
    ] = None,
) -> None:
    """How far a CNN sees, and how far it sees once its locality is trained away.

    Trains networks on Is Same Class (two images far apart: the same class?) or Pathfinder (two
    dots: on the same path?), without and with the regularizer of Razin, Maman and Cohen (ICML
    2022), for each distance, coefficient and seed. Writes accuracy.png, results.jsonl, profile.png
    (how strongly the networks couple patches) and sheet.png (samples) to the output directory.
    Under torchrun the processes train each network together.
    """
    chosen = {
        "data": data,
        "distances": _numbers("distances", distances, int),
        "coefficients": _numbers("coefficients", coefficients, float),
        "seeds": _numbers("seeds", seeds, int),
        "canvas": _canvas(canvas),
        "image_size": image_size,
        "train_size": train_size,
        "test_size": test_size,
        "network": network,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "test_every": test_every,
        "every": every,
        "patch": patch,
        "alike": alike,
        "amp": amp,
        "channels_last": channels_last,
    }
    setting = _setting(task, preset, {k: v for k, v in chosen.items() if v is not None})
    place = out or Path(f"htf-locality-{task}")
    options = _options(engine_option or [])
    how = How(device, workers, threads, engine, options, data_only=data_only)
    incomplete = None
    try:
        outcome = run_grid(setting, place, how, resume)
    except KeyboardInterrupt:
        typer.echo(f"the grid in {place} goes on with --resume", err=True)
        raise
    except Incomplete as error:
        incomplete, outcome = error, error.made
    if not outcome.files:  # of several processes, the first reports
        return
    if outcome.results:
        print_table(task, outcome.results)
    typer.echo("written: " + ", ".join(str(file) for file in outcome.files))
    if outcome.failed:
        for name, why in outcome.failed.items():
            typer.echo(f"failed: {name}: {why}", err=True)
        for sentence in incomplete.sentences if incomplete else ():
            typer.echo(f"failed: {sentence}", err=True)
        raise UserError(f"{len(outcome.failed)} trainings failed; --resume tries them again")
    if incomplete is not None:
        raise incomplete


def _setting(task: str, preset: str, given: dict[str, Any]) -> Setting:
    if task not in TASKS:
        raise UserError(f"the task must be one of {', '.join(TASKS)}, got {shown(task)}")
    if preset not in PRESETS[task]:
        raise UserError(f"--preset must be one of {', '.join(PRESETS[task])}, got {preset!r}")
    of_other = {"isc": ("patch", "alike"), "pathfinder": ("data",)}[task]
    for name in of_other:
        if name in given:
            raise UserError(f"--{name} is not for {task}")
    return dataclasses.replace(PRESETS[task][preset], **given)


def _numbers(name: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(
            f"--{name} takes {what} with commas between them, got {shown(text)}"
        ) from None


def _canvas(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(
            f"--canvas takes a height and a width, 224x224, got {shown(text)}"
        ) from None
    return height, width


def _options(given: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"--engine-option takes NAME=VALUE, got {text!r}")
        options[name] = int(value) if _INTEGER.fullmatch(value) else value
    return options


def print_table(task: str, results: list[dict[str, Any]]) -> None:
    """Prints mean accuracies, a row for each distance and coefficient.

    Args:
        task: ``"isc"`` or ``"pathfinder"``.
        results: see :func:`htflearn.locality.training.train`.
    """
    from rich.console import Console
    from rich.table import Table

    smoke = any(result.get("smoke") for result in results)
    table = Table(title=f"Accuracy ({SMOKE})" if smoke else "Accuracy", title_justify="left")
    for name in (DISTANCE[task], "network", "test", "train", "|cos|", "seeds"):
        table.add_column(name, justify="right")
    names = network_names(result["coefficient"] for result in results)
    for row in sorted(accuracy_rows(results), key=lambda r: (r["distance"], r["coefficient"])):
        deviation = "" if row["std"] is None else f" ± {row['std']:.1%}"
        change = "" if row["change"] is None else f"{row['change']:.3f}"
        table.add_row(
            str(row["distance"]),
            names[row["coefficient"]],
            f"{row['mean']:.1%}{deviation}",
            f"{row['train']:.1%}",
            change,
            str(row["seeds"]),
        )
    Console().print(table)
