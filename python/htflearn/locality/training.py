"""One training of an image classifier with one logit, on a device or on many."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htflearn.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    remove_leftovers,
    restored,
    save_checkpoint,
    taken_from,
)
from htflearn.errors import UserError, reason
from htflearn.files import replace_file
from htflearn.locality.data import Data, Images
from htflearn.locality.gradient_change import InputGradientChange
from htflearn.locality.processes import ALONE, Processes
from htflearn.locality.resnets import NETWORKS
from htflearn.locality.setting import Case, Setting
from htflearn.metrics import MetricsFile, plain

__all__ = ["METRICS", "RESULT", "inputs", "make_network", "train"]

METRICS, RESULT = "metrics.jsonl", "result.json"
_CHECKPOINT_SECONDS = 15.0
_TEST_BATCH = 500


@dataclass
class _State:
    """What a training goes on from, but for weights, optimizer and random generators."""

    iteration: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    changes: int = 0
    regularizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def make_network(setting: Setting, case: Case, channels: int) -> nn.Module:
    """The network with its initial weights, which the case's seed decides.

    Args:
        setting, case: which training.
        channels: of the images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        network: Any = NETWORKS[setting.network](channels, 1)
    return network.to(memory_format=_format(setting))


def inputs(images: Tensor, data: Data, setting: Setting) -> Tensor:
    """uint8 images as a network takes them: mean 0, standard deviation 1."""
    device = images.device
    mean, std = (v.to(device)[:, None, None] for v in (data.mean, data.std))
    return ((images.float() - mean) / std).contiguous(memory_format=_format(setting))


