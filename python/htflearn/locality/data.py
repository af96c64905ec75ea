"""The samples of a training: images for a batch, labels, statistics, and patches to regularize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from htflearn.errors import UserError
from htflearn.locality.area import area_average
from htflearn.locality.labelled import mean_std
from htflearn.locality.patches import FixedPatches, PatchSampler, RandomSquares
from htflearn.locality.pathfinder import generate
from htflearn.locality.same_class import same_class
from htflearn.locality.setting import Case, Setting
from htflearn.locality.shards import ShardedImages

__all__ = ["Data", "Images", "Pictures", "load", "make_pictures"]

_SEED = 0  # of Pathfinder's pictures, which all trainings of a grid share
_SPLITS = ("train", "test")


class Images(Protocol):
    """Images with labels 0 and 1."""

    labels: Tensor
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """uint8 ``[B, C, H, W]``, on the device of the data."""
        ...

    def describe(self, indices: Tensor) -> list[str]:
        """What the label of each sample says, in words."""
        ...

    def to(self, device: Any) -> Any:
        """The same on a device."""
        ...


class Data(NamedTuple):
    """What a training and its test need.

    Attributes:
        train, test: the samples.
        mean, std: of each channel ``[C]``, in units of the pixels' values.
        sampler: patches for the regularizer.
    """

    train: Images
    test: Images
    mean: Tensor
    std: Tensor
    sampler: PatchSampler


class Pictures:
    """A finished set of pictures in memory.

    Args:
        path: see :class:`htflearn.locality.shards.ShardedImages`.
        size: height and width to average them to, or None.

    Raises:
        UserError: the set is not whole.
    """

    def __init__(self, path: Path, size: int | None) -> None:
        source = ShardedImages(path)
        parts = []
        for start in range(0, len(source), 1024):
            images = source.images(range(start, min(start + 1024, len(source))))[:, None]
            parts.append(images if size is None else area_average(images, size))
        self.images = torch.from_numpy(np.concatenate(parts))
        self.labels = torch.from_numpy(source.labels)
        self.shape: tuple[int, int, int] = tuple(self.images.shape[1:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Tensor:
        """uint8 ``[B, 1, H, W]``."""
        return self.images[indices.to(self.images.device)]

    def describe(self, indices: Tensor) -> list[str]:
        """Whether the dots of each are on one path or on two."""
        return ["one path" if label else "two paths" for label in self.labels[indices].tolist()]

    def to(self, device: Any) -> Pictures:
        """The same on a device."""
        self.images = self.images.to(device)
        return self


def make_pictures(
    setting: Setting,
    folder: Path,
    processes: int,
    progress: Callable[[str, int, int], None] = lambda title, done, count: None,
) -> None:
    """Makes the pictures of Pathfinder that a grid needs and are not there yet.

    Args:
        setting: of the grid.
        folder: gets ``length-N/train`` and ``length-N/test``.
        processes: that work at once.
        progress: called with what is being made, how many there are and how many there will be.

    Raises:
        UserError: the folder holds other pictures, or cannot be written.
    """
    for length in setting.distances:
        for split, count in zip(_SPLITS, (setting.train_size, setting.test_size), strict=True):
            title = f"pictures, {length} dashes, {split}"

            def report(done: int, title: str = title, count: int = count) -> None:
                progress(title, done, count)

            place = folder / f"length-{length}" / split
            generate(setting.pathfinder(length), count, place, _SEED, processes, split, report)


def load(setting: Setting, case: Case, folder: Path) -> Data:
    """The samples of one training.

    Args:
        setting: of the grid.
        case: which training.
        folder: of Pathfinder's pictures, see :func:`make_pictures`.

    Raises:
        UserError: the images cannot be read, or do not fit the canvas.
    """
    if setting.task == "pathfinder":
        place = folder / f"length-{case.distance}"
        known, unknown = (Pictures(place / split, setting.image_size) for split in _SPLITS)
        mean, std = mean_std(known.images)
        return Data(known, unknown, mean, std, RandomSquares(setting.patch, seed=case.seed))
    if setting.data is None:
        raise UserError(
            "--data must name a folder of labelled images (CIFAR-10, MNIST or Fashion-MNIST files, "
            "or a folder of images for each class); nothing is downloaded"
        )
    try:
        train, test = same_class(setting.data, setting.same_class(case), "mean")
    except ValueError as error:
        raise UserError(str(error)) from error
    mean, std = mean_std(train.images)
    return Data(train, test, mean, std, FixedPatches(train.patches, case.seed))
