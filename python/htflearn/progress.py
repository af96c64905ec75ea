"""How far a training run is: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows iterations, their rate and the time left on standard error.

    Args:
        total: iterations at most.
        start: iterations done before, by an earlier process.
        title: what is being trained.
        enabled: False shows nothing.
        unit: what is counted, if not iterations.

    Example:
        >>> with Progress(total=100, title="MF") as progress:
        ...     progress.update(50, loss=0.1)
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        title: str = "training",
        enabled: bool = True,
        unit: str = "iterations",
    ) -> None:
        self._total, self._start, self._title, self._unit = total, start, title, unit
        self._rate = "it/s" if unit == "iterations" else f"{unit}/s"
        self._began = self._shown = time.monotonic()
        self._bar: Any = None
        self._enabled = enabled
        if enabled and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(title, total=total, completed=start, rate="", loss="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, iteration: int, loss: float | None = None) -> None:
        """Shows where the run is; cheap enough to be called at every logged iteration."""
        if not self._enabled:
            return
        now = time.monotonic()
        rate = (iteration - self._start) / max(now - self._began, 1e-9)
        text = "" if loss is None else f"loss {loss:.3g}"
        if self._bar is not None:
            self._bar.update(
                self._task, completed=iteration, rate=f"{rate:,.0f} {self._rate}", loss=text
            )
        elif now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            left = (self._total - iteration) / rate if rate else float("inf")
            print(
                f"{self._title}: {iteration:,} of at most {self._total:,} {self._unit}, "
                f"{rate:,.0f} {self._rate}, at most {left:,.0f} s left, {text}",
                file=sys.stderr,
                flush=True,
            )


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
    )
