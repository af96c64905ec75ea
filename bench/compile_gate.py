"""Compiles every Triton kernel in every configuration that is launched, and holds it to ceilings.

No GPU is needed: the launchers run on CPU tensors with a recorder in place of the launch
(``htfkernels.triton.launch.recorded``), and what they would have launched is compiled ahead of time
for sm_80 and sm_90, specialised as Triton's run time would (``compile_kernels.py``), for the models
of ``compile_cases.py``:

    python bench/compile_gate.py              # checks against bench/compile_ceilings.json
    python bench/compile_gate.py --table      # and prints what was found
    python bench/compile_gate.py --update     # takes what was found as the new ceilings
    python bench/compile_gate.py --cases "^evaluate .*, wide" --arch 90     # looks at a part

The check fails, with a sentence for each reason, where a kernel does not compile; where it needs
more registers, shared memory, stack, local memory instructions (spills) or code than its ceiling;
where its tensor-core instructions are not those of the table; where the table has no row for it, or
one that nobody launches any more. Ceilings are kept for each minor version of Triton.

This compiles kernels and reads the machine code. It runs none of them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import compile_cases
from compile_kernels import (
    ARCHITECTURES,
    Launch,
    Needs,
    Report,
    collect_all,
    compile_all,
    target,
)

from htfkernels.triton import configs

CEILINGS = Path(__file__).with_name("compile_ceilings.json")

# What a block can have, whatever the table says: bytes of shared memory by architecture, and
# registers of a thread. An architecture that is not listed is held to the table alone.
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
REGISTER_LIMIT = 255

MEANING = {
    "registers": "registers",
    "shared": "bytes of shared memory",
    "stack": "bytes of stack (spilled registers)",
    "local": "loads and stores of local memory (spilled registers)",
    "code": "bytes of code",
}

Table = dict[str, dict[str, dict[str, Needs]]]
"""Kernel -> configuration -> target -> ceiling."""


# -- the table ------------------------------------------------------------------------------------


def load(path: Path) -> Table:
    """The table in a file; empty where there is none.

    Raises:
        ValueError: the file's columns are not :class:`Needs`'s.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["columns"] != list(Needs._fields):
        raise ValueError(f"{path.name}: expected the columns {', '.join(Needs._fields)}")
    return {
        name: {
            key: {column: Needs(*row) for column, row in columns.items()}
            for key, columns in keys.items()
        }
        for name, keys in content["kernels"].items()
    }


def save(table: Table, path: Path) -> None:
    """Writes the table, a row on each line, so that a change shows what changed."""
    kernels = []
    for name in sorted(table):
        rows = []
        for key in sorted(table[name]):
            columns = [
                f"   {json.dumps(column)}: {json.dumps(list(table[name][key][column]))}"
                for column in sorted(table[name][key])
            ]
            rows.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(columns) + "\n  }")
        kernels.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
    body = ",\n".join(kernels)
    columns = json.dumps(list(Needs._fields))
    path.write_text(f'{{"columns": {columns},\n"kernels": {{\n{body}\n}}}}\n')