def train(
    setting: Setting,
    case: Case,
    data: Data,
    out: Path,
    device: torch.device | str = "cpu",
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Trains one network, or goes on with it where an earlier process stopped.

    Of several processes each takes its part of every batch, and its statistics are normalized
    alone; the first writes.

    Args:
        setting, case: which training.
        data: see :func:`htflearn.locality.data.load`.
        out: folder of ``metrics.jsonl`` (a line for each epoch), ``checkpoints`` and, once it is
            done, ``result.json``.
        device: of the network.
        processes: that train it together.

    Returns:
        what ``result.json`` holds: accuracies after the last epoch, the last epoch's mean of the
        regularizer without its coefficient (None where it was not computed), seconds.

    Raises:
        UserError: the loss is no longer finite, or the checkpoint cannot be read or written.

    Example:
        >>> setting, case = PRESETS["isc"]["smoke"], Case(16, 1.0, 0)
        >>> data = load(setting, case, Path("data"))  # doctest: +SKIP
        >>> train(setting, case, data, Path("run"))["epochs"]  # doctest: +SKIP
        1
    """
    return _Training(setting, case, data, out, torch.device(device), processes).run()


class _Training:
    def __init__(
        self,
        setting: Setting,
        case: Case,
        data: Data,
        out: Path,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.setting, self.case, self.out, self.device = setting, case, out, device
        self.processes = processes
        train, test = data.train.to(device), data.test.to(device)
        self.data = Data(train, test, data.mean.to(device), data.std.to(device), data.sampler)
        network = make_network(setting, case, train.shape[0]).to(device)
        self.network = network
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            lr=setting.lr,
            momentum=setting.momentum,
            weight_decay=setting.weight_decay,
        )
        self.regularizer = InputGradientChange(data.sampler, case.coefficient, every=setting.every)
        self.scaler = torch.amp.GradScaler(device.type, enabled=setting.amp == "float16")
        self.steps = len(train) // setting.batch
        self.state = _State()
        # Loss, right answers and changes of this epoch: on the device, which is not waited for.
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def run(self) -> dict[str, Any]:
        metrics = self._begin()
        began = saved = time.monotonic()
        before = self.state.seconds
        model = self.processes.wrap(self.network)
        state, total = self.state, self.setting.epochs * self.steps
        order: Tensor | None = None
        with metrics:
            while state.iteration < total:
                epoch, step = divmod(state.iteration, self.steps)
                if step == 0 or order is None:
                    order = self._order(epoch)
                self._step(model, order[step * self.setting.batch :][: self.setting.batch])
                state.iteration += 1
                state.seconds = before + time.monotonic() - began
                whole = step + 1 == self.steps
                if whole:
                    self._log(metrics, epoch + 1)
                # Within an epoch the first process knows its own part of the sums only.
                due = time.monotonic() - saved > _CHECKPOINT_SECONDS
                if (due and (whole or self.processes.count == 1)) or state.iteration == total:
                    self._save(metrics)
                    saved = time.monotonic()
            return self._finish(metrics)

    def _begin(self) -> MetricsFile:
        writes = self.processes.first
        path = self.out / METRICS if writes else None
        if has_checkpoint(self.out / "checkpoints"):
            saved = load_checkpoint(self.out / "checkpoints", self.network, self.optimizer)
            self.state = restored(_State, saved, self.out)
            with taken_from(self.out):
                self.sums.copy_(torch.tensor(self.state.sums, dtype=torch.float64))
                self.regularizer.load_state_dict(self.state.regularizer)
                if self.state.scaler:
                    self.scaler.load_state_dict(self.state.scaler)
            if writes:
                remove_leftovers(self.out / "checkpoints")
        elif writes:
            self.out.mkdir(parents=True, exist_ok=True)
        self.processes.wait()  # until all have read
        last = {"epoch": self.state.iteration // self.steps}
        return MetricsFile(path, self.state.metrics_bytes, last)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.case.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data.train), generator=generator)

    def _step(self, model: nn.Module, rows: Tensor) -> None:
        mine = rows[self.processes.rank :: self.processes.count]
        images = inputs(self.data.train.batch(mine), self.data, self.setting)
        labels = self.data.train.labels[mine].to(self.device)
        with self._autocast():
            logits, penalty = self.regularizer.with_outputs(model, images, labels)
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float())
        self.optimizer.zero_grad()
        self.scaler.scale(loss + penalty).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums[0] += loss.detach()
        self.sums[1] += ((logits > 0) == (labels > 0)).sum()
        if penalty.requires_grad:
            assert self.regularizer.last_value is not None
            self.sums[2] += self.regularizer.last_value
            self.state.changes += 1

    def _log(self, metrics: MetricsFile, epoch: int) -> None:
        state, parts = self.state, self.processes
        loss, right, change = parts.sum(self.sums.tolist())
        loss /= self.steps * parts.count
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of {self.case.name} is no longer finite after {epoch} epochs; a smaller "
                f"--lr than {self.setting.lr:g} or a smaller coefficient may help"
            )
        seen = self.steps * self.setting.batch
        line = {
            "epoch": epoch,
            "train_loss": loss,
            "train_accuracy": right / seen,
            "change": change / (state.changes * parts.count) if state.changes else None,
        }
        if epoch % self.setting.test_every == 0 or epoch == self.setting.epochs:
            line["test_accuracy"] = self._accuracy(self.data.test)
        metrics.append(plain(line))
        self.sums.zero_()
        state.changes = 0

    def _accuracy(self, images: Images) -> float:
        parts, right = self.processes, torch.zeros((), dtype=torch.int64, device=self.device)
        self.network.eval()
        with torch.no_grad(), self._autocast():
            for rows in _batches(len(images)):
                mine = rows[parts.rank :: parts.count]
                if len(mine) == 0:
                    continue
                logits = self.network(inputs(images.batch(mine), self.data, self.setting))
                right += ((logits > 0) == (images.labels[mine].to(self.device) > 0)).sum()
        self.network.train()
        return parts.sum([int(right)])[0] / len(images)

    def _save(self, metrics: MetricsFile) -> None:
        if not self.processes.first:
            return
        state = self.state
        state.regularizer, state.scaler = self.regularizer.state_dict(), self.scaler.state_dict()
        state.metrics_bytes, state.sums = metrics.sync(), tuple(self.sums.tolist())
        try:
            save_checkpoint(self.out / "checkpoints", self.network, self.optimizer, vars(state))
        except OSError as error:
            raise UserError(
                f"a checkpoint cannot be written into {self.out}: {reason(error)}"
            ) from error

    def _finish(self, metrics: MetricsFile) -> dict[str, Any]:
        if not self.processes.first:
            return {}
        last = metrics.lines[-1]
        result = {
            **self.case._asdict(),
            **{k: last[k] for k in ("train_loss", "train_accuracy", "change", "test_accuracy")},
            "epochs": last["epoch"],
            "seconds": round(self.state.seconds, 2),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "torch": torch.__version__,
            "smoke": self.setting.smoke,
        }
        replace_file(self.out / RESULT, json.dumps(result, indent=1) + "\n")
        return result

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.setting.amp == "off":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.setting.amp))


def _batches(count: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(_TEST_BATCH)


def _format(setting: Setting) -> torch.memory_format:
    return torch.channels_last if setting.channels_last else torch.contiguous_format
