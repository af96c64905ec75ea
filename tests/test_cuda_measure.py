"""The scripts that measure the CUDA kernels run to their end; where there is no GPU, emulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from htfkernels.runtime import cuda_module as module

BENCH = Path(__file__).parents[1] / "bench"
pytestmark = pytest.mark.skipif(
    module.why_not(module.device_type()) is not None, reason="no CUDA kernels run here"
)


def run(script: str, *arguments: str) -> str:
    # Time for one thread: others may share the machine.
    command = [sys.executable, str(BENCH / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_model_of_time_against_measurements(tmp_path: Path) -> None:
    out = tmp_path / "model.json"
    printed = run("tree_model.py", "--cuts", "2", "--seconds", "30", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert all(row["measured_us"] > 0 and row["estimated_us"] > 0 for row in rows)
    for problem in {row["problem"] for row in rows}:
        own = [row["pass"] for row in rows if row["problem"] == problem and row["chosen"]]
        assert {*own} == {"backward", "forward"}
        assert f"== {problem}: forward" in printed
    assert "== forward: launch" in printed and "== backward: launch" in printed


def test_index_plans_on_the_device(tmp_path: Path) -> None:
    out = tmp_path / "plans.json"
    run("index_plan_device.py", "--samples", "500", "--repeats", "1", "--json", str(out))
    assert json.loads(out.read_text())["rows"]
