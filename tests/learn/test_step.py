"""Captured steps: the numbers of eager ones, when they are captured anew, and when not at all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_graph import SimulatedGraph
from torch import Tensor

import htfkernels as hk
from htflearn import (
    GroupRMSprop,
    RankRegularizer,
    TrainConfig,
    Trainer,
    completion,
    make_target,
    matrix_factorization,
    sensing,
)
from htflearn.step import WARM_UP, GraphStep, waits
from htflearn.trackers import LocalComponentNorms

STEPS = 20
WARMED = ["run"] * (WARM_UP - 1) + ["watched"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedGraph]:
    """The graphs that trainers make."""
    made: list[SimulatedGraph] = []
    monkeypatch.setattr(SimulatedGraph, "made", made, raising=False)
    monkeypatch.setattr(Trainer, "_graph", SimulatedGraph)
    return made


def model_and_task(kind: str = "htf") -> tuple[hk.HTF, Any]:
    generator = torch.Generator().manual_seed(0)
    if kind == "mf":
        target = make_target("matrix", (6, 6), 2, 6.0, None, generator)
        model = matrix_factorization(6, 6, init_std=0.3)
        task: Any = completion(target, 25, 0.0, generator)
    else:
        target = make_target("ht", (4,) * 4, 2, 8.0, None, generator)
        model = hk.HTF(hk.ModeTree.balanced(4), 4, 6, init_std=0.3)
        loss = kind if kind in ("l1", "huber") else "l2"
        if kind in ("rank_one", "gaussian"):
            task = sensing(target, 60, kind, 0.0, generator)  # type: ignore[arg-type]
        else:
            task = completion(target, 150, 0.0, generator, loss)
    model.reset_parameters(generator)
    return model, task


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "grouprmsprop": lambda p: GroupRMSprop(p, lr=0.02, weight_decay=1e-3, capturable=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.001),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, weight_decay=1e-3),
}


def trainer(
    graph: bool | None, kind: str = "htf", optimizer: str = "grouprmsprop", **options: Any
) -> Trainer:
    model, task = model_and_task(kind)
    settings = {"iterations": STEPS, "log_every": 3, **options.pop("config", {})}
    config = TrainConfig(cuda_graph=graph, **settings)
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    return Trainer(model, task, made, config, progress=False, **options)


def numbers(made: Trainer) -> list[Tensor]:
    """Weights, their last gradients, and the optimizer's state."""
    state = made.optimizer.state_dict()["state"]
    kept = [t for entry in state.values() for t in entry.values() if isinstance(t, Tensor)]
    params = list(made.model.parameters())
    return [t.detach().clone() for t in [*params, *(p.grad for p in params), *kept]]  # type: ignore[union-attr]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["htf", "mf", "l1", "huber", "rank_one", "gaussian"])
def test_the_numbers_are_those_of_eager_steps(
    kind: str, optimizer: str, graphs: list[SimulatedGraph], cpu_target: Any
) -> None:
    cpu_target.require("evaluate_at", torch.float32)
    if cpu_target.backend == "triton":
        pytest.skip("the interpreter takes minutes")
    results, found = [], []
    for graph in (False, None):
        made = trainer(graph, kind, optimizer, trackers=[LocalComponentNorms()])
        results.append(made.fit())
        found.append(numbers(made))
    assert equal(*found)
    assert results[0].history == results[1].history
    assert results[1].iterations == STEPS
    assert [g.events for g in graphs] == [[*WARMED, "capture", *["replay"] * (STEPS - WARM_UP)]]


def test_a_count_on_the_host_would_show(graphs: list[SimulatedGraph]) -> None:
    """Of the simulation: what an optimizer keeps in Python, a replay does not advance."""
    found = []
    for captured in (False, True):
        made = trainer(False)
        for group in made.optimizer.param_groups:
            group["capturable"] = False
        eager = made._eager_step()
        step: Any = partial(eager, None)
        if captured:
            step = GraphStep(step, made.optimizer, SimulatedGraph(torch.device("cpu")))
        with hk.use_backend("reference"):
            for _ in range(STEPS):
                step()
        found.append([p.detach().clone() for p in made.model.parameters()])
    assert not equal(*found)


def test_fewer_steps_than_it_takes_to_warm_up(graphs: list[SimulatedGraph]) -> None:
    made = trainer(None, config={"iterations": 2})
    assert made.fit().iterations == 2
    assert graphs[0].events == ["run"] * 2


