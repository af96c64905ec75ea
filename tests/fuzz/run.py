"""Fuzzing, from a shell: ``python tests/fuzz/run.py --cases 1000000 --jobs 2``.

Cases of a family are numbered; a number is all that is needed to repeat one. They run in processes
of their own, so that a crash or a hang is a finding like any other: it is told with its number, and
the next process goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

FAMILIES = {
    "api": "public operations against the dense end tensor in float64",
    "arguments": "bad arguments to public functions",
    "files": "damaged files",
    "operators": "compiled operators with damaged programs, tables and tensors",
}
HUNG = 120.0
"""Seconds that one case may take."""


@dataclass
class Found:
    """What the cases of a family came to."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(self.counts.values()) + len(self.failures)


def run(family: str, first: int, cases: int, jobs: int = 1, most_failures: int = 20) -> Found:
    """Runs cases ``first .. first + cases - 1`` of a family, shared out among processes.

    Stops early after ``most_failures``.
    """
    found = Found()
    share = -(-cases // jobs)
    with selectors.DefaultSelector() as ready:
        waiting = [
            _Worker(family, begin, min(begin + share, first + cases))
            for begin in range(first, first + cases, share)
        ]
        for worker in waiting:
            worker.start(ready)
        while ready.get_map():
            for key, _ in ready.select(timeout=1.0):
                key.data.read(ready, found)
            for key in [*ready.get_map().values()]:
                key.data.end_if_hung()
                if len(found.failures) >= most_failures:
                    key.data.stop(ready)
    return found


class _Worker:
    """A process that runs a range of cases, started again behind a case that ended it."""

    def __init__(self, family: str, begin: int, end: int) -> None:
        self.family, self.next, self.end = family, begin, end
        self.process: subprocess.Popen[bytes]
        self.rest = b""
        self.hung = False

    def start(self, ready: selectors.BaseSelector) -> None:
        command = [sys.executable, __file__, "--worker", self.family, str(self.next), str(self.end)]
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.heard, self.rest, self.hung = time.monotonic(), b"", False
        ready.register(self.process.stdout, selectors.EVENT_READ, self)

    def read(self, ready: selectors.BaseSelector, found: Found) -> None:
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line), found)
        if data:
            return
        self.stop(ready)
        if self.next < self.end:
            found.failures.append((self.next, self._how_it_ended()))
            self.next += 1
            if self.next < self.end:
                self.start(ready)

    def _take(self, line: dict[str, Any], found: Found) -> None:
        self.next = line["next"]
        if "failed" in line:
            found.failures.append((self.next - 1, line["failed"]))
        found.counts.update(line.get("counts", {}))

    def _how_it_ended(self) -> str:
        code = self.process.returncode
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace")[-4000:].strip()
        if self.hung:
            return f"did not end within {HUNG:.0f} s\n{last}"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the process ended with {name}\n{last}"

    def end_if_hung(self) -> None:
        if time.monotonic() - self.heard > HUNG:
            self.hung = True
            self.process.kill()

    def stop(self, ready: selectors.BaseSelector) -> None:
        ready.unregister(self.process.stdout)
        if self.process.poll() is None and self.next < self.end:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def work(family: str, begin: int, end: int) -> None:
    """The cases of one process, told in lines of JSON: counts now and then, failures at once.

    Before a case that may end the process its number is told, so cases are told singly; a line is
    cheap beside a case.
    """
    case = import_module(f"fuzz_{family}").case
    for seed in range(begin, end):
        try:
            line: dict[str, Any] = {"counts": {case(seed): 1}}
        except Exception:
            line = {"failed": traceback.format_exc()[-6000:]}
        print(json.dumps({"next": seed + 1, **line}), flush=True)


def _print(results: dict[str, Found], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{sum(f.cases for f in results.values()):,} cases in {seconds:.0f} s")
    for name, justify in (("family", "left"), ("outcome", "left"), ("cases", "right")):
        table.add_column(name, justify=justify)
    for family, found in results.items():
        for outcome, count in sorted(found.counts.items()):
            table.add_row(family, outcome, f"{count:,}")
        table.add_row(family, "FAILED", f"{len(found.failures):,}", end_section=True)
    Console().print(table)
    for family, found in results.items():
        for seed, why in found.failures:
            print(f"\n-- python {_shown()} --only {family}:{seed}\n{why}")


def _shown() -> str:
    path = Path(__file__).resolve()
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="of all families together")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this; repeatable")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--only", metavar="FAMILY:NUMBER", help="one case, in this process")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        family, begin, end = options.worker
        work(family, int(begin), int(end))
        return 0
    if options.only:
        family, number = options.only.split(":")
        print(import_module(f"fuzz_{family}").case(int(number)))
        return 0
    start, results = time.monotonic(), {}
    families = options.family or list(FAMILIES)
    for family in families:
        cases = -(-options.cases // len(families))
        results[family] = run(family, options.first, cases, options.jobs)
    _print(results, time.monotonic() - start)
    return int(any(found.failures for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
