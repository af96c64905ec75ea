"""What the tests of ``htf spectra`` share: a model on an irregular tree, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import htfkernels as hk
from htflearn import cli

TREE = hk.ModeTree.from_nested(((0, 3), (2, (1,))))


def htf(**options: Any) -> hk.HTF:
    """A random model on it, in float64."""
    return hk.HTF(TREE, (2, 3, 4, 5), 3, **({"out_features": 2, "dtype": torch.float64} | options))


def caterpillar(order: int) -> hk.ModeTree:
    """The deepest binary tree."""
    nested: Any = (0, 1)
    for mode in range(2, order):
        nested = (nested, mode)
    return hk.ModeTree.from_nested(nested)


def run(*arguments: object) -> Any:
    """``htf spectra`` with these arguments."""
    app = cli._application(["spectra"])
    return CliRunner().invoke(app, ["spectra", *map(str, arguments)])


def ok(*arguments: object) -> str:
    """What it prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def existing(path: Path) -> list[str]:
    """Names of what is in a folder."""
    return sorted(p.name for p in path.iterdir())
