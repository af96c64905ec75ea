"""Tasks: what a factorization is trained on. Entries of a tensor, or linear measurements of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

import htfkernels as hk
from htflearn.losses import LOSSES, Loss, loss_function
from htflearn.targets import make_target

__all__ = ["CompletionTask", "SensingTask", "Task", "completion", "make_target", "sensing"]

_LARGEST_FULL = 2**24


class Task(Protocol):
    """What :class:`htflearn.Trainer` needs to know of a task.

    A task may have an attribute ``capturable``: True says that its loss on all samples is the same
    operations on the same tensors every time, and waits for no device, so that a CUDA graph can
    hold them.
    """

    @property
    def num_samples(self) -> int:
        """Number of training samples."""
        ...

    def loss(self, model: Any, rows: Tensor | None = None) -> Tensor:
        """Scalar loss on the training samples: all, or those of ``rows [B]`` int64."""
        ...

    def evaluate(self, model: Any) -> dict[str, float]:
        """Metrics of the model as it is now; at least ``train_loss``."""
        ...


class CompletionTask:
    """Entries of a tensor: fit those given, be judged on others.

    Args:
        indices: ``[M, N]`` int64, the training entries.
        values: ``[M]``.
        dims: ``D_n`` for each mode.
        test_indices, test_values: held-out entries, ``[K, N]`` and ``[K]``.
        loss: a name of :data:`htflearn.LOSSES`, or ``(prediction, target) -> scalar``.
        target: the whole tensor ``[D_1, ..., D_N]``, where it is known.

    Raises:
        ValueError: shapes that do not fit, or no entries.
        IndexError: an index outside ``dims``.

    Attributes:
        num_samples: M.

    Example:
        >>> task = CompletionTask(torch.tensor([[0, 1], [2, 2]]), torch.ones(2), dims=(3, 3))
        >>> task.predict(matrix_factorization(3, 3)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        indices: Tensor,
        values: Tensor,
        dims: Sequence[int],
        test_indices: Tensor | None = None,
        test_values: Tensor | None = None,
        loss: str | Loss = "l2",
        target: Tensor | None = None,
    ) -> None:
        self.dims = tuple(int(d) for d in dims)
        self.loss_function = loss_function(loss)
        _check_entries("indices", indices, values, self.dims)
        if not len(values):
            raise ValueError("CompletionTask: there are no training entries")
        if test_indices is None or test_values is None:
            if test_indices is not test_values:
                raise ValueError("CompletionTask: test_indices and test_values come together")
            test_indices, test_values = indices[:0], values[:0]
        _check_entries("test_indices", test_indices, test_values, self.dims)
        _check_target("CompletionTask", target, self.dims)
        self.indices, self.values = indices, values
        self.test_indices, self.test_values = test_indices, test_values
        self.target = target
        self._linear = _linear_indices(indices, self.dims)
        self._test_linear = _linear_indices(test_indices, self.dims)

    @property
    def num_samples(self) -> int:
        """Number of training entries."""
        return len(self.values)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the loss: with one of :data:`htflearn.LOSSES`."""
        return self.loss_function in LOSSES.values()

    def predict(self, model: hk.HTF, rows: Tensor | None = None) -> Tensor:
        """The model's training entries ``[M]``, or those of ``rows [B]``.

        All of them are evaluated by an index plan, each node once per distinct sub-tuple of its
        modes. Of a batch, all of the tensor is formed and the entries are picked where it has few
        entries for that; else it gets a plan of its own where that pays.
        """
        self._check_dims(model.layout.mode_dims)
        if rows is None:
            return model.at(model.index_plan(self.indices))
        if _full_is_cheaper(self.dims, len(rows)):
            return self._full(model).reshape(-1).index_select(0, self._linear[rows])
        indices = self.indices[rows]
        pays = hk.IndexPlan.pays(model.layout, len(rows))
        return model.at(hk.IndexPlan.make(model.layout, indices) if pays else indices)

    def _check_dims(self, dims: Sequence[int]) -> None:
        if tuple(dims) != self.dims:
            shapes = f"the model's tensor is {list(dims)}, the task's {list(self.dims)}"
            raise ValueError(f"CompletionTask: {shapes}")

    def _full(self, model: hk.HTF) -> Tensor:
        self._check_dims(model.layout.mode_dims)
        return model.full_tensor()

    def loss(self, model: hk.HTF, rows: Tensor | None = None) -> Tensor:
        """Scalar loss on the training entries: all, or those of ``rows [B]``."""
        values = self.values if rows is None else self.values[rows]
        return self.loss_function(self.predict(model, rows), values)

    @torch.no_grad()
    def evaluate(self, model: hk.HTF) -> dict[str, float]:
        """``train_loss``; with held-out entries ``test_loss`` and ``test_mse``; with a target
        ``reconstruction_error``, the Frobenius norm of the difference relative to the target's."""
        scored = self.num_samples + len(self.test_values)
        full = None
        if self.target is not None or _full_is_cheaper(self.dims, scored):
            full = self._full(model)
        if full is not None and self._linear is not None:
            train = full.reshape(-1).index_select(0, self._linear)
            test = full.reshape(-1).index_select(0, self._test_linear)
        else:
            train = model.at(model.index_plan(self.indices))
            test = model.at(model.index_plan(self.test_indices))
        scores = {"train_loss": self.loss_function(train, self.values)}
        if len(self.test_values):
            scores |= _test_scores(self.loss_function, test, self.test_values)
        if full is not None and self.target is not None:
            scores["reconstruction_error"] = _relative_error(full, self.target)
        return _as_floats(scores)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> CompletionTask:
        """The same task on another device or in another dtype."""
        return CompletionTask(
            self.indices.to(device),
            self.values.to(device, dtype),
            self.dims,
            self.test_indices.to(device),
            self.test_values.to(device, dtype),
            self.loss_function,
            None if self.target is None else self.target.to(device, dtype),
        )


