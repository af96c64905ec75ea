"""Files written whole or not at all, and files read that may hold anything."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from htflearn.errors import UserError, reason

__all__ = [
    "append",
    "check_fits",
    "check_output",
    "disk_errors",
    "parse_object",
    "read_object",
    "remove_drafts",
    "replace_file",
    "scratch_file",
    "sync",
    "whole_file",
]

_Path = str | os.PathLike[str]
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust tell errno
_DRAFT = re.compile(r"\.htf-[0-9a-f]{16}(\..*)?")
_NUMPY_FULL = re.compile(r"\d+ requested and \d+ written")


@contextmanager
def whole_file(path: _Path) -> Iterator[Path]:
    """A file of another name in the same folder, to be written in the block; at the block's end it
    goes to the disk and takes its name. Where the block raises, ``path`` is as it was.

    Raises:
        OSError: it cannot be written, whichever exception the writing library has for that.

    Example:
        >>> with whole_file("numbers.txt") as draft:
        ...     _ = draft.write_text("1 2 3")
        >>> Path("numbers.txt").read_text()
        '1 2 3'
    """
    target = Path(path)
    with scratch_file(target) as draft:
        yield draft
        sync(draft)
        os.replace(draft, target)
        sync(target.parent)


@contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that is removed at the end of the block.

    It is new, and its name cannot be foreseen: no link that somebody has put there is followed.
    Its suffix is that of ``path``.

    Raises:
        OSError: as :func:`whole_file` does.
    """
    draft = path.with_name(f".htf-{secrets.token_hex(8)}{path.suffix}")
    with disk_errors(path):
        open(draft, "xb").close()
        try:
            yield draft
        finally:
            draft.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Removes the files of :func:`scratch_file` that killed processes have left.

    Args:
        folder: where nobody else writes now.
    """
    for entry in folder.iterdir():
        if _DRAFT.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: _Path) -> Iterator[None]:
    """Turns what safetensors, PyTorch and NumPy raise for a full disk into the system's error.

    Args:
        path: what is being written, for the message.

    Raises:
        OSError: the block has met an error of the system.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _errno(error: BaseException | None) -> int | None:
    """Of the system's error behind an exception, None where there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        told = _OS_ERROR.search(str(error))
        if told is not None:
            return int(told[1])
        if _NUMPY_FULL.match(str(error)):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def replace_file(path: _Path, text: str) -> None:
    """Writes a text file, whole or not at all: whoever reads it sees the old text or the new.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def append(file: Any, line: bytes) -> None:
    """Appends a line, whole or not at all.

    Args:
        file: open for appending, without a buffer.
        line: what to write.

    Raises:
        OSError: it cannot be written.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except BaseException:
        file.truncate(size)
        raise


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output(path: Path, force: bool = True, option: str = "out") -> None:
    """Whether a command may write a file.

    Args:
        path: the file.
        force: whether it may be there already.
        option: what names it on the command line.

    Raises:
        UserError: it may not, or there is something else than a file.
    """
    if path.is_dir():
        raise UserError(f"--{option} must be a file, and {path} is a directory")
    if path.exists() and not path.is_file():
        raise UserError(f"--{option} must be a file, and {path} is a device or a pipe")
    if os.path.lexists(path) and not force:
        raise UserError(f"{path} exists; give --force to replace it, or another --{option}")


def check_fits(size: int, what: str) -> None:
    """Refuses what would not fit into this machine's memory: a small file can unpack to anything.

    Args:
        size: bytes.
        what: the file, for the message.

    Raises:
        UserError: it is more than the memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"{what} is to hold {size / 1e9:,.0f} GB, more than the {memory / 1e9:,.0f} GB of "
            "memory of this machine"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    return parse_object(text, str(path))


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object in a text.

    Args:
        text: it.
        what: where the text is from, for the message.

    Raises:
        UserError: the text is something else.

    Example:
        >>> parse_object('{"order": 2}', "the tree")
        {'order': 2}
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{what} cannot be read: its JSON is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{what} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise UserError(f"{what} cannot be read: expected a JSON object, got {kind}")
    return found
