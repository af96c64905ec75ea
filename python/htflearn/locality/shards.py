"""Images and labels on disk, in shards that are memory-mapped.

A directory holds ``plan.json`` (what is being made, written first), ``images-N.npy`` (uint8
``[n, H, W]`` or ``[n, C, H, W]``) with ``labels-N.npy``, and ``meta.json`` (the plan with sizes and
checksums, written last: where it is, the data set is whole). A shard is written under another name,
synced and renamed, its images last: where they are, the shard is whole.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.errors import UserError, reason, writable_directory
from htflearn.files import read_object, remove_drafts, replace_file, whole_file
from htflearn.options import shown

__all__ = ["ShardWriter", "ShardedImages", "write_shard"]

_FORMAT = 1
_PLAN, _META = "plan.json", "meta.json"
_Path = str | os.PathLike[str]


class ShardWriter:
    """A data set in the making, by one process at a time.

    Args:
        path: the directory; made where it is missing.
        count: of images.
        shape: of an image, ``(H, W)`` or ``(C, H, W)``.
        about: what is being made, as JSON holds it. A directory of something else is refused.
        shard_size: images of a shard, but for the last.

    Raises:
        ValueError: the count or the shard size is not positive.
        UserError: the directory holds another data set, or cannot be written.

    Example:
        >>> writer = ShardWriter("data/train", 1000, (64, 64), {"generator": "noise"}, 500)
        >>> for shard in writer.missing():
        ...     write_shard(writer.path, shard, *make(writer.indices(shard)))
        >>> writer.finish()
    """

    def __init__(
        self,
        path: _Path,
        count: int,
        shape: tuple[int, ...],
        about: dict[str, Any],
        shard_size: int = 1024,
    ) -> None:
        if count < 1 or shard_size < 1:
            raise ValueError(
                f"expected a count and a shard size from 1, got {count} and {shard_size}"
            )
        plan = {
            "format": _FORMAT,
            "count": count,
            "shape": list(shape),
            "dtype": "uint8",
            "shard_size": shard_size,
            **about,
        }
        self._plan: dict[str, Any] = json.loads(json.dumps(plan))
        self.path = Path(path)
        if self.path.is_dir():
            self._refuse_another()
        writable_directory(self.path)
        remove_drafts(self.path)
        if not (self.path / _PLAN).exists():
            replace_file(self.path / _PLAN, json.dumps(self._plan, indent=1) + "\n")

    def indices(self, shard: int) -> range:
        """Which images a shard holds."""
        size = self._plan["shard_size"]
        return range(shard * size, min((shard + 1) * size, self._plan["count"]))

    def missing(self) -> list[int]:
        """Shards that are not there, or not whole."""
        missing = [shard for shard in range(self._shards) if not self._whole(shard)]
        if missing:
            (self.path / _META).unlink(missing_ok=True)  # the data set is whole no longer
        return missing

    def finish(self) -> None:
        """Writes the checksums: from now on the data set is whole.

        Raises:
            UserError: a shard is missing.
        """
        missing = self.missing()
        if missing:
            raise UserError(f"{self.path} lacks {len(missing)} of its {self._shards} shards")
        if (self.path / _META).exists():
            return
        shards = [
            {
                "count": len(self.indices(shard)),
                "images": _checksum(self.path / _images(shard)),
                "labels": _checksum(self.path / _labels(shard)),
            }
            for shard in range(self._shards)
        ]
        text = json.dumps({**self._plan, "shards": shards}, indent=1)
        replace_file(self.path / _META, text + "\n")

    @property
    def _shards(self) -> int:
        return -(-self._plan["count"] // self._plan["shard_size"])

    def _refuse_another(self) -> None:
        try:
            there = read_object(self.path / _PLAN)
        except FileNotFoundError:
            if any(self.path.glob("images-*.npy")) or (self.path / _META).exists():
                raise UserError(
                    f"{self.path} holds images, but no {_PLAN} that says of what; give an empty "
                    "directory"
                ) from None
            return
        if there == self._plan:
            return
        differs = _first_difference(there, self._plan)
        raise UserError(f"{self.path} holds another data set ({differs}); give another directory")

    def _whole(self, shard: int) -> bool:
        shape = (len(self.indices(shard)), *self._plan["shape"])
        try:
            _map(self.path / _images(shard), shape)
            _map(self.path / _labels(shard), shape[:1])
        except UserError:
            return False
        return True


class ShardedImages:
    """A finished data set, memory-mapped: only what is asked for is read.

    Args:
        path: the directory.

    Attributes:
        path: the directory.
        meta: of ``meta.json``: count, shape, how the images were made, the shards' checksums.
        labels: int64 ``[count]``.

    Raises:
        UserError: the data set is not finished, or a file of it is missing, damaged or of another
            size. The images' checksums take a whole reading: see :meth:`verify`.

    Example:
        >>> data = ShardedImages("data/train")
        >>> data.images([0, 7, 3]).shape, data.labels[[0, 7, 3]]
        ((3, 64, 64), array([1, 0, 0]))
    """

    def __init__(self, path: _Path) -> None:
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        shape = tuple(self.meta["shape"])
        sizes = [shard["count"] for shard in self.meta["shards"]]
        self._ends = np.cumsum(sizes)
        self._images = [_map(self.path / _images(i), (n, *shape)) for i, n in enumerate(sizes)]
        for i, n in enumerate(sizes):
            _map(self.path / _labels(i), (n,))
            self._check(_labels(i), self.meta["shards"][i]["labels"])
        self.labels = np.concatenate(
            [np.load(self.path / _labels(i)) for i in range(len(sizes))]
        ).astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardedImages, (self.path,)  # to another process goes the path, not what is mapped

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        return tuple(self.meta["shape"])

    def images(self, indices: Any) -> np.ndarray:
        """Images in the order asked for.

        Args:
            indices: whole numbers ``[n]``; negative ones count from the end.

        Returns:
            a copy, uint8 ``[n, H, W]`` or ``[n, C, H, W]``.

        Raises:
            IndexError: there is no such image.
        """
        asked = np.asarray(indices, np.int64).reshape(-1)
        beyond = (asked < -len(self)) | (asked >= len(self))
        if beyond.any():
            raise IndexError(f"expected indices below {len(self)}, got {asked[beyond][0]}")
        asked = asked % len(self)
        result = np.empty((len(asked), *self.shape), np.uint8)
        shards = np.searchsorted(self._ends, asked, side="right")
        for shard in np.unique(shards):
            here = shards == shard
            begin = self._ends[shard] - len(self._images[shard])
            result[here] = self._images[shard][asked[here] - begin]
        return result

    def verify(self) -> None:
        """Compares every checksum, which reads all images.

        Raises:
            UserError: a file is not as it was written.
        """
        for i, shard in enumerate(self.meta["shards"]):
            self._check(_images(i), shard["images"])
            self._check(_labels(i), shard["labels"])

    def _check(self, name: str, expected: int) -> None:
        if _checksum(self.path / name) != expected:
            raise UserError(f"{self.path / name} is damaged: remove it and generate again")


def write_shard(path: _Path, shard: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes a shard, whole or not at all.

    Args:
        path: the directory of a :class:`ShardWriter`.
        shard: its number.
        images: uint8 ``[n, H, W]`` or ``[n, C, H, W]``.
        labels: whole numbers from 0 to 255, ``[n]``.

    Raises:
        UserError: it cannot be written.

    Example:
        >>> write_shard("data/train", 0, np.zeros((2, 8, 8), np.uint8), np.array([0, 1]))
    """
    folder = Path(path)
    try:
        for name, array in ((_labels(shard), labels), (_images(shard), images)):
            with whole_file(folder / name) as draft, open(draft, "wb") as file:
                np.save(file, np.ascontiguousarray(array, np.uint8))
    except OSError as error:
        raise UserError(
            f"the shard {folder / _images(shard)} cannot be written: {reason(error)}"
        ) from error


