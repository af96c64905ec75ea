"""CIFAR-10 and CIFAR-100 as they are distributed: pickles or plain bytes, packed or not."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.errors import UserError, reason
from htflearn.files import check_fits
from htflearn.locality.array_pickle import read_array_pickle

__all__ = ["read_cifar"]

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_ARCHIVES = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class _Layout:
    """Which files a version of CIFAR has.

    Attributes:
        names: file of the classes' names.
        names_key, labels_key: in the pickles; empty for plain bytes.
        label_bytes: of plain bytes, how many stand before an image; the last is the label.
    """

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    names_key: str = ""
    labels_key: str = ""
    label_bytes: int = 0

    def batches(self, split: str) -> tuple[str, ...]:
        return self.train if split == "train" else self.test


_LAYOUTS = (
    _Layout(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{n}" for n in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        names_key="label_names",
        labels_key="labels",
    ),
    _Layout(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
        ("test_batch.bin",),
        "batches.meta.txt",
        label_bytes=1,
    ),
    _Layout(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        ("train",),
        ("test",),
        "meta",
        names_key="fine_label_names",
        labels_key="fine_labels",
    ),
    _Layout(
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        label_bytes=2,
    ),
)


def read_cifar(place: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None:
    """Images, labels and class names of CIFAR-10 or CIFAR-100 (fine labels).

    Args:
        place: a folder of the Python or the binary version, the folder around it, or its archive.
            Nothing is unpacked onto the disk.
        split: ``"train"`` or ``"test"``.

    Returns:
        images ``[M, 3, 32, 32]`` uint8, labels ``[M]`` int64 and the names; None where ``place``
        has no such files.

    Raises:
        UserError: a file is missing or damaged, or a pickle asks for more than arrays, strings and
            containers.

    Example:
        >>> images, labels, names = read_cifar(Path("cifar-10-batches-py"), "test")
        >>> images.shape, names[0]
        ((10000, 3, 32, 32), 'airplane')
    """
    if place.is_file():
        return _read_archive(place, split) if place.name.endswith(_ARCHIVES) else None
    for layout in _LAYOUTS:
        for folder in (place, place / layout.folder):
            if any((folder / name).is_file() for name in layout.train + layout.test):
                return _read(layout, split, _from_folder(folder), folder)
    for layout in _LAYOUTS:
        if (place / layout.archive).is_file():
            return _read_archive(place / layout.archive, split)
    return None


def _from_folder(folder: Path) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        path = folder / name
        try:
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {reason(error)}") from error

    return read


def _read_archive(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None:
    wanted = {name for layout in _LAYOUTS for name in (layout.names, *layout.batches(split))}
    content = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = Path(member.name).name
                if name in wanted and member.isfile():
                    check_fits(member.size, f"{name} in {path}")
                    content[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except UserError:
        raise
    except Exception as error:  # of tarfile and of four ways to compress, for a damaged archive
        raise UserError(
            f"{path} cannot be read as an archive: {reason(error).rstrip(':')}"
        ) from error
    for layout in _LAYOUTS:
        if content.keys() & {layout.names, *layout.batches(split)}:
            return _read(layout, split, content.get, path)
    return None


def _read(
    layout: _Layout, split: str, read: Callable[[str], bytes | None], where: Path
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    def content(name: str) -> bytes:
        found = read(name)
        if found is None:
            files = ", ".join((*layout.batches(split), layout.names))
            raise UserError(f"expected the files {files} in {where}, but {name} is missing")
        return found

    batch = _pickled_batch if layout.labels_key else _plain_batch
    parts = [batch(content(name), layout, f"{name} in {where}") for name in layout.batches(split)]
    images = np.concatenate([images for images, _ in parts]).reshape(-1, *_SHAPE)
    labels = np.concatenate([labels for _, labels in parts])
    return images, labels, _names(content(layout.names), layout, f"{layout.names} in {where}")


def _plain_batch(content: bytes, layout: _Layout, what: str) -> tuple[np.ndarray, np.ndarray]:
    record = layout.label_bytes + _PIXELS
    if not content or len(content) % record:
        raise UserError(
            f"expected a multiple of {record} bytes, those of an image and its label, but {what} "
            f"has {len(content)}"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    return rows[:, layout.label_bytes :], rows[:, layout.label_bytes - 1].astype(np.int64)


def _pickled_batch(content: bytes, layout: _Layout, what: str) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickled(content, what)
    data, labels = _entry(batch, "data", what), _entry(batch, layout.labels_key, what)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_PIXELS,):
        array = isinstance(data, np.ndarray)
        kind = f"{data.dtype} {list(data.shape)}" if array else type(data).__name__
        raise UserError(f"expected images uint8 [M, {_PIXELS}], but {what} holds {kind}")
    if not isinstance(labels, list) or not all(_is_label(label) for label in labels):
        raise UserError(f"expected a list of whole numbers as {layout.labels_key} of {what}")
    if len(labels) != len(data):
        raise UserError(
            f"expected a label for each image, but {what} holds {len(data)} images and "
            f"{len(labels)} labels"
        )
    return data, np.array(labels, np.int64)


def _is_label(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _names(content: bytes, layout: _Layout, what: str) -> tuple[str, ...]:
    if layout.names_key:
        names = _entry(_unpickled(content, what), layout.names_key, what)
        if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
            raise UserError(f"expected a list of names as {layout.names_key} of {what}")
        return tuple(n if isinstance(n, str) else n.decode("latin-1") for n in names)
    lines = content.decode("utf-8", errors="replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _entry(batch: Any, key: str, what: str) -> Any:
    """Keys are bytes where somebody has read the files in Python 3 and written them again."""
    found = [batch[k] for k in (key, key.encode()) if k in batch] if isinstance(batch, dict) else []
    if not found:
        raise UserError(f"expected a dictionary with {key!r}, but {what} has none")
    return found[0]


def _unpickled(content: bytes, what: str) -> Any:
    try:
        return read_array_pickle(content)
    except UserError as error:
        raise UserError(f"{what} is not read: {error}") from error
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"expected a pickle, but {what} is damaged or cut off ({reason(error)})"
        ) from error
