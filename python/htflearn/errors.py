"""Errors that are the user's to fix."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "Extras",
    "Incomplete",
    "UserError",
    "out_of_memory",
    "reason",
    "usable_device",
    "writable_directory",
]

_log = logging.getLogger(__name__)
_LONGEST_REASON = 240
# What PyTorch's RuntimeErrors say: on a CPU, on a GPU, and where not even the size can be told.
_MEMORY = ("allocate memory", "out of memory", "size calculation overflowed")


class UserError(Exception):
    """Something the user can put right, told in one sentence.

    The command line prints it without a traceback and ends with exit code 2.
    """


def reason(error: BaseException) -> str:
    """Why an operation failed, as the rest of a sentence: the first line, without a full stop.

    Example:
        >>> reason(ValueError("not a number.\\nSee the manual"))
        'not a number'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    first = lines[0].rstrip(".")
    return first if len(first) <= _LONGEST_REASON else f"{first[:_LONGEST_REASON]}..."


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is not enough memory.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _MEMORY)
    return isinstance(error, MemoryError)


class Incomplete(UserError):
    """The result is there, and something that goes with it could not be made.

    The command line prints each sentence and ends with exit code 3.

    Args:
        sentences: what could not be made, and why.
        made: what the call would have returned.

    Example:
        >>> Incomplete(["the figure could not be made: no space left"]).sentences
        ('the figure could not be made: no space left',)
    """

    def __init__(self, sentences: Sequence[str], made: Any = None) -> None:
        super().__init__("; ".join(sentences))
        self.sentences, self.made = tuple(sentences), made


class Extras:
    """What goes with a result that is safe already: reports, figures, ranks. One that cannot be
    made is told at the end, and costs neither the result nor the others.

    Attributes:
        sentences: what could not be made.

    Example:
        >>> extras = Extras()
        >>> with extras.making("the figure"):
        ...     raise OSError("no space left")
        >>> extras.sentences
        ['the figure could not be made: no space left']
    """

    def __init__(self) -> None:
        self.sentences: list[str] = []

    @contextmanager
    def making(self, what: str) -> Iterator[None]:
        """Notes the exception that ends the block, if one does."""
        try:
            yield
        except BrokenPipeError:  # whoever read our output has seen enough
            raise
        except (OSError, UserError, MemoryError) as error:
            self.sentences.append(f"{what} could not be made: {reason(error)}")
        except Exception as error:
            kind = type(error).__name__
            _log.debug("%s could not be made", what, exc_info=True)  # perhaps a mistake of ours
            self.sentences.append(f"{what} could not be made: {kind}: {reason(error)}")

    def done(self, made: Any = None) -> None:
        """The end.

        Args:
            made: what the call would have returned.

        Raises:
            Incomplete: something could not be made.
        """
        if self.sentences:
            raise Incomplete(self.sentences, made)


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
