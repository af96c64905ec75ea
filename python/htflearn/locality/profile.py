"""How far a network sees: how much the gradient at each patch changes when another is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from htflearn.locality.gradient_change import absolute_cosine, target_outputs
from htflearn.locality.patches import Patch, gap, square_grid

__all__ = ["DistanceRow", "LocalityProfile", "as_the_model", "evaluating", "locality_profile"]


class DistanceRow(NamedTuple):
    """The couplings of all measured pairs of patches at one distance.

    Attributes:
        distance: pixels between the two (:func:`htflearn.locality.patches.gap`), 0 for neighbours.
        coupling: mean over the pairs.
        deviation: standard deviation over the pairs; 0 for a single one.
        pairs: their number.
    """

    distance: int
    coupling: float
    deviation: float
    pairs: int


@dataclass(frozen=True, eq=False)
class LocalityProfile:
    """Couplings between the patches of an image, see :func:`locality_profile`.

    Attributes:
        matrix: ``[P, P]`` float64; row A, column B: the coupling of the gradient at A to a replaced
            B, in 0 .. 1. NaN on the diagonal, where B was not replaced, and where no sample counts.
        counts: ``[P, P]`` int64: the samples that count.
        patches: the P squares, row by row.
        size: height and width of the image in pixels.
        replaced: indices of the patches that were replaced, ascending.
        samples: number of images.
    """

    matrix: Tensor
    counts: Tensor
    patches: tuple[Patch, ...]
    size: tuple[int, int]
    replaced: tuple[int, ...]
    samples: int

    def by_distance(self) -> list[DistanceRow]:
        """Couplings against the pixels between two patches, the nearest first."""
        found: dict[int, list[float]] = {}
        for a, b in (~self.matrix.isnan()).nonzero().tolist():
            distance = gap(self.patches[a], self.patches[b])
            found.setdefault(distance, []).append(float(self.matrix[a, b]))
        return [
            DistanceRow(
                distance,
                float(np.mean(values)),
                float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                len(values),
            )
            for distance, values in sorted(found.items())
        ]

    def half_distance(self) -> int | None:
        """The least distance in pixels at which the mean coupling is below half of that of
        neighbours; None where it never is."""
        rows = self.by_distance()
        return next((r.distance for r in rows if 2 * r.coupling < rows[0].coupling), None)

    def heat_map(self, which: int | Literal["mean"] = "mean") -> np.ndarray:
        """What depends on a patch, over the image.

        Args:
            which: index of a patch that was replaced: at each place the coupling to it. Or
                ``"mean"``: at each place the mean of its couplings to all replaced patches.

        Returns:
            ``[H, W]`` float64, NaN at the replaced patch, where nothing was measured, and at
            margins that the grid of patches leaves.

        Raises:
            ValueError: no such patch was replaced.
        """
        if which == "mean":
            values = self.matrix.nanmean(1)
        elif which in self.replaced:
            values = self.matrix[:, which]
        else:
            raise ValueError(
                f'heat_map: expected "mean" or one of the replaced patches '
                f"{_some(self.replaced)}, got {which!r}"
            )
        image = np.full(self.size, np.nan)
        for patch, value in zip(self.patches, values.tolist(), strict=True):
            image[patch.top : patch.bottom, patch.left : patch.right] = value
        return image

    def table(self, title: str = "") -> Any:
        """Couplings against distance, a table that rich prints."""
        from rich.table import Table

        table = Table(title=title or None)
        for heading in ("pixels between", "coupling", "deviation", "pairs"):
            table.add_column(heading, justify="right")
        for row in self.by_distance():
            table.add_row(
                str(row.distance), f"{row.coupling:.3g}", f"{row.deviation:.3g}", f"{row.pairs:,}"
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything, and the couplings by distance, as JSON holds it; NaN becomes None."""
        return {
            "size": list(self.size),
            "samples": self.samples,
            "patches": [list(patch) for patch in self.patches],
            "replaced": list(self.replaced),
            "matrix": [[None if v != v else v for v in row] for row in self.matrix.tolist()],
            "counts": self.counts.tolist(),
            "by_distance": [row._asdict() for row in self.by_distance()],
            "half_distance": self.half_distance(),
        }


