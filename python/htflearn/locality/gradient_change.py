"""The regularizer that makes a network see far: how the gradient at one patch depends on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from htflearn.locality.patches import PatchSampler, check_patches

__all__ = ["InputGradientChange", "absolute_cosine", "input_gradient_change", "target_outputs"]

Passes = Literal["auto", "one", "two"]
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def input_gradient_change(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None,
    patch_a: Sequence[int],
    patch_b: Sequence[int],
    *,
    passes: Passes = "auto",
    scale: float | None = None,
) -> Tensor:
    """How little the gradient at one patch changes when another patch is replaced::

        mean over the batch of |cos(g, g')|,   g = d f_y(x) / d x[patch_a],   g' the same at x',

    where x' has the patch b of the next sample (the last sample that of the first), and f_y is the
    logit of the true class, or the only logit. It is 1 for a model in which the two patches do not
    interact, whatever the rest does: adding it to a loss *raises* long-range dependence. A sample
    with a gradient of zero counts as 0. (Razin, Maman and Cohen, ICML 2022.) In a batch of one, x'
    is x. Dropout in training draws other masks for x' than for x, as two passes do; these change
    the gradient too, so that such a layer may be better off in ``eval()``.

    The result has derivatives with respect to the parameters (and x, where that requires any), but
    under ``no_grad`` it is only the number. Use it in one ``backward`` together with the loss:
    DistributedDataParallel, whose wrapper is left out here, averages these derivatives together
    with those of the outputs that came through it. Under autocast the cosines are computed in
    float32. Attention runs in PyTorch's plain kernel, the one with second derivatives.

    What ``torch.compile`` made of a model has no second derivatives: such models, and parts, run as
    written. To have the penalty compiled, compile the function that computes the loss from x, y and
    two patches, and calls this one; batch normalization in training is no obstacle there.

    Args:
        model: images to logits ``[B, K]``, or to a single logit ``[B]`` or ``[B, 1]``.
        x: images ``[B, C, H, W]``, in any memory format.
        y: classes ``[B]``; not looked at for a single logit.
        patch_a, patch_b: (top, left, bottom, right) in pixels, bottom and right exclusive.
        passes: ``"one"`` evaluates x and x' as one batch; ``"two"`` one after another, which for
            batch normalization in training are the statistics of the paper's formulation (and
            move the running ones twice); ``"auto"`` takes one, but two where the model is a module
            with a batch normalization in training.
        scale: factor on the outputs before they are differentiated, which a cosine does not see and
            float16 does; by default 1, and 1024 where the outputs are float16.

    Returns:
        a scalar in 0 .. 1, up to rounding.

    Raises:
        ValueError: a patch is empty or outside the image, the patches overlap, the images, classes
            or outputs have another shape, a class is out of range (on the CPU; a GPU is not waited
            for), the output does not depend on x, or there cannot be second derivatives: in
            ``inference_mode``, or with SyncBatchNorm in training.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Softplus(), nn.Linear(16, 3))
        >>> x, y = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
        >>> input_gradient_change(model, x, y, (0, 0, 2, 2), (6, 6, 8, 8)).backward()
    """
    return _change(model, x, y, patch_a, patch_b, passes, scale)[1]


class InputGradientChange:
    """:func:`input_gradient_change` for a training loop: draws the patches, and has a coefficient.

    Args:
        sampler: gives two patches for each batch, see :mod:`htflearn.locality.patches`.
        coefficient: factor on the penalty, not negative; at 0 nothing is computed, drawn, counted.
        every: computes the penalty in one step out of this many, beginning with the first, with the
            coefficient times ``every``: the mean over steps is the same, at a fraction of the cost.
            The calls in between return 0.
        accumulation: calls that make up a step: the number of micro-batches whose gradients are
            accumulated. All calls of a step have the penalty, or none of them has. With the default
            a step is a call, so that among micro-batches ``every`` counts these: ``every=4`` on
            four of them regularizes the first one of each step, four times as strongly.
        passes, scale: as for :func:`input_gradient_change`.

    Attributes:
        last_value: the latest mean of ``|cos|`` in this process, before it is multiplied by the
            coefficient and ``every``: a detached scalar on the model's device, which is not waited
            for. None until there is one.

    :meth:`state_dict` holds the number of calls and the sampler's state, so that a resumed training
    has its penalties in the same steps and on the same patches, even if it was stopped between two
    micro-batches. ``last_value`` is not part of it.

    In a function under ``torch.compile`` it runs as written, between two graphs: it draws random
    numbers (``fullgraph=True`` refuses it; see :func:`input_gradient_change` there).

    Raises:
        ValueError: a coefficient that is negative or not finite, ``every`` or ``accumulation``
            below 1, a scale that is not positive, or ``passes`` that do not exist.

    Example:
        >>> from htflearn.locality.patches import RandomSquares
        >>> regularize = InputGradientChange(RandomSquares(2, min_distance=4, seed=0), 9.0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Softplus(), nn.Linear(16, 3))
        >>> x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> logits, penalty = regularize.with_outputs(model, x, y)
        >>> (nn.functional.cross_entropy(logits, y) + penalty).backward()

        Steps of three micro-batches, every second of them regularized:

        >>> regularize = InputGradientChange(RandomSquares(2), 9.0, every=2, accumulation=3)
        >>> optimizer, computed = torch.optim.SGD(model.parameters(), lr=0.01), []
        >>> for step in range(4):
        ...     optimizer.zero_grad()
        ...     for part, classes in zip(x.split(2), y.split(2)):
        ...         logits, penalty = regularize.with_outputs(model, part, classes)
        ...         ((nn.functional.cross_entropy(logits, classes) + penalty) / 3).backward()
        ...         computed.append(penalty.requires_grad)
        ...     optimizer.step()
        >>> [sum(computed[i : i + 3]) for i in (0, 3, 6, 9)]
        [3, 0, 3, 0]
        >>> regularize.last_value.shape
        torch.Size([])
    """

    def __init__(
        self,
        sampler: PatchSampler,
        coefficient: float = 1.0,
        *,
        every: int = 1,
        accumulation: int = 1,
        passes: Passes = "auto",
        scale: float | None = None,
    ) -> None:
        if not (coefficient >= 0 and math.isfinite(coefficient)):
            raise ValueError(
                "InputGradientChange: coefficient must be finite and not negative, got "
                f"{coefficient}"
            )
        for name, value in (("every", every), ("accumulation", accumulation)):
            if value < 1 or value != int(value):
                raise ValueError(
                    f"InputGradientChange: {name} must be a whole number, 1 or more, got {value}"
                )
        _check_options(passes, scale)
        self.sampler, self.coefficient = sampler, coefficient
        self.every, self.accumulation = every, accumulation
        self.passes, self.scale = passes, scale
        self.last_value: Tensor | None = None
        self._calls = 0

    @torch.compiler.disable(reason="it draws patches; compile input_gradient_change instead")
    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        """The penalty, a scalar to add to the loss.

        Args:
            model, x, y: as for :func:`input_gradient_change`.
        """
        return self._penalty(model, x, y, wrapped=False)[1] if self._due() else _zero(x)

    @torch.compiler.disable(reason="it draws patches; compile input_gradient_change instead")
    def with_outputs(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The model's outputs for x, and the penalty, which shares their pass through the model.

        Args:
            model, x, y: as for :func:`input_gradient_change`. Of a model in
                DistributedDataParallel, x goes through the wrapper; with its ``static_graph``, the
                penalty cannot share that pass and takes its own.

        Returns:
            the outputs as the model gave them (where x and x' were one batch, and a batch
            normalization was in training, normalized with the statistics of both), and the penalty.
            A call without a penalty is ``model(x)`` and 0.
        """
        return self._penalty(model, x, y, wrapped=True) if self._due() else (model(x), _zero(x))

    def _due(self) -> bool:
        if self.coefficient == 0:
            return False
        self._calls += 1
        return (self._calls - 1) // self.accumulation % self.every == 0

    def _penalty(
        self, model: Any, x: Tensor, y: Tensor | None, wrapped: bool
    ) -> tuple[Tensor, Tensor]:
        patches = self.sampler.sample(*_size(x))
        parallel = _unwrapped(model)[1]
        # With a static graph, the first derivative through it is taken for the whole backward: the
        # gradients would be averaged then, before there are any.
        alone = model(x) if wrapped and parallel is not None and parallel.static_graph else None
        shared = wrapped and alone is None
        outputs, change = _change(model, x, y, *patches, self.passes, self.scale, shared)
        outputs = outputs if alone is None else alone
        self.last_value = change.detach()
        return outputs, self.coefficient * self.every * change

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state and the number of calls."""
        return {"sampler": self.sampler.state_dict(), "calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave; ``last_value`` is None until the next one."""
        self.sampler.load_state_dict(state["sampler"])
        self._calls, self.last_value = state["calls"], None

    def __repr__(self) -> str:
        steps = f", accumulation={self.accumulation}" if self.accumulation > 1 else ""
        return f"InputGradientChange({self.sampler}, {self.coefficient}, every={self.every}{steps})"