def test_a_group_without_parameters(graphs: list[SimulatedGraph]) -> None:
    made = trainer(None, optimizer="sgd")
    made.optimizer.param_groups.insert(0, {**made.optimizer.param_groups[0], "params": []})
    made.fit()
    assert graphs[0].events.count("replay") == STEPS - WARM_UP


def changing(graph: bool | None, change: Callable[[Trainer, int], None], **options: Any) -> Trainer:
    """A trainer in whose run something is changed at each logged iteration."""
    lines = iter(range(1000))

    def watch(model: Any) -> float:
        change(made, next(lines))
        return 0.0

    made = trainer(graph, watch=watch, **options)
    return made


def new_lr(made: Trainer, line: int) -> None:
    if line == 2:
        made.optimizer.param_groups[0]["lr"] *= 0.5


def momentum(made: Trainer, line: int) -> None:
    """Its buffers are made at the first step that uses them."""
    if line == 2:
        made.optimizer.param_groups[0]["momentum"] = 0.9


def moved(made: Trainer, line: int) -> None:
    if line == 2:
        for p in made.model.parameters():
            p.data = p.data.clone()


def frozen(made: Trainer, line: int) -> None:
    if line == 2:
        next(iter(made.model.parameters())).requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "optimizer"),
    [(new_lr, "grouprmsprop"), (new_lr, "momentum"), (momentum, "sgd"), (moved, "grouprmsprop")],
)
def test_a_change_is_captured_anew(
    change: Any, optimizer: str, graphs: list[SimulatedGraph]
) -> None:
    found = []
    for graph in (False, None):
        made = changing(graph, change, optimizer=optimizer, config={"log_every": 5})
        made.fit()
        found.append(numbers(made))
    assert equal(*found)
    first, second = 10 - WARM_UP, STEPS - 11
    assert graphs[0].events == [
        *[*WARMED, "capture", *["replay"] * first],
        *["watched", "capture", *["replay"] * second],
    ]


def test_a_parameter_that_is_frozen(graphs: list[SimulatedGraph]) -> None:
    found = []
    for graph in (False, None):
        made = changing(graph, frozen, config={"log_every": 5})
        made.fit()
        found.append([p.detach().clone() for p in made.model.parameters()])
    assert equal(*found)
    assert graphs[0].events.count("capture") == 2


def test_a_number_that_changes_at_every_step_costs_no_capture(
    graphs: list[SimulatedGraph],
) -> None:
    def decay(made: Trainer, line: int) -> None:
        made.optimizer.param_groups[0]["lr"] *= 0.9

    found = []
    for graph in (False, None):
        made = changing(graph, decay, config={"log_every": 1})
        made.fit()
        found.append(numbers(made))
    assert equal(*found)
    assert set(graphs[0].events) == {"run", "watched"}


def test_a_step_size_on_the_cpu_counts_as_a_number(graphs: list[SimulatedGraph]) -> None:
    def halve(made: Trainer, line: int) -> None:
        if line == 2:
            made.optimizer.param_groups[0]["lr"].mul_(0.5)

    made = changing(None, halve, config={"log_every": 5})
    made.optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
    made.fit()
    assert graphs[0].events.count("capture") == 2


def test_resuming(graphs: list[SimulatedGraph], tmp_path: Path) -> None:
    straight = trainer(False, config={"iterations": 40})
    whole = straight.fit()
    for iterations in (9, 25, 40):
        part = trainer(None, config={"iterations": iterations, "log_every": 3}, out=tmp_path)
        part.fit(resume=True)
    assert equal(numbers(straight), numbers(part))
    assert whole.history[-1] == part.fit(resume=True).history[-1]
    assert [g.events.count("replay") for g in graphs[:3]] == [6, 13, 12]


class _Fails(SimulatedGraph):
    def capture(self, step: Callable[[], None]) -> None:
        super().capture(step)
        raise RuntimeError("operation not permitted\nCompile with advice.")


class _Waits(SimulatedGraph):
    def run(self, step: Callable[[], None], watch: bool = False) -> str | None:
        super().run(step, watch)
        return "it waits for the device" if watch else None


