"""The checkpoints of a running training, one after another."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import htfkernels as hk
from htflearn.checkpoint import find_weights, load_model
from htflearn.errors import UserError

__all__ = ["Loaded", "follow", "load"]

_STEP = re.compile(r"step-(\d+)(?:-\d+)?")


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from.

    Attributes:
        model: the model.
        file: its weights.
        iteration: of the checkpoint, or None for a file that is none.
        identity: differs from that of any other checkpoint, one of the same name included.
    """

    model: hk.HTF
    file: Path
    iteration: int | None
    identity: object


def load(path: Path) -> Loaded:
    """Rebuilds a model as :func:`htflearn.load_model` does, from one checkpoint as a whole even
    where a running training replaces it.

    Args:
        path: a ``.safetensors`` file, a checkpoint, a folder of checkpoints, or of a run.

    Raises:
        UserError: there is none, it cannot be read, or it is no HTF.

    Example:
        >>> _ = save_checkpoint("run/checkpoints", matrix_factorization(6, 5))
        >>> load(Path("run")).iteration
        0
    """
    while True:
        file = find_weights(path)
        before = _identity(file)
        try:
            model = load_model(file)
        except UserError:
            if find_weights(path) == file and _identity(file) == before:
                raise
            continue
        # Removed since: it was read to the end all the same. Written over: what was read may be
        # a mixture.
        if before is not None and _identity(file) in (None, before):
            step = _STEP.fullmatch(file.absolute().parent.name)
            return Loaded(model, file, int(step[1]) if step else None, before)


def follow(
    path: Path,
    interval: float = 2.0,
    until: int | None = None,
    timeout: float | None = None,
    waiting: Callable[[str], None] = lambda sentence: None,
) -> Iterator[Loaded]:
    """Yields the newest checkpoint of a folder, then each new one that is found there.

    Where several were written between two looks, the newest of them is yielded alone.

    Args:
        path: a folder of checkpoints, or of a run; it may be made later.
        interval: seconds between two looks.
        until: ends after a checkpoint of this or a later iteration.
        timeout: ends after this many seconds.
        waiting: called at each look with a sentence, until there is a checkpoint.

    Raises:
        UserError: ``path`` is a file; the time is over and there was none; one stays unreadable.
    """
    if path.is_file():
        raise UserError(f"--follow takes a folder of checkpoints, and {path} is a file")
    end = None if timeout is None else time.monotonic() + timeout
    seen: object = None
    unreadable: object = None
    while True:
        last_look = end is not None and time.monotonic() >= end
        now: object = None
        try:
            now = _identity(find_weights(path))
        except UserError as error:
            if seen is None:
                waiting(f"waiting for the first checkpoint: {error}")
        if now is not None and now != seen:
            try:
                loaded = load(path)
            except UserError:
                # A file that is just being written: read again at the next look, once.
                if now == unreadable or last_look:
                    raise
                unreadable = now
            else:
                seen = loaded.identity
                yield loaded
                if until is not None and loaded.iteration is not None and loaded.iteration >= until:
                    return
                continue
        if last_look:
            if seen is None:
                raise UserError(f"no checkpoint appeared in {path} within {timeout:g} s")
            return
        time.sleep(interval if end is None else max(0.0, min(interval, end - time.monotonic())))


def _identity(file: Path) -> object:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return str(file), found.st_ino, found.st_mtime_ns, found.st_size
