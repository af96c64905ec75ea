"""Image files in a folder for each class."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np

from htflearn.complete.images import image_formats, picture_errors
from htflearn.errors import UserError, reason
from htflearn.locality.area import area_average

__all__ = ["read_folders"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_GRAY = ("1", "L", "LA")
_DEEP = ("I", "F")


def read_folders(
    place: Path, split: str, size: int | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None:
    """Images, labels and class names of ``place/train/<class>/*`` and ``place/test/<class>/*``
    (or ``val``), or of ``place/<class>/*``.

    Without folders for the splits, a fifth of each class is for testing: the files whose names have
    the largest hashes, wherever the folder lies and on every machine.

    Args:
        place: the folder.
        split: ``"train"`` or ``"test"``.
        size: height and width to bring every image to, by averaging over areas.

    Returns:
        images ``[M, C, H, W]`` uint8, of one channel where all images are gray and else of three,
        labels ``[M]`` int64 and the names; None where there are no folders of images.

    Raises:
        UserError: a split or all images of a class are missing, an image cannot be read, or images
            differ in size and no ``size`` is given.

    Example:
        >>> images, labels, names = read_folders(Path("photos"), "train", size=32)
        >>> images.shape
        (400, 3, 32, 32)
    """
    if _subfolders(place / "train"):
        wanted = ("train",) if split == "train" else ("test", "val")
        root = next((place / name for name in wanted if _subfolders(place / name)), None)
        if root is None:
            raise UserError(
                f"expected a folder {' or '.join(wanted)} with a folder of images for each class "
                f"in {place}, but there is none"
            )
        files = {folder.name: _images_in(folder) for folder in _subfolders(root)}
    else:
        root = place
        files = {folder.name: _images_in(folder) for folder in _subfolders(root)}
        if not any(files.values()):
            return None
        files = {name: _part(root / name, paths, split) for name, paths in files.items()}
    for name, paths in files.items():
        if not paths:
            raise UserError(f"expected images in {root / name}, but the class has none")
    arrays = _read_equal([path for paths in files.values() for path in paths], size)
    channels = max(len(array) for array in arrays)
    images = np.stack([np.broadcast_to(a, (channels, *a.shape[1:])) for a in arrays])
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    return images, labels, tuple(files)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    paths = (p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    return sorted(p for p in paths if p.is_file() and not p.name.startswith("."))


def _part(folder: Path, paths: list[Path], split: str) -> list[Path]:
    if len(paths) == 1:
        raise UserError(
            f"expected two images or more in {folder}, for training and for testing, but there is "
            "one"
        )
    ordered = sorted(paths, key=lambda p: (hashlib.sha256(p.name.encode()).digest(), p.name))
    kept = len(paths) - max(1, round(len(paths) / 5)) if paths else 0
    return sorted(ordered[:kept] if split == "train" else ordered[kept:])


def _read_equal(paths: list[Path], size: int | None) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    for path in paths:
        array = _read(path)
        if size is not None:
            array = area_average(array[None], size)[0]
        if arrays and array.shape[1:] != arrays[0].shape[1:]:
            raise UserError(
                f"expected images of equal size, but {paths[0]} has {_size(arrays[0])} pixels and "
                f"{path} {_size(array)}; give a size to bring them to"
            )
        arrays.append(array)
    return arrays


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[2]}"


def _read(path: Path) -> np.ndarray:
    """``[1 or 3, H, W]`` uint8."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=image_formats()) as image:
                deep = image.mode.startswith(_DEEP)
                pixels = np.array(image.convert("L" if image.mode in _GRAY else "RGB"))
    except picture_errors() as error:
        raise UserError(f"{path} cannot be read as an image: {reason(error)}") from error
    if deep:
        raise UserError(f"expected an image of 8 bits a channel, but {path} has more")
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
