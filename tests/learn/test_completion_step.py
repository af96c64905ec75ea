"""Fused steps of a completion: the numbers of ordinary ones, in the trainer, captured and resumed;
when steps are not fused."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_graph import SimulatedGraph
from torch import Tensor

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import cuda_module as module
from htfkernels.schedule.index_plan import BILINEAR, FRAMED_ROOT, WALK
from htflearn import (
    CompletionStep,
    CompletionTask,
    GroupRMSprop,
    TrainConfig,
    Trainer,
    completion,
    make_target,
)
from htflearn.losses import LOSSES
from htflearn.step import WARM_UP
from htflearn.trackers import LocalComponentNorms

ON = module.device_type()
REASON = module.why_not(ON)
pytestmark: Any = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

DATA = Path(__file__).parent.parent / "data"
F64 = torch.float64


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    with hk.use_backend("cuda"):
        yield


class Problem:
    """A model and entries to fit; the same again for the same arguments."""

    def __init__(
        self, layout: hk.Layout, batch: int, dtype: torch.dtype = F64, spread: int = 2**30
    ) -> None:
        torch.manual_seed(0)
        ranks = dict(zip(layout.tree.interior, layout.ranks, strict=True))
        self.model = hk.HTF(
            layout.tree, layout.mode_dims, ranks, layout.out_features, layout.root,
            layout.share_weights, dtype=F64,
        )  # fmt: skip
        drawn = [torch.randint(min(d, spread), (batch,)) for d in layout.mode_dims]
        self.indices = torch.stack(drawn, 1).to(ON)
        values = torch.randn(batch, dtype=F64)
        self.values = values.to(ON, dtype)
        self.model = self.model.to(ON, dtype)

    def optimizer(self, **options: Any) -> GroupRMSprop:
        settings = {"lr": 0.02, "capturable": True, **options}
        return GroupRMSprop(self.model.parameters(), **settings)

    def step(self, loss: str = "l2", **options: Any) -> CompletionStep:
        return CompletionStep(
            self.model, self.indices, self.values, self.optimizer(**options), loss
        )

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def ordinary(problem: Problem, steps: int, loss: str = "l2", **options: Any) -> list[float]:
    """Steps by autograd and the formula of the optimizer."""
    with hk.use_backend("reference"):
        step = problem.step(loss, **options)
        assert step.why_not is not None
        return [float(step()) for _ in range(steps)]


def balanced(order: int, dim: int, rank: int, **options: Any) -> hk.Layout:
    return hk.Layout.make(hk.ModeTree.balanced(order), dim, rank, **options)


# Order 3 to 8; the number of samples decides what is framed.
CASES: dict[str, tuple[hk.Layout, int, int]] = {
    "order 3": (hk.Layout.make(hk.ModeTree.from_nested(((0, 1), 2)), [3, 4, 2], 5), 20, 9),
    "order 4": (balanced(4, 3, 7), 50, 9),
    "paper": (balanced(4, 4, 40), 128, 9),
    "order 5": (hk.Layout.make(testing.random_tree(5, 2), [2, 3, 2, 3, 2], 3), 40, 9),
    "order 6": (balanced(6, 3, 6), 30, 9),
    "order 7": (hk.Layout.make(hk.ModeTree.balanced(7, 3), 2, 4), 60, 9),
    "order 8": (balanced(8, 4, 5), 70, 9),
    "framed": (balanced(4, 3, 6), 64, 2),
    "sum root": (balanced(4, 3, 6, root="sum"), 50, 9),
    "CP": (hk.Layout.make(hk.ModeTree.flat(3), 4, 12, root="sum"), 40, 9),
    "chain": (hk.Layout.make(hk.ModeTree.chain(4), [6, 7], 5, root="sum"), 25, 9),
    "shared": (balanced(8, 3, 4, share_weights=True), 50, 9),
    "one sample": (balanced(4, 3, 5), 1, 9),
}


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_ordinary_steps(name: str) -> None:
    layout, batch, spread = CASES[name]
    fused, plain = (Problem(layout, batch, spread=spread) for _ in range(2))
    step = fused.step()
    assert step.why_not is None
    losses = [float(step()) for _ in range(60)]
    np.testing.assert_allclose(losses, ordinary(plain, 60), rtol=1e-9)
    for a, b in zip(fused.weights(), plain.weights(), strict=True):
        assert float((a - b).norm()) <= 1e-10 * float(b.norm())
    assert all(p.grad is None for p in fused.model.parameters())


def test_every_form_is_tested() -> None:
    problems = [Problem(layout, batch, spread=s) for layout, batch, s in CASES.values()]
    forms = {p.model.index_plan(p.indices).form for p in problems}
    assert forms == {WALK, BILINEAR, FRAMED_ROOT}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_losses_and_weight_decay(loss: str, decay: float) -> None:
    layout, batch, _ = CASES["order 4"]
    fused, plain = Problem(layout, batch), Problem(layout, batch)
    step = fused.step(loss, weight_decay=decay)
    losses = [float(step()) for _ in range(10)]
    expected = ordinary(plain, 10, loss, weight_decay=decay)
    np.testing.assert_allclose(losses, expected, rtol=1e-11)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_single_precision(precision: str) -> None:
    """A step's rounding, relative to how far the step goes."""
    layout, batch, _ = CASES["paper"]
    fused, plain = Problem(layout, batch, torch.float32), Problem(layout, batch)
    with torch.no_grad():
        for p, q in zip(plain.model.parameters(), fused.model.parameters(), strict=True):
            p.copy_(q)
    before = plain.weights()
    with hk.use_precision(precision):
        loss = float(fused.step()())
    (expected,) = ordinary(plain, 1)
    allowed = 2e-3 if precision == "tf32" else 1e-5
    assert loss == pytest.approx(expected, rel=allowed)
    rounding = torch.finfo(torch.float32).eps
    for a, b, start in zip(fused.weights(), plain.weights(), before, strict=True):
        bound = allowed * float((b - start).norm()) + rounding * float(b.norm())
        assert float((a.double() - b).norm()) <= bound


