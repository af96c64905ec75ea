"""``htf spectra``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer

from htflearn.errors import Extras, UserError, reason, writable_directory
from htflearn.figures import FORMATS
from htflearn.files import append, check_output, parse_object, replace_file
from htflearn.options import LONGEST, not_negative, positive
from htflearn.spectra.follow import Loaded, follow, load
from htflearn.spectra.measure import METHODS, choose_nodes, measure, to_json
from htflearn.spectra.table import LARGEST_TABLE, table

__all__ = ["spectra"]

_INTERVAL = 2.0
_AROUND_TABLE = 10  # lines of a terminal that are not for nodes
_NARROWEST, _WIDEST = 80, 100_000
_STDOUT = Path("-")
_FOLLOWING = "Following a run"


def spectra(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A .safetensors file, a checkpoint, a folder of checkpoints, or of a run.",
            show_default=False,
        ),
    ],
    nodes: Annotated[
        list[str] | None,
        typer.Option(
            "--nodes",
            "-n",
            metavar="MODES",
            help="Only the node over these modes: 0,1 or 0-3; may be repeated. Default: all.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="qr: small singular values to full precision; gram: cheaper, to 1e-8 of the "
            "largest; auto."
        ),
    ] = "auto",
    rtol: Annotated[
        float | None,
        typer.Option(
            help="The numerical rank counts singular values above this fraction of the largest. "
            "Default: their number times the precision of the weights."
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            help="Show (and keep in the JSON) so many singular values of each node. Default: show "
            "the largest, keep all."
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help=f"A row for each node, of more than {LARGEST_TABLE} too."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the tree with its spectra: .png, .svg or .pdf. An earlier one is replaced.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write all numbers there, in place of earlier ones; - is standard output, and "
            "then nothing else goes there.",
        ),
    ] = None,
    following: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Go on with each new checkpoint of a running training, until Ctrl-C. The JSON "
            "becomes lines, one appended for each checkpoint.",
            rich_help_panel=_FOLLOWING,
        ),
    ] = False,
    interval: Annotated[
        float | None,
        typer.Option(
            help=f"Seconds between two looks. Default: {_INTERVAL:g}.", rich_help_panel=_FOLLOWING
        ),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(
            help="End with the checkpoint of this iteration or a later one.",
            rich_help_panel=_FOLLOWING,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="End after so many seconds.", rich_help_panel=_FOLLOWING),
    ] = None,
) -> None:
    """Measure the ranks of a model's matricizations.

    At every node of the mode tree: the singular values of the matricization that has the node's
    modes as rows, its numerical, effective, stable and Rényi-2 rank, and the entanglement entropy.
    Columns: rows of the matricization, R the node's local rank, bound the largest rank that the
    layout allows. Computed in float64, from the factors; the tensor is never formed.
    """
    for option, given in (("interval", interval), ("until", until), ("timeout", timeout)):
        if given is not None and not following:
            raise UserError(f"--{option} needs --follow")
    positive("interval", interval, LONGEST)
    positive("until", until)
    not_negative("timeout", timeout, LONGEST)
    positive("top", top)
    if method not in METHODS:
        raise UserError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    if rtol is not None and not 0 <= rtol < 1:
        raise UserError(f"--rtol must be at least 0 and less than 1, got {rtol}")
    wishes = _Wishes(nodes, method, rtol, top, every)
    files = _Files(out, json_file, following)
    if not following:
        loaded = load(checkpoint)
        files.check(loaded.file)
        files.prove()
        with _Screen(files, live=False) as screen:
            _show(loaded, wishes, files, screen)
        return
    files.prove()  # the first checkpoint may be hours away
    with _Screen(files, live=True) as screen:
        seconds = _INTERVAL if interval is None else interval
        try:
            for loaded in follow(checkpoint, seconds, until, timeout, screen.say):
                files.check(loaded.file)
                _show(loaded, wishes, files, screen)
        except KeyboardInterrupt:  # how following ends
            return


@dataclass(frozen=True)
class _Wishes:
    nodes: list[str] | None
    method: str
    rtol: float | None
    top: int | None
    every: bool


def _show(loaded: Loaded, wishes: _Wishes, files: _Files, screen: _Screen) -> None:
    """Measures a model, writes the files, and prints the table."""
    chosen = choose_nodes(loaded.model.tree, wishes.nodes) if wishes.nodes else None
    measured = measure(loaded.model, chosen, wishes.method, wishes.rtol)
    step = "" if loaded.iteration is None else f", iteration {loaded.iteration:,}"
    numbers = {"file": str(loaded.file), "iteration": loaded.iteration}
    extras = Extras()
    files.write(numbers | to_json(measured, wishes.top), measured, _name(loaded) + step, extras)
    screen.show(
        lambda most: table(measured, wishes.top, wishes.every, f"{loaded.file}{step}", most)
    )
    extras.done()


def _name(loaded: Loaded) -> str:
    """Of a checkpoint the folder of the run, of another file its own."""
    parts = loaded.file.absolute().parts
    if loaded.iteration is None:
        return parts[-1]
    folders = parts[:-3] if parts[-3] == "checkpoints" else parts[:-2]
    return folders[-1]


class _Files:
    """Where the picture and the numbers go."""

    def __init__(self, out: Path | None, numbers: Path | None, lines: bool) -> None:
        self.out, self.numbers, self._lines = out, numbers, lines
        self.to_stdout = numbers == _STDOUT
        if out is not None and out.suffix.lower() not in FORMATS:
            raise UserError(f"--out must end in {', '.join(FORMATS)}, got {str(out)!r}")
        for option, path in self._given():
            check_output(path, option=option)
        if out is not None and numbers is not None and out.absolute() == numbers.absolute():
            raise UserError(f"--out and --json are the same file {out}")
        self._written: list[str] = []

    def _given(self) -> list[tuple[str, Path]]:
        given = [("out", self.out), ("json", None if self.to_stdout else self.numbers)]
        return [(option, path) for option, path in given if path is not None]

    @property
    def names(self) -> str:
        """Those written last."""
        return ", ".join(self._written)

    def prove(self) -> None:
        """Proves that they can be written.

        Raises:
            UserError: they cannot, or lines would be appended to something else.
        """
        for option, path in self._given():
            if option == "json" and self._lines and path.exists():
                _check_lines(path)
        for _, path in self._given():
            writable_directory(path.parent)

    def check(self, weights: Path) -> None:
        """Raises a UserError where they would take the place of the model."""
        for option, path in self._given():
            if path.exists() and path.samefile(weights):
                raise UserError(f"--{option} {path} would replace the model")

    def write(self, numbers: dict[str, Any], measured: Any, title: str, extras: Extras) -> None:
        """Writes both, each whole or not at all, and tells ``extras`` what could not be written."""
        self._written = []
        if self.numbers is not None:
            with extras.making(str(self.numbers)):
                self._write_numbers(self.numbers, numbers)
        if self.out is not None:
            with extras.making(str(self.out)):
                from htflearn.spectra.figure import draw_spectra

                draw_spectra(measured, self.out, title)
                self._written.append(str(self.out))

    def _write_numbers(self, path: Path, numbers: dict[str, Any]) -> None:
        line = f"{json.dumps(numbers, allow_nan=False)}\n"
        text = line if self._lines else _document(numbers)
        if self.to_stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        if self._lines:
            with open(path, "ab", buffering=0) as file:
                append(file, line.encode())
        else:
            replace_file(path, text)
        self._written.append(str(path))


def _document(numbers: dict[str, Any]) -> str:
    """JSON with a line for each node: lists of singular values are long."""
    parts = []
    for key, value in numbers.items():
        text = json.dumps(value, allow_nan=False)
        if key == "nodes":
            nodes = ",\n  ".join(json.dumps(node, allow_nan=False) for node in value)
            text = f"[\n  {nodes}\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _check_lines(path: Path) -> None:
    """Lines are appended to an earlier run's; to nothing else."""
    last = b"{}\n"
    try:
        with open(path, "r+b") as file:  # to write as well: it has to be possible
            for line in file:
                last = line
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    try:
        parse_object(last if last.endswith(b"\n") else "", str(path))
    except UserError as error:
        raise UserError(
            f"--json {path} holds something else than whole JSON lines to append to"
        ) from error