class SensingTask:
    """Linear measurements ``<A_i, W>`` of a tensor.

    Args:
        measurements: rank-one measurements as ``N`` tensors of vectors ``[M, D_n]``, or any as one
            dense tensor ``[M, D_1, ..., D_N]`` (for small tensors: all of ``W`` is formed).
        values: ``[M]``.
        test_measurements, test_values: held-out ones, in the same form.
        loss: a name of :data:`htflearn.LOSSES`, or ``(prediction, target) -> scalar``.
        target: the whole tensor, where it is known.

    Raises:
        ValueError: shapes that do not fit, or no measurements.

    Attributes:
        num_samples: M.

    Example:
        >>> vectors = [torch.randn(20, 3), torch.randn(20, 4)]
        >>> SensingTask(vectors, torch.ones(20)).predict(matrix_factorization(3, 4)).shape
        torch.Size([20])
    """

    def __init__(
        self,
        measurements: Tensor | Sequence[Tensor],
        values: Tensor,
        test_measurements: Tensor | Sequence[Tensor] | None = None,
        test_values: Tensor | None = None,
        loss: str | Loss = "l2",
        target: Tensor | None = None,
    ) -> None:
        if values.dim() != 1 or not len(values):
            raise ValueError(f"SensingTask: values must be [M], M > 0, got {list(values.shape)}")
        if (test_measurements is None) != (test_values is None):
            raise ValueError(
                "SensingTask: test_measurements and test_values come together or not at all"
            )
        self.dims = _check_measurements("measurements", measurements, len(values))
        if test_measurements is not None and test_values is not None:
            dims = _check_measurements("test_measurements", test_measurements, len(test_values))
            if dims != self.dims:
                raise ValueError(
                    f"SensingTask: test_measurements are of {dims}, the others of {self.dims}"
                )
        self.measurements, self.values = measurements, values
        self.test_measurements, self.test_values = test_measurements, test_values
        self.target = target
        self.loss_function = loss_function(loss)
        _check_target("SensingTask", target, self.dims)

    @property
    def num_samples(self) -> int:
        """Number of training measurements."""
        return len(self.values)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the loss: with one of :data:`htflearn.LOSSES`."""
        return self.loss_function in LOSSES.values()

    def predict(self, model: hk.HTF, rows: Tensor | None = None) -> Tensor:
        """The measurements of the model's tensor ``[M]``, or those of ``rows [B]``."""
        return _measure(model, _rows_of(self.measurements, rows))

    def loss(self, model: hk.HTF, rows: Tensor | None = None) -> Tensor:
        """Scalar loss on the training measurements: all, or those of ``rows [B]``."""
        values = self.values if rows is None else self.values[rows]
        return self.loss_function(self.predict(model, rows), values)

    @torch.no_grad()
    def evaluate(self, model: hk.HTF) -> dict[str, float]:
        """The same metrics as :meth:`CompletionTask.evaluate`."""
        scores = {"train_loss": self.loss(model)}
        if (
            self.test_measurements is not None
            and self.test_values is not None
            and len(self.test_values)
        ):
            predicted = _measure(model, self.test_measurements)
            scores |= _test_scores(self.loss_function, predicted, self.test_values)
        if self.target is not None:
            scores["reconstruction_error"] = _relative_error(model.full_tensor(), self.target)
        return _as_floats(scores)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> SensingTask:
        """The same task on another device or in another dtype."""

        def move(measurements: Any) -> Any:
            if measurements is None or isinstance(measurements, Tensor):
                return None if measurements is None else measurements.to(device, dtype)
            return [move(v) for v in measurements]

        return SensingTask(
            move(self.measurements),
            move(self.values),
            move(self.test_measurements),
            move(self.test_values),
            self.loss_function,
            move(self.target),
        )


