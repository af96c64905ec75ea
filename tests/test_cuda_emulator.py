"""The emulator of CUDA kernels finds the mistakes it says it finds, and runs right kernels right.

Small kernels of both kinds are in ``emulator_check.cpp``, which is compiled here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "tests/emulator_check.cpp", ROOT / "csrc/emulated/emulate.cpp"]
CHECKS = [
    "barrier",
    "missing barrier",
    "missing barrier reads NaN",
    "barrier of a warp",
    "missing barrier of a warp",
    "tiles",
    "tile overwritten too early",
    "pipeline",
    "pipeline without a copy's wait",
    "pipeline that overwrites",
    "copy without a wait reads NaN",
    "copy without a wait",
    "order of blocks",
    "shuffle of half a warp",
    "warp that waits for the block's barrier",
    "mma of half a warp",
    "goes on after an error",
    "blocks of whole warps",
    "shuffles",
    "shuffles in a row",
    "votes",
    "sums of warps",
    "arrival",
    "orders",
    "places",
    "fresh shared memory",
    "copies of all sizes",
    "atomics",
    "mma tf32",
    "mma bf16",
    "mma f64",
    "rounding to tf32",
    "unrounded operands are cut",
]


def compiled(folder: Path, *flags: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = folder / "emulator_check"
    command = [compiler, "-std=c++20", "-O1", "-DHTF_EMULATE", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{ROOT / 'csrc'}", "-o", str(program), *map(str, SOURCES)]
    for path in cpp_extension.include_paths():
        command += ["-isystem", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def found(program: Path) -> dict[str, str]:
    """For each check whether it came out right."""
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert done.stderr == "" and done.returncode in (0, 1)
    return {name: outcome for outcome, name in lines}


def test_all_checks_ran(found):
    assert sorted(found) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_check(found, name):
    assert found[name] == "right"


def test_a_misaligned_copy_ends_the_program(program):
    done = subprocess.run([program, "misaligned copy"], capture_output=True, text=True)
    assert done.returncode < 0
    assert "an asynchronous copy is not aligned to its size" in done.stderr


@pytest.mark.slow
def test_an_address_sanitizer_sees_the_end_of_shared_memory(tmp_path):
    trial = tmp_path / "trial.cpp"
    trial.write_text("int main() {}")
    asan = ["g++", "-fsanitize=address", str(trial), "-o", str(tmp_path / "trial")]
    if shutil.which("g++") is None or subprocess.run(asan, capture_output=True).returncode != 0:
        pytest.skip("the compiler has no address sanitizer")
    program = compiled(tmp_path, "-fsanitize=address", "-g")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    done = subprocess.run(
        [program, "write past the end"], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
