"""``htf dynamics``: the figure, the numbers, the table, and what a user can get wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from htflearn import dynamics as module
from htflearn.cli import run
from htflearn.commands.dynamics import _settings
from htflearn.dynamics import PRESETS, prepare, run_panel
from htflearn.errors import UserError

QUICK = ["dynamics", "--preset", "smoke", "--iterations", "100", "--panels", "mf"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("dynamics") / "made" / "on the way"
    assert run(["dynamics", "--preset", "smoke", "--out", str(out)]) == 0
    return out, json.loads((out / "dynamics.json").read_text())


def test_every_panel_learns_the_rank_of_its_target(smoke: Any) -> None:
    _, results = smoke
    assert results["note"] == "smoke run, not a result"
    assert all(p["settings"]["smoke"] for p in results["panels"])
    assert [p["settings"]["panel"] for p in results["panels"]] == ["mf", "tf", "htf"]
    for panel in results["panels"]:
        assert panel["reason"] == "train loss"
        assert panel["train_loss"] < 5e-5
        assert panel["test_mse"] < 2e-3
        assert panel["learned"] == "target" and panel["remarks"] == []
        for series in panel["series"]:
            assert len(series["components"]) == 2, series["name"]
            rose = [c["rose"] for c in series["components"]]
            assert all(0 < r < panel["iterations"] for r in rose)
            assert len(series["iterations"]) == len(series["norms"])
        first = panel["series"][0]
        rose = [c["rose"] for c in first["components"]]
        assert rose[1] > rose[0] + 100, "one component after the other"
        assert all(r["numerical_rank"] == 2 for r in panel["ranks"].values())


def test_the_figure_is_a_picture(smoke: Any) -> None:
    from PIL import Image

    out, _ = smoke
    with Image.open(out / "dynamics.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 1500 and picture.height > 400
        colours = {c for _, c in picture.convert("RGB").getcolors(2**24)}
    assert (0x00, 0x72, 0xB2) in colours and (0xE6, 0x9F, 0x00) in colours
    assert sorted(p.name for p in out.iterdir()) == [
        "dynamics.json",
        "dynamics.png",
        "htf",
        "mf",
        "tf",
    ]


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*QUICK, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    for text in ("12 x 12, rank 2", "100 (iterations)", "singular values", "test MSE", "rank"):
        assert text in printed.out
    assert "What was learned (smoke run, not a result)" in printed.out
    assert "dynamics.png" in printed.out and printed.err == ""


def test_a_run_that_learned_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["dynamics", "--preset", "smoke", "--panels", "tf,htf", "--order", "8", "--dim", "2"]
    more = ["--optimizer", "sgd", "--loss", "l1", "--iterations", "40", "--out", str(tmp_path)]
    assert run([*command, *more]) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing was learned") == 4, "in the table and below it"
    assert "HTF: the weights have " in printed and "try --optimizer grouprmsprop" in printed
    assert "8 modes of 2, rank 2" in printed
    panels = json.loads((tmp_path / "dynamics.json").read_text())["panels"]
    assert [p["learned"] for p in panels] == ["nothing", "nothing"]
    assert not any(series["components"] for p in panels for series in p["series"])


def test_initial_weights_follow_order_and_depth() -> None:
    for given, stds in (
        ({}, [0.01, 0.01, 0.05]),
        ({"order": 6, "depth": 4}, [0.0537, 0.316, 0.148]),
        ({"order": 6, "init_std": 0.2}, [0.2, 0.2, 0.2]),
    ):
        assert [s.init_std for s in _settings("smoke", "mf,tf,htf", given)] == stds
        assert all(s.smoke for s in _settings("smoke", "mf,tf,htf", given))
    assert not any(s.smoke for s in _settings("paper", "mf,tf,htf", {"order": 3}))


def test_options_reach_the_settings(tmp_path: Path) -> None:
    options = "--dim 5 --order 3 --rank 1 --samples 50 --width 4 --seed 3 --optimizer adam"
    more = "--lr 0.02 --init-std 0.1 --noise-std 0.01 --norm 3 --dtype float64 --log-every 50"
    more += " --loss huber --threads 2"
    before = torch.get_num_threads()
    command = ["dynamics", "--preset", "smoke", "--panels", "htf,tf", "--iterations", "100"]
    out = ["--out", str(tmp_path)]
    assert run([*command, *options.split(), *more.split(), *out]) == 0
    assert torch.get_num_threads() == before
    panels = json.loads((tmp_path / "dynamics.json").read_text())["panels"]
    assert [p["settings"]["panel"] for p in panels] == ["htf", "tf"]
    for panel in panels:
        expected = {"dim": 5, "order": 3, "rank": 1, "samples": 50, "width": 4, "seed": 3}
        expected |= {"optimizer": "adam", "lr": 0.02, "init_std": 0.1, "dtype": "float64"}
        expected |= {"loss": "huber", "threads": 2}
        assert expected.items() <= panel["settings"].items()
        assert panel["series"][0]["iterations"] == [0, 50, 100]


def test_a_seed_means_the_same_in_both_dtypes() -> None:
    setting = PRESETS["smoke"]["htf"]
    single, double = (prepare(dataclasses.replace(setting, dtype=d)) for d in module.DTYPES)
    assert torch.equal(single[0].indices, double[0].indices)
    torch.testing.assert_close(single[0].values.double(), double[0].values, rtol=1e-6, atol=1e-6)
    for a, b in zip(single[1].parameters(), double[1].parameters(), strict=True):
        assert a.dtype == torch.float32 and b.dtype == torch.float64
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-8)


def comparable(out: Path) -> Any:
    """The results but for the clock."""
    results = json.loads((out / "dynamics.json").read_text())
    for panel in results["panels"]:
        for key in ("seconds", "iterations_per_second"):
            del panel[key]
    return results


def test_resume_gives_what_an_uninterrupted_run_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["dynamics", "--preset", "smoke", "--panels", "mf,tf", "--iterations", "300"]
    assert run([*command, "--out", str(tmp_path / "whole")]) == 0

    original = module.run_panel

    def interrupted(setting: Any, *args: Any) -> Any:
        if setting.panel == "tf":  # a third of it, then Ctrl-C
            run_panel(dataclasses.replace(setting, iterations=100), *args)
            raise KeyboardInterrupt
        return original(setting, *args)

    monkeypatch.setattr(module, "run_panel", interrupted)
    assert run([*command, "--out", str(tmp_path / "parts")]) == 130
    assert not (tmp_path / "parts" / "dynamics.json").exists()
    monkeypatch.undo()
    assert run([*command, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs, checks for exit code 2 and one line on standard error, and returns the line."""
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("htf: ") and "Traceback" not in printed.err
    return printed.err