def completion(
    target: Tensor,
    num_samples: int,
    noise_std: float = 0.0,
    generator: torch.Generator | None = None,
    loss: str | Loss = "l2",
) -> CompletionTask:
    """Completion of a known tensor: entries drawn without replacement, the others for testing.

    Args:
        target: ``[D_1, ..., D_N]``.
        num_samples: number of training entries.
        noise_std: standard deviation of normal noise on the training values, not on the others.
        generator: of the choice and of the noise.
        loss: see :class:`CompletionTask`.

    Raises:
        ValueError: ``num_samples`` is not between 1 and the number of entries.

    Example:
        >>> completion(make_target("cp", (4, 5, 3), 2, 10.0), num_samples=30).num_samples
        30
    """
    total = target.numel()
    if not 0 < num_samples <= total:
        raise ValueError(f"completion: num_samples must be in 1..{total}, got {num_samples}")
    linear = torch.randperm(total, generator=generator)
    indices = torch.stack(torch.unravel_index(linear, target.shape), dim=1)
    values = target.flatten()[linear]
    train, test = (indices[:num_samples], indices[num_samples:])
    noisy = _with_noise(values[:num_samples], noise_std, generator)
    return CompletionTask(
        train, noisy, tuple(target.shape), test, values[num_samples:], loss=loss, target=target
    )


def sensing(
    target: Tensor,
    num_samples: int,
    kind: Literal["rank_one", "gaussian"] = "rank_one",
    noise_std: float = 0.0,
    generator: torch.Generator | None = None,
    loss: str | Loss = "l2",
    num_test: int = 0,
) -> SensingTask:
    """Sensing of a known tensor by random measurements.

    Args:
        target: ``[D_1, ..., D_N]``.
        num_samples: number of training measurements.
        kind: ``"rank_one"``: outer products of standard normal vectors; ``"gaussian"``: standard
            normal tensors. Either way a measurement has variance ``norm(target) ** 2``.
        noise_std: standard deviation of normal noise on the training values.
        generator: of the measurements and of the noise.
        loss: see :class:`CompletionTask`.
        num_test: number of further measurements, without noise, to test on.

    Raises:
        ValueError: there is no such kind, or ``num_samples`` is not positive.

    Example:
        >>> sensing(make_target("cp", (4, 5, 3), 2, 10.0), num_samples=30).num_samples
        30
    """
    if num_samples < 1:
        raise ValueError(f"sensing: num_samples must be positive, got {num_samples}")
    dims, total = tuple(target.shape), num_samples + num_test

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(target.dtype)

    measurements: Tensor | list[Tensor]
    if kind == "rank_one":
        measurements = [draw(total, d) for d in dims]
        partial = target[None]
        for v in measurements:
            partial = torch.einsum("md,md...->m...", v, partial.expand(total, *partial.shape[1:]))
        values = partial
    elif kind == "gaussian":
        measurements = draw(total, *dims)
        values = measurements.flatten(1) @ target.flatten()
    else:
        raise ValueError(f'sensing: kind must be "rank_one" or "gaussian", got {kind!r}')
    return SensingTask(
        _rows_of(measurements, slice(0, num_samples)),
        _with_noise(values[:num_samples], noise_std, generator),
        _rows_of(measurements, slice(num_samples, None)) if num_test else None,
        values[num_samples:] if num_test else None,
        loss=loss,
        target=target,
    )


