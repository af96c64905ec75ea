"""Training of the models that ``htf complete`` compares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

import htfkernels as hk
from htflearn.complete.entries import Entries
from htflearn.complete.quantize import Split
from htflearn.errors import UserError
from htflearn.models import tensor_factorization
from htflearn.optim import GroupRMSprop
from htflearn.tasks import CompletionTask
from htflearn.train import TrainConfig, Trainer

__all__ = ["Fitted", "Problem", "Settings", "fit", "make_cp", "make_htf", "prepare"]

LARGEST_FULL = 2**24
_BATCH = 16_384
_OUTPUT_STD = 0.3
_BEND = 1e-3
_PENALTIES = (0.5, 2.0, 8.0, 0.0)  # in units of one training entry's squared error
_PROBE = 0.25


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        iterations: steps of the last run of a model.
        max_seconds: for all runs of a model together.
        lr: first step size; it falls to zero along half a cosine.
        optimizer: ``"adam"``, ``"rmsprop"`` (:class:`htflearn.GroupRMSprop`) or ``"sgd"``.
        loss: ``"l2"``, ``"l1"`` or ``"huber"``.
        weight_decay: coefficient of the sum of squared weights, relative to one entry's squared
            error; None tries several.
        smoothness: coefficient of :class:`_SmoothTask`'s penalty.
        init_std: standard deviation of all initial weights, or None, which makes the tensor's 0.3.
        dtype: of the parameters.
        device: where models are trained; they come back to the CPU.
        batch_size: entries a step, or None.
        seed: of initial weights and batches.
        progress: whether to show it.
    """

    iterations: int = 800
    max_seconds: float = 50.0
    lr: float = 0.03
    optimizer: str = "adam"
    loss: str = "l2"
    weight_decay: float | None = None
    smoothness: float = 0.0
    init_std: float | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch_size: int | None = None
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True)
class Problem:
    """Known entries, ready for training: ``(value - mean) / scale``, some of them held out.

    Attributes:
        entries: as in the file.
        train, held: positions in ``entries.values``.
        mean, scale: mean and standard deviation of the training values; 0 where they are all equal,
            so that every prediction is that value.
    """

    entries: Entries
    train: np.ndarray
    held: np.ndarray
    mean: float
    scale: float

    def mean_everywhere(self, indices: np.ndarray) -> np.ndarray:
        """The mean as the prediction ``[M]`` at indices ``[M, N]``."""
        return self.entries.finish(np.full(len(indices), self.mean))

    def error(self, predicted: np.ndarray) -> float:
        """Root mean squared error on the entries held out, in the units of the file."""
        wrong = self.entries.finish(predicted) - self.entries.values[self.held]
        return float(np.sqrt(np.mean(np.square(wrong))))


def prepare(entries: Entries, held_out: float, seed: int) -> Problem:
    """Holds out entries and measures mean and scale of the others.

    Args:
        entries: known entries.
        held_out: fraction of them, between 0 and 1, that decides when to stop.
        seed: of the choice.

    Raises:
        UserError: the fraction is out of range, or leaves nothing to train on.
    """
    if not 0 < held_out < 1:
        raise UserError(f"--held-out expects a fraction between 0 and 1, got {held_out:g}")
    train, held = entries.split(held_out, seed)
    if not len(train):
        raise UserError(
            f"too few known entries: holding out {held_out:g} of {len(held)} leaves none to learn "
            "from"
        )
    values = entries.values[train]
    scale = float(values.std())
    # The spread of equal numbers is rounding, not a unit to measure in.
    if scale <= 1e-12 * max(abs(float(values.mean())), 1e-300):
        scale = 0.0
    return Problem(entries, train, held, float(values.mean()), scale)


