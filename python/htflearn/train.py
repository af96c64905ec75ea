"""One training loop for every model and task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htflearn import completion_step
from htflearn.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    remove_leftovers,
    restored,
    save_checkpoint,
    taken_from,
)
from htflearn.errors import UserError, reason, writable_directory
from htflearn.metrics import MetricsFile, plain
from htflearn.progress import Progress
from htflearn.step import CudaGraph, Graph, make_step
from htflearn.tasks import Task
from htflearn.trackers import Tracker

__all__ = ["TrainConfig", "TrainResult", "Trainer"]


@dataclass(frozen=True)
class TrainConfig:
    """When to log, to save and to stop.

    A loss that is not finite always stops a run, at the next logged iteration.

    Attributes:
        iterations: at most that many steps.
        batch_size: samples a step, in a new order each epoch; None takes all of them each step.
        log_every: iterations between two lines of metrics. Early stopping looks at these alone.
        checkpoint_every: iterations between two checkpoints, or None.
        checkpoint_seconds: seconds between two checkpoints, or None.
        stop_train_loss: stops when the train loss is below it ...
        stop_patience: ... in that many logged iterations one after another.
        plateau_patience: stops when the watched metric (the train loss where nothing is watched)
            has not improved for that many logged iterations.
        plateau_tolerance: what improves by less than this fraction has not improved.
        max_seconds: stops after that many seconds, those before a resume included.
        seed: of the order of the samples.
        cuda_graph: whether steps are captured as a CUDA graph, which launches all kernels of a step
            at once; the iterations and their numbers are those of eager steps. None: where they
            can be (parameters on a GPU, no ``batch_size``, a capturable optimizer) and the task
            says that its loss is capturable. True: always; a run that cannot raises the reason.
            False: never.
    """

    iterations: int = 10_000
    batch_size: int | None = None
    log_every: int = 100
    checkpoint_every: int | None = None
    checkpoint_seconds: float | None = 10.0
    stop_train_loss: float | None = None
    stop_patience: int = 1
    plateau_patience: int | None = None
    plateau_tolerance: float = 1e-3
    max_seconds: float | None = None
    seed: int = 0
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        for name in ("iterations", "log_every", "stop_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be positive, got {getattr(self, name)}")
        for name in ("batch_size", "checkpoint_every", "plateau_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TrainConfig: {name} must be positive or None, got {value}")


@dataclass(frozen=True)
class TrainResult:
    """How a run went.

    Attributes:
        iterations: steps taken.
        reason: why it stopped: ``"iterations"``, ``"train loss"``, ``"plateau"``, ``"not finite"``
            or ``"time"``.
        seconds: time spent, logging and checkpoints included, over all processes of the run.
        history: one dictionary per logged iteration: ``iteration``, the task's metrics,
            ``watched``, and each tracker's measurement under its name. Numbers that are not finite
            are None.
        best: lowest watched value, or None.
        best_iteration: where it was, or None.
    """

    iterations: int
    reason: str
    seconds: float
    history: list[dict[str, Any]]
    best: float | None = None
    best_iteration: int | None = None


@dataclass
class _State:
    """Everything but weights, optimizer and random generators that a run continues from."""

    iteration: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    logged: int = -1
    under: int = 0
    plateau_best: float = math.inf
    plateau_age: int = 0
    best: float = math.inf
    best_iteration: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    batches: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class Trainer:
    """Trains a model on a task.

    On a GPU a full-batch step of a completion with :class:`htflearn.GroupRMSprop` is one operator
    where nothing else takes part in it (:class:`htflearn.CompletionStep`, which says when); it
    leaves no gradients in the parameters. The log, at level ``INFO``, tells whether it is.

    Args:
        model: any module the task can evaluate.
        task: see :class:`htflearn.tasks.Task`.
        optimizer: of the model's parameters.
        config: when to log, save and stop.
        trackers: measured at every logged iteration, see :mod:`htflearn.trackers`.
        out: directory of ``metrics.jsonl`` and ``checkpoints``; None keeps nothing.
        progress: shows a bar on a terminal, or a line now and then elsewhere.
        watch: ``model -> float``, measured at every logged iteration; the weights of its lowest
            value are kept.
        restore_best: gives the model these weights at the end.
        title: shown with the progress.
        regularizer: ``model -> scalar`` added to each step's loss, for example a
            :class:`htflearn.RankRegularizer`. The losses in the metrics are without it.

    Raises:
        UserError: ``out`` cannot be written.

    Example:
        >>> task = completion(make_target("matrix", (8, 8), 2, 8.0), num_samples=40)
        >>> model = matrix_factorization(8, 8, init_std=0.1)
        >>> config = TrainConfig(iterations=20, stop_train_loss=1e-3)
        >>> Trainer(model, task, GroupRMSprop(model.parameters()), config).fit().reason
        'iterations'
    """

    _graph: type[Graph] = CudaGraph

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        trackers: Sequence[Tracker] = (),
        out: str | Path | None = None,
        progress: bool = True,
        watch: Callable[[Any], float] | None = None,
        restore_best: bool = False,
        title: str = "training",
        regularizer: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.model, self.task, self.optimizer, self.config = model, task, optimizer, config
        self.trackers, self.watch, self.restore_best = list(trackers), watch, restore_best
        self.progress, self.title, self.regularizer = progress, title, regularizer
        self.out = None if out is None else writable_directory(out)
        names = [tracker.name for tracker in self.trackers]
        if len(set(names)) < len(names):
            raise ValueError(f"Trainer: two trackers have the same name: {sorted(names)}")

    def fit(self, resume: bool = False) -> TrainResult:
        """Trains until one of the config's conditions holds.

        Args:
            resume: goes on from the newest checkpoint in ``out``, with the same numbers as if the
                run had never been interrupted (on the same machine and number of threads); without
                a checkpoint it starts. A new run replaces what an earlier one left in ``out``.

        Raises:
            UserError: the checkpoint cannot be read, or is of another model or optimizer.
            RuntimeError: ``cuda_graph`` is True, and a step cannot be captured.
        """
        step = make_step(
            self._fused_step() or self._eager_step(),
            self.task,
            self.optimizer,
            self.regularizer,
            self.config.batch_size,
            self.config.cuda_graph,
            self._graph,
        )
        state, metrics = self._begin(resume)
        batches = _Batches(self.task.num_samples, self.config, _device(self.model))
        if state.batches:
            with taken_from(self.out or ""):
                batches.load_state_dict(state.batches)
        began = time.monotonic() - state.seconds
        with (
            metrics,
            Progress(
                self.config.iterations, state.iteration, self.title, self.progress
            ) as progress,
        ):
            self._loop(step, state, metrics, batches, progress, began)
            state.seconds = time.monotonic() - began
            self._save(state, metrics, batches)
            if self.restore_best and state.best_weights:
                self.model.load_state_dict(state.best_weights)
            found = state.best_iteration >= 0
            return TrainResult(
                state.iteration,
                state.reason,
                state.seconds,
                metrics.lines,
                state.best if found else None,
                state.best_iteration if found else None,
            )

    def _begin(self, resume: bool) -> tuple[_State, MetricsFile]:
        if self.out is None:
            return _State(), MetricsFile(None)
        path, checkpoints = self.out / "metrics.jsonl", self.out / "checkpoints"
        if not (resume and has_checkpoint(checkpoints)):
            # First of all, so that a kill from here on leaves the start of this run, unmixed.
            self._write(_State())
            return _State(), MetricsFile(path)
        saved = load_checkpoint(checkpoints, self.model, self.optimizer)
        state = restored(_State, saved, self.out)
        # Taken at the end of the run, and missed now.
        if state.best_weights and _shapes(state.best_weights) != _shapes(self.model.state_dict()):
            raise UserError(f"the best weights in {self.out} are those of another model")
        remove_leftovers(checkpoints)
        last = {"iteration": state.logged} if state.logged >= 0 else None
        return state, MetricsFile(path, state.metrics_bytes, last)

    def _fused_step(self) -> Callable[[Tensor | None], Any] | None:
        """All of a step in one operator, where there is one."""
        fused = completion_step.of_task(
            self.model, self.task, self.optimizer, self.regularizer, self.config.batch_size
        )
        return None if fused is None else lambda rows: fused()

    def _eager_step(self) -> Callable[[Tensor | None], None]:
        model, optimizer, loss_of = self.model, self.optimizer, self.task.loss
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def step(rows: Tensor | None) -> None:
            for p in parameters:
                p.grad = None
            loss = loss_of(model, rows)
            if self.regularizer is not None:
                loss = loss + self.regularizer(model)
            loss.backward()
            optimizer.step()

        return step

    def _loop(
        self,
        step: Callable[[Tensor | None], None],
        state: _State,
        metrics: MetricsFile,
        batches: _Batches,
        progress: Progress,
        began: float,
    ) -> None:
        config = self.config
        every, seconds_every = config.checkpoint_every or 0, config.checkpoint_seconds or math.inf
        end = began + (config.max_seconds or math.inf)
        saved_at = time.monotonic()
        self.model.train()
        # A run that stopped on one of its conditions, resumed under the same ones, stops again.
        state.reason = self._reason(state)
        while not state.reason:
            now = time.monotonic()
            late = now >= end
            last = late or state.iteration >= config.iterations
            if (last or state.iteration % config.log_every == 0) and state.logged < state.iteration:
                logged = self._log(state, metrics)
                progress.update(state.iteration, logged)
                state.reason = "" if math.isfinite(logged) else "not finite"
                state.reason = state.reason or self._reason(state)
            if not state.reason and last:
                state.reason = "time" if late else "iterations"
            if state.reason:
                return
            if self.out is not None and (
                now - saved_at >= seconds_every or (every and state.iteration % every == 0)
            ):
                state.seconds = now - began
                self._save(state, metrics, batches)
                saved_at = time.monotonic()
            step(batches.next())
            state.iteration += 1

    def _log(self, state: _State, metrics: MetricsFile) -> float:
        """Measures, writes a line, updates what early stopping counts; returns the train loss."""
        config, model = self.config, self.model
        model.eval()
        scores = self.task.evaluate(model)
        loss = scores["train_loss"]
        line: dict[str, Any] = {"iteration": state.iteration, **scores}
        finite = math.isfinite(loss)
        if finite and self.watch is not None:
            line["watched"] = float(self.watch(model))
        if finite:  # a decomposition of a matrix that is not finite raises
            line |= {t.name: t.measure(model, self.task) for t in self.trackers}
        model.train()
        metrics.append(plain(line))
        state.logged = state.iteration
        value = line.get("watched", loss)
        if self.watch is not None and value < state.best:
            state.best, state.best_iteration = value, state.iteration
            state.best_weights = {k: v.clone() for k, v in model.state_dict().items()}
        if value < state.plateau_best - config.plateau_tolerance * abs(state.plateau_best) or (
            state.plateau_best == math.inf and math.isfinite(value)
        ):
            state.plateau_best, state.plateau_age = value, 0
        else:
            state.plateau_age += 1
        below = config.stop_train_loss is not None and loss < config.stop_train_loss
        state.under = state.under + 1 if below else 0
        return loss

    def _reason(self, state: _State) -> str:
        config = self.config
        if config.stop_train_loss is not None and state.under >= config.stop_patience:
            return "train loss"
        if config.plateau_patience is not None and state.plateau_age >= config.plateau_patience:
            return "plateau"
        return ""

    def _save(self, state: _State, metrics: MetricsFile, batches: _Batches) -> None:
        if self.out is None:
            return
        # Weights that are not finite would take the place of some that are still of use.
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            return
        state.metrics_bytes = metrics.sync()
        state.batches = batches.state_dict()
        self._write(state)

    def _write(self, state: _State) -> None:
        assert self.out is not None
        try:
            save_checkpoint(self.out / "checkpoints", self.model, self.optimizer, vars(state))
        except OSError as error:
            raise UserError(
                f"a checkpoint cannot be written into {self.out}: {reason(error)}"
            ) from error


class _Batches:
    """Rows for each step: None for all samples, or slices of a new permutation each epoch."""

    def __init__(self, samples: int, config: TrainConfig, device: torch.device) -> None:
        self._samples, self._size = samples, config.batch_size
        self._device = device
        self._generator = torch.Generator().manual_seed(config.seed)
        self._epoch = self._generator.get_state()
        self._order: Tensor | None = None
        self._position = 0

    def next(self) -> Tensor | None:
        if self._size is None:
            return None
        if self._order is None or self._position >= self._samples:
            self._epoch = self._generator.get_state()
            self._order = torch.randperm(self._samples, generator=self._generator)
            self._order = self._order.to(self._device)
            self._position = 0
        rows = self._order[self._position : self._position + self._size]
        self._position += self._size
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        position = state["position"]
        self._generator.set_state(state["epoch"])
        if position and self._size is not None:
            self._order = None
            self.next()
        self._position = position


def _shapes(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in weights.items()}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
