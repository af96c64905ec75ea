"""``htf dynamics``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from htflearn.dynamics import PRESETS, Setting, adapted, run
from htflearn.errors import Incomplete, UserError
from htflearn.figures import SMOKE, shape_of
from htflearn.learned import LARGEST, RISEN
from htflearn.options import not_negative, positive, shown, usable_threads

__all__ = ["dynamics"]

_MOST_MODES = 64  # of a tensor of PyTorch's
_MOST_MATRICES = 1000
_MOST_WEIGHTS = 2**28


def dynamics(
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the figure, the numbers and the checkpoints. One that holds a run "
            "already is refused, unless --resume or --force is given."
        ),
    ] = Path("htf-dynamics"),
    panels: Annotated[str, typer.Option(help="Which of mf, tf and htf to train.")] = "mf,tf,htf",
    preset: Annotated[
        str, typer.Option(help="paper: the paper's sizes; smoke: a few seconds.")
    ] = "paper",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an earlier run was interrupted; of one that is finished, make the "
            "numbers and the figure again.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew and replace an earlier run.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of the target, the entries given and the initial weights.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="grouprmsprop, sgd or adam.")] = None,
    lr: Annotated[float | None, typer.Option(help="Step size.")] = None,
    loss: Annotated[str | None, typer.Option(help="l2, l1 or huber.")] = None,
    init_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the initial weights; the preset's by default, and for "
            "another --order or --depth the one with which components begin to grow as fast."
        ),
    ] = None,
    order: Annotated[
        int | None,
        typer.Option(help="Number of modes (of TF and HTF)."),
    ] = None,
    dim: Annotated[int | None, typer.Option(help="Dimension of every mode.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the target.")] = None,
    norm: Annotated[float | None, typer.Option(help="Frobenius norm of the target.")] = None,
    samples: Annotated[int | None, typer.Option(help="Number of entries given.")] = None,
    noise_std: Annotated[float | None, typer.Option(help="Of noise on the entries given.")] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Hidden width (MF), components (TF), local ranks (HTF)."),
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Number of matrices (of MF).")] = None,
    iterations: Annotated[int | None, typer.Option(help="At most that many.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Iterations between two points.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
) -> None:
    """Watch low rank being learned, one component at a time.

    Trains a matrix (MF), a tensor (TF) and a hierarchical tensor factorization (HTF) to complete a
    tensor of low rank, as in Razin, Maman and Cohen (ICML 2022), and writes the norms of their
    components against iterations to dynamics.png and dynamics.json in the output directory.
    """
    chosen = {
        "seed": seed,
        "optimizer": optimizer,
        "lr": lr,
        "loss": loss,
        "init_std": init_std,
        "order": order,
        "dim": dim,
        "rank": rank,
        "norm": norm,
        "samples": samples,
        "noise_std": noise_std,
        "width": width,
        "depth": depth,
        "iterations": iterations,
        "log_every": log_every,
        "dtype": dtype,
        "threads": threads,
        "device": device,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    settings = _settings(preset, panels, given)
    if resume and force:
        raise UserError("--resume goes on with a run, --force starts anew: give one of them")
    incomplete = None
    try:
        results = run(settings, out, resume, force=force)
    except KeyboardInterrupt:
        typer.echo(f"the run in {out} goes on with --resume", err=True)
        raise
    except Incomplete as error:
        incomplete, results = error, error.made
    print_table(results["panels"])
    files = [f for f in (out / "dynamics.png", out / "dynamics.json") if f.exists()]
    typer.echo(f"written: {', '.join(map(str, files))}")
    if incomplete is not None:
        raise incomplete


def _settings(preset: str, panels: str, given: dict[str, Any]) -> list[Setting]:
    if preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if not 0 <= given.get("seed", 0) < 2**63:
        raise UserError(f"--seed must be in 0..2^63-1, got {shown(given['seed'])}")
    names = [name.strip() for name in panels.split(",")]
    unknown = [name for name in names if name not in PRESETS[preset]]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"--panels takes mf, tf and htf, each at most once, got {panels!r}")
    presets, settings = PRESETS[preset], []
    for name in names:
        changed = {**given, "order": 2} if name == "mf" else given
        _check(dataclasses.replace(presets[name], **changed))
        settings.append(adapted(presets[name], **changed))
    return settings


def _check(setting: Setting) -> None:
    """What can be told of the numbers before anything is made of their size."""
    positive("order", setting.order, _MOST_MODES)
    positive("depth", setting.depth, _MOST_MATRICES)
    for field in ("dim", "rank", "width", "iterations", "log_every", "norm", "init_std", "lr"):
        positive(field.replace("_", "-"), getattr(setting, field))
    not_negative("noise-std", setting.noise_std)
    usable_threads(setting.threads)
    for option, size in (("width", setting.width), ("rank", setting.rank)):
        nodes = setting.depth if setting.panel == "mf" else setting.order
        side = setting.dim if setting.panel == "tf" else max(size, setting.dim)
        if nodes * size * side > _MOST_WEIGHTS:
            raise UserError(
                f"--{option} {size} makes more than {_MOST_WEIGHTS:,} weights in the "
                f"{setting.panel.upper()} panel"
            )


def print_table(panels: list[dict[str, Any]]) -> None:
    """Prints what the panels learned, a column for each, and what to change where one did not.

    Args:
        panels: as :func:`htflearn.dynamics.run_panel` returns them.
    """
    from rich.console import Console
    from rich.table import Table

    smoke = any(panel["settings"]["smoke"] for panel in panels)
    title = f"What was learned ({SMOKE})" if smoke else "What was learned"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("")
    for panel in panels:
        table.add_column(panel["settings"]["panel"].upper())
    rows: dict[str, Any] = {
        "tensor": _shape,
        "weights": lambda p: f"{p['parameters']:,}",
        "iterations": lambda p: f"{p['iterations']:,} ({p['reason']})",
        f"components risen\n(> {LARGEST:.0%} of largest,\n> {RISEN:g} x the start)": _learned,
        "rose at": lambda p: _each(p, "rose", "{:,}"),
        "norms": lambda p: _each(p, "norm", "{:.3g}"),
        "train loss": lambda p: f"{p['train_loss']:.2e} ({p['settings']['loss']})",
        "test MSE": lambda p: "-" if p["test_mse"] is None else f"{p['test_mse']:.2e}",
        "relative error": lambda p: f"{p['reconstruction_error']:.2e}",
        "matricization rank\neffective (> 1%)": _ranks,
        "iterations/s": lambda p: f"{p['iterations_per_second'] or 0:,.0f}",
        "seconds": lambda p: f"{p['seconds']:.1f}",
        "backend": _backend,
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(panel) for panel in panels))
    Console().print(table)
    for panel in panels:
        for remark in panel["remarks"]:
            typer.echo(f"{panel['settings']['panel'].upper()}: {remark}")


def _shape(panel: dict[str, Any]) -> str:
    s = panel["settings"]
    return f"{shape_of(s, 'x')}, rank {s['rank']}"


def _learned(panel: dict[str, Any]) -> str:
    if panel["learned"] == "nothing":
        return "nothing was learned"
    series = panel["series"]
    if len(series) == 1:
        return f"{len(series[0]['components'])} {series[0]['name']}"
    return "\n".join(f"{len(s['components'])} at {s['name']}" for s in series)


def _backend(panel: dict[str, Any]) -> str:
    s = panel["settings"]
    where = f"threads: {s['threads']}" if s["device"] == "cpu" else s["device"]
    return f"{panel['backend']}, {s['dtype']}, {where}"


def _each(panel: dict[str, Any], key: str, form: str) -> str:
    """Of each component that has risen, a line for each node where there are several."""
    found = [
        (s["name"], ", ".join(form.format(c[key]) for c in s["components"]))
        for s in panel["series"]
        if s["components"]
    ]
    if len(panel["series"]) == 1:
        return found[0][1] if found else "-"
    return "\n".join(f"{name}: {values}" for name, values in found) or "-"


def _ranks(panel: dict[str, Any]) -> str:
    return "\n".join(
        f"{node}: {r['effective_rank']:.2f} ({r['numerical_rank']})"
        for node, r in panel["ranks"].items()
    )
