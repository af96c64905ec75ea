"""Checks of kernels on the device at hand.

``auto`` has a family of GPU kernels checked when it first wants it
(:mod:`htfkernels.runtime.verdicts`); ``htf verify`` has all of them checked.

A check runs in a thread of its own. Of what a caller may have set there (gradients, autocast, a
transform of ``torch.func``, a trace of ``torch.compile``, a device, a stream, a backend) nothing is
in force in another thread, and what the check sets there nobody sees.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from htfkernels.runtime import dispatch, verdicts
from htfkernels.runtime.operations import Family, families
from htfkernels.runtime.plan import make_plan
from htfkernels.runtime.precision import PRECISIONS, use_precision
from htfkernels.runtime.verdicts import Place, Verdict
from htfkernels.verify.checks import CHECKS, Held, Numbers, numbers_of

__all__ = ["HEADER", "Row", "check", "chosen", "notes", "rows", "text"]

_log = logging.getLogger("htfkernels")


def check(family: Family, math: str, place: Place) -> Verdict:
    """Holds all cases of a family against the formula.

    Args:
        family: one of :func:`htfkernels.runtime.operations.families`.
        math: one of its ``maths``.
        place: where its kernels run.

    Returns:
        what was found; the first result that is wrong, or the first exception, ends the check.
    """
    with ThreadPoolExecutor(1, "htfkernels verify") as thread:
        return thread.submit(contextvars.Context().run, _check, family, math, place).result()


_NOTHING = Held("", 0.0, 1.0)


@dataclass
class _SoFar:
    """Where a check is, and the result that came nearest to what is allowed."""

    case: str = "the cases"
    count: int = 0
    worst: Held = _NOTHING


def _check(family: Family, math: str, place: Place) -> Verdict:
    verdicts.checking.set(True)
    begun, so_far, lasting = time.perf_counter(), _SoFar(), True
    try:
        with _in_force(family, math, place):
            failure = _first_failure(family, numbers_of(math, place.device), so_far)
    except Exception as error:
        _log.info("%s, %s:", family, so_far.case, exc_info=True)
        first = str(error).strip().partition("\n")[0]
        failure, lasting = f"{so_far.case} raises {type(error).__name__}: {first}", False
    seconds, worst = time.perf_counter() - begun, so_far.worst
    lost = failure is not None and _lost(place)
    return Verdict(failure, so_far.count, worst.error, worst.allowed, seconds, lasting, lost)


def _first_failure(family: Family, numbers: Numbers, so_far: _SoFar) -> str | None:
    for so_far.case, results in CHECKS[str(family)](family, numbers):
        so_far.count += 1
        for result in results():
            if not result.part <= so_far.worst.part:
                so_far.worst = result
            if not result.part <= 1:
                return (
                    f"{so_far.case}, {result.what}: the error is {result.error:.1e} of the scale, "
                    f"and {result.allowed:.1e} is allowed"
                )
    return None


@contextmanager
def _in_force(family: Family, math: str, place: Place) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(dispatch.use_backend(family.backend))
        stack.enter_context(use_precision(math if math in PRECISIONS else "ieee"))
        if place.device.startswith("cuda"):
            stack.enter_context(torch.cuda.device(place.device))
            # The process's: what a caller wants to hear of waiting is not about the check.
            if mode := torch.cuda.get_sync_debug_mode():
                stack.callback(torch.cuda.set_sync_debug_mode, mode)
                torch.cuda.set_sync_debug_mode("default")
        yield


def _lost(place: Place) -> bool:
    """Whether a device is of no use any more: errors inside kernels stay with the process."""
    if not place.device.startswith("cuda"):
        return False
    try:
        torch.cuda.synchronize(place.device)
    except RuntimeError:
        return True
    return False


# -- all of them ----------------------------------------------------------------------------------

HEADER = ("kernels", "numbers", "device", "cases", "error", "allowed", "seconds", "state")


class Row(NamedTuple):
    """A family in one way of rounding.

    Attributes:
        family: of kernels.
        math: one of its ``maths``; ``"all"`` where it cannot run.
        device: by its name.
        verdict: what was found, or None.
        reason: why it cannot run, or None.
    """

    family: Family
    math: str
    device: str
    verdict: Verdict | None
    reason: str | None

    @property
    def failed(self) -> bool:
        return self.verdict is not None and self.verdict.failure is not None

    @property
    def state(self) -> str:
        """A word or two."""
        if self.verdict is None:
            return "cannot run"
        return "FAILED" if self.failed else "verified"

    @property
    def cells(self) -> tuple[str, ...]:
        """The row under :data:`HEADER`; the error is that of the result nearest to what is
        allowed, or furthest beyond."""
        numbers = ("", "", "", "")
        if self.verdict is not None:
            v = self.verdict
            numbers = (str(v.cases), f"{v.error:.1e}", f"{v.allowed:.1e}", f"{v.seconds:.2f}")
        return (str(self.family), self.math, self.device, *numbers, self.state)


def chosen(which: Sequence[str] = ()) -> list[tuple[Family, str]]:
    """The families in their ways of rounding, or those of them that have all words of one of the
    texts in their names.

    Args:
        which: such as ``"cuda"``, ``"triton tf32"`` or ``"cuda index plan"``.

    Raises:
        ValueError: a text chooses none.

    Example:
        >>> [f"{family} {math}" for family, math in chosen(["index plan", "slog tf32"])]
        ['cuda index plan int64', 'triton slog tf32']
    """
    every = {
        (family, math): set(f"{family} {math}".split())
        for family in families()
        for math in family.maths
    }
    wanted = [set(text.split()) for text in which]
    for text, words in zip(which, wanted, strict=True):
        if not any(name >= words for name in every.values()):
            listed = ", ".join(str(family) for family in families())
            raise ValueError(f"expected kernels among {listed}, got {text!r}")
    return [
        pair for pair, name in every.items() if not which or any(name >= words for words in wanted)
    ]


def rows(which: Sequence[tuple[Family, str]]) -> Iterator[Row]:
    """Checks families anew, whatever is known of them, and keeps what is found.

    Args:
        which: of :func:`chosen`.
    """
    useless: dict[str, str] = {}
    told: set[Family] = set()
    for family, math in which:
        device = dispatch.device_of(family.backend)
        spec = dispatch.Spec(family.ops[0], numbers_of(math, device).dtype, device)
        reason = dispatch.why_not(family.backend, spec)
        if reason is not None:
            if family not in told:
                told.add(family)
                yield Row(family, "all", device, None, reason)
            continue
        for place in verdicts.places(device):
            if place.name in useless:
                yield Row(family, math, place.name, None, useless[place.name])
                continue
            verdict = check(family, math, place)
            if family.backend != "cpp":
                verdicts.record(family, math, place, verdict)
                make_plan.cache_clear()
            if verdict.lost:
                useless[place.name] = f"{family} ({math}) has left the device unusable"
            yield Row(family, math, place.name, verdict, None)


def notes(found: Sequence[Row]) -> list[str]:
    """Sentences: what failed, and why the others cannot run."""
    told = [f"{r.family} ({r.math}): {r.verdict.failure}" for r in found if r.verdict and r.failed]
    reasons: dict[str, dict[str, None]] = {}
    for row in found:
        if row.reason is not None:
            reasons.setdefault(row.reason, {})[str(row.family)] = None
    return told + [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def text(found: Sequence[Row]) -> str:
    """The rows and notes as lines of text."""
    lines = [HEADER, *(row.cells for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*table, *notes(found)])
