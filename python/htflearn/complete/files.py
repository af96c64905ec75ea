"""Reading and writing of whole files: every error a sentence, every write all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from htflearn.complete.entries import Entries, Predict
from htflearn.errors import UserError, reason, writable_directory
from htflearn.files import check_output, scratch_file, whole_file

__all__ = [
    "ARRAYS",
    "TABLES",
    "Source",
    "Write",
    "check_outputs",
    "existing",
    "missing_places",
    "rehearse",
    "write_file",
]

ARRAYS = (".npy", ".npz", ".pt")
TABLES = (".csv", ".parquet")

Write = Callable[[Path], None]


class Source(Protocol):
    """A file with a tensor in it."""

    kind: str
    path: Path
    entries: Entries
    default_smoothness: float

    @property
    def asked(self) -> int:
        """Number of entries that the result has and the file does not give."""
        ...

    def notes(self, path: Path) -> tuple[str, ...]:
        """What to know of a result written to ``path``, a sentence each."""
        ...

    def writer(self, path: Path, predict: Predict, smooth: bool) -> Write:
        """What writes the completed tensor.

        Args:
            path: where to; its suffix tells the format.
            predict: the model.
            smooth: the model's value everywhere, in place of known entries too.

        Returns:
            a function that writes everything to the path it is given.
        """
        ...

    def check_format(self, path: Path) -> None:
        """Raises a UserError where a result of this kind cannot be written to ``path``."""
        ...


def existing(path: Path, what: str = "") -> Path:
    """``path`` if it is a file.

    Raises:
        UserError: it is not.
    """
    called = f"{what} {path}" if what else str(path)
    if path.is_dir():
        raise UserError(f"expected a file, but {called} is a directory")
    if not path.is_file():
        raise UserError(f"there is no file {called}")
    return path


def check_outputs(paths: list[Path], source: Path, force: bool) -> None:
    """Proves, before the work begins, that the results can be written and replace nothing.

    Raises:
        UserError: a folder is missing or cannot be written, an output exists and ``force`` is not
            given, or an output is the input.
    """
    for path in paths:
        if path.resolve() == source.resolve():
            raise UserError(f"the output {path} is the input; give another --out")
        check_output(path, force)
        if not path.parent.is_dir():
            raise UserError(f"the folder {path.parent} of the output does not exist")
        writable_directory(path.parent)


def rehearse(path: Path, write: Write) -> None:
    """Writes a file and removes it again, before the work begins: what the format cannot hold and
    what the disk has no room for is seen now.

    Args:
        path: where the result will go.
        write: what writes something of its kind and size.

    Raises:
        UserError: it cannot be written.
    """
    with _told(path), scratch_file(path) as draft:
        write(draft)


def write_file(path: Path, write: Write, force: bool) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: where to.
        write: what writes it.
        force: replaces a file of this name.

    Raises:
        UserError: it cannot be written, or has come into being since :func:`check_outputs`.
    """
    with _told(path), whole_file(path) as draft:
        write(draft)
        if os.path.lexists(path) and not force:
            raise UserError(f"{path} was made by something else meanwhile; nothing was written")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error


def missing_places(known: np.ndarray) -> np.ndarray:
    """Indices ``[K, N]`` int64 of the False entries of a boolean array."""
    return np.stack(np.nonzero(~known), axis=1).astype(np.int64)
