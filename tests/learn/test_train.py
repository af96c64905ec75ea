"""The trainer: stops, resumes, and what it records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import largest_file
from torch import Tensor, nn

import htfkernels as hk
from htflearn import (
    CompletionTask,
    GroupRMSprop,
    TrainConfig,
    Trainer,
    UserError,
    completion,
    load_checkpoint,
    make_target,
    matrix_factorization,
    save_checkpoint,
    sensing,
)
from htflearn.trackers import LocalComponentNorms, SingularValues, Unbalancedness


def problem(
    optimizer: str = "grouprmsprop", seed: int = 0
) -> tuple[hk.HTF, CompletionTask, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    task = completion(make_target("ht", (4,) * 4, 2, 8.0, None, generator), 150, 0.0, generator)
    model = hk.HTF(hk.ModeTree.balanced(4), 4, 6, init_std=0.3)
    model.reset_parameters(generator)
    make: Any = {"grouprmsprop": GroupRMSprop, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    return model, task, make[optimizer](model.parameters(), lr=0.01)


def trainer(config: TrainConfig, out: Path | None = None, **options: Any) -> Trainer:
    model, task, optimizer = problem(options.pop("optimizer", "grouprmsprop"))
    options.setdefault("trackers", [LocalComponentNorms(top=3), Unbalancedness()])
    return Trainer(model, task, optimizer, config, out=out, progress=False, **options)


def weights(made: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in made.model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_step_is_a_step_of_the_optimizer() -> None:
    made = trainer(TrainConfig(iterations=7, log_every=3))
    model, task, optimizer = problem()
    for _ in range(7):
        optimizer.zero_grad()
        task.loss(model).backward()
        optimizer.step()
    result = made.fit()
    assert equal(weights(made), [p.detach() for p in model.parameters()])
    assert (result.iterations, result.reason) == (7, "iterations")
    assert [line["iteration"] for line in result.history] == [0, 3, 6, 7]
    assert result.history[-1]["train_loss"] == pytest.approx(task.loss(model).item(), rel=1e-6)
    assert set(result.history[0]["local_component_norms"]) == {"{0,1}", "{2,3}", "{0-3}"}
    assert result.seconds > 0 and result.best is None


def test_it_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    task = completion(make_target("matrix", (8, 8), 1, 8.0, None, generator), 50, 0.0, generator)
    model = matrix_factorization(8, 8, init_std=0.05)
    config = TrainConfig(iterations=3000, log_every=10, stop_train_loss=1e-4)
    made = Trainer(
        model, task, GroupRMSprop(model.parameters()), config, [SingularValues()], progress=False
    )
    result = made.fit()
    assert result.reason == "train loss"
    assert result.history[-1]["test_mse"] < 0.05
    first, second = result.history[-1]["singular_values"]["values"][:2]
    assert first > 50 * second


class Scripted:
    """A task whose metrics are given; its model is one number."""

    num_samples = 10

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.rows = losses, []  # type: ignore[var-annotated]
        self.steps = 0

    def loss(self, model: nn.Module, rows: Tensor | None = None) -> Tensor:
        self.steps += 1
        self.rows.append(rows)
        return next(iter(model.parameters())).sum() * 0.0

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"train_loss": self.losses[min(self.steps, len(self.losses) - 1)]}


def scripted(losses: list[float], **settings: Any) -> tuple[Scripted, Any]:
    options = {k: settings.pop(k) for k in ("watch", "restore_best", "out") if k in settings}
    task, model = Scripted(losses), nn.Linear(1, 1)
    config = TrainConfig(**{"iterations": 50, "log_every": 1, **settings})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return task, Trainer(model, task, optimizer, config, progress=False, **options).fit()


def test_stops_when_the_loss_stays_under() -> None:
    losses = [1.0, 0.1, 1.0, 0.1, 0.1, 1.0, 0.1, 0.1, 0.1, 0.1]
    _, result = scripted(losses, stop_train_loss=0.5, stop_patience=3)
    assert (result.reason, result.iterations) == ("train loss", 8)
    _, result = scripted(losses, stop_train_loss=0.5)
    assert (result.reason, result.iterations) == ("train loss", 1)
    _, result = scripted([0.5], stop_train_loss=0.5)
    assert result.reason == "iterations"


def test_stops_on_a_plateau() -> None:
    losses = [8.0, 4.0, 3.9999, 3.9998, 2.0, 1.9999, 1.9998, 1.9997]
    _, result = scripted(losses, plateau_patience=3)
    assert (result.reason, result.iterations) == ("plateau", 7)
    _, result = scripted(losses, plateau_patience=3, plateau_tolerance=0.0)
    assert (result.reason, result.iterations) == ("plateau", 10)


def test_the_plateau_is_of_what_is_watched() -> None:
    watched = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    losses = [10.0 - i for i in range(9)]
    _, result = scripted(losses, plateau_patience=2, watch=lambda model: next(watched))
    assert (result.reason, result.iterations) == ("plateau", 3)
    assert (result.best, result.best_iteration) == (2.0, 1)
    assert [line["watched"] for line in result.history] == [3.0, 2.0, 2.5, 2.6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_stops_when_not_finite_and_keeps_json(bad: float, tmp_path: Path) -> None:
    _, result = scripted([1.0, 1.0, bad], out=tmp_path, watch=lambda model: 1.0)
    assert (result.reason, result.iterations) == ("not finite", 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert lines[-1] == {"iteration": 2, "train_loss": None}


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path: Path) -> None:
    config = TrainConfig(iterations=60, log_every=20, checkpoint_every=1)
    made = trainer(config, tmp_path, optimizer="sgd")
    for group in made.optimizer.param_groups:
        group["lr"] = 100.0
    assert made.fit().reason == "not finite"
    again = trainer(config, tmp_path, optimizer="sgd")
    again._begin(resume=True)
    assert all(bool(p.isfinite().all()) for p in again.model.parameters())


def test_stops_in_time(tmp_path: Path) -> None:
    made = trainer(TrainConfig(iterations=10**9, log_every=10**9, max_seconds=0.05), tmp_path)
    result = made.fit()
    assert result.reason == "time" and 0.05 <= result.seconds < 5
    assert result.history[-1]["iteration"] == result.iterations > 0


def test_the_best_weights_come_back(tmp_path: Path) -> None:
    seen: list[tuple[float, list[Tensor]]] = []

    def watch(model: hk.HTF) -> float:
        value = abs(len(seen) - 4.0)
        seen.append((value, [p.detach().clone() for p in model.parameters()]))
        return value

    config = TrainConfig(iterations=80, log_every=10)
    made = trainer(config, tmp_path, watch=watch, restore_best=True)
    result = made.fit()
    assert (result.best, result.best_iteration) == (0.0, 40)
    assert equal(weights(made), seen[4][1])
    # A finished run, resumed, gives the same weights again.
    again = trainer(config, tmp_path, watch=watch, restore_best=True)
    assert again.fit(resume=True).best_iteration == 40
    assert equal(weights(again), seen[4][1])


def test_batches_cover_each_epoch_in_a_new_order() -> None:
    task, _ = scripted([1.0], batch_size=4, iterations=9)
    rows = [r.tolist() for r in task.rows]
    assert [len(r) for r in rows] == [4, 4, 2] * 3
    epochs = [[*rows[i], *rows[i + 1], *rows[i + 2]] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again, _ = scripted([1.0], batch_size=4, iterations=9)
    other, _ = scripted([1.0], batch_size=4, iterations=9, seed=1)
    assert [r.tolist() for r in again.rows] == rows != [r.tolist() for r in other.rows]


def test_sensing_is_trained_too() -> None:
    generator = torch.Generator().manual_seed(0)
    task = sensing(make_target("cp", (4, 4, 4), 1, 4.0, None, generator), 120, generator=generator)
    model = hk.HTF(hk.ModeTree.flat(3), 4, 8, root="sum", init_std=0.3)
    model.reset_parameters(generator)
    config = TrainConfig(iterations=800, log_every=50, batch_size=40)
    result = Trainer(model, task, GroupRMSprop(model.parameters()), config, progress=False).fit()
    errors = [line["reconstruction_error"] for line in result.history]
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("batch_size", [None, 32])
@pytest.mark.parametrize("optimizer", ["grouprmsprop", "adam"])
def test_resume_continues_bit_for_bit(
    batch_size: int | None, optimizer: str, tmp_path: Path
) -> None:
    def config(iterations: int) -> TrainConfig:
        return TrainConfig(
            iterations, batch_size, log_every=10, checkpoint_every=7, checkpoint_seconds=None
        )

    straight = trainer(config(200), tmp_path / "a", optimizer=optimizer)
    whole = straight.fit()
    for iterations in (10, 50, 120, 200):
        part = trainer(config(iterations), tmp_path / "b", optimizer=optimizer)
        result = part.fit(resume=True)
    assert equal(weights(straight), weights(part))
    assert result.history == whole.history
    first, second = (tmp_path / d / "metrics.jsonl" for d in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_resume_from_between_two_lines_writes_none_twice(tmp_path: Path) -> None:
    class Dies(BaseException):
        pass

    config = TrainConfig(200, 32, log_every=10, checkpoint_every=7, checkpoint_seconds=None)
    straight = trainer(config, tmp_path / "a")
    whole = straight.fit()
    made = trainer(config, tmp_path / "b")
    step, count = made.optimizer.step, 0

    def dies() -> Any:
        nonlocal count
        count += 1
        if count == 131:
            raise Dies
        return step()

    made.optimizer.step = dies  # type: ignore[method-assign, assignment]
    with pytest.raises(Dies):
        made.fit()
    metrics = tmp_path / "b" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 14  # one line beyond the last checkpoint
    with open(metrics, "ab") as file:
        file.write(b'{"iteration": 140, "train')
    again = trainer(config, tmp_path / "b")
    assert again.fit(resume=True).history == whole.history
    assert metrics.read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert equal(weights(again), weights(straight))


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    config = TrainConfig(3000, log_every=10, stop_train_loss=1e-2, stop_patience=2)
    first = trainer(config, tmp_path).fit()
    assert first.reason == "train loss"
    again = trainer(config, tmp_path).fit(resume=True)
    assert (again.iterations, again.reason, again.history) == (
        first.iterations,
        first.reason,
        first.history,
    )


def test_a_new_run_replaces_an_old_one(tmp_path: Path) -> None:
    trainer(TrainConfig(50, log_every=10), tmp_path).fit()
    result = trainer(TrainConfig(20, log_every=10), tmp_path).fit()
    assert result.iterations == 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert trainer(TrainConfig(20), tmp_path).fit(resume=True).iterations == 20


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert trainer(TrainConfig(5), tmp_path).fit(resume=True).iterations == 5


def test_resume_of_another_model(tmp_path: Path) -> None:
    trainer(TrainConfig(5), tmp_path).fit()
    other = hk.HTF(hk.ModeTree.balanced(4), 4, 7)
    made = Trainer(
        other,
        problem()[1],
        GroupRMSprop(other.parameters()),
        TrainConfig(5),
        out=tmp_path,
        progress=False,
    )
    with pytest.raises(UserError, match="another model"):
        made.fit(resume=True)


@pytest.mark.parametrize("damage", ["cut short", "empty", "junk", "gone", "another run's"])
def test_resume_with_metrics_that_are_not_those_of_the_run(damage: str, tmp_path: Path) -> None:
    config = TrainConfig(20, log_every=10)
    trainer(config, tmp_path).fit()
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        junk = b"x" * len(content)
        other = content.replace(b'"iteration": 20', b'"iteration": 30')
        left = {"cut short": content[:-9], "empty": b"", "junk": junk, "another run's": other}
        path.write_bytes(left[damage])
    with pytest.raises(
        UserError, match=r"metrics\.jsonl (is not as the run left it|cannot be read)"
    ):
        trainer(config, tmp_path).fit(resume=True)
    assert not path.exists() or path.read_bytes() == left[damage], "nothing is made worse"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"iteration": "many"}, "its iteration is not of type int"),
        ({"reason": None}, "its reason is not of type str"),
        ({"metrics_bytes": -5}, "expected whole lines"),
        ({"batches": {"epoch": 3}}, "is damaged: KeyError"),
        ({"batches": {"epoch": torch.ones(3), "position": 0}}, "is damaged: TypeError"),
        ({"best_weights": {"other": torch.ones(3)}}, "the best weights in .* of another model"),
        ({"best_weights": {"weights.0": 3}}, "the best weights in .* of another model"),
        ({"age": 3}, "is of another training: it has 'age'"),
    ],
    ids=range(8),
)
def test_resume_from_a_damaged_state(changes: Any, says: str, tmp_path: Path) -> None:
    config = TrainConfig(20, 32, log_every=10)
    made = trainer(config, tmp_path)
    made.fit()
    state = load_checkpoint(tmp_path, made.model, made.optimizer)
    save_checkpoint(tmp_path / "checkpoints", made.model, made.optimizer, state)
    assert trainer(config, tmp_path).fit(resume=True).iterations == 20
    path = next((tmp_path / "checkpoints").glob("step-*/state.pt"))
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "state": {**state, **changes}}, path)
    with pytest.raises(UserError, match=says):
        trainer(config, tmp_path).fit(resume=True)


def test_a_disk_without_room(tmp_path: Path) -> None:
    config = TrainConfig(100, log_every=10, checkpoint_every=10)
    with largest_file(200), pytest.raises(UserError, match=r"a checkpoint cannot be .*: File too"):
        trainer(config, tmp_path / "a").fit()
    assert not list((tmp_path / "a" / "checkpoints").iterdir())
    made = trainer(config, tmp_path / "b")
    made.fit()
    # The weights and the state fit, and the metrics do not.
    with largest_file(200_000), pytest.raises(UserError, match=r"metrics\.jsonl cannot be written"):
        long = TrainConfig(100_000, log_every=1, checkpoint_seconds=None)
        trainer(long, tmp_path / "b").fit(resume=True)
    assert trainer(TrainConfig(120), tmp_path / "b").fit(resume=True).iterations == 120


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot be written"):
        trainer(TrainConfig(5), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["iterations", "log_every", "batch_size", "plateau_patience"])
def test_bad_config(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: 0})


def test_progress_on_no_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from htflearn import progress

    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with progress.Progress(total=100, start=0, title="MF") as shown:
        shown.update(50, loss=0.25)
    text = capsys.readouterr().err
    assert text.startswith("MF: 50 of at most 100 iterations") and "loss 0.25" in text
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 60.0)
    with progress.Progress(total=100) as shown:
        shown.update(50, loss=0.25)
    assert capsys.readouterr().err == ""
