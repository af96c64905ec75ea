"""IDX files, the format that MNIST and Fashion-MNIST are distributed in."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from htflearn.errors import UserError, reason
from htflearn.files import check_fits

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
    header = 4 + 4 * ndim
    magic = bytes((0, 0, _UNSIGNED_BYTES, ndim))
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(header)
            if start[:4] != magic or len(start) < header:
                raise UserError(
                    f"expected an IDX file of unsigned bytes with {ndim} dimensions, which starts "
                    f"with {magic.hex(' ')}, but {path} starts with {start.hex(' ') or 'nothing'}"
                )
            shape = [int(d) for d in np.frombuffer(start, ">u4", ndim, offset=4)]
            size = prod(shape)
            check_fits(size, str(path))
            content = file.read(size + 1)  # a packed file may go on without end
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    if len(content) != size:
        found = f"{header + len(content)} bytes" + (" or more" if len(content) > size else "")
        raise UserError(
            f"expected {header + size} bytes for the dimensions {shape}, but {path} has {found}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape).copy()
