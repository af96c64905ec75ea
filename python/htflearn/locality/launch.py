"""Many independent calls of one function, spread over workers of an existing engine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from htflearn.errors import UserError

__all__ = ["ENGINES", "check_engine", "cores", "launch"]

ENGINES = ("joblib", "submitit")
_WATCH, _WATCH_SECONDS = "htf-launcher", 0.5


def check_engine(engine: str, options: Mapping[str, Any]) -> None:
    """Whether an engine can be used here.

    Args:
        engine: ``"joblib"``: processes of this machine; ``"submitit"``: jobs of a cluster.
        options: of the engine, see :func:`launch`.

    Raises:
        UserError: there is no such engine, it is not installed, or has no options.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if find_spec(engine) is None:
        raise UserError(
            f"--engine {engine} needs {engine}, which is not installed: pip install {engine}"
        )
    if options and engine != "submitit":
        raise UserError(f"--engine {engine} takes no --engine-option, got {', '.join(options)}")


def launch(
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    engine: str = "joblib",
    workers: int = 1,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Iterator[tuple[int, Any]]:
    """Calls a function once for each job; a call that fails does not stop the others.

    Args:
        function: of a module, with arguments and results that can be pickled.
        jobs: the arguments of each call.
        engine: see :func:`check_engine`. A single worker of joblib is this process itself.
        workers: calls at the same time (of joblib; a cluster decides that itself).
        threads: of PyTorch, for each call; None leaves them as they are.
        options: of submitit, given to ``AutoExecutor.update_parameters``; ``cluster`` among them
            chooses the cluster (``slurm``, ``local``, ``debug``).
        folder: where submitit keeps what the jobs print.

    Yields:
        the job's number and its result, or the exception it ended with, as the jobs end.

    Raises:
        UserError: the engine does not take the jobs.

    Example:
        >>> sorted(launch(pow, [(2, 3), (3, 2)]))
        [(0, 8), (1, 9)]
    """
    numbered = list(enumerate(jobs))
    if engine == "submitit":
        yield from _submitit(function, numbered, threads, dict(options or {}), folder)
    elif workers == 1 or len(numbered) <= 1:
        before = torch.get_num_threads()
        try:
            for number, job in numbered:
                yield _call(function, number, job, threads)
        finally:
            torch.set_num_threads(before)
    else:
        from joblib import Parallel, delayed

        # One job at a time for each worker: an interruption then loses none that waits its turn.
        parallel = Parallel(
            workers, return_as="generator_unordered", batch_size=1, pre_dispatch=workers
        )
        yield from parallel(
            delayed(_call_for)(os.getpid(), function, *job, threads) for job in numbered
        )


def _call(
    function: Callable[..., Any], number: int, job: tuple[Any, ...], threads: int | None
) -> tuple[int, Any]:
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return number, function(*job)
    except Exception as error:
        return number, error


def _call_for(
    launcher: int,
    function: Callable[..., Any],
    number: int,
    job: tuple[Any, ...],
    threads: int | None,
) -> tuple[int, Any]:
    """In a worker, which ends with the process that gave it the job: nobody would collect the
    result, and the job may soon be given to another."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    if not any(thread.name == _WATCH for thread in threading.enumerate()):
        threading.Thread(target=watch, name=_WATCH, daemon=True).start()
    return _call(function, number, job, threads)


def _submitit(
    function: Callable[..., Any],
    jobs: list[tuple[int, tuple[Any, ...]]],
    threads: int | None,
    options: dict[str, Any],
    folder: Path | None,
) -> Iterator[tuple[int, Any]]:
    import submitit

    try:
        executor = submitit.AutoExecutor(folder or "submitit", cluster=options.pop("cluster", None))
        executor.update_parameters(**options)
        with executor.batch():
            handed = [executor.submit(_call, function, *job, threads) for job in jobs]
    except (RuntimeError, ValueError, TypeError, NameError, OSError) as error:
        raise UserError(f"submitit does not take the jobs: {error}") from error
    numbers = {handle: number for handle, (number, _) in zip(handed, jobs, strict=True)}
    for handle in submitit.helpers.as_completed(handed):
        try:
            yield handle.result()
        except Exception as error:  # of the cluster: _call gives back those of the function
            yield numbers[handle], error


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