def _change(
    model: Any,
    x: Tensor,
    y: Tensor | None,
    patch_a: Sequence[int],
    patch_b: Sequence[int],
    passes: Passes,
    scale: float | None,
    wrapped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs for x, and the mean of the absolute cosines."""
    _check_options(passes, scale)
    a, b = check_patches(patch_a, patch_b, *_size(x))
    inner, parallel = _unwrapped(model)
    if not torch.compiler.is_compiling():
        _check_differentiable(inner)
    if passes == "auto":
        passes = "two" if _normalizes_batches(inner) else "one"
    replaced = x.clone()  # keeps the memory format
    replaced[:, :, b.top : b.bottom, b.left : b.right] = x[
        :, :, b.top : b.bottom, b.left : b.right
    ].roll(-1, 0)

    def gradient(call: Any, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, found = _input_gradient(call, images, labels, scale)
        return outputs, found[:, :, a.top : a.bottom, a.left : a.right].flatten(1)

    outer = parallel if wrapped and parallel is not None else inner
    if passes == "one":
        labels = torch.cat([y, y]) if y is not None and y.ndim else y
        outputs, both = gradient(outer, torch.cat([x, replaced]), labels)
        outputs, (first, second) = outputs[: len(x)], both.chunk(2)
    else:
        outputs, first = gradient(outer, x, y)
        _, second = gradient(inner, replaced, y)
    return outputs, absolute_cosine(first, second).mean()


def _input_gradient(
    model: Any, x: Tensor, y: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The outputs, and the gradient of the targets' sum with respect to the images."""
    if torch.compiler.is_compiling():
        return _compiled_input_gradient(model, x, y, scale)
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        with _twice_differentiable():
            outputs = model(x.clone())  # which a first layer may change in place
        total = _total(outputs, y, len(x), scale)
        found = None
        if total.requires_grad:
            # As in any backward, what ran in float32 is not cast on the way back.
            with torch.autocast(x.device.type, enabled=False):
                (found,) = torch.autograd.grad(
                    total, x, create_graph=differentiated, allow_unused=True
                )
    if found is None:
        raise ValueError("input_gradient_change: the model's output does not depend on x")
    return outputs if differentiated else outputs.detach(), found


def _compiled_input_gradient(
    model: Any, x: Tensor, y: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The same by torch.func, of which torch.compile makes one graph."""
    buffers = _changing_buffers(model)

    def total(images: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        # Nothing from outside may be changed in here: new running statistics come out as results.
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        images = images.clone()
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            outputs = torch.func.functional_call(model, own, (images,)) if own else model(images)
        return _total(outputs, y, len(images), scale), (outputs, own)

    found, (outputs, changed) = torch.func.grad(total, has_aux=True)(x)
    for name, buffer in buffers.items():
        # Unseen by autograd: an earlier call in the same graph has them saved, without using them.
        buffer.data.copy_(changed[name])
    return outputs, found


def _total(outputs: Any, y: Tensor | None, batch: int, scale: float | None) -> Tensor:
    targets = target_outputs(outputs, y, batch)
    if scale is None:
        scale = 1024.0 if targets.dtype == torch.float16 else 1.0
    return targets.sum() * scale


def target_outputs(outputs: Tensor, y: Tensor | None, batch: int) -> Tensor:
    """The logit of each sample's class, or its only logit.

    Args:
        outputs: ``[B, K]``, ``[B, 1]`` or ``[B]``.
        y: classes ``[B]``, integers in 0 .. K - 1; not looked at for a single logit.
        batch: B.

    Returns:
        ``[B]``, in the outputs' dtype.

    Raises:
        ValueError: outputs or classes of another shape or kind, or (on the CPU) a class out of
            range.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2) or len(outputs) != batch:
        came = (
            f"a tensor {list(outputs.shape)}"
            if isinstance(outputs, Tensor)
            else f"a {type(outputs).__name__}"
        )
        raise ValueError(
            f"the model must give logits [{batch}, K] or a single logit [{batch}] for {batch} "
            f"images, it gave {came}"
        )
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return outputs.reshape(batch)
    count = outputs.shape[1]
    if y is None or y.shape != (batch,) or y.dtype not in _INTEGERS:
        came = "None" if y is None else f"{y.dtype} {list(y.shape)}"
        raise ValueError(f"with {count} logits, y must be classes [{batch}], got {came}")
    # A GPU would have to be waited for, and a graph be left: there gather itself complains.
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(v) for v in y.aminmax())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(f"with {count} logits, classes are 0 .. {count - 1}, y has {wrong}")
    return outputs.gather(1, y.long()[:, None]).reshape(batch)


