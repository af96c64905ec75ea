"""``htf verify``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from htfkernels.verify import HEADER, Row, chosen, notes, rows
from htflearn.errors import UserError

__all__ = ["verify"]

_WRONG = 1
_WIDTH = 120  # where the output is not a terminal


def verify(
    which: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KERNELS]...",
            help="Only those with these words in their names: cuda, 'triton tf32', 'cuda tree'.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Checks all kernels on this machine against the formulas, and shows what was found.

    GPU kernels that fail are not taken from then on, unless they are asked for by name; what is
    found is kept in the user's cache folder. Exit code 1: some failed.
    """
    try:
        wanted = chosen(which or ())
    except ValueError as error:
        raise UserError(str(error)) from None
    found: list[Row] = []
    for row in rows(wanted):
        # Kernels may have to be compiled first: something is to be seen meanwhile.
        typer.echo(f"{row.family} ({row.math}): {row.state}", err=True)
        found.append(row)
    _print(found)
    if any(row.failed for row in found):
        raise typer.Exit(_WRONG)


def _print(found: list[Row]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in HEADER:
        numeric = name in ("cases", "error", "allowed", "seconds")
        table.add_column(name, justify="right" if numeric else "left")
    for row in found:
        style = "red" if row.failed else "dim" if row.verdict is None else None
        table.add_row(*row.cells, style=style)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(table)
    for note in notes(found):
        typer.echo(note)
