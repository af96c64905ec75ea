"""Metrics as JSON lines that a run can be cut back to and continued from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from htflearn.errors import UserError, reason
from htflearn.files import append, parse_object

__all__ = ["MetricsFile", "plain"]


class MetricsFile:
    """Lines of metrics, in memory and, with a path, in a file.

    The lines hold no clock times, so two runs with the same numbers have the same bytes.

    Args:
        path: the file, or None.
        keep: bytes of an existing file to keep; what lies behind them is cut off.
        last: what the last line that is kept must hold.

    Attributes:
        lines: the lines, those kept first.

    Raises:
        UserError: the file cannot be read or written, or what is to be kept is something else.
    """

    def __init__(
        self, path: Path | None, keep: int = 0, last: dict[str, Any] | None = None
    ) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path = path
        self._file: Any = None
        if path is None:
            return
        if keep:
            self.lines = _kept(path, keep, last or {})
        with self._writing():
            self._file = open(path, "ab", buffering=0)
            self._file.truncate(keep)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line and hands it to the system, so that another program can follow the run.

        Raises:
            UserError: it cannot be written.
        """
        if self._file is not None:
            with self._writing():
                append(self._file, json.dumps(line).encode() + b"\n")
        self.lines.append(line)

    def sync(self) -> int:
        """Brings the file to the disk and returns its size.

        Raises:
            UserError: it cannot be written.
        """
        if self._file is None:
            return 0
        with self._writing():
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {reason(error)}") from error


def _kept(path: Path, keep: int, last: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(keep) if 0 < keep <= size else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    damaged = f"{path} is not as the run left it"
    if not content.endswith(b"\n"):
        raise UserError(f"{damaged}: expected whole lines of {keep} bytes in all, got {size}")
    lines = content.split(b"\n")[:-1]
    kept = [parse_object(line, f"line {n} of {path}") for n, line in enumerate(lines, 1)]
    if not last.items() <= kept[-1].items():
        name, value = next(iter(last.items()))
        raise UserError(f"{damaged}: expected {name} {value} in the last line kept")
    return kept


def plain(value: Any) -> Any:
    """The same value with None for numbers that are not finite, which JSON cannot write.

    Example:
        >>> plain({"loss": float("nan"), "norms": [1.0, 2.0]})
        {'loss': None, 'norms': [1.0, 2.0]}
    """
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
