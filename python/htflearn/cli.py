"""The command line ``htf``."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from htflearn.errors import Incomplete, UserError, out_of_memory, reason

__all__ = ["COMMANDS", "main", "run"]

COMMANDS: dict[str, tuple[str, str]] = {
    "dynamics": (
        "htflearn.commands.dynamics:dynamics",
        "Watch MF, TF and HTF learn low rank, one component at a time; draw the figure.",
    ),
    "complete": (
        "htflearn.commands.complete:complete",
        "Fill in the missing entries of a tensor, a table or a picture.",
    ),
    "spectra": (
        "htflearn.commands.spectra:spectra",
        "Measure the ranks of a checkpoint at every node of its tree; draw them; follow a run.",
    ),
    "locality": (
        "htflearn.commands.locality:locality",
        "Train CNNs to see far, with a regularizer; draw accuracy against distance.",
    ),
    "bench": (
        "htflearn.commands.bench:bench",
        "Time the kernels against PyTorch and other libraries; compare two runs.",
    ),
    "verify": (
        "htflearn.commands.verify:verify",
        "Check all kernels on this machine against the formulas.",
    ),
    "info": (
        "htflearn.commands.info:info",
        "Show versions, threads, and which backends run here.",
    ),
}
"""Name -> (``module:function``, line of help). A command without its module is not offered."""

_USER_ERROR, _INCOMPLETE, _INTERRUPTED = 2, 3, 130
_LONGEST, _END = 600, 200  # of a sentence, and what is kept of its end


def main() -> None:
    """The entry point of ``htf``: runs a command and ends the process."""
    for stream in (sys.stdout, sys.stderr):  # letters it lacks are replaced
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    _choose_waiting(sys.argv[1:])
    sys.exit(run(sys.argv[1:]))


def _choose_waiting(arguments: Sequence[str]) -> None:
    """Sets ``GOMP_SPINCOUNT`` unless the user has said how threads wait; OpenMP reads it when
    PyTorch is loaded. ``htf info`` shows what a script of the user's would get."""
    told = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if not told and _called(arguments) != "info":
        os.environ["GOMP_SPINCOUNT"] = _spins(arguments)


def _spins(arguments: Sequence[str]) -> str:
    """How often OpenMP's threads look for work or for each other before they sleep.

    Where other processes want the cores, a thread that spins takes the time of the very thread it
    waits for. Two threads on two cores of a Xeon that about nine other processes wanted, medians
    of two runs in ms::

        spins                        0         100       1,000     20,000    default    one thread
        step of the HTF panel     2.6, 2.8  2.8, 2.9  2.9, 3.0   8.1, 7.6  128, 88     2.9, 6.8
        medium of htf bench        26, 32    32, 27    27, 20     23, 37   144, 133     35, 38
        512-square torch.mm       1.8, 1.8  1.7, 1.8  1.8, 2.0   2.5, 4.0   16, 12     1.7, 1.8
        a small forward            0.049     0.052     0.086       0.68       16        0.045

    The last row is a forward of 720,000 multiply-adds, called every 0.2 ms, in one run. Calls of it
    that nothing disturbed took 0.050, 0.050, 0.049, 0.043, 0.044 and 0.046 ms. With both cores
    free, then beside one process that is always busy, medians of two runs in ms::

        spins                        0         100       1,000     20,000    default    passive
        step of the HTF panel     2.3, 3.4  1.9, 3.0  2.2, 4.1   2.2, 9.1  2.1, 4.2  2.0, 3.4
        medium of htf bench        12, 20    11, 24    11, 26     12, 36   9.6, 22    12, 31
        512-square torch.mm       1.2, 1.8  0.9, 2.0  1.0, 2.6   1.3, 3.3  1.0, 1.1  1.0, 2.6
        forward of 3.3 million   .09, .10  .08, .16  .10, .20   .07, .81  .10, .11  .13, .21

    A hundred spins take a few microseconds: enough for a thread that is done almost at the
    same time. Benchmarks are for idle machines and wait longer.
    """
    return "20000" if _called(arguments) == "bench" else "100"


def _called(arguments: Sequence[str]) -> str | None:
    return next((a for a in arguments if not a.startswith("-")), None)


def run(arguments: Sequence[str]) -> int:
    """Runs a command.

    Args:
        arguments: as on the command line, without the program's name.

    Returns:
        the exit code: 0; 2 where the user has something to put right; 3 where the result is there,
        and something that goes with it, a figure or a report, is not; 130 after an interruption.

    Example:
        >>> run(["info"])  # doctest: +SKIP
        0
    """
    if find_spec("typer") is None or find_spec("rich") is None:
        print('htf needs the learn extra: pip install "htfkernels[learn]"', file=sys.stderr)
        return _USER_ERROR
    app = _application(arguments)
    try:
        app(args=list(arguments), prog_name="htf")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _application(arguments: Sequence[str]) -> Any:
    """The typer application. Only the module of the command that is called is loaded: each of them
    loads PyTorch, which ``htf --help`` need not wait for."""
    import typer

    app = typer.Typer(
        name="htf",
        help="Hierarchical tensor factorizations: train them, watch their ranks, complete tensors.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_no_options)
    called = _called(arguments)
    completing = "_HTF_COMPLETE" in os.environ
    for name, (place, summary) in COMMANDS.items():
        module, function = place.split(":")
        if find_spec(module) is None:
            continue
        command = _no_options
        if name == called or completing:
            command = _guarded(getattr(import_module(module), function))
        app.command(name, short_help=summary)(command)
    return app


def _no_options() -> None:
    pass


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with errors that are the user's to fix told in a sentence."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        import typer

        try:
            command(*args, **kwargs)
        except BaseException as error:
            told = _told(error)
            if told is None:
                raise
            code, sentences = told
            for sentence in sentences:
                print(f"htf: {_one_line(sentence)}", file=sys.stderr)
            raise typer.Exit(code) from None

    return guarded


def _told(error: BaseException) -> tuple[int, Sequence[str]] | None:
    """The exit code and the sentences for an error that is the user's to fix, or the machine's;
    None for any other."""
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, ["interrupted"]
    if isinstance(error, Incomplete):
        return _INCOMPLETE, error.sentences
    if isinstance(error, UserError):
        return _USER_ERROR, [str(error)]
    if isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
        return None
    if isinstance(error, OSError):
        file = "" if error.filename is None else f"{error.filename}: "
        return _USER_ERROR, [f"{file}{reason(error)}"]
    if out_of_memory(error):
        detail = f": {reason(error)}" if str(error) else ""
        return _USER_ERROR, [f"there is not enough memory{detail}"]
    return None


def _one_line(sentence: str) -> str:
    """What is named in a sentence may be of any length, and hold what a terminal obeys."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - _END]} ... {text[-_END:]}"


if __name__ == "__main__":
    main()
