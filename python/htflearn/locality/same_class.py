"""Is Same Class: two images on a canvas, and whether they show the same class.

The data set of Razin, Maman and Cohen (Implicit Regularization in Hierarchical Tensor Factorization
and Deep Convolutional Neural Networks, ICML 2022): the further apart the images stand, the further
a network has to see.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from htflearn.errors import UserError
from htflearn.locality.area import area_average
from htflearn.locality.labelled import LabelledImages, Split, mean_std, read_labelled
from htflearn.locality.patches import Patch

__all__ = ["SameClass", "SameClassSetting", "same_class"]


@dataclass(frozen=True)
class SameClassSetting:
    """Where the two images stand, and how many pairs there are.

    Attributes:
        distance: pixels between the images.
        canvas: height and width.
        image_size: height and width to bring the images to, by averaging over areas; None keeps
            them as they are.
        train_pairs, test_pairs: how many pairs each split has.
        seed: of the choice of pairs.

    Raises:
        ValueError: a number that is negative or, but for the distance and the seed, zero; or images
            of ``image_size`` do not fit the canvas.

    Example:
        >>> SameClassSetting(distance=100).patches(32, 32)[0]
        Patch(top=96, left=30, bottom=128, right=62)
    """

    distance: int = 0
    canvas: tuple[int, int] = (224, 224)
    image_size: int | None = None
    train_pairs: int = 5000
    test_pairs: int = 10000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.distance < 0 or self.seed < 0:
            raise ValueError(
                "SameClassSetting: distance and seed must not be negative, got "
                f"{self.distance} and {self.seed}"
            )
        if len(self.canvas) != 2 or min(self.canvas) < 1:
            raise ValueError(
                "SameClassSetting: canvas must be a positive height and width, got "
                f"{tuple(self.canvas)}"
            )
        for name in ("train_pairs", "test_pairs", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"SameClassSetting: {name} must be positive, got {value}")
        if self.image_size is not None:
            self.patches(self.image_size, self.image_size)

    def patches(self, image_height: int, image_width: int) -> tuple[Patch, Patch]:
        """Where the images stand: both in the middle of the height, symmetric about the middle of
        the width. Where the pixels left over are odd in number, the odd one is below or at the
        right.

        Args:
            image_height, image_width: of an image on the canvas, after any change of size.

        Returns:
            ``(top, left, bottom, right)`` of the left and of the right image, bottom and right
            exclusive.

        Raises:
            ValueError: the images do not fit the canvas.

        Example:
            >>> SameClassSetting(distance=16, canvas=(14, 44)).patches(14, 14)[1]
            Patch(top=0, left=30, bottom=14, right=44)
        """
        height, width = self.canvas
        most = width - 2 * image_width
        if image_height > height or most < 0:
            raise ValueError(
                f"SameClassSetting: two images of {image_height} x {image_width} pixels do not fit "
                f"a canvas of {height} x {width}; {height} x {width // 2} fit at most"
            )
        if self.distance > most:
            raise ValueError(
                f"SameClassSetting: two images of {image_height} x {image_width} pixels fit a "
                f"canvas of {height} x {width} at a distance of {most} at most, got {self.distance}"
            )
        top, left = (height - image_height) // 2, (most - self.distance) // 2
        bottom, right = top + image_height, left + image_width
        shift = image_width + self.distance
        first = Patch(top, left, bottom, right)
        return first, Patch(top, left + shift, bottom, right + shift)


class SameClass:
    """Pairs of images and, made when asked for, the canvases they stand on.

    Half of the pairs are of the same class (of an odd number, the smaller half); the classes, and
    the pairs of different classes, are equally frequent but for rounding. No image is paired with
    itself, and no pair comes twice unless its classes have too few images. The pairs depend on the
    images' labels, the seed, the split and the epoch only: canvases of other distances show the
    same pairs.

    Args:
        images: of the split; pairs are drawn from these only.
        setting: where the images stand, how many pairs there are, and the seed.
        split: ``"train"`` or ``"test"``.
        background: value of the canvas around the images, for all channels or for each. It is
            black (0); with the mean of each channel it is zero once the mean is subtracted.

    Raises:
        ValueError: the images do not fit the canvas, or the background does not fit the channels.
        UserError: a class has a single image.

    Attributes:
        setting, split: as given.
        names: of the classes.
        images: ``[M, C, h, w]`` uint8, in the size they have on the canvas.
        pairs: ``[len, 2]`` int64, which of the images stands left and which right.
        labels: ``[len]`` int64, 1 where both are of the same class, else 0.
        shape: ``(C, H, W)`` of a canvas.
        patches: where the two images stand, see :meth:`SameClassSetting.patches`.

    Example:
        >>> images = read_labelled("/usr/share/datasets/fashion-mnist", "train")
        >>> data = SameClass(images, SameClassSetting(distance=100), "train")
        >>> data.batch(range(64)).shape
        torch.Size([64, 1, 224, 224])
    """

    def __init__(
        self,
        images: LabelledImages,
        setting: SameClassSetting,
        split: Split,
        background: int | Sequence[int] = 0,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f'SameClass: split must be "train" or "test", got {split!r}')
        lone = np.flatnonzero(np.bincount(images.labels) == 1)
        if len(lone):
            raise UserError(
                f"expected two images or more of every class, to make pairs of, but "
                f"{images.source} has one of {images.names[lone[0]]}"
            )
        self.setting, self.split, self.names = setting, split, images.names
        pixels = images.images
        if setting.image_size is not None:
            pixels = area_average(pixels, setting.image_size)
        channels, height, width = pixels.shape[1:]
        self.patches = setting.patches(height, width)
        self.shape = (channels, *setting.canvas)
        self.images = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        self._background = _per_channel(background, channels)
        self._classes = images.labels
        # The places of each class's images.
        self._places = [np.flatnonzero(images.labels == c) for c in range(len(images.names))]
        self.redraw(0)

    def __len__(self) -> int:
        return len(self.labels)

    def redraw(self, epoch: int) -> None:
        """Draws the pairs of an epoch in place of those there are: more data, from the same images.

        Args:
            epoch: the same pairs come again for the same one; 0 are those from the beginning.

        Raises:
            ValueError: ``epoch`` is negative.

        Example:
            >>> data.redraw(epoch=3)
            >>> data.pairs.shape
            torch.Size([5000, 2])
        """
        if epoch < 0:
            raise ValueError(f"SameClass: epoch must not be negative, got {epoch}")
        train = self.split == "train"
        count = self.setting.train_pairs if train else self.setting.test_pairs
        rng = np.random.default_rng([self.setting.seed, 0 if train else 1, epoch])
        same = _same(self._places, count // 2, rng)
        different = _different(self._places, count - count // 2, rng)
        order = rng.permutation(count)
        device = self.images.device
        self.pairs = torch.from_numpy(np.concatenate([same, different])[order]).to(device)
        self.labels = torch.from_numpy((order < len(same)).astype(np.int64)).to(device)

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The canvases of some pairs.

        Args:
            indices: ``[B]``, which pairs.

        Returns:
            ``[B, C, H, W]`` uint8, on the device of the images.

        Raises:
            IndexError: an index outside the pairs.

        Example:
            >>> data.batch([0, 7]).shape
            torch.Size([2, 1, 224, 224])
        """
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        pairs = self.pairs[rows]
        canvases = self._background.expand(len(pairs), *self.shape).contiguous()
        for side, (top, left, bottom, right) in enumerate(self.patches):
            canvases[:, :, top:bottom, left:right] = self.images[pairs[:, side]]
        return canvases

    def describe(self, indices: Sequence[int] | Tensor) -> list[str]:
        """What the label of some pairs says, and the classes of their two images, in two lines.

        Args:
            indices: ``[B]``, which pairs.

        Example:
            >>> data.describe([0])
            ['different\\ntrouser, ankle boot']
        """
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        labels, pairs = self.labels[rows].tolist(), self.pairs[rows].tolist()
        return [
            f"{'same class' if same else 'different'}\n"
            + ", ".join(_short(self.names[self._classes[image]]) for image in pair)
            for same, pair in zip(labels, pairs, strict=True)
        ]

    def to(self, device: Any) -> SameClass:
        """The same pairs with images on another device, where the canvases are then made."""
        moved = copy.copy(self)
        moved.images, moved.pairs = self.images.to(device), self.pairs.to(device)
        moved.labels, moved._background = self.labels.to(device), self._background.to(device)
        return moved


