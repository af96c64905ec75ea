"""Holds the machine code in the built module ``htfkernels._C_cuda`` to ceilings.

What is read is what would run: registers, shared memory, stack, local memory instructions (spills),
size and tensor-core instructions of every kernel of the module, for every GPU architecture in it.
No GPU is needed, and no kernel runs:

    python bench/cuda_gate.py              # checks against bench/cuda_ceilings.json
    python bench/cuda_gate.py --table      # and prints what was found
    python bench/cuda_gate.py --update     # takes what was found as the new ceilings

The check fails, with a sentence for each reason, where a kernel has grown beyond its row of the
table or has none, where a row has no kernel any more, and where a kernel spills at all, unless its
row says so. Ceilings are kept for each minor version of nvcc. Triton's package has the
disassembler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import compile_gate
from compile_kernels import TENSOR_CORES, Needs, Report
from triton import knobs

from htfkernels.runtime import cuda_module as module

CEILINGS = Path(__file__).with_name("cuda_ceilings.json")


@dataclass(frozen=True)
class Cubin:
    """The machine code of one source file for one architecture."""

    arch: int
    path: Path

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class ModuleReport(Report):
    """What a kernel of the module needs."""

    compiler: str = ""

    @property
    def target(self) -> str:
        return f"{self.compiler} sm_{self.arch}"


def find_module() -> Path:
    """The file of ``htfkernels._C_cuda``.

    Raises:
        FileNotFoundError: it was not built.
    """
    folder = Path(module.__file__).parent.parent
    found = sorted(folder.glob("_C_cuda*.so"))
    if not found:
        raise FileNotFoundError(f"there is no _C_cuda in {folder}: HTF_BUILD_CUDA=1 builds it")
    return found[0]


def extract(path: Path, folder: Path) -> list[Cubin]:
    """All machine code of a module, written to a folder."""
    command = [knobs.nvidia.cuobjdump.path, "-xelf", "all", str(path.resolve())]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    found = []
    for file in sorted(folder.glob("*.cubin")):
        match = re.fullmatch(r".+\.sm_(\d+)[af]?\.cubin", file.name)
        if match is None:
            raise RuntimeError(f"cuda gate: cuobjdump wrote {file.name}, which names no sm_")
        found.append(Cubin(int(match[1]), file))
    return found


def read(cubin: Cubin, compiler: str) -> list[ModuleReport]:
    """What each kernel of a cubin needs."""
    usage = dict(_usage(_tool("-res-usage", cubin.path)))
    code = dict(_instructions(_tool("-sass", cubin.path)))
    if set(usage) != set(code):
        raise RuntimeError(f"cuda gate: cuobjdump lists different kernels of {cubin.path.name}")
    names = _demangled(list(usage))
    reports = []
    for mangled, (registers, stack, shared) in usage.items():
        name, key = _split(names[mangled])
        instructions = code[mangled]
        needs = Needs(
            registers,
            shared,
            stack,
            sum(i in ("LDL", "STL") for i in instructions),
            16 * len(instructions),
            "+".join(t for t in TENSOR_CORES if any(i.startswith(t) for i in instructions)),
        )
        reports.append(ModuleReport(name, key, cubin.arch, (), needs, compiler=compiler))
    return reports


def _tool(option: str, path: Path) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(printed: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    pattern = r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for name, registers, stack, shared in re.findall(pattern, printed):
        yield name, (int(registers), int(stack), int(shared))


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")


def _instructions(printed: str) -> Iterator[tuple[str, list[str]]]:
    for part in re.split(r"^\s*Function : ", printed, flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), _INSTRUCTION.findall(body)


def _demangled(names: list[str]) -> dict[str, str]:
    if not names:
        return {}
    given = "\n".join(names)
    printed = subprocess.run(["c++filt"], input=given, capture_output=True, text=True, check=True)
    return dict(zip(names, printed.stdout.splitlines(), strict=True))


def _split(signature: str) -> tuple[str, str]:
    """``kernel`` and its template arguments, of a demangled signature."""
    text = signature.replace("(anonymous namespace)::", "")
    depth, end = 0, len(text)
    for i, c in enumerate(text):  # up to the list of parameters
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    text = re.sub(r"^(void|auto) ", "", text[:end]).replace("htf::gpu::", "")
    name, _, rest = text.partition("<")
    return name, re.sub(r"\((?:int|bool|[\w:]+)\)(?=-?\d)", "", rest.removesuffix(">"))


def spills(reports: list[ModuleReport], table: compile_gate.Table) -> list[str]:
    """A sentence for each kernel that has a stack or touches local memory, where the table does not
    expect it."""
    found = []
    for r in reports:
        row = table.get(r.name, {}).get(r.key, {}).get(r.target)
        if (r.found.stack or r.found.local) and (row is None or not (row.stack or row.local)):
            found.append(
                f"{r.name} [{r.key}] on {r.target}: it spills ({r.found.stack} bytes of stack, "
                f"{r.found.local} loads and stores of local memory)"
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("--table", action="store_true", help="print what was found, as Markdown")
    parser.add_argument("--module", type=Path, help="another build of _C_cuda")
    parser.add_argument("--ceilings", type=Path, default=CEILINGS, help="the table's file")
    options = parser.parse_args(arguments)
    info = module.build_info()
    if isinstance(info, str):
        print(f"cuda gate: htfkernels._C_cuda cannot be loaded: {info}", file=sys.stderr)
        return 1
    compiler = ".".join(info["compiler"].split(".")[:2])
    path = options.module or find_module()
    with tempfile.TemporaryDirectory() as folder:
        cubins = extract(path, Path(folder))
        reports = [report for cubin in cubins for report in read(cubin, compiler)]
        sizes: dict[int, int] = {}
        for cubin in cubins:
            sizes[cubin.arch] = sizes.get(cubin.arch, 0) + cubin.size
    if options.table:
        print(compile_gate.markdown(reports))
    archs = sorted(sizes)
    table = compile_gate.load(options.ceilings)
    violations = compile_gate.limits(reports)
    if options.update:
        known = [f"{compiler} sm_{arch}" for arch in archs]
        compile_gate.save(compile_gate.updated(table, reports, known), options.ceilings)
    else:
        violations = [*spills(reports, table), *compile_gate.check(reports, table)]
    print(*violations, sep="\n", file=sys.stderr, end="\n" if violations else "")
    cubin_sizes = ", ".join(f"{sizes[arch]:,} bytes of cubins for sm_{arch}" for arch in archs)
    print(
        f"{path.name}, {compiler}: {len(reports)} kernels, {cubin_sizes}, "
        f"{path.stat().st_size:,} bytes in all; {len(violations)} violations"
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
