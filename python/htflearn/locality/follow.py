"""How far a grid of trainings is, read from the files that they write."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from htflearn.locality.training import METRICS

__all__ = ["Follower"]

_SECONDS, _SECONDS_BETWEEN_LINES = 1.0, 20.0


class Follower:
    """Shows epochs done and the time left, on standard error, while other processes train.

    Args:
        title: what is trained.
        runs: folder of each training -> its epochs, and how long one takes compared with others.
        enabled: False shows nothing.

    Example:
        >>> with Follower("isc", {Path("runs/a"): (50, 1.0), Path("runs/b"): (50, 2.5)}):
        ...     time.sleep(0.01)  # the trainings
    """

    def __init__(
        self, title: str, runs: Mapping[Path, tuple[int, float]], enabled: bool = True
    ) -> None:
        self._title, self._runs, self._enabled = title, dict(runs), enabled
        self._epochs = sum(epochs for epochs, _ in self._runs.values())
        self._work = sum(epochs * weight for epochs, weight in self._runs.values())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._bar: Any = None

    def __enter__(self) -> Follower:
        if self._enabled and self._runs:
            self._began, self._before = time.monotonic(), self._done()[1]
            if sys.stderr.isatty():
                self._bar = _bar()
                self._task = self._bar.add_task(self._title, total=self._work, left="")
                self._bar.start()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def _follow(self) -> None:
        shown = time.monotonic()
        while not self._stop.wait(_SECONDS):
            epochs, work = self._done()
            now = time.monotonic()
            passed, left = now - self._began, ""
            if work > self._before:
                seconds = passed * (self._work - work) / (work - self._before)
                left = f"about {_duration(seconds)} left"
            if self._bar is not None:
                text = f"{epochs:,} of {self._epochs:,} epochs, {left}"
                self._bar.update(self._task, completed=work, left=text)
            elif now - shown >= _SECONDS_BETWEEN_LINES:
                shown = now
                text = f"{self._title}: {epochs:,} of {self._epochs:,} epochs"
                parts = [text, f"{_duration(passed)} passed", left]
                print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def _done(self) -> tuple[int, float]:
        """Epochs, and epochs times their weights."""
        done, work = 0, 0.0
        for folder, (epochs, weight) in self._runs.items():
            try:
                lines = min(epochs, (folder / METRICS).read_bytes().count(b"\n"))
            except OSError:  # has not begun
                continue
            done, work = done + lines, work + lines * weight
        return done, work


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f} min"
    return f"{seconds / 3600:.1f} h"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
    )