def same_class(
    path: str | os.PathLike[str],
    setting: SameClassSetting,
    background: Literal["black", "mean"] = "black",
) -> tuple[SameClass, SameClass]:
    """The training and the test set made of a set of labelled images on the disk.

    Args:
        path: see :func:`htflearn.locality.labelled.read_labelled`.
        setting: where the images stand, and how many pairs there are.
        background: of the canvases; ``"mean"`` is the rounded mean of each channel of the training
            images, as if the images were normalized before they are put on canvases of zeros.

    Returns:
        training pairs, of training images only, and test pairs, of test images only.

    Raises:
        ValueError: the images do not fit the canvas, or there is no such background.
        UserError: the images cannot be read, or those of the splits differ in shape.

    Example:
        >>> train, test = same_class("/usr/share/datasets/fashion-mnist", SameClassSetting(100))
        >>> len(train), len(test)
        (5000, 10000)
    """
    if background not in ("black", "mean"):
        raise ValueError(f'same_class: background must be "black" or "mean", got {background!r}')
    train = read_labelled(path, "train", setting.image_size)
    test = read_labelled(path, "test", setting.image_size)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"expected training and test images of equal shape, but {path} has images of "
            f"{list(train.images.shape[1:])} and {list(test.images.shape[1:])}"
        )
    value: list[int] | int = 0
    if background == "mean":
        value = mean_std(train.images)[0].round().int().tolist()
    return SameClass(train, setting, "train", value), SameClass(test, setting, "test", value)


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _per_channel(background: int | Sequence[int], channels: int) -> Tensor:
    """``[C, 1, 1]`` uint8."""
    values = [background] * channels if isinstance(background, int) else list(background)
    if len(values) != channels or not all(0 <= v <= 255 for v in values):
        raise ValueError(
            f"SameClass: background must be in 0..255, one value or {channels}, got {background}"
        )
    return torch.tensor(values, dtype=torch.uint8)[:, None, None]