def _full_is_cheaper(dims: tuple[int, ...], count: int) -> bool:
    return prod(dims) <= min(4 * count, _LARGEST_FULL)


def _check_entries(name: str, indices: Tensor, values: Tensor, dims: tuple[int, ...]) -> None:
    if values.dim() != 1:
        raise ValueError(
            f"CompletionTask: the values of {name} must be [M], got {list(values.shape)}"
        )
    if indices.dtype != torch.int64 or tuple(indices.shape) != (len(values), len(dims)):
        raise ValueError(
            f"CompletionTask: {name} must be int64 [{len(values)}, {len(dims)}] to fit the values "
            f"and dims, got {indices.dtype} {list(indices.shape)}"
        )
    limits = torch.tensor(dims, device=indices.device)
    outside = ((indices < 0) | (indices >= limits)).nonzero()
    if len(outside):
        row, mode = outside[0].tolist()
        raise IndexError(
            f"CompletionTask: {name}[{row}] has index {int(indices[row, mode])} in mode {mode}, "
            f"whose dimension is {dims[mode]}"
        )


def _linear_indices(indices: Tensor, dims: tuple[int, ...]) -> Any:
    """Row-major positions ``[M]``; None for tensors that are never formed as a whole."""
    if prod(dims) > _LARGEST_FULL:
        return None
    linear = torch.zeros_like(indices[:, 0])
    for n, d in enumerate(dims):
        linear = linear * d + indices[:, n]
    return linear


def _check_measurements(
    name: str, measurements: Tensor | Sequence[Tensor], count: int
) -> tuple[int, ...]:
    if isinstance(measurements, Tensor):
        if measurements.dim() < 3 or measurements.shape[0] != count:
            raise ValueError(
                f"SensingTask: dense {name} must be [{count}, D_1, ..., D_N] to fit the values, "
                f"got {list(measurements.shape)}"
            )
        return tuple(measurements.shape[1:])
    for n, v in enumerate(measurements):
        if v.dim() != 2 or v.shape[0] != count:
            raise ValueError(
                f"SensingTask: {name}[{n}] must be [{count}, D_{n}], got {list(v.shape)}"
            )
    return tuple(v.shape[1] for v in measurements)


def _check_target(task: str, target: Tensor | None, dims: tuple[int, ...]) -> None:
    if target is not None and tuple(target.shape) != dims:
        raise ValueError(f"{task}: target must be {list(dims)}, got {list(target.shape)}")


def _measure(model: hk.HTF, measurements: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(measurements, Tensor):
        return measurements.flatten(1) @ model.full_tensor().reshape(-1)
    return model(measurements)


def _rows_of(measurements: Any, rows: Any) -> Any:
    if rows is None:
        return measurements
    return (
        measurements[rows] if isinstance(measurements, Tensor) else [v[rows] for v in measurements]
    )


def _with_noise(values: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    if not 0 <= std < float("inf"):
        raise ValueError(f"noise_std must be finite and not negative, got {std}")
    if std == 0:
        return values
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    return values + std * noise.to(values.dtype)


def _test_scores(loss: Loss, predicted: Tensor, values: Any) -> dict[str, Tensor]:
    return {"test_loss": loss(predicted, values), "test_mse": (predicted - values).square().mean()}


def _relative_error(tensor: Any, target: Tensor) -> Tensor:
    return (tensor - target).norm() / target.norm()


def _as_floats(scores: dict[str, Tensor]) -> dict[str, float]:
    """One transfer from the device for all of them."""
    numbers = torch.stack([s.double() for s in scores.values()]).tolist()
    return dict(zip(scores, numbers, strict=True))