def test_trajectory_of_the_papers_code() -> None:
    data = np.load(DATA / "trajectory_grouprmsprop.npz")
    meta = json.loads(str(data["meta"]))
    tree = hk.ModeTree.from_levels(meta["levels"])

    def weights(prefix: str) -> dict[hk.Node, Tensor]:
        keys = {n: f"{prefix}/{n.level}/{'-'.join(map(str, sorted(n.modes)))}" for n in tree.nodes}
        return {n: torch.from_numpy(data[key]) for n, key in keys.items()}

    model = hk.HTF(tree, meta["mode_dims"], meta["widths"], dtype=F64)
    with torch.no_grad():
        for node, weight in weights("w0").items():
            model.node_weight(node).copy_(weight)
    model = model.to(ON)
    optimizer = GroupRMSprop(model.parameters(), lr=meta["lr"], capturable=True)
    step = CompletionStep(
        model,
        torch.from_numpy(data["indices"]).to(ON),
        torch.from_numpy(data["targets"]).to(ON),
        optimizer,
    )
    assert step.why_not is None
    losses = [float(step()) for _ in range(meta["steps"])]
    np.testing.assert_allclose(losses, data["loss"], rtol=1e-12)
    for node, weight in weights("wT").items():
        error = (model.node_weight(node).cpu() - weight).norm() / weight.norm()
        assert error.item() < 1e-12, node


