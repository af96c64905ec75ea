"""The regularizer that makes a network see far: how the gradient at one patch depends on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from htflearn.locality.patches import PatchSampler, check_patches

__all__ = ["InputGradientChange", "absolute_cosine", "input_gradient_change", "target_outputs"]

Passes = Literal["auto", "one", "two"]


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
    with a gradient of zero counts as 0. (Razin, Maman and Cohen, ICML 2022.)

    The result has derivatives with respect to the parameters (and x, where that requires any). Use
    it in one ``backward`` together with the loss. Under autocast it is computed in float32. A model
    in ``torch.compile`` or DistributedDataParallel is called without its wrapper: compiled graphs
    have no second derivatives, and DDP averages the gradients of what else was called through it.

    Args:
        model: images to logits ``[B, K]``, or to a single logit ``[B]`` or ``[B, 1]``.
        x: images ``[B, C, H, W]``, in any memory format.
        y: classes ``[B]``; not looked at for a single logit.
        patch_a, patch_b: (top, left, bottom, right) in pixels, bottom and right exclusive.
        passes: ``"one"`` evaluates x and x' as one batch; ``"two"`` one after another, which for
            batch normalization in training are the statistics of the paper's formulation;
            ``"auto"`` takes one, but two where a batch normalization is in training.
        scale: factor on the outputs before they are differentiated, which a cosine does not see and
            float16 does; by default 1, and 1024 where autocast to float16 is on.

    Returns:
        a scalar in 0 .. 1.

    Raises:
        ValueError: a patch is empty or outside the image, the patches overlap, the images, classes
            or outputs have another shape, or the output does not depend on x.

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
        coefficient: factor on the penalty, not negative; at 0 nothing is computed.
        passes, scale: as for :func:`input_gradient_change`.

    Raises:
        ValueError: a coefficient that is negative or not finite, or ``passes`` that do not exist.

    Example:
        >>> regularize = InputGradientChange(RandomSquares(2, min_distance=4, seed=0), 9.0)
        >>> logits, penalty = regularize.with_outputs(model, x, y)
        >>> (nn.functional.cross_entropy(logits, y) + penalty).backward()
    """

    def __init__(
        self,
        sampler: PatchSampler,
        coefficient: float = 1.0,
        *,
        passes: Passes = "auto",
        scale: float | None = None,
    ) -> None:
        if not (coefficient >= 0 and math.isfinite(coefficient)):
            raise ValueError(
                "InputGradientChange: coefficient must be finite and not negative, got "
                f"{coefficient}"
            )
        _check_passes(passes)
        self.sampler, self.coefficient = sampler, coefficient
        self.passes, self.scale = passes, scale

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        """The penalty, a scalar to add to the loss.

        Args:
            model, x, y: as for :func:`input_gradient_change`.
        """
        if self.coefficient == 0:
            return x.new_zeros(())
        patches = self.sampler.sample(*_size(x))
        change = _change(model, x, y, *patches, self.passes, self.scale)[1]
        return self.coefficient * change

    def with_outputs(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The model's outputs for x, and the penalty, which shares their pass through the model.

        Args:
            model, x, y: as for :func:`input_gradient_change`. Of a model in
                DistributedDataParallel, x goes through the wrapper.

        Returns:
            the outputs as the model gave them (where x and x' were one batch, and a batch
            normalization was in training, normalized with the statistics of both), and the penalty.
        """
        if self.coefficient == 0:
            return model(x), x.new_zeros(())
        patches = self.sampler.sample(*_size(x))
        outputs, change = _change(model, x, y, *patches, self.passes, self.scale, wrapped=True)
        return outputs, self.coefficient * change

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self.sampler.load_state_dict(state["sampler"])

    def __repr__(self) -> str:
        return f"InputGradientChange({self.sampler}, {self.coefficient})"


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
    _check_passes(passes)
    a, b = check_patches(patch_a, patch_b, *_size(x))
    inner = _unwrapped(model)
    if passes == "auto":
        passes = "two" if _normalizes_batches(inner) else "one"
    replaced = x.clone()  # keeps the memory format
    replaced[:, :, b.top : b.bottom, b.left : b.right] = x.roll(-1, 0)[
        :, :, b.top : b.bottom, b.left : b.right
    ]
    factor = _scale(x.device) if scale is None else scale

    def gradient(call: Any, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, found = _input_gradient(call, images, labels, factor)
        return outputs, found[:, :, a.top : a.bottom, a.left : a.right].flatten(1)

    outer = model if wrapped and isinstance(model, nn.parallel.DistributedDataParallel) else inner
    if passes == "one":
        labels = None if y is None else torch.cat([y, y])
        outputs, both = gradient(outer, torch.cat([x, replaced]), labels)
        outputs, (first, second) = outputs[: len(x)], both.chunk(2)
    else:
        outputs, first = gradient(outer, x, y)
        _, second = gradient(inner, replaced, y)
    return outputs, absolute_cosine(first, second).mean()


def _input_gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The outputs, and the gradient of the targets' sum with respect to the images."""
    if torch.compiler.is_compiling():

        def total(images: Tensor) -> tuple[Tensor, Tensor]:
            outputs = model(images)
            return target_outputs(outputs, y, len(images)).sum() * scale, outputs

        found, outputs = torch.func.grad(total, has_aux=True)(x)
        return outputs, found
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        outputs = model(x)
        total_of_targets = target_outputs(outputs, y, len(x)).sum() * scale
        if not total_of_targets.requires_grad:
            raise ValueError("input_gradient_change: the model's output does not depend on x")
        (found,) = torch.autograd.grad(total_of_targets, x, create_graph=True, allow_unused=True)
    if found is None:
        raise ValueError("input_gradient_change: the model's output does not depend on x")
    return outputs, found


def target_outputs(outputs: Tensor, y: Tensor | None, batch: int) -> Tensor:
    """The logit of each sample's class, or its only logit.

    Args:
        outputs: ``[B, K]``, ``[B, 1]`` or ``[B]``.
        y: classes ``[B]``, integers in 0 .. K - 1; not looked at for a single logit.
        batch: B.

    Returns:
        ``[B]``, in the outputs' dtype.

    Raises:
        ValueError: outputs or classes of another shape or kind.
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
    if y is None or y.shape != (batch,) or y.is_floating_point() or y.dtype == torch.bool:
        came = "None" if y is None else f"{y.dtype} {list(y.shape)}"
        raise ValueError(f"with {outputs.shape[1]} logits, y must be classes [{batch}], got {came}")
    return outputs.gather(1, y.long()[:, None]).reshape(batch)


def absolute_cosine(a: Tensor, b: Tensor) -> Tensor:
    """``|cos|`` of the rows of two matrices, 0 where one of the two rows is zero.

    Rows are first brought to a largest entry of one: their squares neither vanish nor overflow.

    Args:
        a, b: ``[B, n]``.

    Returns:
        ``[B]``, in float32 at least; finite derivatives everywhere, zero at rows that are zero.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    tops = a.detach().abs().amax(1, keepdim=True), b.detach().abs().amax(1, keepdim=True)
    live = (tops[0] > 0) & (tops[1] > 0)
    # Not 0 / 0, whose derivative would be NaN: ones take the place of rows that do not count.
    a = torch.where(live, a, 1.0) / torch.where(live, tops[0], 1.0)
    b = torch.where(live, b, 1.0) / torch.where(live, tops[1], 1.0)
    cosine = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(live[:, 0], cosine.abs(), 0.0)


def _unwrapped(model: Any) -> Any:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # of torch.compile
            model = model._orig_mod
        else:
            return model


def _normalizes_batches(model: Any) -> bool:
    if not isinstance(model, nn.Module):
        return False
    norms = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
    return any(
        isinstance(m, norms) and (m.training or m.running_mean is None) for m in model.modules()
    )


def _scale(device: torch.device) -> float:
    kind = device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return 1024.0 if half else 1.0


def _size(x: Tensor) -> tuple[int, int]:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be images [B, C, H, W] of real numbers, got {x.dtype} {list(x.shape)}"
        )
    return int(x.shape[2]), int(x.shape[3])


def _check_passes(passes: str) -> None:
    if passes not in ("auto", "one", "two"):
        raise ValueError(f'passes must be "auto", "one" or "two", got {passes!r}')
