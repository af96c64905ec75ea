"""IDX files, the format that MNIST and Fashion-MNIST are distributed in."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from htflearn.complete.files import reason
from htflearn.errors import UserError

__all__ = ["read_idx", "read_idx_folder"]

_PREFIX = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES = 0x08


def read_idx_folder(place: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images and labels of a folder of IDX files.

    Args:
        place: the folder, or the one around a folder ``raw``.
        split: ``"train"`` or ``"test"``.

    Returns:
        images ``[M, 1, H, W]`` uint8 and labels ``[M]`` uint8; None where there are no such files.

    Raises:
        UserError: a file is missing or damaged, or images and labels differ in number.

    Example:
        >>> images, labels = read_idx_folder(Path("/usr/share/datasets/fashion-mnist"), "test")
        >>> images.shape
        (10000, 1, 28, 28)
    """
    for folder in (place, place / "raw"):
        found = {
            (which, kind): _find(folder, prefix, kind)
            for which, prefix in _PREFIX.items()
            for kind in ("images-idx3", "labels-idx1")
        }
        if any(found.values()):
            break
    else:
        return None
    paths = []
    for kind in ("images-idx3", "labels-idx1"):
        path = found[split, kind]
        if path is None:
            name = f"{_PREFIX[split]}-{kind}-ubyte"
            raise UserError(f"expected the file {name} or {name}.gz in {folder}, but it is missing")
        paths.append(path)
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise UserError(
            f"expected a label for each image, but {paths[0]} holds {len(images)} images and "
            f"{paths[1]} {len(labels)} labels"
        )
    return images[:, None], labels


def _find(folder: Path, prefix: str, kind: str) -> Path | None:
    names = [f"{prefix}-{kind}-ubyte", f"{prefix}-{kind}-ubyte".replace("-idx", ".idx")]
    paths = [folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, compressed by gzip or not.

    Args:
        path: the file; one that ends in ``.gz`` is decompressed.
        ndim: how many dimensions are expected.

    Returns:
        uint8, of ``ndim`` dimensions.

    Raises:
        UserError: the file cannot be read, is no IDX file of unsigned bytes with that many
            dimensions, or is shorter or longer than its header says.

    Example:
        >>> read_idx(Path("t10k-labels-idx1-ubyte.gz"), 1).shape
        (10000,)
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    header = 4 + 4 * ndim
    magic = bytes((0, 0, _UNSIGNED_BYTES, ndim))
    if content[:4] != magic or len(content) < header:
        raise UserError(
            f"expected an IDX file of unsigned bytes with {ndim} dimensions, which starts with "
            f"{magic.hex(' ')}, but {path} has {len(content)} bytes and starts with "
            f"{content[:4].hex(' ') or 'nothing'}"
        )
    shape = [int(d) for d in np.frombuffer(content, ">u4", ndim, offset=4)]
    expected = header + prod(shape)
    if len(content) != expected:
        raise UserError(
            f"expected {expected} bytes for the dimensions {shape}, but {path} has {len(content)}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
