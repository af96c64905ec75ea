"""Which kernels of a GPU are known to compute what they should on this machine.

Kernels come in families. ``auto`` takes a family only after it has reproduced a few small cases of
:mod:`htfkernels.testing` on the device: once for each kind of device, driver, version of CUDA,
PyTorch, Triton and this package, and for each way of rounding where kernels differ. That takes
well under a second, and Triton some seconds more to compile what it has not compiled yet. What was
found is remembered in the user's cache folder, ``$XDG_CACHE_HOME/htfkernels/verified`` (by default
``~/.cache``), which may be deleted at any time. ``HTF_VERIFY=0`` trusts every family.

This module holds what is known. :mod:`htfkernels.verify` finds it out: it calls the operations, so
it stands above them, and is loaded when a family is first wanted.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import tempfile
import threading
import warnings
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from htfkernels.runtime import cuda_module
from htfkernels.runtime.operations import OPERATIONS, Family

__all__ = [
    "Place",
    "Unverified",
    "Verdict",
    "checking",
    "driver_version",
    "failure",
    "forget",
    "known",
    "known_failure",
    "places",
    "record",
    "trusted",
]

_log = logging.getLogger("htfkernels")


@dataclass(frozen=True)
class Place:
    """A device that kernels run on, and what a verdict depends on there.

    Attributes:
        device: as PyTorch names it; another one of the same kind is the same place.
        name, capability: of its kind.
        driver: version of what drives it.
    """

    device: str = field(compare=False)
    name: str
    capability: str = ""
    driver: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a check has found.

    Attributes:
        failure: None where all results were right, else one sentence: which case, and what of it.
        cases: how many there were.
        error, allowed: of the result that came nearest to what is allowed, or went furthest beyond.
        seconds: the check took.
        lasting: whether it would be the same in another process. An exception may have other
            reasons than the kernels.
        lost: whether the device cannot be used any more in this process.
    """

    failure: str | None
    cases: int = 0
    error: float = 0.0
    allowed: float = 0.0
    seconds: float = 0.0
    lasting: bool = True
    lost: bool = False


class Unverified(RuntimeError):
    """A family is wanted where it cannot be checked."""


checking: ContextVar[bool] = ContextVar("htfkernels_checking", default=False)
"""Set while a check runs: the kernels that it is about are not asked for a verdict."""

_Key = tuple[str, str, torch.dtype, str, str]
_failures: dict[_Key, str | None] = {}
_verdicts: dict[tuple[Family, str, Place], Verdict] = {}
_lock = threading.Lock()


def trusted() -> bool:
    """Whether ``HTF_VERIFY`` says that nothing is to be checked."""
    return os.environ.get("HTF_VERIFY", "").lower() in ("0", "false", "off", "no", "n")


def failure(backend: str, op: str, dtype: torch.dtype, precision: str, device: str) -> str | None:
    """Why the kernels of an operation are not to be trusted, in one sentence, or None.

    The first time it is asked it looks into the cache folder, and checks the kernels where nothing
    is known; a failure is a warning then. Afterwards it is a look into a dictionary.

    Args:
        backend, op: whose kernels.
        dtype, precision: of the numbers.
        device: a device type.

    Raises:
        Unverified: nothing is known, and nothing can be found out while a CUDA graph is captured.
        RuntimeError: the check has left the device unusable.
    """
    key = (backend, op, dtype, precision, device)
    try:
        return _failures[key]
    except KeyError:
        pass
    if checking.get() or trusted():
        return None
    family = OPERATIONS[op].backends[backend].family
    if family is None:
        return None
    math = family.math(dtype, precision)
    wrong, new = None, False
    with _lock:
        for place in places(device):
            verdict = _verdicts.get((family, math, place))
            if verdict is None:
                verdict = _read(family, math, place) or _check(family, math, place)
                _verdicts[family, math, place] = verdict
                new |= verdict.failure is not None
            if wrong is None and verdict.failure is not None:
                wrong = _sentence(family, math, place, verdict)
        _failures[key] = wrong
    if new:
        warnings.warn(
            f"{wrong}. `auto` does not take these kernels; `htf verify` checks them again, "
            "HTF_VERIFY=0 takes them all the same",
            RuntimeWarning,
            stacklevel=2,
        )
    return wrong


def known(family: Family, math: str, place: Place) -> Verdict | None:
    """The verdict, from memory or the cache folder, or None; checks nothing."""
    return _verdicts.get((family, math, place)) or _read(family, math, place)


def known_failure(family: Family, math: str, device: str) -> str | None:
    """What :func:`failure` would say, as far as it is known; checks nothing."""
    for place in places(device):
        verdict = known(family, math, place)
        if verdict is not None and verdict.failure is not None:
            return _sentence(family, math, place, verdict)
    return None


def record(family: Family, math: str, place: Place, verdict: Verdict) -> None:
    """Takes a new verdict in place of what was known, and writes it into the cache folder."""
    with _lock:
        _failures.clear()
        _verdicts[family, math, place] = verdict
    _write(family, math, place, verdict)