def _same(places: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """``[count, 2]``: pairs of two images of one class."""
    classes = len(places)
    chosen = rng.permutation(classes)[np.arange(count) % classes]
    parts = [np.empty((0, 2), np.int64)]
    for own, number in zip(places, np.bincount(chosen, minlength=classes), strict=True):
        size = len(own)
        code = _distinct(size * (size - 1) // 2, int(number), rng)
        # Going round the class by at most half of it meets each unordered pair once.
        first = code % size
        second = (first + code // size + 1) % size
        swap = rng.random(len(code)) < 0.5
        ordered = np.where(swap[:, None], np.c_[second, first], np.c_[first, second])
        parts.append(own[ordered])
    return np.concatenate(parts)


def _different(places: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """``[count, 2]``: pairs of images of two classes."""
    classes = len(places)
    order, step = rng.permutation(classes), np.arange(count)
    # Each round has every class once at the left and once at the right; the rounds shift the right
    # ones, so that all pairs of classes come equally often.
    left = order[step % classes]
    right = order[(step + 1 + step // classes % (classes - 1)) % classes]
    numbers = np.bincount(left * classes + right, minlength=classes**2).reshape(classes, classes)
    parts = [np.empty((0, 2), np.int64)]
    for a in range(classes):
        for b in range(a + 1, classes):
            size = len(places[b])
            code = _distinct(len(places[a]) * size, int(numbers[a, b] + numbers[b, a]), rng)
            rng.shuffle(code)
            pairs = np.c_[places[a][code // size], places[b][code % size]]
            parts += [pairs[: numbers[a, b]], pairs[numbers[a, b] :, ::-1]]
    return np.concatenate(parts)


def _distinct(among: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``[count]`` int64 in ``0..among - 1``, distinct unless there are more, then evenly spread."""
    chosen = rng.choice(among, count % among, replace=False, shuffle=False)
    if count < among:
        return chosen
    return np.concatenate([np.tile(np.arange(among), count // among), chosen])
