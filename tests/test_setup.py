"""setup.py: which modules are built, for which GPUs, and what is said of a wrong setting."""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
Build = Callable[..., dict[str, list[str]]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """Runs setup.py without building; its names, and what it gave to ``setup``."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    for name in list(os.environ):
        if name.startswith(("HTF_", "TORCH_CUDA", "CUDA_HOME", "CUDA_PATH")):
            monkeypatch.delenv(name)

    def run() -> dict[str, Any]:
        given: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", given.update)
        return runpy.run_path("setup.py") | given

    return run


@pytest.fixture
def build(script: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Build:
    """``build(**environment)``: of each module, the number of sources and the GPUs' flags."""

    def run(**environment: str) -> dict[str, list[str]]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = {}
        for extension in script()["ext_modules"]:
            flags = extension.extra_compile_args
            cuda = flags.get("nvcc", []) if isinstance(flags, dict) else []
            count = str(len(extension.sources))
            found[extension.name] = [count, *(f for f in cuda if "gencode" in f)]
        return found

    return run


@pytest.fixture
def toolkit(tmp_path: Path) -> str:
    for name in ("bin/nvcc", "include/cuda.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    return str(tmp_path)


def test_cuda_where_it_is_asked_for(build: Build, toolkit: str) -> None:
    found = build(CUDA_HOME=toolkit, HTF_BUILD_CUDA="1")
    assert sorted(found) == ["htfkernels._C", "htfkernels._C_cuda", "htfkernels._plan"]
    count, *flags = found["htfkernels._C_cuda"]
    assert int(count) == len(list((ROOT / "csrc" / "units").rglob("*.cu")))
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("asked", "pytorch", "compiled"),
    [
        (
            None,
            "13.0",
            "_C, _plan (CPU); _C_cuda (CUDA, 80;90+PTX): PyTorch 2.13.0 is a CUDA build",
        ),
        ("1", "13.0", "_C, _plan (CPU); _C_cuda (CUDA, 80;90+PTX): HTF_BUILD_CUDA=1"),
        ("1", None, "_C, _plan (CPU); _C_cuda (CUDA, 80;90+PTX): HTF_BUILD_CUDA=1"),
        ("0", "13.0", "_C, _plan (CPU); without _C_cuda: HTF_BUILD_CUDA=0"),
        (
            None,
            None,
            "_C, _plan (CPU); without _C_cuda: PyTorch 2.13.0 is not a CUDA build "
            "(HTF_BUILD_CUDA=1 asks for it)",
        ),
    ],
)
def test_what_is_compiled_and_why(
    script: Callable[[], dict[str, Any]],
    toolkit: str,
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    pytorch: str | None,
    compiled: str,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(torch.version, "cuda", pytorch)
    monkeypatch.setenv("CUDA_HOME", toolkit)
    if asked is not None:
        monkeypatch.setenv("HTF_BUILD_CUDA", asked)
    found = script()
    assert found["compiled"] == f"htfkernels: compiling {compiled}"
    names = {extension.name for extension in found["ext_modules"]}
    assert ("htfkernels._C_cuda" in names) == ("without" not in compiled)
    assert names >= {"htfkernels._C", "htfkernels._plan"}


@pytest.mark.parametrize("pytorch", ["13.0", None])
def test_without_a_toolkit(
    build: Build,
    script: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    pytorch: str | None,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", pytorch)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert "htfkernels._C_cuda" not in build()
    assert ("no nvcc was found" in script()["compiled"]) == (pytorch is not None)
    with pytest.raises(SystemExit, match=r"HTF_BUILD_CUDA=1 asks .* no CUDA toolkit was found"):
        build(HTF_BUILD_CUDA="1")


def test_emulated(build: Build) -> None:
    found = build(HTF_BUILD_CUDA="0", HTF_EMULATE_CUDA="1")
    assert sorted(found) == ["htfkernels._C", "htfkernels._C_emulated", "htfkernels._plan"]


CSRC = ROOT / "csrc"


def included_by(files: Iterable[Path]) -> list[str]:
    return sorted(
        line.split('"')[1]
        for path in files
        for line in path.read_text().splitlines()
        if line.startswith("#include")
    )


def sources(end: str, apart: tuple[str, ...]) -> list[str]:
    names = (str(p.relative_to(CSRC)) for p in CSRC.rglob(f"*.{end}"))
    return sorted(name for name in names if not name.startswith(apart))


def test_every_source_is_in_one_unit() -> None:
    """A unit includes the sources that are compiled together; kernels are compiled alone."""
    apart = ("units/", "emulated/", "plan/", "cpu/kernels")
    assert included_by(CSRC.glob("units/*.cpp")) == sources("cpp", apart)
    assert included_by(CSRC.glob("units/cuda/*.cu")) == sources("cu", ("units/",))


def test_every_cuda_unit_is_emulated() -> None:
    wrappers = set(CSRC.glob("emulated/*.cpp")) - {CSRC / "emulated" / "emulate.cpp"}
    assert included_by(wrappers) == [
        f"units/cuda/{p.name}" for p in sorted(CSRC.glob("units/cuda/*"))
    ]


def test_listed_architectures(build: Build, toolkit: str) -> None:
    archs = "7.5 8.6;9.0a+PTX"
    found = build(CUDA_HOME=toolkit, HTF_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST=archs)
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
        ({"HTF_BUILD_CUDA": "maybe"}, "HTF_BUILD_CUDA: expected 1 or 0, got 'maybe'"),
    ],
)
def test_wrong_settings(build: Build, toolkit: str, setting: dict[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        build(**{"CUDA_HOME": toolkit, "HTF_BUILD_CUDA": "1"} | setting)


def test_what_is_older_than_a_header_is_compiled_again(
    script: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    times = {"csrc/a.o": 1, "csrc/b.o": 3, "csrc/c.o": 1, "csrc/c_cuda.o": 1, "csrc/d.o": 1, "h": 2}
    for name, time in times.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time, time))
    sources = ["csrc/a.cu", "csrc/b.cu", "csrc/c.cu", "csrc/new.cu"]
    script()["drop_stale"](str(tmp_path), sources, [str(tmp_path / "h")])
    assert sorted(p.name for p in (tmp_path / "csrc").iterdir()) == ["b.o", "d.o"]
