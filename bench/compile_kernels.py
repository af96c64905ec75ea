"""What Triton kernels need: launches recorded without a GPU, compiled, and read as machine code.

Nothing is judged here; ``compile_gate.py`` does that.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from htfkernels.triton import launch as door

ARCHITECTURES = (80, 90)
MINOR = ".".join(triton.__version__.split(".")[:2])

# Tensor-core instructions by their first letters in SASS, those of all architectures.
TENSOR_CORES = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA")


class Needs(NamedTuple):
    """What a kernel needs, and its tensor-core instructions; or the most that it may, a ceiling."""

    registers: int
    shared: int
    stack: int
    local: int
    code: int
    tensor: str


NOTHING = Needs(0, 0, 0, 0, 0, "")


@dataclass
class Launch:
    """A kernel and all that decides its machine code, but for the architecture.

    Attributes:
        kernel: the ``triton.jit`` function.
        signature, constants, attributes: what Triton's run time makes of the arguments: types by
            name, compile-time values and properties by position.
        warps, stages: of the launch.
        cases: names of the cases that launch it.
    """

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    warps: int
    stages: int
    cases: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Module and function, without the package's name."""
        full = f"{self.kernel.fn.__module__}.{self.kernel.fn.__qualname__}"
        return full.removeprefix("htfkernels.").replace(".<locals>", "")

    @property
    def key(self) -> str:
        """The configuration: types of the arguments with ``/16`` where divisible by 16, values of
        the constants."""
        parts = []
        for i, (name, kind) in enumerate(self.signature.items()):
            constants = [v for path, v in self.constants.items() if path[0] == i]
            if kind == "constexpr":
                parts.append(f"{name}={_text(constants[0])}")
                continue
            divisible = (
                "/16" if any(path[0] == i and a for path, a in self.attributes.items()) else ""
            )
            held = f"={_text(tuple(constants))}" if constants else ""
            parts.append(f"{name}:{kind}{divisible}{held}")
        return f"{' '.join(parts)} warps={self.warps} stages={self.stages}"


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs. ``error`` is set, and the numbers are 0, where it does not
    compile."""

    name: str
    key: str
    arch: int
    cases: tuple[str, ...]
    found: Needs = NOTHING
    seconds: float = 0.0
    error: str | None = None

    @property
    def target(self) -> str:
        """The table's column."""
        return target(self.arch)


def target(arch: int) -> str:
    """Name of an architecture under this version of Triton."""
    return f"triton {MINOR} sm_{arch}"


def _text(value: Any) -> str:
    value = getattr(value, "value", value)  # tl.constexpr
    if isinstance(value, JITFunction):
        return value.fn.__qualname__
    return value if isinstance(value, str) else str(value).replace(" ", "")


# -- recording ------------------------------------------------------------------------------------


class _NoDevice:
    """A driver that names a target and has no device; specialisation asks for nothing else."""

    def get_current_device(self) -> int:
        return -1  # which no device is: Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURES[0], 32)


@contextmanager
def _specialising(hook: Callable[..., bool]) -> Iterator[None]:
    """Triton as on a machine with a GPU, until it would compile: then ``hook`` is called."""
    active, before = driver._active, knobs.runtime.jit_cache_hook
    driver.set_active(_NoDevice())
    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        driver.set_active(active)
        knobs.runtime.jit_cache_hook = before


def collect(run: Callable[[], object], case: str = "") -> list[Launch]:
    """The different kernels and configurations that ``run`` launches, none of which is run.

    Args:
        run: calls launchers, on CPU tensors.
        case: a name for messages.

    Raises:
        RuntimeError: Triton's interpreter is on, in which kernels have no machine code.
        TypeError: something other than a ``triton.jit`` function is launched.
    """
    if door.INTERPRETED:
        raise RuntimeError("compile gate: TRITON_INTERPRET is set, and then nothing is compiled")
    found: dict[tuple[str, str], Launch] = {}
    compiled: dict[str, Any] = {}

    def hook(**call: Any) -> bool:
        compiled.update(call["compile"])
        return True  # as if already compiled: Triton goes no further

    def recorder(
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        constants: dict[str, Any],
        config: door.Config,
    ) -> None:
        if not isinstance(kernel, JITFunction):
            raise TypeError(
                f"compile gate: {kernel!r} is launched, which is no triton.jit function"
            )
        compiled.clear()
        with _specialising(hook):
            kernel.warmup(
                *args,
                grid=grid,
                **constants,
                num_warps=config.warps,
                num_stages=config.stages,
                enable_fp_fusion=True,
            )
        launch = Launch(
            kernel,
            dict(compiled["signature"]),
            dict(compiled["constants"]),
            dict(compiled["configs"][0]),
            config.warps,
            config.stages,
            [case] if case else [],
        )
        found.setdefault((launch.name, launch.key), launch)

    with door.recorded(recorder):
        run()
    return list(found.values())


