"""setup.py: which modules are built, for which GPUs, and what is said of a wrong setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import runpy, sys, setuptools
found = []
setuptools.setup = lambda **given: found.append(given)
sys.argv = ["setup.py"]
runpy.run_path("setup.py")
for extension in found[0]["ext_modules"]:
    flags = extension.extra_compile_args
    cuda = flags.get("nvcc", []) if isinstance(flags, dict) else []
    print(extension.name, len(extension.sources), *(f for f in cuda if "gencode" in f))
"""


def build(**environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("HTF_", "TORCH_CUDA", "CUDA_HOME", "CUDA_PATH")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    command = [sys.executable, "-c", SCRIPT]
    env = inherited | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def toolkit(tmp_path: Path) -> str:
    for name in ("bin/nvcc", "include/cuda.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    return str(tmp_path)


def extensions(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


def test_with_a_toolkit(toolkit: str) -> None:
    found = extensions(build(CUDA_HOME=toolkit))
    assert sorted(found) == ["htfkernels._C", "htfkernels._C_cuda", "htfkernels._plan"]
    count, *flags = found["htfkernels._C_cuda"]
    assert int(count) == len(list((ROOT / "csrc").rglob("*.cu")))
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_without_cuda(toolkit: str) -> None:
    found = extensions(build(CUDA_HOME=toolkit, HTF_SKIP_CUDA_BUILD="1"))
    assert sorted(found) == ["htfkernels._C", "htfkernels._plan"]


def test_emulated(toolkit: str) -> None:
    found = extensions(build(CUDA_HOME=toolkit, HTF_SKIP_CUDA_BUILD="1", HTF_EMULATE_CUDA="1"))
    assert sorted(found) == ["htfkernels._C", "htfkernels._C_emulated", "htfkernels._plan"]


def test_every_cuda_source_is_emulated() -> None:
    included = {
        line.split('"')[1]
        for wrapper in (ROOT / "csrc" / "emulated").glob("*.cpp")
        for line in wrapper.read_text().splitlines()
        if line.startswith("#include") and '.cu"' in line
    }
    sources = {str(p.relative_to(ROOT / "csrc")) for p in (ROOT / "csrc").rglob("*.cu")}
    assert included == sources


def test_listed_architectures(toolkit: str) -> None:
    found = extensions(build(CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST="7.5 8.6;9.0a+PTX"))
    assert found["htfkernels._C_cuda"][1:] == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "expected numbers such as 8.0;9.0+PTX, got 'Hopper'"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0"}, "the CUDA kernels need 8.0 or later, got '7.0'"),
        ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME is /nowhere, and there is no bin/nvcc"),
    ],
)
def test_wrong_settings(toolkit: str, setting: dict[str, str], message: str) -> None:
    done = build(**{"CUDA_HOME": toolkit} | setting)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_older_than_a_header_is_compiled_again(tmp_path: Path) -> None:
    times = {"csrc/a.o": 1, "csrc/b.o": 3, "csrc/c.o": 1, "csrc/c_cuda.o": 1, "csrc/d.o": 1, "h": 2}
    for name, time in times.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time, time))
    script = """
import runpy, sys, setuptools
setuptools.setup = lambda **given: None
drop_stale = runpy.run_path("setup.py")["drop_stale"]
folder = sys.argv[1]
drop_stale(folder, ["csrc/a.cu", "csrc/b.cu", "csrc/c.cu", "csrc/new.cu"], [folder + "/h"])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True)
    assert sorted(p.name for p in (tmp_path / "csrc").iterdir()) == ["b.o", "d.o"]
