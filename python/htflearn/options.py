"""Numbers of the command line, checked before the work begins."""

from __future__ import annotations

import math
from typing import Any

from htflearn.errors import UserError

__all__ = ["LONGEST", "not_negative", "positive", "shown", "usable_threads", "whole_numbers"]

LONGEST = 10**9
"""Seconds: the system can wait for these, and not for many more."""

_LARGEST = 2**63 - 1  # of whole numbers, where nothing less is named
_MOST_THREADS = 1024
_SHOWN = 40


def positive(option: str, value: float | None, most: float | None = None) -> None:
    """Checks a number of the command line; None, for one that was not given, passes.

    Args:
        option: what it is called there, without dashes.
        value: the number.
        most: the largest allowed; None: any that is finite.

    Raises:
        UserError: it is not above 0, or too large, or not finite.

    Example:
        >>> positive("lr", 0.1)
    """
    if value is not None and not value > 0:
        raise UserError(f"--{option} must be positive, got {shown(value)}")
    _at_most(option, value, most)


def not_negative(option: str, value: float | None, most: float | None = None) -> None:
    """The same for a number that may be 0."""
    if value is not None and not value >= 0:
        raise UserError(f"--{option} must not be negative, got {shown(value)}")
    _at_most(option, value, most)


def _at_most(option: str, value: float | None, most: float | None) -> None:
    if value is None:
        return
    if value == math.inf:
        raise UserError(f"--{option} must be finite, got {value}")
    limit = most or (_LARGEST if isinstance(value, int) else math.inf)
    if value > limit:
        raise UserError(f"--{option} must be at most {limit:,}, got {shown(value)}")


def shown(value: Any) -> str:
    """What was given, as a message shows it."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def whole_numbers(text: str, most: int = _LARGEST) -> list[int] | None:
    """The whole numbers, from 0 on, of a list with commas; None where it is no such list, or has a
    number above ``most``.

    Example:
        >>> whole_numbers("64, 32"), whole_numbers("64,x"), whole_numbers("9" * 5000)
        ([64, 32], None, None)
    """
    parts = [part.strip() for part in text.split(",")]
    # Python refuses to convert numbers of thousands of digits.
    if not all(part.isdecimal() and len(part) <= len(str(most)) for part in parts):
        return None
    numbers = [int(part) for part in parts]
    return numbers if max(numbers) <= most else None


def usable_threads(count: int | None) -> None:
    """Checks a number of threads before the work begins: OpenMP ends the process where the system
    has no room for them.

    Args:
        count: of ``--threads``, None where it was not given.

    Raises:
        UserError: it is not positive, or more than 1024.
    """
    positive("threads", count, _MOST_THREADS)