class _Screen:
    """Prints tables: one in the place of the other on a terminal that follows, else one after the
    other; nothing where standard output is for the numbers."""

    def __init__(self, files: _Files, live: bool) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._silent, self._files = files.to_stdout, files
        self._live: Any = None
        self._said = ""
        if live and self._console.is_terminal and not self._silent:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> _Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """A sentence, told once."""
        if sentence == self._said:
            return
        self._said = sentence
        if self._live is not None:
            self._live.update(sentence, refresh=True)
        else:
            print(sentence, file=sys.stderr, flush=True)

    def show(self, make: Any) -> None:
        """``make(most rows)`` is what to print."""
        written = f"written: {self._files.names}" if self._files.names else ""
        if self._silent:
            if written:
                typer.echo(written, err=True)
            return
        if self._live is not None:
            from rich.console import Group

            # A table that is higher than the terminal cannot be replaced.
            most = max(min(LARGEST_TABLE, self._console.height - _AROUND_TABLE), 1)
            self._live.update(Group(make(most), *filter(None, [written])), refresh=True)
            return
        shown = make(LARGEST_TABLE)
        if not self._console.is_terminal:  # lines of a file or a pipe are as long as they need be
            self._console.width = _WIDEST
            self._console.width = max(self._console.measure(shown).maximum, _NARROWEST)
        self._console.print(shown)
        if written:
            typer.echo(written)
