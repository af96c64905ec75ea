"""Errors that are the user's to fix."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["UserError", "writable_directory"]


class UserError(Exception):
    """Something the user can put right, told in one sentence.

    The command line prints it without a traceback and ends with exit code 2.
    """


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
