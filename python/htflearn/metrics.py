"""Metrics as JSON lines that a run can be cut back to and continued from."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["MetricsFile", "plain"]


class MetricsFile:
    """Lines of metrics, in memory and, with a path, in a file.

    The lines hold no clock times, so two runs with the same numbers have the same bytes.

    Args:
        path: the file, or None.
        keep: bytes of an existing file to keep; what lies behind them is cut off.

    Attributes:
        lines: the lines, those kept first.
    """

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        self._file = open(path, "ab")
        self._file.truncate(min(keep, self._file.tell()))
        with open(path, encoding="utf-8") as kept:
            self.lines = [json.loads(line) for line in kept]

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
        """Adds a line and hands it to the system, so that another program can follow the run."""
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Brings the file to the disk and returns its size."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size


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
