"""One training of the locality experiments: it learns, resumes, and runs in several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from locality_files import tiny, write_images
from torch import Tensor

from htflearn import UserError
from htflearn.locality import training
from htflearn.locality.data import load
from htflearn.locality.setting import Case, Setting
from htflearn.locality.training import inputs, make_network, train


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def weights(setting: Setting, case: Case, out: Path) -> dict[str, Tensor]:
    network = make_network(setting, case, 1)
    training.load_checkpoint(out / "checkpoints", network)
    return network.state_dict()


def go(setting: Setting, case: Case, out: Path) -> dict[str, Any]:
    return train(setting, case, load(setting, case, out / "data"), out)


def test_it_learns(data: Path, tmp_path: Path) -> None:
    setting = tiny(data, epochs=20, train_size=128, test_size=60)
    result = go(setting, Case(0, 0.5, 0), tmp_path / "run")
    assert result["train_accuracy"] > 0.9 and result["test_accuracy"] > 0.8
    assert 0 < result["change"] < 1 and result["epochs"] == 20
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [*range(1, 21)]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


class Stopped(Exception):
    pass


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_resumed_anywhere_it_is_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    setting, case = tiny(data, epochs=3, amp=amp), Case(20, 1.0, 1)
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    whole = go(setting, case, tmp_path / "whole")
    step, taken = training._Training._step, 0

    def stopping(self: Any, *arguments: Any) -> None:
        nonlocal taken
        taken += 1
        if taken % 3 == 0:
            raise Stopped
        step(self, *arguments)

    monkeypatch.setattr(training._Training, "_step", stopping)
    stops = 0
    while True:
        try:
            parts = go(setting, case, tmp_path / "parts")
            break
        except Stopped:
            stops += 1
    assert stops >= 3
    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert {**whole, "seconds": 0} == {**parts, "seconds": 0}
    first, second = (weights(setting, case, tmp_path / run) for run in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_more_epochs_go_on_from_the_last(data: Path, tmp_path: Path) -> None:
    case = Case(20, 0.0, 0)
    go(tiny(data, epochs=1), case, tmp_path / "run")
    go(tiny(data, epochs=3), case, tmp_path / "run")
    go(tiny(data, epochs=3), case, tmp_path / "whole")
    runs = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("run", "whole")]
    assert runs[0] == runs[1]


def test_the_seed_decides_everything(data: Path, tmp_path: Path) -> None:
    setting = tiny(data)
    torch.manual_seed(5)
    one = go(setting, Case(20, 1.0, 0), tmp_path / "one")
    torch.manual_seed(6)
    other = go(setting, Case(20, 1.0, 0), tmp_path / "other")
    third = go(setting, Case(20, 1.0, 3), tmp_path / "third")
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert one["train_loss"] != third["train_loss"]


def test_images_are_normalized_and_keep_their_format(data: Path, tmp_path: Path) -> None:
    setting = tiny(data, canvas=(6, 12), distances=(0,))
    loaded = load(setting, Case(0, 0.0, 0), tmp_path)
    images = inputs(loaded.train.batch(torch.arange(48)), loaded, setting)
    assert images.shape == (48, 1, 6, 12) and images.is_contiguous(
        memory_format=torch.channels_last
    )
    assert abs(float(images.mean())) < 0.1 and abs(float(images.std()) - 1) < 0.1
    background = load(tiny(data), Case(20, 0.0, 0), tmp_path)
    canvas = inputs(background.train.batch(torch.arange(4)), background, setting)
    assert canvas[:, :, :, 10:30].abs().max() < 0.01  # between the images: the mean


def test_a_loss_that_is_not_finite_ends_the_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no longer finite after \d+ epochs; a smaller --lr than"):
        go(tiny(data, lr=1e30, epochs=4), Case(20, 0.0, 0), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_checkpoint_of_something_else_is_refused(data: Path, tmp_path: Path) -> None:
    setting, case = tiny(data), Case(20, 0.0, 0)
    network = make_network(setting, case, 1)
    training.save_checkpoint(tmp_path / "run" / "checkpoints", network, state={"other": 1})
    with pytest.raises(UserError, match="of another training: it has 'other'"):
        go(setting, case, tmp_path / "run")
