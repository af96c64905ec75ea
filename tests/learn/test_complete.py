"""``htf complete``: what it learns, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import htfkernels as hk
from htflearn import cli
from htflearn.complete.run import Options, complete

QUICK = Options(iterations=40, progress=False)


def low_rank(*dims: int, rank: int = 2, seed: int = 0) -> np.ndarray:
    """A tensor of hierarchical rank `rank`, of mean square 1."""
    torch.manual_seed(seed)
    tree = hk.ModeTree.balanced(len(dims))
    model = hk.HTF(tree, dims, rank, init_std=1.0, dtype=torch.float64)
    with torch.no_grad():
        tensor = model.full_tensor().numpy()
    return tensor / np.sqrt(np.mean(tensor**2))


def with_gaps(tensor: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    gaps = np.random.default_rng(seed).random(tensor.shape) < fraction
    return np.where(gaps, np.nan, tensor)


def htf(file: Path, *options: object) -> int:
    quick = ("--iterations", 40, "--quiet")
    return cli.run(["complete", str(file), *map(str, quick), *map(str, options)])


def test_a_planted_tensor_is_recovered(tmp_path: Path) -> None:
    truth = low_rank(8, 8, 8, 8)
    given = with_gaps(truth, 0.5)
    np.save(tmp_path / "t.npy", given)
    made = complete(tmp_path / "t.npy", Options(iterations=600, progress=False))
    result = np.load(made.result)
    missing = np.isnan(given)
    assert np.array_equal(result[~missing], given[~missing])
    error = np.sqrt(np.mean((result - truth)[missing] ** 2))
    assert error < 0.05
    scores = {m["name"]: m for m in made.numbers["models"]}
    assert scores["HTF"]["held_out_rmse"] < 0.05 < 0.9 < scores["mean"]["held_out_rmse"]
    rank = next(r for r in made.numbers["ranks"] if r["modes"] == [0, 1])
    assert rank["rank_above_1_percent"] <= 4 and 1 < rank["effective_rank"] < 3


def test_the_report(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 7, 8), 0.3))
    assert htf(tmp_path / "t.npy", "--hide", 0.2, "--ranks", "5,4") == 0
    report = json.loads((tmp_path / "t-completed.json").read_text())
    assert report["shape"] == [6, 7, 8] and report["tree"] == [[0, 1], 2]
    assert report["known"] + report["hidden"] + report["missing"] == 6 * 7 * 8
    assert report["hidden"] == round(0.2 * (report["known"] + report["hidden"]))
    mean, model, cp = report["models"]
    assert [mean["name"], model["name"], cp["name"]] == ["mean", "HTF", "CP"]
    assert mean["held_out_relative"] == mean["hidden_relative"] == 1.0
    assert model["ranks"] == [4, 5]
    assert abs(cp["parameters"] - model["parameters"]) <= (6 + 7 + 8) / 2
    for scores in (model, cp):
        for key in ("held_out_rmse", "hidden_rmse", "weight_decay", "seconds", "iterations"):
            assert scores[key] >= 0
        relative = scores["hidden_rmse"] / mean["hidden_rmse"]
        assert scores["hidden_relative"] == pytest.approx(relative)
    (rank,) = report["ranks"]
    assert rank["modes"] == [0, 1] and (rank["rows"], rank["columns"]) == (42, 8)
    assert rank["local_rank"] == 5 and 1 <= rank["numerical_rank"] <= 4
    assert len(rank["singular_values"]) <= 4
    assert report["settings"]["iterations"] == 40 and report["seconds"] > 0


def test_the_hidden_entries_are_judged_by_what_is_written(tmp_path: Path) -> None:
    truth = low_rank(6, 7, 8)
    np.save(tmp_path / "t.npy", truth)
    made = complete(tmp_path / "t.npy", Options(iterations=40, hide=0.4, progress=False))
    result = np.load(made.result)
    changed = result != truth
    assert changed.sum() == made.numbers["hidden"] == round(0.4 * truth.size)
    rmse = np.sqrt(np.mean((result - truth)[changed] ** 2))
    assert made.numbers["models"][1]["hidden_rmse"] == pytest.approx(rmse, rel=1e-6)


def test_smooth_writes_the_model_everywhere(tmp_path: Path) -> None:
    given = with_gaps(low_rank(6, 7, 8), 0.2)
    np.save(tmp_path / "t.npy", given)
    assert htf(tmp_path / "t.npy", "--smooth") == 0
    result = np.load(tmp_path / "t-completed.npy")
    assert np.isfinite(result).all() and not np.isin(result, given).any()


def test_the_seed_decides(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 7, 8), 0.3))
    results = []
    for seed in (3, 3, 4):
        assert htf(tmp_path / "t.npy", "--seed", seed, "--force") == 0
        results.append(np.load(tmp_path / "t-completed.npy"))
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


@pytest.mark.parametrize(
    "options",
    [
        ("--tree", "flat"),
        ("--tree", "halves", "--ranks", "4"),
        ("--optimizer", "rmsprop", "--loss", "huber", "--init-std", "0.5"),
        ("--optimizer", "sgd", "--loss", "l1", "--lr", "0.01", "--weight-decay", "0"),
        ("--dtype", "float64", "--batch-size", "50", "--held-out", "0.3"),
        ("--smoothness", "0.1", "--smooth-modes", "1,2"),
        ("--max-seconds", "0.5", "--iterations", "1000000"),
        ("--quantize", "--smoothness", "0.1"),
        ("--factors", "auto,4"),
    ],
    ids=" ".join,
)
def test_options(tmp_path: Path, options: tuple[str, ...]) -> None:
    given = with_gaps(low_rank(17, 18, 4), 0.3)
    np.save(tmp_path / "t.npy", given)
    assert htf(tmp_path / "t.npy", *options) == 0
    result = np.load(tmp_path / "t-completed.npy")
    known = np.isfinite(given)
    assert np.isfinite(result).all() and np.array_equal(result[known], given[known])


def test_a_tree_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(5, 5, 5, 5), 0.2))
    tree = hk.ModeTree.from_nested(((0, 3), ((1,), 2)))
    (tmp_path / "tree.json").write_text(tree.to_json())
    assert htf(tmp_path / "t.npy", "--tree", tmp_path / "tree.json", "--ranks", "2,3,4") == 0
    report = json.loads((tmp_path / "t-completed.json").read_text())
    assert report["tree"] == [[0, 3], [[1], 2]]


def test_a_vector_is_split(tmp_path: Path) -> None:
    given = with_gaps(np.sin(np.arange(200) / 7), 0.3)
    np.save(tmp_path / "t.npy", given)
    assert htf(tmp_path / "t.npy", "--quantize") == 0
    report = json.loads((tmp_path / "t-completed.json").read_text())
    assert report["shape"] == [200] and report["split_shape"] == [5, 5, 2, 2, 2]
    assert np.isfinite(np.load(tmp_path / "t-completed.npy")).all()


def test_two_modes_have_no_other_cp(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(9, 8), 0.3))
    assert htf(tmp_path / "t.npy") == 0
    report = json.loads((tmp_path / "t-completed.json").read_text())
    assert [m["name"] for m in report["models"]] == ["mean", "HTF"]
    assert "HTF is a CP" in report["notes"][-1]
    assert [r["modes"] for r in report["ranks"]] == [[0], [1]]


def test_equal_entries(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", with_gaps(np.full((5, 6), 7.0), 0.3))
    assert htf(tmp_path / "t.npy") == 0
    assert (np.load(tmp_path / "t-completed.npy") == 7.0).all()


def test_the_tables_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 7, 8), 0.3))
    assert cli.run(["complete", str(tmp_path / "t.npy"), "--iterations", "20"]) == 0
    shown = capsys.readouterr().out
    for part in ("mean", "HTF", "CP", "held out", "ranks found", "{0,1}", "42 x 8", "written"):
        assert part in shown


def test_results_are_kept_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 7, 8), 0.3))
    (tmp_path / "t-completed.json").write_text("earlier")
    assert htf(tmp_path / "t.npy") == 2
    assert "t-completed.json exists; give --force" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t-completed.json", "t.npy"]
    assert htf(tmp_path / "t.npy", "--force") == 0
    assert json.loads((tmp_path / "t-completed.json").read_text())["kind"] == "array"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interruption_while_writing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 7, 8), 0.3))
    assert htf(tmp_path / "t.npy") == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    real, calls = np.save, []

    def save(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) > 1:  # the first only tries whether the result can be written
            raise error
        real(*args, **options)

    monkeypatch.setattr(np, "save", save)
    assert htf(tmp_path / "t.npy", "--force", "--seed", 1) in (2, 130)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def broken(*_: object, **__: object) -> None:
    raise MemoryError("std::bad_alloc")


BROKEN = {
    "htflearn.complete.report._ranks": "the ranks could not be made: std::bad_alloc",
    "htflearn.complete.run.make_cp": "the comparison with CP could not be made: not enough memory",
    "htflearn.complete.run.make_report": "the report could not be made: std::bad_alloc",
    "htflearn.complete.run.report_writer": "the report could not be made: std::bad_alloc",
    "htflearn.complete.run.picture_writer": "the picture could not be made: std::bad_alloc",
}


@pytest.mark.parametrize("place", BROKEN)
def test_what_cannot_be_made_does_not_cost_the_result(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.add.outer(np.arange(9) * 5, np.arange(10) * 7).astype(np.uint8)
    Image.fromarray(np.stack([pixels] * 3, axis=2)).save(tmp_path / "p.png")
    for name in ("p-completed.json", "p-completed-panels.png"):
        (tmp_path / name).write_text("of an earlier result")
    monkeypatch.setattr(place, broken)
    options = ("--iterations", "2", "--weight-decay", "0", "--hide", "0.5", "--no-quantize")
    assert cli.run(["complete", str(tmp_path / "p.png"), *options, "--force"]) == 3
    shown = capsys.readouterr()
    assert shown.err.startswith(f"htf: {BROKEN[place]}") and shown.err.count("\n") == 1
    assert np.array(Image.open(tmp_path / "p-completed.png")).shape == (9, 10, 3)
    written = shown.out.splitlines()[-1]
    report, panels = tmp_path / "p-completed.json", tmp_path / "p-completed-panels.png"
    for file, lacks in ((report, "the report"), (panels, "the picture")):
        assert file.exists() == (file.name in written) == (lacks not in BROKEN[place])
    if report.exists() and panels.exists():
        numbers = json.loads(report.read_text())
        assert BROKEN[place] in numbers["notes"][-1]
        assert "HTF is a CP" not in " ".join(numbers["notes"])
        assert (numbers["ranks"] == []) == ("ranks" in place)


def test_an_interruption_after_the_result_tells_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 7, 8), 0.3))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("htflearn.complete.run.make_cp", interrupted)
    assert htf(tmp_path / "t.npy") == 130
    assert f"the completed tensor is in {tmp_path / 't-completed.npy'}" in capsys.readouterr().err
    assert np.isfinite(np.load(tmp_path / "t-completed.npy")).all()


def test_an_interruption_while_training_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 7, 8), 0.3))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("htflearn.train.Trainer.fit", interrupted)
    assert htf(tmp_path / "t.npy") == 130
    assert [p.name for p in tmp_path.iterdir()] == ["t.npy"]


def test_a_loss_that_diverges_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 7, 8), 0.3))
    assert htf(tmp_path / "t.npy", "--optimizer", "sgd", "--lr", "1e30", "--init-std", "1e20") == 2
    assert "no finite result" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["t.npy"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("smoothness", [0.0, 0.1])
def test_on_a_gpu_the_same_is_learned(smoothness: float, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", with_gaps(low_rank(6, 5, 4), 0.3))
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.npy"
        options = replace(
            QUICK, device=device, dtype="float64", out=out, weight_decay=0.0, smoothness=smoothness,
            max_seconds=1e6,  # the step size falls by the clock where that is nearer to its end
        )  # fmt: skip
        found.append(np.load(complete(tmp_path / "t.npy", options).result))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)