def absolute_cosine(a: Tensor, b: Tensor) -> Tensor:
    """``|cos|`` of the rows of two matrices, 0 where one of the two rows is zero.

    Rows are first brought to a largest entry of one: their squares neither vanish nor overflow.
    Rows without a normal number (1e-38 in float32), whose derivative would overflow, count as zero.

    Args:
        a, b: ``[B, n]``.

    Returns:
        ``[B]``, in float32 at least; finite derivatives at all finite rows, zero at rows that are
        zero. A row with a NaN or an infinity gives NaN.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    tops = a.detach().abs().amax(1, keepdim=True), b.detach().abs().amax(1, keepdim=True)
    tiny = torch.finfo(dtype).tiny
    dead = (tops[0] < tiny) | (tops[1] < tiny)  # and NaN is not
    # Not 0 / 0, whose derivative would be NaN: ones take the place of rows that do not count.
    a = torch.where(dead, 1.0, a) / torch.where(dead, 1.0, tops[0])
    b = torch.where(dead, 1.0, b) / torch.where(dead, 1.0, tops[1])
    cosine = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(dead[:, 0], 0.0, cosine.abs())


def _unwrapped(model: Any) -> tuple[Any, Any]:
    """The model itself, and the DistributedDataParallel around it, if there is one."""
    parallel = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            parallel, model = model, model.module
        elif hasattr(model, "_orig_mod"):  # of torch.compile
            model = model._orig_mod
        else:
            return model, parallel


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Compiled code runs as written, and attention in the kernel that has second derivatives."""
    with (
        torch.compiler.set_stance("force_eager"),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        yield


def _normalizes_batches(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in model.modules()
    )


def _changing_buffers(model: Any) -> dict[str, Tensor]:
    """Buffers of modules in training, by name."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        name: buffer
        for prefix, module in model.named_modules()
        if module.training
        for name, buffer in module.named_buffers(prefix, recurse=False)
    }


def _check_differentiable(model: Any) -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "input_gradient_change needs derivatives, which inference_mode excludes; no_grad does "
            "not"
        )
    # It exchanges statistics between processes in its backward, unseen by autograd: second
    # derivatives would be wrong.
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
        and isinstance(model, nn.Module)
        and any(isinstance(m, nn.SyncBatchNorm) and m.training for m in model.modules())
    ):
        raise ValueError(
            "input_gradient_change: SyncBatchNorm in training has no second derivatives; use "
            "BatchNorm, or put it in eval()"
        )


def _zero(x: Tensor) -> Tensor:
    """A penalty that was not computed, in the dtype of one that was."""
    return x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))


def _size(x: Tensor) -> tuple[int, int]:
    if x.ndim != 4 or not x.is_floating_point() or len(x) == 0:
        raise ValueError(
            f"x must be images [B, C, H, W] of real numbers, got {x.dtype} {list(x.shape)}"
        )
    return int(x.shape[2]), int(x.shape[3])


def _check_options(passes: str, scale: float | None) -> None:
    if passes not in ("auto", "one", "two"):
        raise ValueError(f'passes must be "auto", "one" or "two", got {passes!r}')
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")
