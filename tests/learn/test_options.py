"""Every option of every command, with values that make no sense: a sentence or a usage error."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from locality_files import write_images

from htflearn import cli, matrix_factorization
from htflearn.checkpoint import save_model

VALUES = [
    "", "-1", "0", "nan", "inf", "1e400", "1e308", "1e-320", "9" * 30, "9" * 400, "9" * 5000,
    "-" + "9" * 400, "1,2", "1,,2", "x", "²", "1_000", "a" * 300, "/dev/null", "/proc/x/y",
    "deep.json", "null.json", "empty", "junk", "images", "[" * 200, "-", "0x0", "9999999x9999999",
    "0-99999999", "a=--5", "=", "cuda", "paper", "flat", "a\nb", "\x1b[2J",
]  # fmt: skip

COMMANDS = {
    "dynamics": ["--preset", "smoke", "--panels", "tf"],
    "complete": ["t.npy"],
    "spectra": ["model.safetensors", "--nodes", "0"],
    "locality": [*("isc", "--preset", "smoke", "--data", "images", "--canvas", "6x40"),
                 *("--image-size", "6", "--distances", "0", "--train-size", "48", "--batch", "16")],
    "bench": ["--scale", "tiny"],
}  # fmt: skip


class Reached(Exception):
    """Everything has been checked, and the work would begin."""


def reached(*_: Any, **__: Any) -> None:
    raise Reached


def options(command: str) -> list[tuple[str, int]]:
    """Those that take values, and how many."""
    found = typer.main.get_command(cli._application([command])).commands[command]  # type: ignore
    return [(p.opts[0], p.nargs) for p in found.params if p.opts[0][0] == "-" and not p.is_flag]


@pytest.mark.parametrize("command", COMMANDS)
def test_values_that_make_no_sense(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for place in (
        "torch.set_num_threads", "htflearn.train.Trainer.fit", "htflearn.locality.grid.launch",
        "htflearn.bench.run._machines",
    ):  # fmt: skip
        monkeypatch.setattr(place, reached)
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    np.save("t.npy", np.where(np.eye(6, 5) > 0, np.nan, 1.0))
    save_model("model.safetensors", matrix_factorization(6, 5))
    Path("deep.json").write_text("[" * 100_000)
    Path("null.json").write_text("null")
    Path("junk").write_bytes(bytes(range(256)))
    Path("empty").touch()
    choose, calls = random.Random(0), 0
    for option, count in options(command):
        for value in choose.sample(VALUES, 3):
            calls += 1
            try:
                code = cli.run([command, *COMMANDS[command], option, *[value] * count])
            except Reached:
                continue
            told = capsys.readouterr().err
            assert code in (0, 2), (option, value, told)
            if code == 2 and "Error" not in told:
                assert told.startswith("htf: ") and told.count("\n") == 1, (option, value, told)
                assert not told.startswith("htf: htf:") and len(told) < 700
    assert calls >= 27