def test_an_output_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr(module, "run_panel", lambda *args: pytest.fail("it trained"))
    said = fails([*QUICK, "--out", str(tmp_path / "file" / "out")], capsys)
    assert "cannot be written" in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "tiny"], "--preset"),
        (["--panels", "mf,cp"], "mf,cp"),
        (["--panels", "mf,mf"], "at most once"),
        (["--optimizer", "lbfgs"], "optimizer"),
        (["--dtype", "float16"], "dtype"),
        (["--loss", "l3"], "l3"),
        (["--samples", "0"], "1..144"),
        (["--samples", "145"], "1..144"),
        (["--dim", "0"], "--dim"),
        (["--iterations", "0"], "--iterations"),
        (["--rank", "-1"], "--rank"),
        (["--threads", "0"], "--threads"),
        (["--init-std", "0"], "--init-std must be positive"),
        (["--init-std", "nan"], "--init-std must be positive"),
        (["--norm", "inf"], "--norm must be finite"),
        (["--noise-std", "-1"], "--noise-std must not be negative, got -1"),
        (["--noise-std", "nan"], "--noise-std must not be negative"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--lr", "0"], "--lr must be positive"),
        (["--width", "100000"], "--width 100000 makes more than 268,435,456 weights"),
        (["--rank", "100000"], "--rank 100000 makes more than"),
        (["--depth", "100000"], "--depth must be at most 1,000"),
        (["--threads", "100000"], "--threads must be at most 1,024"),
        (["--dim", "9" * 400], "--dim must be at most"),
        (["--depth", "1"], "depth"),
        (["--seed", "-1"], "--seed"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails([*QUICK, *options, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_tensor_too_large_to_form() -> None:
    with pytest.raises(UserError, match="too large"):
        prepare(dataclasses.replace(PRESETS["paper"]["htf"], order=10))


def test_resume_with_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert run([*QUICK, *out]) == 0
    before = (tmp_path / "dynamics.json").read_bytes()
    capsys.readouterr()
    assert "width 12, not 13" in fails([*QUICK, *out, "--resume", "--width", "13"], capsys)
    assert (tmp_path / "dynamics.json").read_bytes() == before
    assert run([*QUICK, *out, "--resume", "--iterations", "150"]) == 0


def test_a_run_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(QUICK) == 0

    def left() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = left()
    capsys.readouterr()
    for more in ([], ["--panels", "tf"], ["--seed", "3"]):
        said = fails([*QUICK, *more], capsys)
        assert "htf-dynamics holds a run already" in said
        assert all(way in said for way in ("--resume", "--force", "another --out"))
    assert "give one of them" in fails([*QUICK, "--resume", "--force"], capsys)
    assert left() == before
    # Whatever is left of a run is one.
    for name in ("dynamics.json", "dynamics.png", "mf/metrics.jsonl"):
        (tmp_path / "htf-dynamics" / name).unlink()
        assert "holds a run already" in fails(QUICK, capsys)
    assert run([*QUICK, "--force", "--seed", "3"]) == 0
    panel = json.loads((tmp_path / "htf-dynamics" / "dynamics.json").read_text())["panels"][0]
    assert panel["settings"]["seed"] == 3


def test_settings_alone_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "mf").mkdir()
    (tmp_path / "mf" / "settings.json").write_text("{}")  # as where the disk was full at once
    assert run([*QUICK, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("text", ["null", "[]", "", "[" * 100_000])
def test_settings_of_something_else(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mf").mkdir()
    (tmp_path / "mf" / "settings.json").write_text(text)
    said = fails([*QUICK, "--out", str(tmp_path), "--resume"], capsys)
    assert "mf/settings.json cannot be read" in said


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("_ranks", "the ranks of the MF panel could not be made: std::bad_alloc"),
        ("figure", "could not be made: std::bad_alloc"),
    ],
)
def test_what_cannot_be_made_does_not_cost_the_run(
    place: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("std::bad_alloc")

    figure = "htflearn.figures.draw_dynamics"
    monkeypatch.setattr(figure if place == "figure" else f"htflearn.dynamics.{place}", broken)
    assert run([*QUICK, "--out", str(tmp_path)]) == 3
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and "test MSE" in printed.out
    (panel,) = json.loads((tmp_path / "dynamics.json").read_text())["panels"]
    assert (panel["ranks"] == {}) == (place == "_ranks")
    assert (tmp_path / "dynamics.png").exists() == (place == "_ranks")


def test_a_panel_that_fails_does_not_cost_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(setting: Any, *args: Any) -> Any:
        if setting.panel == "mf":
            raise UserError("the MF panel: out of luck")
        return run_panel(setting, *args)

    monkeypatch.setattr(module, "run_panel", failing)
    assert run([*QUICK[:-1], "mf,tf", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err == "htf: the MF panel: out of luck\n"
    (panel,) = json.loads((tmp_path / "dynamics.json").read_text())["panels"]
    assert panel["settings"]["panel"] == "tf" and (tmp_path / "dynamics.png").exists()


def test_the_name_of_the_program_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dynamics", "--preset", "smoke", "--panels", "htf", "--out", str(tmp_path)]
    said = fails([*command, "--samples", "9999"], capsys)
    assert said.startswith("htf: the HTF panel: ")


def test_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fails([*QUICK, "--device", "cuda", "--out", str(tmp_path / "out")], capsys)
    assert "--device cuda: PyTorch finds no GPU here" in said
    assert not (tmp_path / "out").exists()


def test_a_run_from_before_there_were_devices_and_stamps_goes_on(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    assert run([*QUICK, *out]) == 0
    path = tmp_path / "mf" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("device") == "cpu" and settings.pop("smoke")
    path.write_text(json.dumps(settings))
    assert run([*QUICK, *out, "--resume", "--iterations", "150"]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["grouprmsprop", "adam"])
def test_a_run_on_a_gpu_learns_what_one_on_the_cpu_does(optimizer: str, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        command = ["dynamics", "--preset", "smoke", "--iterations", "60", "--dtype", "float64"]
        more = ["--optimizer", optimizer, "--device", device, "--out", str(tmp_path / device)]
        assert run([*command, *more]) == 0
        found.append(json.loads((tmp_path / device / "dynamics.json").read_text())["panels"])
    for cpu, gpu in zip(*found, strict=True):
        assert gpu["settings"]["device"] == "cuda"
        assert gpu["train_loss"] == pytest.approx(cpu["train_loss"], rel=1e-6)


def test_a_run_that_diverges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails([*QUICK, "--out", str(tmp_path), "--optimizer", "sgd", "--lr", "1e6"], capsys)
    assert "no longer finite" in said and "--lr" in said