@pytest.mark.parametrize("name", ["paper", "order 8", "framed", "order 7"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_the_order_of_threads_changes_nothing(name: str, dtype: torch.dtype) -> None:
    def run(decay: float) -> list[Tensor]:
        layout, batch, spread = CASES[name]
        problem = Problem(layout, batch, dtype, spread)
        step = problem.step(weight_decay=decay)
        return [*(step() for _ in range(3)), *problem.weights()]

    for decay in (0.0, 0.1):
        first = run(decay)
        if module.emulated():
            from htfkernels import _C_emulated

            _C_emulated.set_backward(True)
        try:
            second = run(decay)
        finally:
            if module.emulated():
                _C_emulated.set_backward(False)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def launches(run: Callable[[], Any]) -> int:
    counted = import_module("htfkernels._C_emulated" if module.emulated() else "htfkernels._C_cuda")
    before = counted.launches()
    run()
    return int(counted.launches() - before)


def test_the_number_of_launches() -> None:
    """In the paper's setting: 2 forward, the loss, 3 backward, the optimizer; a weight decay takes
    one more."""
    layout = balanced(4, 8, 512)
    problem = Problem(layout, 2048, torch.float32)
    flat = torch.randperm(8**4)[:2048]
    problem.indices = torch.stack(torch.unravel_index(flat, (8,) * 4), 1).to(ON)
    assert launches(problem.step()) <= 7
    assert launches(problem.step(weight_decay=0.1)) <= 8
    assert launches(Problem(*CASES["order 8"][:2]).step()) <= 12


def test_losses_are_tensors_of_their_own() -> None:
    step = Problem(*CASES["order 4"][:2]).step()
    losses = [step() for _ in range(3)]
    assert all(x.shape == () and not x.requires_grad for x in losses)
    assert len({float(x) for x in losses}) == 3


def test_settings_are_read_at_each_step() -> None:
    layout, batch, _ = CASES["order 4"]
    fused, plain = Problem(layout, batch), Problem(layout, batch)
    found = []
    for problem, backend in ((fused, "cuda"), (plain, "reference")):
        leaves, *others = problem.model.weights
        size = torch.tensor(0.05, device=ON)
        optimizer = GroupRMSprop(
            [{"params": [leaves], "lr": size}, {"params": others, "weight_decay": 0.1}],
            lr=0.02, alpha=0.9, capturable=True,
        )  # fmt: skip
        with hk.use_backend(backend):
            step = CompletionStep(problem.model, problem.indices, problem.values, optimizer)
            assert (step.why_not is None) == (backend == "cuda")
            for number in range(6):
                if number == 2:
                    size.mul_(0.5)
                    optimizer.param_groups[1]["lr"] = 0.01
                if number == 4:
                    others[0].requires_grad_(False)
                step()
        found.append((problem.weights(), optimizer.state_dict()["state"]["shared"]))
    (ours, state), (theirs, expected) = found
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-12 * float(b.norm())
    assert state.keys() == expected.keys()
    assert float(state["step"]) == float(expected["step"]) == 6
    assert float(state["average"]) == pytest.approx(float(expected["average"]), rel=1e-12)
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in expected.items()}


def test_autograd_sees_that_the_weights_have_moved() -> None:
    problem = Problem(*CASES["order 4"][:2])
    step = problem.step()
    with hk.use_backend("reference"):
        loss = problem.model.at(problem.indices).square().sum()
    step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_and_schedulers_see_steps() -> None:
    problem = Problem(*CASES["order 4"][:2])
    optimizer, seen = problem.optimizer(), []

    def hook(*_: Any) -> None:
        seen.append(optimizer.param_groups[0]["lr"])

    hook.reads_gradients = False  # type: ignore[attr-defined]
    optimizer.register_step_post_hook(hook)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = CompletionStep(problem.model, problem.indices, problem.values, optimizer)
    assert step.why_not is None
    for _ in range(3):
        step()
        schedule.step()
    assert seen == [0.02, 0.01, 0.005]


# -- in the trainer -------------------------------------------------------------------------------


def trainer(backend: str = "cuda", iterations: int = 12, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    model = hk.HTF(hk.ModeTree.balanced(4), 3, 4, init_std=0.3, dtype=F64)
    model.reset_parameters(generator)
    with hk.use_backend("reference"):
        target = make_target("ht", (3,) * 4, 2, 8.0, None, generator, F64)
    task = completion(target, 40, 0.0, generator).to(ON)
    model, evaluate = model.to(ON), task.evaluate

    def by_reference(model: Any) -> dict[str, float]:
        with hk.use_backend("reference"):
            return evaluate(model)

    task.evaluate = by_reference  # type: ignore[method-assign]
    settings = {"lr": 0.02, "capturable": True, **options.pop("optimizer", {})}
    optimizer = GroupRMSprop(model.parameters(), **settings)
    graph = options.pop("cuda_graph", False)
    config = TrainConfig(iterations=iterations, log_every=4, cuda_graph=graph)
    return Trainer(
        model, task, optimizer, config, trackers=[LocalComponentNorms()], progress=False, **options
    )


def numbers(made: Trainer) -> list[Tensor]:
    shared = made.optimizer.state_dict()["state"]["shared"]
    kept = [shared["average"], shared["step"]]
    return [t.detach().clone() for t in [*made.model.parameters(), *kept]]


def test_the_trainer_takes_fused_steps(caplog: pytest.LogCaptureFixture) -> None:
    made, plain = trainer(), trainer()
    with caplog.at_level(logging.INFO, "htflearn"):
        result = made.fit()
    assert "steps are fused" in caplog.text
    with hk.use_backend("reference"):
        expected = plain.fit()
    for line, other in zip(result.history, expected.history, strict=True):
        assert line["iteration"] == other["iteration"]
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-10)
    for a, b in zip(numbers(made), numbers(plain), strict=True):
        assert float((a - b).norm()) <= 1e-11 * float(b.norm())


def test_resuming(tmp_path: Path) -> None:
    """To the very bits, and from ordinary steps to fused ones and back."""
    straight = trainer()
    straight.fit()
    for iterations in (4, 12):
        part = trainer(iterations=iterations, out=tmp_path / "fused")
        part.fit(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(numbers(straight), numbers(part), strict=True))
    for iterations, backend, capturable in (
        (4, "cuda", True), (7, "reference", False), (9, "cuda", True), (12, "reference", True),
    ):  # fmt: skip
        part = trainer(
            iterations=iterations, out=tmp_path / "mixed", optimizer={"capturable": capturable}
        )
        with hk.use_backend(backend):
            part.fit(resume=True)
    for a, b in zip(numbers(part), numbers(straight), strict=True):
        assert float((a - b).norm()) <= 1e-11 * float(b.norm())


def test_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of steps that are not; on a GPU the graph is a real one."""
    made: list[SimulatedGraph] = []
    if module.emulated():
        monkeypatch.setattr(SimulatedGraph, "made", made, raising=False)
        monkeypatch.setattr(Trainer, "_graph", SimulatedGraph)
    eager, captured = trainer(), trainer(cuda_graph=True)
    results = [eager.fit(), captured.fit()]
    assert all(torch.equal(a, b) for a, b in zip(numbers(eager), numbers(captured), strict=True))
    assert results[0].history == results[1].history
    for graph in made:
        assert graph.events.count("replay") == 12 - WARM_UP


# -- when not -------------------------------------------------------------------------------------


class OtherLoss(CompletionTask):
    def loss(self, model: Any, rows: Tensor | None = None) -> Tensor:
        return 2 * super().loss(model, rows)


def spoilt(kind: str) -> Trainer:
    made = trainer(iterations=1)
    task, model = made.task, made.model
    if kind == "regularizer":
        made.regularizer = lambda model: model.weights[0].square().sum()
    if kind == "task":
        made.task = OtherLoss(task.indices, task.values, task.dims)  # type: ignore[attr-defined]
    if kind == "replaced":
        task.loss = lambda model, rows=None: CompletionTask.loss(task, model, rows)  # type: ignore
    if kind == "function":
        task.loss_function = lambda p, y: (p - y).square().mean()  # type: ignore[attr-defined]
    if kind == "batches":
        made.config = TrainConfig(iterations=1, batch_size=10)
    if kind == "optimizer":
        made.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if kind == "host":
        made.optimizer = GroupRMSprop(model.parameters(), capturable=False)
    if kind == "hook":
        made.optimizer.register_step_pre_hook(lambda *_: None)
    if kind == "weight hook":
        model.weights[0].register_hook(lambda g: g)  # type: ignore[index, union-attr]
    if kind == "some weights":
        some = list(model.parameters())[1:]
        made.optimizer = GroupRMSprop(some, capturable=True)
    if kind == "values":
        task.values = task.values.float()  # type: ignore[attr-defined]
    return made


NOT_FUSED = {
    "regularizer": "there is a regularizer",
    "task": "OtherLoss has a loss of its own",
    "replaced": "CompletionTask has a loss of its own",
    "function": "the loss is a function that only its user knows",
    "batches": r"every step is on other rows \(batch_size 10\)",
    "optimizer": "the optimizer is SGD, and the one that is fused is GroupRMSprop",
    "host": "GroupRMSprop is not made with capturable=True",
    "hook": "the optimizer has step hooks, which may look for gradients",
    "weight hook": "a weight has hooks, which may look at gradients",
    "some weights": "the optimizer does not have all of the model's weights",
    "values": "the values are torch.float32 on .*, the weights torch.float64 on",
}


@pytest.mark.parametrize("kind", NOT_FUSED)
def test_what_is_not_fused(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    made = spoilt(kind)
    with caplog.at_level(logging.INFO, "htflearn"):
        assert made._fused_step() is None
    told = [r.getMessage() for r in caplog.records if "not fused" in r.getMessage()]
    assert len(told) == 1
    assert re.search(NOT_FUSED[kind], told[0])


def test_other_backends_and_dtypes() -> None:
    problem = Problem(*CASES["order 4"][:2])
    with hk.use_backend("reference"):
        assert "'reference' was asked for" in str(problem.step().why_not)
    if module.emulated():
        with hk.use_backend("auto"):
            assert problem.step().why_not == "the weights are on the CPU"
    half = Problem(*CASES["order 4"][:2], torch.bfloat16)
    assert "cuda computes completion_step in float32, float64" in str(half.step().why_not)
    outputs = Problem(balanced(4, 3, 5, out_features=2), 20)
    assert outputs.step().why_not == "the model has 2 outputs"


def test_bad_values() -> None:
    problem = Problem(*CASES["order 4"][:2])
    with pytest.raises(ValueError, match=r"values must be \[50\], one for each index tuple"):
        CompletionStep(problem.model, problem.indices, problem.values[1:], problem.optimizer())
    other = Problem(*CASES["paper"][:2])
    plan = other.model.index_plan(other.indices)
    with pytest.raises(ValueError, match="the index plan is of another tree, other dimensions or"):
        CompletionStep(problem.model, plan, other.values, problem.optimizer())
    with pytest.raises(ValueError, match="loss: expected one of l2, l1, huber"):
        problem.step("l3")


# -- the benchmark --------------------------------------------------------------------------------


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "bench" / "train_step.py"
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_without_a_gpu() -> None:
    done = bench()
    assert done.returncode != 0
    assert done.stderr == "train_step: there is no CUDA device, and this measures one\n"


@pytest.mark.skipif(not module.emulated(), reason="kernels are emulated only when asked for")
def test_the_benchmark_runs(tmp_path: Path) -> None:
    done = bench("--dry", "--precision", "tf32x3", "--out", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["implementation"] for row in found["rows"]] == ["fused, launched"]
    assert found["provenance"]["command"].endswith("rows.json")