def forget() -> None:
    """Forgets what this process knows; the cache folder stays as it is."""
    with _lock:
        _failures.clear()
        _verdicts.clear()


def _check(family: Family, math: str, place: Place) -> Verdict:
    if _capturing(place):
        raise Unverified(
            f"the kernels {family} ({math}) have not been checked on {place.name} yet, and cannot "
            "be while a CUDA graph is captured: take the step once before it is captured, or run "
            "`htf verify`"
        )
    verdict: Verdict = import_module("htfkernels.verify.run").check(family, math, place)
    _write(family, math, place, verdict)
    if verdict.lost:
        raise RuntimeError(
            f"{_sentence(family, math, place, verdict)}. The device cannot be used any more in "
            "this process; the next one leaves these kernels alone"
        )
    return verdict


def _sentence(family: Family, math: str, place: Place, verdict: Verdict) -> str:
    return f"the kernels {family} ({math}) fail on {place.name}: {verdict.failure}"


def _capturing(place: Place) -> bool:
    return place.device.startswith("cuda") and torch.cuda.is_current_stream_capturing()


# -- where ----------------------------------------------------------------------------------------


def places(device: str) -> list[Place]:
    """Of a device type, one device of each kind that this process sees and the kernels run on; the
    current one where there is but one kind."""
    if device != "cuda":
        return [Place(device, "the CPU")]
    driver = driver_version() or "unknown"
    current = torch.cuda.current_device()
    others = [i for i in range(torch.cuda.device_count()) if i != current]
    found: dict[tuple[str, str], Place] = {}
    for i in (current, *others):
        p = torch.cuda.get_device_properties(i)
        if p.major >= 8:
            kind = (p.name, f"{p.major}.{p.minor}")
            found.setdefault(kind, Place(f"cuda:{i}", *kind, driver))
    return [*found.values()]


@cache
def driver_version() -> str | None:
    """The version of the NVIDIA driver, or None where it does not tell.

    Example:
        >>> driver_version()  # doctest: +SKIP
        '580.65.06'
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(80)
    if library.nvmlInit_v2() != 0:
        return None
    done = library.nvmlSystemGetDriverVersion(text, len(text))
    library.nvmlShutdown()
    return text.value.decode() if done == 0 else None


# -- the cache folder -----------------------------------------------------------------------------
# A file for each verdict, so that processes that check different kernels at a time do not undo each
# other's work. Its name is a digest of all that the verdict depends on, which is also in it.


def _depends_on(family: Family, math: str, place: Place) -> dict[str, str]:
    return {
        "family": str(family),
        "math": math,
        "device": place.name,
        "capability": place.capability,
        "driver": place.driver,
        **_versions(family.backend),
    }


@cache
def _versions(backend: str) -> dict[str, str]:
    found = {
        "htfkernels": str(import_module("htfkernels").__version__),
        "sources": _fingerprint(backend),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
    if backend == "triton":
        found["triton"] = str(import_module("triton").__version__)
    return found


def _fingerprint(backend: str) -> str:
    """Of this package's Python, kernels and hosts, and of the module with the compiled kernels."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    if backend == "cuda":
        files.append(cuda_module.file())
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _path(depends_on: dict[str, str]) -> Path | None:
    """The file of a verdict, or None where there is no cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):  # as the specification asks for
        return None
    text = json.dumps(depends_on, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Path(base) / "htfkernels" / "verified" / f"{digest}.json"


def _read(family: Family, math: str, place: Place) -> Verdict | None:
    """What the file says, or None: there is none, or it is damaged."""
    depends_on = _depends_on(family, math, place)
    path = _path(depends_on)
    try:
        text = path.read_bytes()[:65536] if path else b""
        found = json.loads(text)
        if found["depends_on"] != depends_on:
            return None
        return _verdict(found["verdict"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _verdict(found: dict[str, Any]) -> Verdict:
    """Raises TypeError where it is something else."""
    verdict = Verdict(**found)
    if not isinstance(verdict.failure, str | None):
        raise TypeError
    numbers = (verdict.cases, verdict.error, verdict.allowed, verdict.seconds)
    if not all(isinstance(n, int | float) for n in numbers):
        raise TypeError
    return verdict


def _write(family: Family, math: str, place: Place, verdict: Verdict) -> None:
    """As a whole or not at all. A folder that cannot be written costs a check in the next
    process."""
    if not (verdict.lasting or verdict.lost):
        return
    depends_on = _depends_on(family, math, place)
    path = _path(depends_on)
    if path is None:
        return
    content = {"depends_on": depends_on, "verdict": asdict(verdict)}
    draft = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".draft-", delete=False
        ) as file:
            draft = file.name
            json.dump(content, file, indent=1)
        os.replace(draft, path)
    except OSError as error:
        _log.info("the verdict on %s cannot be kept in %s: %s", family, path.parent, error)
        if draft is not None and os.path.exists(draft):
            os.unlink(draft)
