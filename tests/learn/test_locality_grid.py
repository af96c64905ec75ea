"""``htf locality``: grids of trainings, their outcome, and what is told about bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_figures import keep_figures, texts_overlap
from locality_files import tiny, tiny_pathfinder, write_images

from htflearn import UserError, cli
from htflearn.locality import accuracy_figure, grid, processes
from htflearn.locality.accuracy_figure import accuracy_rows, draw_accuracy
from htflearn.locality.data import load, make_pictures
from htflearn.locality.grid import How, run_grid
from htflearn.locality.launch import launch
from htflearn.locality.setting import Case, network_names
from htflearn.locality.shards import ShardedImages

ALONE = How(workers=1, threads=1, progress=False)
FILES = {"accuracy.png", "profile.json", "profile.png", "results.jsonl", "runs", "settings.json"}
FILES |= {"sheet.png"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("locality", "isc", "--preset", "smoke", "--data", str(data), "--out", str(out)),
        *("--canvas", "6x16", "--image-size", "6", "--distances", "0,4", "--train-size", "48"),
        *("--test-size", "20", "--batch", "16", "--workers", "1", "--threads", "1", *more),
    ]


def test_a_grid_from_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    assert cli.run(command(data, out)) == 0
    printed = capsys.readouterr().out
    assert "Accuracy (smoke run, not a result)" in printed
    assert "pixels between the images" in printed and "plain" in printed
    assert {path.name for path in out.iterdir()} == FILES
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(results) == 4 and all(r["smoke"] for r in results)
    profiles = json.loads((out / "profile.json").read_text())
    assert list(profiles) == ["plain", "regularized"]
    assert all(profile["smoke"] for profile in profiles.values())
    assert {(r["distance"], r["coefficient"]) for r in results} == {
        (0, 0.0), (0, 1.0), (4, 0.0), (4, 1.0)
    }  # fmt: skip
    assert all((r["change"] is None) == (r["coefficient"] == 0) for r in results)

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert cli.run(command(data, out)) == 2
    assert "holds a grid already" in capsys.readouterr().err
    assert cli.run(command(data, out, "--resume")) == 0
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert before == after, "what is done is not done again"
    assert cli.run(command(data, out, "--resume", "--seeds", "0,1")) == 0
    assert len((out / "results.jsonl").read_text().splitlines()) == 8
    assert cli.run(command(data, out, "--resume", "--lr", "0.5")) == 2
    assert "has lr 0.01, not 0.5" in capsys.readouterr().err


def test_workers_come_to_the_same_numbers(data: Path, tmp_path: Path) -> None:
    setting = tiny(data)
    one = run_grid(setting, tmp_path / "one", ALONE)
    two = run_grid(setting, tmp_path / "two", How(workers=2, threads=1, progress=False))
    assert not one.failed and not two.failed
    for a, b in zip(one.results, two.results, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_pathfinder(tmp_path: Path) -> None:
    outcome = run_grid(tiny_pathfinder(), tmp_path / "grid", ALONE)
    assert len(outcome.results) == 1 and 0 <= outcome.results[0]["change"] <= 1
    assert (tmp_path / "grid" / "data" / "length-2" / "test" / "meta.json").exists()
    again = run_grid(tiny_pathfinder(seeds=(0, 1)), tmp_path / "grid", ALONE, resume=True)
    assert len(again.results) == 2 and again.results[0] == outcome.results[0]


def test_data_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["locality", "pathfinder", "--preset", "smoke", "--out", str(tmp_path / "grid")]
    assert cli.run([*arguments, "--workers", "1", "--data-only"]) == 0
    assert {p.name for p in (tmp_path / "grid").iterdir()} == {"data", "settings.json", "sheet.png"}
    assert len(ShardedImages(tmp_path / "grid" / "data" / "length-3" / "train")) == 128
    assert "written: " in capsys.readouterr().out


def test_a_training_that_fails_does_not_stop_the_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = grid.train

    def failing(setting: Any, case: Any, *rest: Any) -> Any:
        if case.coefficient:
            raise UserError("out of luck")
        return real(setting, case, *rest)

    monkeypatch.setattr(grid, "train", failing)
    assert cli.run(command(data, tmp_path / "grid")) == 2
    printed = capsys.readouterr()
    assert "failed: distance-4-coefficient-1-seed-0: out of luck" in printed.err
    assert printed.err.splitlines()[-1] == "htf: 2 trainings failed; --resume tries them again"
    assert len((tmp_path / "grid" / "results.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(grid, "train", real)
    assert cli.run(command(data, tmp_path / "grid", "--resume")) == 0
    assert len((tmp_path / "grid" / "results.jsonl").read_text().splitlines()) == 4


BAD = [
    (["locality", "maze"], "the task must be one of isc, pathfinder, got 'maze'"),
    (["locality", "isc", "--preset", "x"], "--preset must be one of paper, laptop, smoke"),
    (["locality", "isc", "--preset", "paper"], "--data must name a folder of labelled images"),
    (["locality", "isc", "--data", "nowhere"], "nothing is downloaded"),
    (["locality", "pathfinder", "--data", "x"], "--data is not for pathfinder"),
    (["locality", "isc", "--patch", "3"], "--patch is not for isc"),
    (["locality", "isc", "--distances", "0,a"], "--distances takes whole numbers"),
    (["locality", "isc", "--distances", "5,5"], "--distances needs values that differ"),
    (["locality", "isc", "--distances", "5000"], "at a distance of 120 at most, got 5000"),
    (["locality", "pathfinder", "--distances", "9" * 400], "--distances must be at most 16,384"),
    (["locality", "pathfinder", "--canvas", "99999x99999"], "--canvas must be at most 16,384"),
    (["locality", "isc", "--coefficients", "-1"], "--coefficients must not be negative"),
    (["locality", "isc", "--canvas", "big"], "--canvas takes a height and a width"),
    (["locality", "pathfinder", "--canvas", "64x32"], "--canvas must be square"),
    (["locality", "pathfinder", "--distances", "99"], "expected snakes that fit into the canvas"),
    (["locality", "isc", "--batch", "1"], "--batch must be in 2..1000"),
    (["locality", "isc", "--epochs", "0"], "--epochs must be positive, got 0"),
    (["locality", "isc", "--lr", "0"], "--lr must be positive"),
    (["locality", "isc", "--lr", "inf"], "--lr must be finite"),
    (["locality", "isc", "--momentum", "1"], "--momentum must be in 0..1"),
    (["locality", "isc", "--weight-decay", "nan"], "--weight-decay must not be negative"),
    (["locality", "isc", "--train-size", "9" * 30], "--train-size must be at most 100,000,000"),
    (["locality", "isc", "--threads", "9999"], "--threads must be at most 1,024"),
    (["locality", "isc", "--engine-option", "a=--5"], "takes no --engine-option"),
    (["locality", "isc", "--network", "big"], "--network must be one of resnet18, resnet34, small"),
    (["locality", "isc", "--amp", "on"], "--amp must be off, float16 or bfloat16"),
    (["locality", "isc", "--engine", "x"], "--engine must be one of joblib, submitit"),
    (["locality", "isc", "--engine-option", "a=1"], "takes no --engine-option"),
    (["locality", "isc", "--engine-option", "a"], "--engine-option takes NAME=VALUE"),
    (["locality", "isc", "--workers", "0"], "--workers must be positive, got 0"),
    (["locality", "isc", "--threads", "-1"], "--threads must be positive, got -1"),
    (["locality", "isc", "--image-size", "0"], "--image-size must be positive, got 0"),
    (["locality", "pathfinder", "--image-size", "50"], "--image-size must be at most that of"),
    (["locality", "pathfinder", "--patch", "30"], "no such pair fits into an image of 48 x 48"),
    (["locality", "isc", "--device", "tpu"], "--device must be auto, cpu or cuda"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(b[0][1:]) for b in BAD])
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not any(tmp_path.iterdir()), "nothing is written"


def broken(*_: Any, **__: Any) -> None:
    raise MemoryError("std::bad_alloc")


@pytest.mark.parametrize(
    ("place", "lost"),
    [
        ("draw_accuracy", ["accuracy.png"]),
        ("locality_profile", ["profile.json", "profile.png"]),
        ("draw_profiles", ["profile.png"]),
    ],
)
def test_a_figure_that_cannot_be_made_does_not_cost_the_others(
    place: str,
    lost: list[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(grid, place, broken)
    out = tmp_path / "grid"
    assert cli.run(command(data, out, "--distances", "4", "--coefficients", "0")) == 3
    printed = capsys.readouterr()
    assert printed.err == f"htf: {out / lost[0]} could not be made: std::bad_alloc\n"
    assert "Accuracy" in printed.out
    assert {path.name for path in out.iterdir()} == FILES - set(lost)


@pytest.mark.parametrize("text", ["null", "[]", "{}", "", "[" * 100_000])
def test_files_of_something_else(
    text: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    result = out / "runs" / "distance-4-coefficient-0-seed-0" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text(text)
    some = command(data, out, "--distances", "4", "--coefficients", "0")
    assert cli.run(some) == 2
    assert "result.json" in capsys.readouterr().err
    (out / "settings.json").write_text(text)
    assert cli.run([*some, "--resume"]) == 2
    assert "grid" in capsys.readouterr().err


def test_a_grid_without_its_settings_is_not_gone_on_with(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid" / "runs" / "a").mkdir(parents=True)
    (tmp_path / "grid" / "runs" / "a" / "metrics.jsonl").touch()
    for more, says in (([], "holds a grid already (runs/a"), (["--resume"], "no settings.json")):
        assert cli.run(command(data, tmp_path / "grid", *more)) == 2
        assert says in capsys.readouterr().err


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), processes.only_one(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_corrupt_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "images")
    file = data / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-7])
    assert cli.run(command(data, tmp_path / "grid")) == 2
    error = capsys.readouterr().err
    assert "train-images-idx3-ubyte" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "grid").exists()


def test_rows_and_their_figure(tmp_path: Path) -> None:
    results = [
        {"distance": d, "coefficient": c, "seed": s, "test_accuracy": 0.5 + 0.1 * c + 0.01 * s,
         "train_accuracy": 1.0, "change": 0.5 if c else None}
        for d in (0, 40) for c in (0.0, 1.0) for s in (0, 1, 2)
    ]  # fmt: skip
    rows = accuracy_rows(results)
    assert [(r["coefficient"], r["distance"], r["seeds"]) for r in rows] == [
        (0.0, 0, 3), (0.0, 40, 3), (1.0, 0, 3), (1.0, 40, 3)
    ]  # fmt: skip
    assert rows[3]["mean"] == pytest.approx(0.61) and rows[3]["std"] == pytest.approx(0.01)
    assert accuracy_rows(results[:1])[0]["std"] is None
    assert network_names(r["coefficient"] for r in results) == {0.0: "plain", 1.0: "regularized"}


def test_the_figure_of_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole bars, ticks up to 100%, a legend beside the curves, and what a smoke run says."""
    drawn = keep_figures(monkeypatch, accuracy_figure)
    results = [
        {"distance": d, "coefficient": c, "seed": s, "test_accuracy": accuracy,
         "train_accuracy": 1.0, "change": 0.5 if c else None}
        for d in (0, 40) for c in (0.0, 1.0) for s, accuracy in enumerate((1.0, 0.99, 0.6))
    ]  # fmt: skip
    more = [{**r, "coefficient": 9.0 + r["coefficient"]} for r in results]
    smoke = [{**r, "smoke": True} for r in results]
    for some in (results, results[:1], results + more, smoke):
        draw_accuracy(some, "isc", tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 10_000
    names = []
    for figure in drawn:
        assert texts_overlap(figure) == []
        (axis,), (legend,) = figure.axes, figure.legends
        names.append([text.get_text() for text in legend.get_texts()])
        box = legend.get_window_extent()
        assert not box.overlaps(axis.get_window_extent()), "nothing is hidden"
        assert axis.get_yticks().max() <= 100
        low, high = axis.get_ylim()
        for bar in (bar for bars in axis.collections for bar in bars.get_paths()):
            assert low < bar.vertices[:, 1].min() and bar.vertices[:, 1].max() < high
    assert names[0] == names[3] == ["plain", "regularized"] and names[1] == ["plain"]
    assert names[2] == ["plain", *(f"regularized, coefficient {c}" for c in (1, 9, 10))]
    assert [text.get_text() for text in drawn[3].texts] == ["smoke run, not a result"]
    assert drawn[0].texts == []


def test_samples_are_described_in_words(data: Path, tmp_path: Path) -> None:
    case = Case(20, 0.0, 0)
    pairs = load(tiny(data), case, tmp_path).train
    for label, words in zip(pairs.labels[:20].tolist(), pairs.describe(range(20)), strict=True):
        said, _, classes = words.partition("\n")
        left, right = classes.split(", ")
        assert said == ("same class" if left == right else "different") and label == (left == right)
    setting = tiny_pathfinder()
    make_pictures(setting, tmp_path, 1)
    pictures = load(setting, Case(2, 1.0, 0), tmp_path).train
    found = pictures.describe(torch.arange(4))
    assert found == [("two paths", "one path")[label] for label in pictures.labels[:4].tolist()]


def test_launching(tmp_path: Path) -> None:
    jobs = [(2, 3), (3, 2), (0, -1)]
    for workers in (1, 2):
        answers = dict(launch(pow, jobs, workers=workers))
        assert answers[0] == 8 and answers[1] == 9 and isinstance(answers[2], ZeroDivisionError)


def test_two_processes_cannot_train_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_PATIENCE", 0.3)
    setting = tiny(data, distances=(20,), coefficients=(0.0,), epochs=1)
    case = next(setting.cases())
    with processes.only_one(tmp_path / "grid" / "runs" / case.name):
        outcome = run_grid(setting, tmp_path / "grid", ALONE)
    assert "another process is at work in" in outcome.failed[case.name]
    assert len(run_grid(setting, tmp_path / "grid", ALONE, resume=True).results) == 1


@pytest.mark.slow
def test_launching_through_submitit(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    options = {"cluster": "local", "timeout_min": 2}
    jobs = [(2, 3), (0, -1)]
    answers = dict(launch(pow, jobs, "submitit", options=options, folder=tmp_path / "jobs"))
    assert answers[0] == 8 and isinstance(answers[1], ZeroDivisionError)
    with pytest.raises(UserError, match="submitit does not take the jobs"):
        list(launch(pow, jobs, "submitit", options={"cluster": "nowhere"}, folder=tmp_path))


@pytest.mark.slow
def test_two_processes_train_together(data: Path, tmp_path: Path) -> None:
    arguments = command(data, tmp_path / "grid", "--epochs", "2")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*run, "--standalone", "-m", "htflearn.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    results = [
        json.loads(x) for x in (tmp_path / "grid" / "results.jsonl").read_text().split("\n") if x
    ]
    assert len(results) == 4 and all(r["processes"] == 2 and r["epochs"] == 2 for r in results)
    assert done.stdout.count("written:") == 1


@pytest.mark.slow
def test_killed_and_resumed(data: Path, tmp_path: Path) -> None:
    more = ["--epochs", "40", "--workers", "2"]
    assert cli.run(command(data, tmp_path / "whole", *more)) == 0
    arguments, epochs = command(data, tmp_path / "killed", *more), 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-m", "htflearn.cli", *arguments], cwd=tmp_path)
        began, before = time.monotonic(), epochs
        while epochs <= before and process.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.02)
            files = (tmp_path / "killed" / "runs").glob("*/metrics.jsonl")
            epochs = sum(file.read_bytes().count(b"\n") for file in files)
        assert process.poll() is None and before < epochs < 160, "killed at work"
        process.kill()
        process.wait()
        arguments = command(data, tmp_path / "killed", *more, "--resume")
    assert cli.run(arguments) == 0
    whole, killed = (
        [{**json.loads(x), "seconds": 0} for x in (tmp_path / run / "results.jsonl").open()]
        for run in ("whole", "killed")
    )
    assert whole == killed


def test_an_error_that_nobody_foresaw_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(grid, "train", broken)
    setting = tiny(data, distances=(20,), coefficients=(0.0,))
    outcome = run_grid(setting, tmp_path / "grid", ALONE)
    (text,) = outcome.failed.values()
    assert text.startswith("ZeroDivisionError: deep inside (see ")
    (file,) = (tmp_path / "grid" / "runs").glob("*/error.txt")
    assert "in broken" in file.read_text()
