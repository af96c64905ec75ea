"""``htf spectra --follow``: the checkpoints of a run while it is running."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from spectra_runs import existing, htf, ok, run

import htfkernels as hk
from htflearn import UserError, load_model, save_checkpoint
from htflearn.spectra import follow as following
from htflearn.spectra.measure import measure, to_json


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Writes checkpoints of these iterations from a thread, ``seconds`` apart."""
    threads = []

    def start(*iterations: int, seconds: float = 0.2) -> None:
        def write() -> None:
            for iteration in iterations:
                time.sleep(seconds)
                model = htf(init_std=0.5 + iteration)
                save_checkpoint(tmp_path / "run/checkpoints", model, state={"iteration": iteration})

        threads.append(threading.Thread(target=write))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def test_follow(tmp_path: Path, writer: Callable[..., None]) -> None:
    writer(10, 20)
    lines, picture = tmp_path / "lines.jsonl", tmp_path / "tree.png"
    options = ["--follow", "--interval", 0.02, "--timeout", 30, "--until", 20, "--json", lines]
    result = run(tmp_path / "run", *options, "--out", picture)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("waiting for the first checkpoint: there is no checkpoint in")
    assert "iteration 10\n" in result.stdout and "iteration 20\n" in result.stdout
    made = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["iteration"] for line in made] == [10, 20]
    last = to_json(measure(load_model(tmp_path / "run")))
    assert made[-1]["nodes"] == last["nodes"] != made[0]["nodes"]
    with Image.open(picture) as image:
        assert image.size[0] > 100
    assert existing(tmp_path) == ["lines.jsonl", "run", "tree.png"]
    # What is there is shown again to another command; its lines are appended.
    result = run(tmp_path / "run" / "checkpoints", *options)
    assert [json.loads(s)["iteration"] for s in lines.read_text().splitlines()] == [10, 20, 20]


def test_follow_a_writer_in_haste(tmp_path: Path, writer: Callable[..., None]) -> None:
    """Checkpoints are replaced while they are read: each line is one of them, as a whole."""
    writer(*range(1, 61), seconds=0.002)
    options = ["--interval", 0.001, "--timeout", 60, "--until", 60, "--json", "-"]
    made = [json.loads(s) for s in ok(tmp_path / "run", "--follow", *options).splitlines()]
    iterations = [line["iteration"] for line in made]
    assert iterations == sorted(set(iterations)) and iterations[-1] == 60


def test_a_checkpoint_that_goes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, htf(), state={"iteration": 1})
    real, left = following.load_model, [2]

    def load(path: Path) -> hk.HTF:
        if left[0]:
            left[0] -= 1
            save_checkpoint(folder, htf(), state={"iteration": 3 - left[0]})
        return real(path)

    monkeypatch.setattr(following, "load_model", load)
    assert following.load(tmp_path).iteration == 3


def test_a_new_run_of_the_same_name_is_seen(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, htf(), state={"iteration": 5})
    found = following.follow(tmp_path, interval=0.001, timeout=30)
    assert next(found).iteration == 5
    save_checkpoint(tmp_path, htf(), state={"iteration": 6})
    assert save_checkpoint(tmp_path, htf(), state={"iteration": 5}).name == "step-000000005"
    assert next(found).iteration == 5


def test_a_file_that_stays_unreadable_ends_it(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path, htf()) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(UserError, match="cannot be read"):
        next(following.follow(tmp_path, interval=0.001))
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        file.write_bytes(whole)

    file.write_bytes(whole[:100])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following.time, "sleep", sleep)
        assert next(following.follow(tmp_path, interval=0.5)).iteration == 0
    assert looks == [0.5]


def test_follow_ends_by_itself(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, htf())
    printed = ok(tmp_path, "--follow", "--interval", 0.01, "--timeout", 0.05)
    assert printed.count("iteration 0") == 1


def test_follow_ends_cleanly_with_control_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, htf())
    monkeypatch.setattr(following.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    result = run(tmp_path, "--follow", "--json", "-")
    assert result.exit_code == 0 and result.stderr == ""
    assert json.loads(result.stdout)["iteration"] == 0


@pytest.mark.parametrize("before", ["{\n}\n", '{"a": 1}\n{"b"', "words\n"])
def test_lines_are_appended_to_lines_alone(tmp_path: Path, before: str) -> None:
    save_checkpoint(tmp_path / "run", htf())
    lines = tmp_path / "lines.jsonl"
    lines.write_text(before)
    result = run(tmp_path / "run", "--follow", "--timeout", 0, "--json", lines)
    assert result.exit_code == 2 and "something else than whole JSON lines" in result.stderr
    assert lines.read_text() == before


@pytest.mark.slow
def test_an_interrupted_process(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", htf())
    command = ["spectra", str(tmp_path / "run"), "--follow", "--interval", "30"]
    process = subprocess.Popen(
        [sys.executable, "-m", "htflearn.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and "iteration 0" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""
