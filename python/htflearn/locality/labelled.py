"""Labelled images from files on the disk. Nothing is ever downloaded."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from htflearn.errors import UserError
from htflearn.locality.area import area_average
from htflearn.locality.cifar import read_cifar
from htflearn.locality.folders import read_folders
from htflearn.locality.idx import read_idx_folder

__all__ = ["LabelledImages", "Split", "mean_std", "read_labelled"]

Split = Literal["train", "test"]

_EXPECTED = (
    "IDX files (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the same of t10k), "
    "CIFAR-10 or CIFAR-100 (cifar-10-batches-py, cifar-10-batches-bin or their .tar.gz), or a "
    "folder of images for each class, also below train and test"
)
_SOURCES = (
    "nothing is downloaded: CIFAR-10 is at https://www.cs.toronto.edu/~kriz/cifar.html, and "
    "Debian's package dataset-fashion-mnist puts Fashion-MNIST in /usr/share/datasets/fashion-mnist"
)
_FASHION_MNIST = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# CRC-32 of its labels in training and in test: its files are called as those of MNIST are.
_FASHION_MNIST_LABELS = {0x2ED6E46A, 0x242BC73F}


@dataclass(frozen=True)
class LabelledImages:
    """Images of equal size, each of one class.

    Attributes:
        images: ``[M, C, H, W]`` uint8.
        labels: ``[M]`` int64, places in ``names``.
        names: of the classes, two or more, none of them without an image.
        source: where the images are from, for messages and reports.

    Raises:
        ValueError: arrays of another shape or dtype.
        UserError: fewer than two classes, a class without images, or a label outside the classes.

    Example:
        >>> images = np.zeros((2, 1, 4, 4), np.uint8)
        >>> LabelledImages(images, np.array([0, 1]), ("cat", "dog"), "made up").names
        ('cat', 'dog')
    """

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4:
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"LabelledImages: images must be uint8 [M, C, H, W], got {got}")
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"LabelledImages: labels must be int64 [{len(images)}], got {got}")
        if not images.size:
            raise UserError(f"expected images, but {self.source} holds none")
        outside = np.flatnonzero((labels < 0) | (labels >= len(self.names)))
        if len(outside):
            raise UserError(
                f"expected labels in 0..{len(self.names) - 1}, the places of the class names, but "
                f"image {outside[0]} of {self.source} has the label {labels[outside[0]]}"
            )
        if len(self.names) < 2:
            raise UserError(f"expected two classes or more, but {self.source} has only one")
        empty = np.flatnonzero(np.bincount(labels, minlength=len(self.names)) == 0)
        if len(empty):
            name = self.names[empty[0]]
            raise UserError(
                f"expected images of every class, but {self.source} has none of {name[:80]}"
            )


def read_labelled(
    path: str | os.PathLike[str], split: Split, size: int | None = None
) -> LabelledImages:
    """Reads one of the two splits of a set of labelled images; what ``path`` is, is found out.

    Args:
        path: a folder of IDX files as MNIST and Fashion-MNIST have (the distinct labels are the
            classes' names, but Fashion-MNIST, known by its labels, has words); CIFAR-10 or
            CIFAR-100 in the Python or binary version, its folder, the one around it or the archive;
            or image files in ``train/<class>`` and ``test/<class>`` (or ``val``), or in
            ``<class>``; a fifth of the images is then for testing.
        split: ``"train"`` or ``"test"``.
        size: height and width to bring every image to, by averaging over areas.

    Returns:
        the images, in the files' order.

    Raises:
        ValueError: there is no such split, or ``size`` is not positive.
        UserError: there is nothing there or nothing known, a file is missing or damaged, image
            files differ in size, or see :class:`LabelledImages`.

    Example:
        >>> data = read_labelled("/usr/share/datasets/fashion-mnist", "train")
        >>> data.images.shape
        (60000, 1, 28, 28)
    """
    if split not in get_args(Split):
        raise ValueError(f'read_labelled: split must be "train" or "test", got {split!r}')
    if size is not None and size < 1:
        raise ValueError(f"read_labelled: size must be positive, got {size}")
    place = Path(path)
    if not place.exists():
        raise UserError(f"there is no {place}; expected {_EXPECTED}; {_SOURCES}")
    images, labels, names = _read(place, split, size)
    if size is not None:
        images = area_average(images, size)
    source = f"{split} of {place}"
    return LabelledImages(images, labels.astype(np.int64), names, source)


def _read(
    place: Path, split: Split, size: int | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    idx = read_idx_folder(place, split)
    if idx is not None:
        # The files name no classes, and some sets count theirs from 1.
        classes, labels = np.unique(idx[1], return_inverse=True)
        known = zlib.crc32(idx[1].tobytes()) in _FASHION_MNIST_LABELS
        return idx[0], labels, _FASHION_MNIST if known else tuple(str(c) for c in classes)
    found = read_cifar(place, split) or read_folders(place, split, size)
    if found is None:
        raise UserError(f"expected {_EXPECTED} in {place}, but there is none of them; {_SOURCES}")
    return found


def mean_std(images: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, in units of the pixels' values 0..255.

    Args:
        images: ``[M, C, H, W]`` uint8, such as ``LabelledImages.images`` of the training set.

    Returns:
        two tensors ``[C]`` float32.

    Example:
        >>> mean, std = mean_std(read_labelled("/usr/share/datasets/fashion-mnist", "train").images)
        >>> mean.round(), std.round()
        (tensor([73.]), tensor([90.]))
    """
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    counts = np.zeros((array.shape[1], 256), np.int64)
    for start in range(0, len(array), 1024):
        for channel, values in enumerate(array[start : start + 1024].swapaxes(0, 1)):
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()
