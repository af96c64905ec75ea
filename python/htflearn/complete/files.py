"""Reading and writing of whole files: every error a sentence, every write all or nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from htflearn.complete.entries import Entries, Predict
from htflearn.errors import UserError

__all__ = [
    "ARRAYS",
    "TABLES",
    "Source",
    "Write",
    "check_outputs",
    "existing",
    "missing_places",
    "reason",
    "write_files",
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


def reason(error: BaseException) -> str:
    """Why an operation failed, as the rest of a sentence: the first line, without a full stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def check_outputs(paths: list[Path], source: Path, force: bool) -> None:
    """Proves, before the work begins, that the results can be written and replace nothing.

    Raises:
        UserError: a folder is missing or cannot be written, an output exists and ``force`` is not
            given, or an output is the input.
    """
    for path in paths:
        if path.resolve() == source.resolve():
            raise UserError(f"the output {path} is the input; give another --out")
        if path.is_dir():
            raise UserError(f"the output {path} is a directory, expected a file")
        if path.exists() and not force:
            raise UserError(f"{path} exists; give --force to replace it, or another --out")
        if not path.parent.is_dir():
            raise UserError(f"the folder {path.parent} of the output does not exist")
    for folder in {path.parent for path in paths}:
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".htf-"):
                pass
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be written: {reason(error)}") from error


def write_files(writers: Mapping[Path, Write], force: bool) -> None:
    """Writes files whole or not at all.

    All are written under other names in the same folders; only when every one is complete and on
    disk do they get their own.

    Args:
        writers: for each path what writes it.
        force: replaces files of these names.

    Raises:
        UserError: a file cannot be written, or has come into being since :func:`check_outputs`.
    """
    written: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            handle, name = tempfile.mkstemp(
                suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent
            )
            os.close(handle)
            written[path] = Path(name)
            try:
                write(written[path])
                _finish(written[path])
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{path} cannot be written: {reason(error)}") from error
        taken = next((path for path in written if path.exists()), None)
        if taken is not None and not force:
            raise UserError(f"{taken} was made by something else meanwhile; nothing was written")
        for path in list(written):
            os.replace(written[path], path)
            del written[path]
    finally:
        for left in written.values():
            left.unlink(missing_ok=True)


def _finish(path: Path) -> None:
    """On disk, with the permissions of a file made the ordinary way (mkstemp's are the owner's)."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def missing_places(known: np.ndarray) -> np.ndarray:
    """Indices ``[K, N]`` int64 of the False entries of a boolean array."""
    return np.stack(np.nonzero(~known), axis=1).astype(np.int64)
