"""``bench/gpu_gate.sh`` and what it runs, on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GATE = ROOT / "bench" / "gpu_gate.sh"

# A Python that notes what it is asked to run, and fails at what FAILS names.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$NOTED"
while (($#)); do
  [[ -n ${FAILS:-} && $1 == "$FAILS" ]] && exit 3
  [[ $1 == --out ]] && echo written >"$2"
  shift
done
exit 0
"""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gate(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HTF_")}
    return subprocess.run(
        ["bash", str(GATE), *arguments, str(out)],
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=500,
        cwd=out.parent,
    )


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    for name in ("python", "compute-sanitizer"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
        path.chmod(0o755)
    return {
        "HTF_GATE_PYTHON": str(tmp_path / "bin" / "python"),
        "NOTED": str(tmp_path / "noted"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HTF_COMMIT": "0123456789abcdef",
    }


STEPS = [
    "install", "verify", "tests", "memory", "race", "float32", "training", "model", "spectra",
    "bfloat16", "autotune", "report",
]  # fmt: skip


def verdicts(printed: str) -> dict[str, str]:
    found = (re.fullmatch(r"(\w+): ((ok|FAILED|skipped).*)", line) for line in printed.splitlines())
    return {match[1]: match[2] for match in found if match}


def test_on_a_gpu_every_step_runs_in_order(stubs: dict[str, str], tmp_path: Path) -> None:
    done = gate(tmp_path / "out", **stubs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*verdicts(done.stdout)] == STEPS
    assert all(verdict.startswith("ok") for verdict in verdicts(done.stdout).values())
    noted = Path(stubs["NOTED"]).read_text().splitlines()
    noted = [line for line in noted if not line.startswith("-c ")]
    wanted = [
        "-m pip install -q --no-build-isolation --no-deps -e .",
        "-m htflearn.cli verify cuda triton tf32 triton bfloat16 cpp",
        "-m not slow -k ((triton-cuda or cuda-cuda) and not (second or",
        "--tool memcheck --error-exitcode 9",
        "--tool racecheck --error-exitcode 9",
        "--dtype float32 --precision tf32 -w wide -w huge -w medium -w deep",
        "bench/train_step.py --precision ieee --precision tf32",
        "bench/tree_model.py --seconds 20",
        "--dtype float64 -w spectra-64",
        "--dtype bfloat16 -w wide -w huge",
        "folded bmm, max-autotune",
        "bench/gpu_report.py",
    ]
    assert len(noted) == len(wanted)
    for line, part in zip(noted, wanted, strict=True):
        assert part in line
    names = {path.name for path in (tmp_path / "out").iterdir()}
    stem = re.fullmatch(r"(gpu-gate-\d{8}T\d{6}Z-01234567)\.md", min(names, key=len))
    assert stem, names
    steps = ("float32", "training", "model", "spectra", "bfloat16", "autotune")
    endings = [".md", "-log.txt", "-verify.txt", *(f"-{step}.json" for step in steps)]
    assert names == {stem[1] + ending for ending in endings}


@pytest.mark.parametrize(
    ("fails", "step"),
    [("pip", "install"), ("verify", "verify"), ("pytest", "tests"), ("bfloat16", "bfloat16")],
)
def test_a_step_that_fails_stops_no_other(
    fails: str, step: str, stubs: dict[str, str], tmp_path: Path
) -> None:
    done = gate(tmp_path / "out", **stubs, FAILS=fails)
    found = verdicts(done.stdout)
    assert done.returncode == 1 and [*found] == STEPS
    assert [name for name in STEPS if found[name].startswith("FAILED")] == [step]
    assert "exit code 3" in found[step]


def test_a_memory_checker_that_refuses_the_device_is_no_failure(
    stubs: dict[str, str], tmp_path: Path
) -> None:
    checker = tmp_path / "bin" / "compute-sanitizer"
    checker.write_text("#!/usr/bin/env bash\necho '==== Error: Device not supported'\nexit 1\n")
    done = gate(tmp_path / "out", **stubs)
    assert done.returncode == 0
    assert verdicts(done.stdout)["memory"].startswith("skipped, compute-sanitizer does not support")


def test_without_a_gpu_it_says_so(stubs: dict[str, str], tmp_path: Path) -> None:
    done = gate(tmp_path / "out", **stubs, FAILS="import torch; assert torch.cuda.is_available()")
    assert done.returncode == 2 and "finds no CUDA device" in done.stderr
    done = gate(tmp_path / "out", "--wet", **stubs)
    assert done.returncode == 2 and "no option --wet, only --dry" in done.stderr


def test_limits_sum_to_less_than_ten_minutes() -> None:
    table = re.search(r"declare -A limit=\((.*?)\)", GATE.read_text(), re.DOTALL)
    limits = {name: int(n) for name, n in re.findall(r"\[(\w+)\]=(\d+)", table[1])}
    assert [*limits] == STEPS and sum(limits.values()) < 570


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gate(out, HTF_GATE_PYTHON=sys.executable, HTF_GATE_DEVICE="cpu", HTF_GATE_SCALE="tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    found = verdicts(done.stdout)
    assert [*found] == STEPS
    skipped = [name for name in STEPS if found[name].startswith("skipped")]
    assert skipped == ["install", "race", "training", "model", "spectra", "autotune"]
    files = sorted(out.glob("*.json"))
    assert len(files) == 2
    sizes = {"wide", "huge", "medium", "deep", "small", "few", "one", "ragged", "paper"}
    sizes |= {"completion", "dense"}
    for path in files:
        text = path.read_text()
        assert str(tmp_path) not in text and str(ROOT) not in text and sys.prefix not in text
        data = json.loads(text)
        assert {row["workload"] for row in data["rows"]} == sizes
        assert data["provenance"]["commit"] and data["provenance"]["date"]
    (checked,) = out.glob("*-verify.txt")
    assert re.search(r"cpp evaluate +ieee +the CPU .* verified", checked.read_text())
    (table,) = out.glob("*.md")
    assert "| huge | forward | float32 |" in table.read_text()


@pytest.mark.parametrize("arguments", [["--only", "primes", "batch1"]])
def test_sanitize(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitize = script("sanitize")
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--device", "cpu", *arguments])
    assert sanitize.main() == 0
    assert "sanitize: 22 checks on cpu by auto, 0 wrong" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "check", lambda *rest: float("nan"))
    assert sanitize.main() == 1
    assert "evaluate on primes, auto, torch.float32, ieee: off by nan" in capsys.readouterr().out


def row(implementation: str, median: float | None, **more: Any) -> dict[str, Any]:
    return {
        "workload": "wide", "sizes": {}, "pass": "forward", "implementation": implementation,
        "median_ms": median, "fraction_of_gemm": median and 0.5 / median, "floor_ms": 0.25,
        "peak_mb": 10.0, "error": None, **more,
    }  # fmt: skip


MADE = {
    "gpu": "Some GPU", "gpu_capability": "9.0", "driver": "580", "cuda": "13.0", "triton": "3.6.0",
    "dtype": "float32", "precision": "tf32", "torch": "2.11.0", "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc", "gemm_gflops": 400_000.0, "copy_gb_per_s": 3000.0, "command": "htf bench",
}  # fmt: skip


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row("htfkernels", 2.0, peak_mb=11.0),
        row("htfkernels, CUDA graph", 1.0, peak_mb=90.0),
        row("htfkernels, no plan", 0.1),
        row("folded bmm", 5.0, peak_mb=30.0),
        row("folded bmm, max-autotune", 3.0, peak_mb=None),
        row("batch-major", None, error="wrong: off by 1.0e+00 of the largest number"),
        row("cirkit", None, error="it is not installed: pip install libcirkit"),
    ]
    path, table = tmp_path / "a.json", tmp_path / "a.md"
    path.write_text(json.dumps({"provenance": MADE, "rows": rows}))
    report = script("gpu_report")
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(path), "--out", str(table)])
    assert report.main() == 0
    text = table.read_text()
    assert (
        "| wide | forward | float32 (tf32) | 2.00 | 1.00 | folded bmm, max-autotune | 3.00 | 3.00x "
        "| 50% | 25% | 11.0 / 30.0 |" in text
    )
    assert "- float32, tf32: Some GPU (capability 9.0, driver 580, CUDA 13.0, triton 3.6.0)" in text
    assert "2026-01-02T03:04:05+00:00, commit abc; GEMM 400 TFLOP/s, copy 3000 GB/s" in text
    assert "- batch-major (wide, forward, float32 (tf32)): wrong: off by" in text
    assert "not installed" not in text
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path / "none.json")])
    assert report.main() == 2