def ceiling(found: Needs) -> Needs:
    """A ceiling for what was found. A thread gets registers by the eight, and a tenth more code is
    no reason to fail."""
    return found._replace(
        registers=min(-(-found.registers // 8) * 8, REGISTER_LIMIT),
        code=-(-found.code * 11 // (10 * 128)) * 128,
    )


def updated(
    table: Table,
    reports: Iterable[Report],
    looked_at: Iterable[str],
    complete: bool = True,
    only: str = "",
) -> Table:
    """The table with what was found as ceilings.

    Args:
        table: as it was.
        reports: what was found.
        looked_at: for which compilers and architectures (:func:`target`). Rows of others stay.
        complete: whether a row without a report is dropped.
        only: the choice that was made among the configurations.
    """
    columns = set(looked_at)
    kept = {
        (name, key, column): row
        for name, key, column, row in _rows(table)
        if not complete or column not in columns or not selected(name, key, only)
    }
    for report in reports:
        if report.error is None:
            kept[report.name, report.key, report.target] = ceiling(report.found)
    result: Table = {}
    for (name, key, column), row in kept.items():
        result.setdefault(name, {}).setdefault(key, {})[column] = row
    return result


def _rows(table: Table) -> Iterator[tuple[str, str, str, Needs]]:
    for name, keys in table.items():
        for key, columns in keys.items():
            for column, row in columns.items():
                yield name, key, column, row


def selected(name: str, key: str, only: str) -> bool:
    """Whether ``--only`` chooses a configuration: a regular expression found in its name or key."""
    return not only or re.search(only, f"{name} {key}") is not None


# -- the check ------------------------------------------------------------------------------------


def limits(reports: Iterable[Report]) -> list[str]:
    """A sentence for each kernel that does not compile, that no GPU of its kind could run, or that
    has the name of another, of which the table would lose one."""
    violations = []
    named: set[tuple[str, str, str]] = set()
    for report in reports:
        row = (report.name, report.key, report.target)
        if row in named:
            violations.append(f"{_about(report)}: there are two of this name; rename one")
        named.add(row)
        most = SHARED_LIMITS.get(report.arch)
        if report.error is not None:
            violations.append(f"{_about(report)}: it does not compile: {report.error}")
        elif most is not None and report.found.shared > most:
            violations.append(
                f"{_about(report)}: {report.found.shared} bytes of shared memory, and a block of "
                f"sm_{report.arch} has {most}"
            )
        elif report.found.registers > REGISTER_LIMIT:
            violations.append(
                f"{_about(report)}: {report.found.registers} registers, and a thread has "
                f"{REGISTER_LIMIT}"
            )
    return violations


def check(reports: list[Report], table: Table, complete: bool = True, only: str = "") -> list[str]:
    """A sentence for each way in which what was found is not what the table says.

    Args:
        reports: of all architectures that are checked.
        table: the ceilings.
        complete: whether a row without a report is one that nobody launches any more.
        only: the choice that was made among the configurations.
    """
    violations = limits(reports)
    columns = {report.target for report in reports}
    known = {column for _, _, column, _ in _rows(table)}
    for column in sorted(columns - known):
        violations.append(f"the table has no ceilings for {column}: make them with --update")
    for report in reports:
        if report.error is not None or report.target not in known:
            continue
        row = table.get(report.name, {}).get(report.key, {}).get(report.target)
        if row is None:
            violations.append(
                f"{_about(report)}: a configuration without ceilings; --update adds them"
            )
            continue
        for name, unit in MEANING.items():
            found, most = getattr(report.found, name), getattr(row, name)
            if found > most:
                violations.append(f"{_about(report)}: {found} {unit}, and the ceiling is {most}")
        if report.found.tensor != row.tensor:
            violations.append(
                f"{_about(report)}: the tensor-core instructions are "
                f"{report.found.tensor or 'none'}, and the table expects {row.tensor or 'none'}"
            )
    if complete:
        launched = {(report.name, report.key, report.target) for report in reports}
        for name, key, column, _ in _rows(table):
            if (
                column in columns
                and selected(name, key, only)
                and (name, key, column) not in launched
            ):
                violations.append(
                    f"{name} [{key}] on {column}: a row for what nobody launches; --update drops it"
                )
    return violations


def _about(report: Report) -> str:
    where = f", launched by {report.cases[0]}" if report.cases else ""
    where += f" and {len(report.cases) - 1} more" if len(report.cases) > 1 else ""
    return f"{report.name} [{report.key}] on {report.target}{where}"


def markdown(reports: Iterable[Report]) -> str:
    """What was found, as a table."""
    lines = [
        "| kernel | configuration | target | registers | shared | stack | local | code "
        "| tensor cores | seconds |",
        "|---|---|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for r in sorted(reports, key=lambda r: (r.name, r.key, r.arch)):
        numbers = [r.error] if r.error else list(r.found)
        cells = [r.name, r.key, r.target, *numbers, f"{r.seconds:.1f}"]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("--table", action="store_true", help="print what was found, as Markdown")
    parser.add_argument(
        "--only", default="", help="kernels or configurations, a regular expression"
    )
    parser.add_argument(
        "--cases",
        default="",
        help="only these cases' launches, a regular expression of their names",
    )
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="80,90")
    parser.add_argument("--jobs", type=int, help="processes; as many as there are CPUs")
    parser.add_argument("--ceilings", type=Path, default=CEILINGS, help="the table's file")
    options = parser.parse_args(arguments)
    archs = [int(arch) for arch in options.arch.split(",")]

    start = time.perf_counter()
    cases = [case for case in compile_cases.cases() if re.search(options.cases, case[0])]
    launches: dict[int, list[Launch]] = {}
    violations: list[str] = []
    for arch in archs:
        with configs.assumed(arch):  # tiles may differ
            launches[arch], failures = collect_all(cases)
        violations += [f for f in failures if f not in violations]
    if options.update and violations:
        # A case that fails would take its rows out of the table.
        print(*violations, "The table is as it was.", sep="\n", file=sys.stderr)
        return 1
    complete = not violations and not options.cases
    recorded = time.perf_counter() - start
    reports: list[Report] = []
    for arch, found in launches.items():
        chosen = [each for each in found if selected(each.name, each.key, options.only)]
        reports += compile_all(chosen, [arch], options.jobs)
    if options.table:
        print(markdown(reports))
    if options.update:
        table = load(options.ceilings)
        save(updated(table, reports, map(target, archs), complete, options.only), options.ceilings)
        violations = limits(reports)
    else:
        violations += check(reports, load(options.ceilings), complete, options.only)
    print(*violations, sep="\n", file=sys.stderr, end="\n" if violations else "")
    total = time.perf_counter() - start
    spilling = sum(report.found.local > 0 for report in reports)
    print(
        f"{len(reports)} configurations for {', '.join(map(target, archs))}: "
        f"{spilling} spill, {len(violations)} violations "
        f"({recorded:.0f} s recording, {total:.0f} s in all)"
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