def collect_all(
    cases: Iterable[tuple[str, Callable[[], object]]],
) -> tuple[list[Launch], list[str]]:
    """What all cases launch, each configuration once, and a sentence for each case that fails."""
    found: dict[tuple[str, str], Launch] = {}
    failures = []
    for name, run in cases:
        try:
            launches = collect(run, name)
        except Exception as error:
            failures.append(f"case {name}: {type(error).__name__}: {_line(error)}")
            continue
        if not launches:
            failures.append(f"case {name}: it launches nothing")
        for launch in launches:
            known = found.setdefault((launch.name, launch.key), launch)
            if known is not launch:
                known.cases += launch.cases
    return list(found.values()), failures


def _line(error: BaseException) -> str:
    """An error's message on one line, what it ends with where it is long."""
    text = " ".join(str(error).split())
    return text if len(text) < 400 else f"... {text[-400:]}"


# -- compiling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Binary:
    """A compiled kernel before it is disassembled; or why there is none."""

    code: bytes = b""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str | None = None


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compiles a kernel for an architecture and reads what it needs off its machine code."""
    (report,) = _reports([(launch, arch)], [_compile(launch, arch)])
    return report


def compile_all(
    launches: Iterable[Launch], archs: Iterable[int], processes: int | None = None
) -> list[Report]:
    """Compiles all launches for all architectures, in several processes.

    They are forks of this one, which know the kernels without importing them again. One that dies
    takes its siblings' work with it, which is then done one by one, so that the culprit is named.
    """
    launches = list(launches)
    _jobs[:] = [(launch, arch) for arch in archs for launch in launches]
    binaries: dict[int, _Binary] = {}
    with _pool(processes or os.cpu_count() or 1) as pool:
        numbers = {pool.submit(_compile_job, number): number for number in range(len(_jobs))}
        for future in as_completed(numbers):
            try:
                binaries[numbers[future]] = future.result()
            except BrokenProcessPool:
                continue
    for number in range(len(_jobs)):
        if number in binaries:
            continue
        with _pool(1) as pool:
            try:
                binaries[number] = pool.submit(_compile_job, number).result()
            except BrokenProcessPool:
                binaries[number] = _Binary(error="the compiler's process died")
    return _reports(_jobs, [binaries[number] for number in range(len(_jobs))])


_jobs: list[tuple[Launch, int]] = []


def _compile_job(number: int) -> _Binary:
    return _compile(*_jobs[number])


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("fork"))


def _compile(launch: Launch, arch: int) -> _Binary:
    start = time.perf_counter()
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,
    }
    try:
        with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
            # Nothing of an earlier compilation is taken up, and nothing is left.
            knobs.cache.dir = folder
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            printed = _tool(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
            usage = re.findall(r"REG:(\d+) STACK:(\d+)", printed)
            if not usage:
                raise RuntimeError(f"cuobjdump -res-usage prints no registers: {printed}")
            return _Binary(
                _code(compiled.asm["cubin"]),
                max(int(registers) for registers, _ in usage),
                max(int(stack) for _, stack in usage),
                int(compiled.metadata.shared),
                time.perf_counter() - start,
            )
    except Exception as error:
        return _Binary(error=f"{type(error).__name__}: {_line(error)}")


def _tool(path: str, *arguments: object) -> str:
    command = [path, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _code(cubin: bytes) -> bytes:
    """The instructions in a cubin, which is a 64-bit ELF file: its sections ``.text.*``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of a section: offset of its name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin[strings + name :].startswith(b".text.")
    )


# -- reading machine code -------------------------------------------------------------------------

_INSTRUCTION_BYTES = 16  # since sm_70
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")


def _reports(jobs: Sequence[tuple[Launch, int]], binaries: Sequence[_Binary]) -> list[Report]:
    found: dict[int, Needs] = {}
    for arch in {arch for _, arch in jobs}:
        numbers = [i for i, (_, a) in enumerate(jobs) if a == arch and binaries[i].error is None]
        code = [binaries[i].code for i in numbers]
        for i, names in zip(numbers, _disassembled(code, arch), strict=True):
            found[i] = Needs(
                binaries[i].registers,
                binaries[i].shared,
                binaries[i].stack,
                sum(name in ("LDL", "STL") for name in names),
                len(binaries[i].code),
                "+".join(t for t in TENSOR_CORES if any(name.startswith(t) for name in names)),
            )
    return [
        Report(
            launch.name,
            launch.key,
            arch,
            tuple(launch.cases),
            found.get(i, NOTHING),
            binaries[i].seconds,
            binaries[i].error,
        )
        for i, (launch, arch) in enumerate(jobs)
    ]


def _disassembled(code: Sequence[bytes], arch: int) -> Iterator[list[str]]:
    """Names of the instructions of several kernels, disassembled together: starting the
    disassembler takes longer than a kernel."""
    if not code:
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(code))
        file.flush()
        target = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
        arguments = ("--binary", target, "--no-dataflow", "--print-code", file.name)
        names = _INSTRUCTION.findall(_tool(knobs.nvidia.nvdisasm.path, *arguments))
    total = sum(map(len, code)) // _INSTRUCTION_BYTES
    if len(names) != total:
        raise RuntimeError(f"compile gate: nvdisasm shows {len(names)} instructions of {total}")
    first = 0
    for kernel in code:
        last = first + len(kernel) // _INSTRUCTION_BYTES
        yield names[first:last]
        first = last