@pytest.mark.parametrize(
    ("graph", "reason"), [(_Fails, "operation not permitted"), (_Waits, "it waits for the device")]
)
def test_what_cannot_be_captured_goes_on_with_a_warning(
    graph: Any,
    reason: str,
    graphs: list[SimulatedGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Trainer, "_graph", graph)
    eager, made = trainer(False), trainer(None)
    with caplog.at_level(logging.WARNING, "htflearn"):
        assert eager.fit().history == made.fit().history
    assert equal(numbers(eager), numbers(made))
    assert [r.getMessage() for r in caplog.records] == [
        f"a step cannot be captured as a CUDA graph, and is taken eagerly: {reason}"
    ]
    assert "replay" not in graphs[0].events

    with pytest.raises(RuntimeError, match=f"cuda_graph=True was asked for, but.*{reason}$"):
        trainer(True).fit()


def test_a_loss_that_reads_a_number_cannot_be_captured(
    graphs: list[SimulatedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    _, task = model_and_task()

    def relative(model: Any, rows: Tensor | None = None) -> Tensor:
        loss = task.loss(model, rows)
        return loss / loss.item()

    found = []
    for graph in (False, None):
        made = trainer(graph)
        made.task.loss = relative  # type: ignore[method-assign]
        made.fit()
        found.append(numbers(made))
    assert equal(*found)
    assert "_local_scalar_dense waits for the device" in caplog.text


def test_a_watched_step_tells_where_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch warns of it; other warnings go their way."""
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found: list[str] = []
    with pytest.warns(UserWarning) as seen:
        with waits(found, watch=True):
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
    assert [str(w.message) for w in seen] == ["something else"]
    assert len(found) == 1
    assert found[0].startswith(f"it waits for the device in {__file__}, line ")
    assert modes == ["warn", 0]

    with pytest.warns(UserWarning, match="synchronizing"), waits(found, watch=False):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert len(found) == 1 and len(modes) == 2


def test_autograd_knows_of_a_replay() -> None:
    class Nothing(SimulatedGraph):
        made: list[SimulatedGraph] = []  # noqa: RUF012

        def replay(self) -> None:
            pass

    made = trainer(False)
    eager = made._eager_step()
    step = GraphStep(partial(eager, None), made.optimizer, Nothing(torch.device("cpu")))
    for _ in range(WARM_UP + 1):
        step()
    loss = made.task.loss(made.model)
    step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def hooked(made: Trainer) -> None:
    made.optimizer.register_step_post_hook(lambda *_: None)


def adam(made: Trainer) -> None:
    made.optimizer = torch.optim.Adam(made.model.parameters())


def plain(made: Trainer) -> None:
    made.optimizer = GroupRMSprop(made.model.parameters())


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (None, {"batch_size": 10}, r"every step is on other rows \(batch_size 10\)"),
        (hooked, {}, "GroupRMSprop has step hooks"),
        (adam, {}, "Adam is not made with capturable=True"),
        (plain, {}, "GroupRMSprop is not made with capturable=True"),
    ],
)
def test_what_is_never_captured(
    change: Any, config: dict[str, Any], reason: str, graphs: list[SimulatedGraph]
) -> None:
    for graph in (None, True):
        made = trainer(graph, config=config)
        if change is not None:
            change(made)
        if graph:
            with pytest.raises(RuntimeError, match=reason):
                made.fit()
        else:
            assert made.fit().iterations == STEPS
    assert not graphs


def own_loss(made: Trainer) -> None:
    made.task.loss_function = lambda a, b: (a - b).square().mean()  # type: ignore[attr-defined]


def regularized(made: Trainer) -> None:
    made.regularizer = lambda model: 1e-3 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("change", [own_loss, regularized])
def test_what_is_captured_only_when_asked(change: Any, graphs: list[SimulatedGraph]) -> None:
    """What someone else wrote may count, or draw, or wait."""
    found = []
    for graph in (None, True):
        made = trainer(graph)
        change(made)
        made.fit()
        found.append(numbers(made))
    assert len(graphs) == 1 and "replay" in graphs[0].events
    assert equal(*found)


def test_a_regularizer_of_ranks_is_not_captured(graphs: list[SimulatedGraph]) -> None:
    trainer(None, regularizer=RankRegularizer("renyi2", "lower", 0.1)).fit()
    assert not graphs


def test_never(graphs: list[SimulatedGraph]) -> None:
    assert trainer(False).fit().iterations == STEPS
    assert not graphs


def test_no_graphs_on_a_cpu(tmp_path: Path) -> None:
    """And who asks for one loses no earlier run."""
    trainer(None, out=tmp_path).fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(RuntimeError, match="the parameters are on cpu, and graphs are for CUDA"):
        trainer(True, out=tmp_path).fit()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
