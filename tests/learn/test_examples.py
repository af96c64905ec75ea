"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

import htfkernels as hk
import htflearn

MODULES = (
    "checkpoint",
    "dynamics",
    "errors",
    "figures",
    "files",
    "learned",
    "locality.accuracy_figure",
    "locality.array_pickle",
    "locality.follow",
    "locality.gradient_change",
    "locality.launch",
    "locality.patches",
    "locality.resnets",
    "locality.setting",
    "losses",
    "metrics",
    "models",
    "optim",
    "options",
    "progress",
    "spectra.follow",
    "spectra.measure",
    "spectra.places",
    "spectra.table",
    "targets",
    "tasks",
    "trackers",
    "train",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = {key: getattr(htflearn, key) for key in htflearn.__all__}
    known |= {"torch": torch, "hk": hk}
    done = doctest.testmod(import_module(f"htflearn.{name}"), extraglobs=known)
    assert done.attempted > 0 and done.failed == 0
