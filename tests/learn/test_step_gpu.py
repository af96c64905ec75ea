"""Captured steps on a GPU against eager ones there."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import htfkernels as hk
from htflearn import GroupRMSprop, TrainConfig, Trainer, completion, make_target, sensing
from htflearn.step import CudaGraph
from htflearn.trackers import LocalComponentNorms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 40

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "grouprmsprop": lambda p: GroupRMSprop(p, lr=0.02, weight_decay=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True),
}


class Counted(CudaGraph):
    """Counts, for all of a test."""

    captures = 0
    replays = 0

    def capture(self, step: Callable[[], None]) -> None:
        Counted.captures += 1
        super().capture(step)

    def replay(self) -> None:
        Counted.replays += 1
        super().replay()


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    Counted.captures = Counted.replays = 0
    monkeypatch.setattr(Trainer, "_graph", Counted)
    return Counted


def problem(kind: str = "completion") -> tuple[hk.HTF, Any]:
    generator = torch.Generator().manual_seed(0)
    double = torch.float64
    target = make_target("ht", (4,) * 4, 2, 8.0, None, generator, double)
    model = hk.HTF(hk.ModeTree.balanced(4), 4, 6, init_std=0.3, dtype=double)
    model.reset_parameters(generator)
    if kind == "completion":
        task: Any = completion(target, 150, 0.0, generator)
    else:
        task = sensing(target, 60, kind, 0.0, generator)  # type: ignore[arg-type]
    return model, task


def trainer(
    graph: bool | None,
    device: str = "cuda",
    kind: str = "completion",
    optimizer: str = "grouprmsprop",
    **options: Any,
) -> Trainer:
    model, task = problem(kind)
    settings = {"iterations": STEPS, "log_every": 10, **options.pop("config", {})}
    config = TrainConfig(cuda_graph=graph, **settings)
    model = model.to(device)
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    return Trainer(model, task.to(device), made, config, progress=False, **options)


def weights(made: Trainer) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in made.model.parameters()]


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    """Sums by atomic additions differ in their last bits from run to run; in float64 that is far
    from what a step more or less, or a stale number, would do."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["completion", "rank_one", "gaussian"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_numbers_are_those_of_eager_steps(
    kind: str, optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    found, results = [], []
    with caplog.at_level(logging.WARNING, "htflearn"):
        for graph in (False, None, True):
            made = trainer(graph, kind=kind, optimizer=optimizer, trackers=[LocalComponentNorms()])
            results.append(made.fit())
            found.append(weights(made))
    assert not caplog.records
    assert (Counted.captures, Counted.replays) == (2, 2 * (STEPS - 3))
    for result, other in zip(results[1:], found[1:], strict=True):
        assert_close(found[0], other)
        assert result.iterations == STEPS
        for line, eager in zip(result.history, results[0].history, strict=True):
            assert line["iteration"] == eager["iteration"]
            assert line["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-7)


def slowed(graph: bool, lr: Any, slow: Callable[[dict[str, Any]], None]) -> list[Tensor]:
    """Weights after a run in which the step size changes at the third line of metrics."""
    lines = iter(range(100))

    def watch(model: Any) -> float:
        if next(lines) == 2:
            slow(group)
        return 0.0

    made = trainer(graph, watch=watch)
    group = made.optimizer.param_groups[0]
    group["lr"] = lr
    made.fit()
    return weights(made)


def test_a_new_step_size_is_captured_anew() -> None:
    def slow(group: dict[str, Any]) -> None:
        group["lr"] *= 0.25

    assert_close(slowed(False, 0.02, slow), slowed(True, 0.02, slow))
    assert Counted.captures == 2


def test_a_step_size_on_the_device_is_read_by_the_graph() -> None:
    def slow(group: dict[str, Any]) -> None:
        group["lr"].mul_(0.25)

    def lr() -> Tensor:
        return torch.tensor(0.02, dtype=torch.float64, device="cuda")

    assert_close(slowed(False, lr(), slow), slowed(True, lr(), slow))
    assert Counted.captures == 1


@pytest.mark.parametrize("optimizer", ["grouprmsprop", "adam"])
def test_resuming_on_another_device(optimizer: str, tmp_path: Path) -> None:
    straight = trainer(False, "cuda", optimizer=optimizer, config={"iterations": 60})
    straight.fit()
    for iterations, device in ((20, "cuda"), (40, "cpu"), (60, "cuda")):
        part = trainer(
            None, device, optimizer="grouprmsprop", config={"iterations": iterations}, out=tmp_path
        )
        if optimizer == "adam":
            capturable = device == "cuda"
            part.optimizer = torch.optim.Adam(
                part.model.parameters(), lr=0.01, capturable=capturable
            )
        assert part.fit(resume=True).iterations == iterations
    assert_close(weights(straight), weights(part))
    assert Counted.captures == 2


def test_a_step_that_waits_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    def relative(model: Any, rows: Tensor | None = None) -> Tensor:
        loss = task.loss(model, rows)
        return loss / loss.item()

    found = []
    for graph in (False, None):
        made = trainer(graph)
        task = problem()[1].to("cuda")
        made.task.loss = relative  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING, "htflearn"):
            assert made.fit().iterations == STEPS
        found.append(weights(made))
    assert_close(*found)
    assert len(caplog.records) == 1
    assert "it waits for the device in" in caplog.text and Path(__file__).name in caplog.text
    assert Counted.captures == 0

    forced = trainer(True)
    forced.task.loss = relative  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"cuda_graph=True was asked for.*waits for the device"):
        forced.fit()


def test_an_error_in_a_capture_leaves_everything_as_it_was(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Raised by Python, half way through."""

    def refuses(model: Any, rows: Tensor | None = None) -> Tensor:
        loss = task.loss(model, rows)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not today")
        return loss

    task = problem()[1].to("cuda")
    eager, made = trainer(False), trainer(None, out=tmp_path)
    made.task.loss = refuses  # type: ignore[method-assign]
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, "htflearn"):
        eager.fit()
        made.fit()
    assert torch.cuda.current_stream() == stream
    assert_close(weights(eager), weights(made))
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == ["not today"]


BROKEN = """
import logging, sys
import torch
sys.path.insert(0, {folder!r})
from test_step_gpu import assert_close, problem, trainer, weights

def waits_late(model, rows=None):
    loss = task.loss(model, rows)
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream().synchronize()
    return loss

task = problem()[1].to("cuda")
eager, made = trainer(False), trainer(None)
made.task.loss = waits_late
eager.fit()
made.fit()
assert_close(weights(eager), weights(made))
torch.cuda.synchronize()
assert torch.ones(1 << 20, device="cuda").sum().item() == 1 << 20
"""


def test_a_capture_that_cuda_breaks_off() -> None:
    """In a process of its own, which it may leave in disorder."""
    code = BROKEN.format(folder=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "a step cannot be captured as a CUDA graph" in run.stderr


def test_a_graph_on_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    eager, made = trainer(False, "cuda:1"), trainer(True, "cuda:1")
    eager.fit()
    made.fit()
    assert_close(weights(eager), weights(made))