class _SmoothTask(CompletionTask):
    """Completion with a penalty on bends: the mean over the tensor ``W`` of
    ``sqrt((W[i-1] - 2 W[i] + W[i+1])^2 + 0.001)``, summed over the given modes.

    Nearly the absolute value: edges cost no more than their height.
    """

    def __init__(
        self, split: Split, modes: Sequence[int], coefficient: float, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._split, self._modes, self._coefficient = split, modes, coefficient

    def loss(self, model: hk.HTF, rows: Tensor | None = None) -> Tensor:
        full = model.full_tensor()
        linear = self._linear if rows is None else self._linear[rows]
        values = self.values if rows is None else self.values[rows]
        fit = self.loss_function(full.reshape(-1).index_select(0, linear), values)
        tensor = self._split.join(full)
        bends = [(tensor.diff(n=2, dim=n).square() + _BEND).sqrt().mean() for n in self._modes]
        return fit + self._coefficient * torch.stack(bends).sum()


@dataclass(frozen=True)
class Fitted:
    """A trained model.

    Attributes:
        name: what it is called in the report.
        model, split: its tensor has the shape ``split.shape``.
        weight_decay: what was chosen.
        error: root mean squared error on the entries held out.
        iterations, best_iteration, reason: of the run that was kept.
        seconds: of all its runs.
        problem: what it was trained on.
    """

    name: str
    model: hk.HTF
    split: Split
    weight_decay: float
    error: float
    iterations: int
    best_iteration: int
    reason: str
    seconds: float
    problem: Problem

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.model.layout.num_parameters

    def predict(self, indices: np.ndarray) -> np.ndarray:
        """Entries ``[M]`` at indices ``[M, N]`` of the tensor as it is, in its own units."""
        raw = _values_at(self.model, self.split, torch.from_numpy(indices))
        return self.problem.entries.finish(raw * self.problem.scale + self.problem.mean)


@torch.no_grad()
def _values_at(model: hk.HTF, split: Split, indices: Tensor) -> np.ndarray:
    total = prod(split.shape)
    places = split.split(indices).to(model.weights[0].device)
    if total <= LARGEST_FULL and total <= 64 * max(len(places), 1):
        full = model.full_tensor()
        values = full[tuple(places.T)]
    else:
        parts = [model.at(part) for part in places.split(2**16)]
        values = torch.cat(parts) if parts else torch.zeros(0)
    return values.double().cpu().numpy()


def make_htf(
    tree: hk.ModeTree, dims: Sequence[int], ranks: dict[hk.Node, int], settings: Settings
) -> hk.HTF:
    """An HTF whose initial tensor has entries of standard deviation 0.3, or weights of
    ``settings.init_std``.

    The root sums: weights of its own would only rescale its components, and under weight decay a
    factor more makes all of them shrink sooner.
    """
    model = hk.HTF(tree, dims, ranks, root="sum", init_std=settings.init_std, dtype=settings.dtype)
    if settings.init_std is None:
        std = _leaf_std(tree.order, model.layout.ranks[-1])
        with torch.no_grad():  # interior weights of R_v ** -0.5 keep the variance of messages
            for group, weight in zip(model.layout.groups, model.weights, strict=True):
                if group.level == 0:
                    weight.mul_(group.rows**0.5 * std)
    return model


def _leaf_std(order: int, components: int) -> float:
    """Of leaf weights, such that a sum of products of messages has a standard deviation of 0.3."""
    return (_OUTPUT_STD / components**0.5) ** (1 / order)


def make_cp(dims: Sequence[int], components: int, settings: Settings) -> hk.HTF:
    """A CP factorization with initial entries of the same standard deviation."""
    std = settings.init_std
    if std is None:
        std = _leaf_std(len(dims), components)
    return tensor_factorization(dims, components, init_std=std, dtype=settings.dtype)


def fit(
    name: str,
    problem: Problem,
    split: Split,
    make: Callable[[], hk.HTF],
    settings: Settings,
) -> Fitted:
    """Trains a model; the weights that do best on the entries held out are kept.

    Weight decay, where it is not given, is found by runs of a quarter of the iterations, as many as
    leave time for a full one; a full run with what did best follows. The best of all runs is the
    result.

    Args:
        name: for the report and the progress.
        problem: the data.
        split: how the model sees the tensor.
        make: makes a model with new initial weights.
        settings: how.

    Raises:
        UserError: no run came to a finite result.
    """
    began = time.monotonic()
    task = _task(problem, split, settings)
    decays = [p / len(problem.train) for p in _PENALTIES]
    probes = decays if settings.weight_decay is None else []
    best: Fitted | None = None

    def attempt(decay: float, share: float, seconds: float) -> None:
        nonlocal best
        run = _run(name, problem, split, task, make, settings, decay, share, seconds)
        if math.isfinite(run.error) and (best is None or run.error < best.error):
            best = run

    for number, decay in enumerate(probes):
        spent = time.monotonic() - began
        full = spent / (number * _PROBE) if number else 0.0
        if spent + (1 + _PROBE) * full > settings.max_seconds:
            break
        attempt(decay, _PROBE, settings.max_seconds * _PROBE)
    chosen = settings.weight_decay
    if chosen is None:
        chosen = decays[0] if best is None else best.weight_decay
    attempt(chosen, 1.0, settings.max_seconds - (time.monotonic() - began))
    if best is None:
        raise UserError(f"training of {name} came to no finite result; try a smaller --lr")
    return replace(best, seconds=time.monotonic() - began)


def _task(problem: Problem, split: Split, settings: Settings) -> CompletionTask:
    indices = split.split(torch.from_numpy(problem.entries.indices))
    scaled = (problem.entries.values - problem.mean) / (problem.scale or 1.0)
    values = torch.from_numpy(scaled).to(settings.dtype)
    train, held = torch.from_numpy(problem.train), torch.from_numpy(problem.held)
    indices, values = indices.to(settings.device), values.to(settings.device)
    parts = (indices[train], values[train], split.shape, indices[held], values[held])
    if settings.smoothness == 0:
        return CompletionTask(*parts, loss=settings.loss)
    modes = [n for n in problem.entries.neighbours if problem.entries.dims[n] > 2]
    if prod(split.shape) > LARGEST_FULL:
        raise UserError(
            f"--smoothness needs a tensor of at most {LARGEST_FULL:,} entries, got "
            f"{prod(split.shape):,}"
        )
    if not modes:
        raise UserError("--smoothness needs a mode of at least 3 ordered positions, there is none")
    return _SmoothTask(split, modes, settings.smoothness, *parts, loss=settings.loss)


def _run(
    name: str,
    problem: Problem,
    split: Split,
    task: CompletionTask,
    make: Callable[[], hk.HTF],
    settings: Settings,
    decay: float,
    share: float,
    seconds: float,
) -> Fitted:
    """One run with a share of the iterations, its step size annealed within them or the time."""
    torch.manual_seed(settings.seed)
    model = make().to(settings.device)
    iterations = max(round(settings.iterations * share), 1)
    optimizer = _optimizer(model, settings.optimizer, settings.lr, 2 * decay)
    batch = settings.batch_size
    if batch is None and prod(split.shape) > min(4 * task.num_samples, LARGEST_FULL):
        batch = _BATCH
    if batch is not None and batch >= task.num_samples:
        batch = None
    config = TrainConfig(
        iterations=iterations,
        batch_size=batch,
        log_every=max(5, iterations // 60),
        max_seconds=max(seconds, 0.01),
        seed=settings.seed,
    )
    held = problem.entries.indices[problem.held]

    def watch(current: hk.HTF) -> float:
        raw = _values_at(current, split, torch.from_numpy(held))
        return problem.error(raw * problem.scale + problem.mean)

    with _annealed(optimizer, settings.lr, iterations, config.max_seconds or math.inf):
        result = Trainer(
            model,
            task,
            optimizer,
            config,
            progress=settings.progress,
            watch=watch,
            restore_best=True,
            title=f"{name}, weight decay {decay:.1e}",
        ).fit()
    return Fitted(
        name,
        model.cpu(),
        split,
        decay,
        math.inf if result.best is None else result.best,
        result.iterations,
        result.best_iteration or 0,
        result.reason,
        result.seconds,
        problem,
    )


def _optimizer(model: hk.HTF, name: str, lr: float, decay: float) -> torch.optim.Optimizer:
    weights = model.parameters()
    if name == "adam":
        return torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.99), weight_decay=decay)
    if name == "rmsprop":
        return GroupRMSprop(weights, lr=lr, weight_decay=decay)
    return torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=decay)


@contextmanager
def _annealed(
    optimizer: torch.optim.Optimizer, lr: float, iterations: int, seconds: float
) -> Iterator[None]:
    """Lets the step size fall along half a cosine, over the iterations or the time, whichever is
    nearer to its end."""
    began, steps = time.monotonic(), 0

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        done = min(max(steps / iterations, (time.monotonic() - began) / seconds), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done))

    after_step.reads_gradients = False  # type: ignore[attr-defined]
    hook = optimizer.register_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()
