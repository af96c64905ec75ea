"""A training process killed at random moments leaves what can be loaded, and continues from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from htflearn import load_checkpoint, load_model


def test_killed_again_and_again(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("kill_driver.py")
    run = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), "0"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    left = json.loads(run.stdout)
    assert left["kills"] >= 3
    assert left["iterations"] == sorted(left["iterations"]), "a kill never loses a checkpoint"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    for a, b in zip(load_model(whole).parameters(), load_model(killed).parameters(), strict=True):
        assert torch.equal(a, b)
    assert load_checkpoint(killed)["iteration"] == 150
    assert len(list((killed / "checkpoints").iterdir())) == 2
