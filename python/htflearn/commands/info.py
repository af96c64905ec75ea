"""``htf info``."""

from __future__ import annotations

from htfkernels.info import info_text

__all__ = ["info"]


def info() -> None:
    """Shows versions, threads, the CPU's capability, and which backends run here and why not."""
    print(info_text())