def _images(shard: int) -> str:
    return f"images-{shard:05d}.npy"


def _labels(shard: int) -> str:
    return f"labels-{shard:05d}.npy"


def _map(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {file}") from error
    except Exception as error:  # NumPy has Python parse the header, which may raise anything
        raise UserError(f"{file} is damaged: {reason(error)}") from error
    if array.shape != shape or array.dtype != np.uint8:
        raise UserError(
            f"{file} is damaged: expected uint8 of shape {shape}, got {array.dtype} of "
            f"{array.shape}"
        )
    return array


def _read_meta(folder: Path) -> dict[str, Any]:
    file = folder / _META
    try:
        meta = read_object(file)
    except FileNotFoundError as error:
        if (folder / _PLAN).exists():
            raise UserError(
                f"the data set in {folder} is not finished; generate it again"
            ) from error
        raise UserError(f"there is no data set in {folder}") from error
    try:
        found, shape, shards = meta["format"], meta["shape"], meta["shards"]
        numbers = [shard[key] for shard in shards for key in ("count", "images", "labels")]
        whole = sum(shard["count"] for shard in shards) == meta["count"] and len(shape) in (2, 3)
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__}: {reason(error)}") from error
    if found != _FORMAT:
        raise UserError(f"expected a data set of format {_FORMAT} in {folder}, got {shown(found)}")
    if not whole or not all(type(n) is int and n >= 0 for n in (*numbers, *shape)):
        raise UserError(f"{file} is damaged: its shards do not hold {shown(meta['count'])} images")
    return meta


def _checksum(file: Path) -> int:
    value = 0
    try:
        with open(file, "rb") as stream:
            while block := stream.read(2**22):
                value = zlib.crc32(block, value)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from error
    return value


def _first_difference(there: dict[str, Any], asked: dict[str, Any], of: str = "") -> str:
    for key in [*asked, *(key for key in there if key not in asked)]:
        old, new = there.get(key), asked.get(key)
        if old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                return _first_difference(old, new, f"{of}{key}.")
            return f"its {of}{key} is {old}, not {new}"
    return "it says so in another way"