def locality_profile(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    patch: int = 4,
    replaced: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> LocalityProfile:
    """How strongly a network couples the patches of an image, for all pairs of patches (A, B)::

        coupling(A, B) = 1 - mean over the images of |cos(g_A, g'_A)|

    with ``g_A`` the gradient of the target at the pixels of A, and ``g'_A`` the same after B was
    replaced by the next image's B (the last image gets the first one's). It is 0 where the two do
    not interact, one minus :func:`htflearn.input_gradient_change`. The target is the logit of the
    label, else of the class that the model predicts for the unchanged image, or the only logit.

    A gradient of zero has no direction. Where it is zero both before and after, the image does not
    count for this pair; where B makes it appear or vanish, it counts as a cosine of 0.

    One gradient gives a whole column of pairs: with P patches it takes P + 1 of them, not P^2. The
    model is in ``eval()`` meanwhile, and gets its modes back; the parameters' gradients are left
    alone.

    Args:
        model: images to logits ``[B, K]``, or to a single logit ``[B]`` or ``[B, 1]``; its images
            come on the device and in the dtype of its first parameter.
        images: ``[M, C, H, W]`` of real numbers, two or more, in any memory format.
        labels: classes ``[M]``; None: the model's own predictions.
        patch: side of the squares in pixels; a margin that they leave is not measured.
        replaced: how many patches B to replace, drawn at random; by default all P.
        seed: of that draw.
        batch_size: images at once.

    Returns:
        the couplings.

    Raises:
        ValueError: images, labels, sizes or the model's outputs of another shape or kind, an output
            that does not depend on the images, or gradients that are not finite.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
        >>> profile = locality_profile(model, torch.randn(16, 1, 8, 8), patch=2)
        >>> [row.distance for row in profile.by_distance()]
        [0, 2, 4]
    """
    _check_images("locality_profile", images)
    total = len(images)
    if labels is not None and (
        labels.shape != (total,) or labels.is_floating_point() or labels.dtype == torch.bool
    ):
        raise ValueError(
            f"locality_profile: labels must be classes [{total}], got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"locality_profile: batch_size must be positive, got {batch_size}")
    size = int(images.shape[2]), int(images.shape[3])
    patches = tuple(square_grid(*size, patch))
    chosen = _draw(len(patches), replaced, seed)
    # Under inference_mode nothing could be differentiated, whatever enable_grad says.
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        sums = torch.zeros(len(patches), len(patches), dtype=torch.float64)
        counts = torch.zeros(len(patches), len(patches), dtype=torch.int64)
        for start in range(0, total, batch_size):
            rows = torch.arange(start, min(start + batch_size, total), device=images.device)
            x = as_the_model(model, images[rows])
            following = as_the_model(model, images[(rows + 1) % total])
            y = None if labels is None else labels[rows.to(labels.device)].to(x.device)
            before, y = _gradients(model, x, y, patches)
            for b in chosen:
                changed, inside = x.clone(), _slices(patches[b])
                changed[inside] = following[inside]
                after, _ = _gradients(model, changed, y, patches)
                coupling, counted = _couplings(before, after)
                sums[:, b] += coupling.cpu()
                counts[:, b] += counted.cpu()
    if not sums.isfinite().all():
        raise ValueError("locality_profile: the model's input gradients are not finite")
    counts.fill_diagonal_(0)
    matrix = torch.where(counts > 0, sums / counts, torch.nan)
    return LocalityProfile(matrix, counts, patches, size, chosen, total)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Puts a module and all within it into ``eval()``, and gives each its own mode back after."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def as_the_model(model: Any, images: Tensor) -> Tensor:
    """Images on the device and in the dtype of a module's first parameter; others as they are."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return images if first is None else images.to(first.device, first.dtype)


def _check_images(name: str, images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or len(images) < 2:
        raise ValueError(
            f"{name}: images must be two or more [M, C, H, W] of real numbers, got {images.dtype} "
            f"{list(images.shape)}"
        )


def _draw(patches: int, replaced: int | None, seed: int) -> tuple[int, ...]:
    if replaced is None:
        return tuple(range(patches))
    if not 1 <= replaced <= patches:
        raise ValueError(
            f"locality_profile: replaced must be in 1..{patches}, the number of patches, got "
            f"{replaced}"
        )
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:replaced].tolist()))


def _gradients(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None, patches: tuple[Patch, ...]
) -> tuple[Tensor, Tensor | None]:
    """Gradients ``[B, P, C * side^2]`` float64, and the classes whose logits were taken."""
    x = x.detach().requires_grad_()
    outputs = model(x)
    if y is None and isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1:
        y = outputs.detach().argmax(1)
    target = target_outputs(outputs, y, len(x)).sum()
    found = None
    if target.requires_grad:
        (found,) = torch.autograd.grad(target, x, allow_unused=True)
    if found is None:
        raise ValueError("locality_profile: the model's output does not depend on the images")
    first, last = patches[0], patches[-1]
    side = first.bottom - first.top
    grid = found[:, :, first.top : last.bottom, first.left : last.right]
    squares = grid.unfold(2, side, side).unfold(3, side, side)  # [B, C, rows, columns, side, side]
    # One minus a cosine is the square of a small angle: float32 would hide those below 3e-4.
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2).double(), y


def _couplings(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """For each patch the sum over the samples of 1 - |cos|, and how many of them count."""
    samples, patches, length = before.shape
    cosine = absolute_cosine(before.reshape(-1, length), after.reshape(-1, length))
    counts = ((before != 0).any(2) | (after != 0).any(2)).reshape(samples, patches)
    change = (1 - cosine.reshape(samples, patches)).clamp_min(0)
    return torch.where(counts, change, 0.0).sum(0), counts.sum(0)


def _slices(patch: Patch) -> tuple[slice, ...]:
    rows, columns = slice(patch.top, patch.bottom), slice(patch.left, patch.right)
    return slice(None), slice(None), rows, columns


def _some(indices: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return shown if len(indices) <= 8 else f"{shown}, ... ({len(indices)} in all)"
