"""Errors that are the user's to fix."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["UserError", "usable_device", "writable_directory"]


class UserError(Exception):
    """Something the user can put right, told in one sentence.

    The command line prints it without a traceback and ends with exit code 2.
    """


def usable_device(name: str) -> str:
    """Proves that a device is there, before the work begins.

    Args:
        name: ``"cpu"`` or ``"cuda"``.

    Returns:
        the same name.

    Raises:
        UserError: there is none of that name, or no GPU here.

    Example:
        >>> usable_device("cpu")
        'cpu'
    """
    import torch  # not above: `htf --help` imports this module and needs no PyTorch

    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    return name


def writable_directory(path: str | os.PathLike[str]) -> Path:
    """Makes a directory and proves that files can be written into it, before the work begins.

    Args:
        path: the directory; missing parents are made too.

    Returns:
        the directory.

    Raises:
        UserError: it cannot be made or written into.

    Example:
        >>> out = writable_directory("runs/first")
        >>> out.is_dir()
        True
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-"):
            pass
    except OSError as error:
        raise UserError(
            f"the output directory {directory} cannot be written: {error.strerror or error}"
        ) from error
    return directory
