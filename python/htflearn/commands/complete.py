"""``htf complete``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["complete"]

_INPUT, _MODEL, _TRAINING, _OUTPUT = "Input", "Model", "Training", "Output"


def complete(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A tensor (.npy, .npz, .pt), a long table (.csv, .parquet) or a picture.",
            show_default=False,
        ),
    ],
    key: Annotated[
        str | None, typer.Option(help="Which array of an .npz or .pt file.", rich_help_panel=_INPUT)
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Boolean array (or picture) of the same shape: true (not black) where known.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    missing: Annotated[
        float | None,
        typer.Option(
            help="The value that stands for missing, besides NaN.", rich_help_panel=_INPUT
        ),
    ] = None,
    index_columns: Annotated[
        str | None,
        typer.Option(
            help="Columns of a table with the indices: user,item,week. Default: all but the value.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    value_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the values, empty where missing. Default: the last.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Index columns whose integers are names, not positions.", rich_help_panel=_INPUT
        ),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the index columns: 10,20,5. Default: the largest index and one more.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    hide: Annotated[
        float | None,
        typer.Option(
            help="Hide this fraction of the known entries (pixels), and measure against them.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    tree: Annotated[
        str,
        typer.Option(
            help="auto (from the shape), balanced, halves, flat, or a .json of ModeTree.to_json.",
            rich_help_panel=_MODEL,
        ),
    ] = "auto",
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Local ranks: one number, or one for each level, the root's last: 64,32.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    quantize: Annotated[
        bool | None,
        typer.Option(
            help="Split long modes into their prime factors, scale by scale: a 512 x 512 picture "
            "becomes 9 modes of 2 x 2. Default: pictures in blocks of 8 x 8, nothing else.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    factors: Annotated[
        str | None,
        typer.Option(
            help="Split long modes into these factors instead, coarsest first: auto,8 or 8,8,8.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    smoothness: Annotated[
        float | None,
        typer.Option(
            help="Penalty on bends along ordered modes. Default: 0.1 for pictures, else 0.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    smooth_modes: Annotated[
        str | None,
        typer.Option(
            help="The modes it counts for: 1,2. Default: all; rows and columns of a picture.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            help="Fraction of the known entries that decides when to stop.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.1,
    iterations: Annotated[
        int, typer.Option(help="At most that many.", rich_help_panel=_TRAINING)
    ] = 800,
    max_seconds: Annotated[
        float,
        typer.Option(help="For training, all models together.", rich_help_panel=_TRAINING),
    ] = 110.0,
    lr: Annotated[float, typer.Option(help="First step size.", rich_help_panel=_TRAINING)] = 0.03,
    optimizer: Annotated[
        str,
        typer.Option(
            help="adam, rmsprop (of all weights as one) or sgd.", rich_help_panel=_TRAINING
        ),
    ] = "adam",
    loss: Annotated[str, typer.Option(help="l2, l1 or huber.", rich_help_panel=_TRAINING)] = "l2",
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Coefficient of the squared weights. Default: found on the entries held out.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    init_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of all initial weights. Default: what makes the tensor's 0.3.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Entries a step. Default: all, if they fit.", rich_help_panel=_TRAINING),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32 or float64.", rich_help_panel=_TRAINING)
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=_TRAINING)] = "cpu",
    seed: Annotated[
        int,
        typer.Option(
            help="Of what is hidden and held out, and of the initial weights.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write. Default: beside FILE, with -completed.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="A table with every cell, not only the rows given.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth",
            help="The model's value everywhere, in place of known entries too.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace earlier results.", rich_help_panel=_OUTPUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress and no tables.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Fill in the missing entries of a tensor, a table or a picture.

    A hierarchical tensor factorization learns the known entries and predicts the others. Beside it
    a CP factorization with as many weights is trained, and both are compared, on entries held out,
    with the mean. Known entries stay as they are.

    Written: the completed tensor in the input's format, a report beside it (.json) with errors and
    ranks, and for a picture panels (-panels.png) of what was given, what was made of it, and the
    truth where pixels were hidden.
    """
    from htflearn.complete.report import print_report
    from htflearn.complete.run import Options
    from htflearn.complete.run import complete as run
    from htflearn.errors import Incomplete

    options = Options(
        key=key,
        mask=mask,
        missing=missing,
        index_columns=index_columns,
        value_column=value_column,
        labels=labels,
        dims=dims,
        every=every,
        hide=hide,
        tree=tree,
        ranks=ranks,
        quantize=quantize,
        factors=factors,
        smoothness=smoothness,
        smooth_modes=smooth_modes,
        held_out=held_out,
        iterations=iterations,
        max_seconds=max_seconds,
        lr=lr,
        optimizer=optimizer,
        loss=loss,
        weight_decay=weight_decay,
        init_std=init_std,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        seed=seed,
        out=out,
        smooth=smooth,
        force=force,
        progress=not quiet,
    )
    incomplete = None
    try:
        made = run(file, options)
    except Incomplete as error:
        incomplete, made = error, error.made
    if not quiet:
        if made.numbers:
            print_report(made.numbers)
        files = [p for p in (made.result, made.report, made.picture) if p and p.exists()]
        typer.echo(f"written: {', '.join(map(str, files))}")
    if incomplete is not None:
        raise incomplete
