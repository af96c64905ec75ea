"""The C++ compiles for aarch64 as well, and its kernels are right there (under qemu) and here."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CROSS = "aarch64-linux-gnu-g++"
KERNELS = sorted(map(str, (ROOT / "csrc/cpu").glob("kernels*.cpp")))
CHECK = str(ROOT / "tests/kernels_check.cpp")

pytestmark = pytest.mark.slow


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py would build for the CPU."""
    pytest.importorskip("pybind11")
    setuptools = pytest.importorskip("setuptools")
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HTF_BUILD_CUDA", "0")
    monkeypatch.delenv("HTF_EMULATE_CUDA", raising=False)
    runpy.run_path("setup.py")
    return {extension.name: extension for extension in given["ext_modules"]}


def require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def python_headers(folder: Path) -> list[str]:
    """Flags for Python's headers, which are those of this machine's Python.

    Debian's include ``<architecture>/pythonX.Y/pyconfig.h``; one of 64 bits says the same as any.
    """
    include = Path(sysconfig.get_path("include"))
    own = include.parent / (sysconfig.get_config_var("MULTIARCH") or "none") / include.name
    if own.is_dir():
        (folder / "aarch64-linux-gnu").mkdir()
        (folder / "aarch64-linux-gnu" / include.name).symlink_to(own)
    return [f"-I{include}", f"-I{folder}"]


def test_compiles(extensions: dict[str, Any], tmp_path: Path) -> None:
    require(CROSS)
    headers = python_headers(tmp_path)
    commands = []
    for name, extension in extensions.items():
        flags = [*extension.extra_compile_args, *(f"-I{d}" for d in extension.include_dirs)]
        if extension.py_limited_api:
            flags.append("-DPy_LIMITED_API=0x030A0000")
        for source in extension.sources:
            output = tmp_path / f"{name}-{source.replace('/', '-')}.o"
            # Less optimised: it takes half the time.
            where = ["-O1", "-fPIC", "-c", source, "-o", str(output)]
            commands.append([CROSS, *flags, *headers, *where])
    assert len(commands) > len(KERNELS) + 3
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


@pytest.mark.parametrize("where", ["here", "aarch64"])
def test_kernels(where: str, extensions: dict[str, Any], tmp_path: Path) -> None:
    here = where == "here"
    compiler = os.environ.get("CXX", "c++") if here else CROSS
    require(*([compiler] if here else [compiler, "qemu-aarch64"]))
    program = str(tmp_path / "check")
    flags = extensions["htfkernels._C"].extra_compile_args
    # Static where it is emulated, so that it needs no libraries of the other machine.
    link = [] if here else ["-static"]
    run([compiler, *flags, "-Icsrc", *link, *KERNELS, CHECK, "-o", program])
    printed = run([program] if here else ["qemu-aarch64", program])
    assert "generic, float: " in printed and "generic, double: " in printed
    assert printed.endswith("\n0 wrong\n")
    if not here or platform.machine() != "x86_64":
        assert "avx" not in printed
