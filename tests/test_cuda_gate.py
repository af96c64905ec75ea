"""The gate on the CUDA module reads machine code rightly, and fails for the reasons it says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from htfkernels.runtime import dispatch

pytest.importorskip("triton")
if dispatch.interpreted():
    pytest.skip("compile_kernels is for Triton's compiler", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import cuda_gate as gate
from compile_kernels import Needs

NVCC = shutil.which("nvcc") or next(iter(Path("/usr/local/cuda/bin").glob("nvcc")), None)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
needs_module = pytest.mark.skipif(
    not any(Path(gate.module.__file__).parent.parent.glob("_C_cuda*.so")),
    reason="_C_cuda was not built",
)

KERNELS = """
namespace htf::gpu { namespace {
template <class T, int N> __global__ void scale(T* x) {
  __shared__ T y[N];
  y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = y[N - 1 - threadIdx.x];
}
__global__ void spill(float* x, int at) {
  float y[64];
  for (int i = 0; i < 64; ++i) y[i] = x[i];
  for (int i = 0; i < at; ++i) y[i * at % 64] *= y[(i + at) % 64];
  for (int i = 0; i < 64; ++i) x[i] = y[i];
}
} }
void use(float* x, double* y) {
  htf::gpu::scale<float, 64><<<1, 64>>>(x);
  htf::gpu::scale<double, 32><<<1, 32>>>(y);
  htf::gpu::spill<<<1, 1>>>(x, 3);
}
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of an object file with kernels of which is known what they need."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "some.cu").write_text(KERNELS)
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    command = [str(NVCC), *archs, "-c", "some.cu", "-o", "some.o"]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "cubins").mkdir()
    cubins = gate.extract(folder / "some.o", folder / "cubins")
    assert sorted(c.arch for c in cubins) == [80, 90]
    found = [report for cubin in cubins for report in gate.read(cubin, "nvcc 1.0")]
    return {(r.name, r.key, r.arch): r for r in found}


@needs_nvcc
def test_kernels_are_read(reports):
    names = [("scale", "double, 32"), ("scale", "float, 64"), ("spill", "")]
    assert sorted(reports) == sorted((*n, arch) for n in names for arch in (80, 90))
    for arch, own in ((80, 0), (90, 1024)):  # sm_90 takes a kilobyte of a block's for itself
        found = reports["scale", "float, 64", arch].found
        assert found.shared == own + 256
        assert (found.stack, found.local, found.tensor) == (0, 0, "")
        assert 0 < found.registers <= 32
        spilling = reports["spill", "", arch].found
        assert spilling.stack == 256
        assert spilling.local > 0
        assert reports["spill", "", arch].target == f"nvcc 1.0 sm_{arch}"


@needs_nvcc
def test_spills_are_told_unless_expected(reports):
    found = list(reports.values())
    sentences = gate.spills(found, {})
    assert len(sentences) == 2
    assert all(s.startswith("spill [] on nvcc 1.0 sm_") and "it spills" in s for s in sentences)
    table = gate.compile_gate.updated({}, found, ["nvcc 1.0 sm_80", "nvcc 1.0 sm_90"])
    assert gate.spills(found, table) == []
    assert gate.compile_gate.check(found, table) == []


@needs_nvcc
def test_growth_missing_and_superfluous_rows_are_told(reports):
    found = list(reports.values())
    table = gate.compile_gate.updated({}, found, [])
    row = table["scale"]["float, 64"]["nvcc 1.0 sm_90"]
    table["scale"]["float, 64"]["nvcc 1.0 sm_90"] = row._replace(registers=1)
    del table["scale"]["double, 32"]["nvcc 1.0 sm_80"]
    table["gone"] = {"": {"nvcc 1.0 sm_80": Needs(1, 0, 0, 0, 0, "")}}
    sentences = gate.compile_gate.check(found, table)
    assert len(sentences) == 3
    assert any("registers, and the ceiling is 1" in s for s in sentences)
    assert any("a configuration without ceilings" in s for s in sentences)
    assert any(s.startswith("gone [] on nvcc 1.0 sm_80") for s in sentences)


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("htf::gpu::(anonymous namespace)::product(htf::gpu::Product, int)", ("product", "")),
        ("void htf::gpu::scale<float, (int)64>(float*)", ("scale", "float, 64")),
        (
            "void htf::gpu::(anonymous namespace)::f<htf::gpu::(anonymous namespace)::A<3>, true>"
            "(htf::gpu::(anonymous namespace)::A<3>)",
            ("f", "A<3>, true"),
        ),
    ],
)
def test_signatures(signature, expected):
    assert gate._split(signature) == expected


@needs_module
def test_the_module_is_within_its_ceilings(capsys):
    """What the gate says of this build, where nvcc is one that the table knows."""
    info = gate.module.build_info()
    compiler = ".".join(info["compiler"].split(".")[:2])
    table = json.loads(gate.CEILINGS.read_text())["kernels"]
    known = {column for keys in table.values() for rows in keys.values() for column in rows}
    if f"{compiler} sm_80" not in known or info["architectures"] != "80;90+PTX":
        pytest.skip(f"the table has no ceilings for {compiler}, {info['architectures']}")
    code = gate.main([])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "0 violations" in printed.out


@needs_module
def test_the_module_loads_without_a_driver():
    """And says what is missing, in a process that sees no device."""
    script = (
        "from htfkernels.runtime import cuda_module as module\n"
        "assert 'nvcc' in module.build_info()['compiler']\n"
        "print(module.why_not('cuda'))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HTF_EMULATE_CUDA"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() not in ("", "None")
    assert "\n" not in done.stdout.strip()
