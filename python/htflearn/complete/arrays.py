"""Tensors as array files: ``.npy``, ``.npz`` and ``.pt``."""

from __future__ import annotations

import pickle
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.complete.entries import Entries, Predict
from htflearn.complete.files import ARRAYS, Write, existing, missing_places
from htflearn.errors import UserError, reason
from htflearn.files import check_fits

__all__ = ["ArraySource", "read_array", "read_mask"]


@dataclass
class ArraySource:
    """An array with missing entries. Use :meth:`open`.

    Attributes:
        array: as in the file.
        known: the same shape, which of its entries are known.
        key: its name among several, or None.
        content: everything in a .pt file by its key, where there are keys.
        dtype: the array's, NumPy's or PyTorch's (bfloat16, which NumPy lacks, is float32 here).
    """

    path: Path
    array: np.ndarray
    known: np.ndarray
    key: str | None
    content: dict[str, Any]
    dtype: Any
    entries: Entries
    kind: str = "array"
    default_smoothness: float = 0.0

    @classmethod
    def open(
        cls,
        path: Path,
        key: str | None = None,
        mask: Path | None = None,
        missing: float | None = None,
    ) -> ArraySource:
        """Reads an array file.

        Args:
            path: ``.npy``, ``.npz`` or ``.pt``.
            key: which array, where there are several.
            mask: file of a boolean array of the same shape, true where an entry is known.
            missing: the value that stands for a missing entry, besides NaN.

        Raises:
            UserError: the file cannot be read, or holds no array of numbers.
        """
        array, key, content, dtype = read_array(path, key)
        known = ~np.isnan(array) if array.dtype.kind == "f" else np.ones(array.shape, bool)
        if missing is not None:
            known &= array != missing
        if mask is not None:
            known &= read_mask(mask, array.shape)
        values = array[known].astype(np.float64)
        whole_numbers = array.dtype.kind != "f"
        bounded = whole_numbers and len(values) > 0
        entries = Entries(
            dims=tuple(array.shape),
            indices=np.stack(np.nonzero(known), axis=1).astype(np.int64)
            if array.ndim
            else np.zeros((1, 0), np.int64),
            values=values,
            names=tuple(f"mode {n}" for n in range(array.ndim)),
            whole=array.ndim,
            neighbours=tuple(range(array.ndim)),
            integer=whole_numbers,
            low=float(values.min()) if bounded else None,
            high=float(values.max()) if bounded else None,
        )
        return cls(path, array, known, key, content, dtype, entries)

    @property
    def asked(self) -> int:
        """Number of missing entries."""
        return int((~self.known).sum())

    def notes(self, path: Path) -> tuple[str, ...]:
        """See :class:`htflearn.complete.files.Source`."""
        return ()

    def check_format(self, path: Path) -> None:
        """Raises a UserError where ``path`` does not end as an array file."""
        if path.suffix.lower() not in ARRAYS:
            raise UserError(f"expected an output ending in {', '.join(ARRAYS)}, got {path.name}")

    def completed(self, predict: Predict, smooth: bool) -> np.ndarray:
        """The array with predictions where entries are missing or hidden (everywhere if smooth)."""
        known = self.known.copy()
        known[tuple(self.entries.hidden_indices.T)] = False
        if smooth:
            known[...] = False
        result = self.array.copy()
        result[~known] = predict(missing_places(known)).astype(self.array.dtype)
        return result

    def writer(self, path: Path, predict: Predict, smooth: bool) -> Write:
        """See :class:`htflearn.complete.files.Source`. A key and the other arrays of the file are
        kept where the output's format has room for them."""
        result = self.completed(predict, smooth)
        suffix = path.suffix.lower()
        if suffix == ".npy":
            return lambda to: _save_npy(to, result)
        same = suffix == self.path.suffix.lower()
        if suffix == ".npz":
            beside = self.path if same else None
            return lambda to: _save_npz(to, self.key or "tensor", result, beside)
        named = {**self.content, self.key: result} if same and self.key is not None else result
        return lambda to: _save_pt(to, named, self.key, self.dtype)


def read_array(path: Path, key: str | None) -> tuple[np.ndarray, str | None, dict[str, Any], Any]:
    """The array of a file, its key, a .pt file's content by key, and the dtype to write back."""
    existing(path)
    if path.suffix.lower() == ".pt":
        return _read_pt(path, key)
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.ndarray):
            with content as archive:
                key = _choose(path, archive.files, key)
                _check_size(path, {key, f"{key}.npy"})
                array = archive[key]
                return _numbers(array, f"{key} in {path}"), key, {}, array.dtype
    except UserError:
        raise
    except Exception as error:  # NumPy has Python parse the header, which may raise anything
        if "pickle" in str(error) and "Object arrays" in str(error):
            raise UserError(f"expected an array of numbers, but {path} holds objects") from error
        raise UserError(
            f"expected an array file, but {path} cannot be read as one ({_plain(error)})"
        ) from error
    if key is not None:
        raise UserError(f"--key {key} was given, but {path} holds a single array without a key")
    return _numbers(content, str(path)), None, {}, content.dtype


def _plain(error: BaseException) -> str:
    # NumPy takes what it does not know for a pickle, and says so at length.
    return "it is not a NumPy file" if "pickle" in str(error) else reason(error)


def _check_size(path: Path, names: set[str] | None = None) -> None:
    """Refuses a zip archive whose members of these names (all of them) do not fit into memory."""
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if names is None or m.filename in names]
    check_fits(sum(member.file_size for member in members), str(path))


def _read_pt(path: Path, key: str | None) -> tuple[np.ndarray, str | None, dict[str, Any], Any]:
    import torch

    try:
        if zipfile.is_zipfile(path):
            _check_size(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be read: expected tensors saved by torch.save, and nothing else"
        ) from error
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        raise UserError(f"{path} cannot be read as a PyTorch file: {reason(error)}") from error
    everything: dict[str, Any] = {}
    if isinstance(content, dict):
        named = [name for name, value in content.items() if isinstance(value, torch.Tensor)]
        everything, key = dict(content), _choose(path, named, key)
        content = everything[key]
    elif key is not None:
        raise UserError(f"--key {key} was given, but {path} holds a single tensor without a key")
    if not isinstance(content, torch.Tensor):
        raise UserError(f"expected a tensor, but {path} holds a {type(content).__name__}")
    if content.layout != torch.strided or content.is_quantized or content.is_complex():
        raise UserError(f"expected a dense tensor of real numbers, but {path} holds another kind")
    dtype = content.dtype
    dense = content.detach()
    try:
        array = (dense.float() if dtype == torch.bfloat16 else dense).numpy()
    except (RuntimeError, TypeError) as error:  # of the meta device, or a dtype that NumPy lacks
        raise UserError(f"expected numbers of a common dtype, but {path} holds {dtype}") from error
    return _numbers(array, str(path)), key, everything, dtype


def _choose(path: Path, names: list[str], key: str | None) -> str:
    if not names:
        raise UserError(f"{path} holds no array")
    if key is None:
        if len(names) > 1:
            raise UserError(f"{path} holds several arrays ({_listed(names)}); choose one by --key")
        return names[0]
    if key not in names:
        raise UserError(f"{path} has no array {key!r}, only {_listed(names)}")
    return key


def _listed(names: list[str]) -> str:
    shown = ", ".join(str(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def _numbers(array: Any, what: str) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise UserError(f"expected an array of real numbers, but {what} is none")
    if array.dtype.kind not in "fiub":
        raise UserError(f"expected an array of real numbers, but {what} has dtype {array.dtype}")
    return array


def read_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A boolean array of this shape, true where an entry is known.

    Args:
        path: an array file, or a picture (not black: known).
        shape: of the tensor; a mask of its leading modes counts for all that is below them.

    Raises:
        UserError: the file cannot be read, or has another shape, or is not of true and false.
    """
    if path.suffix.lower() in ARRAYS:
        mask = read_array(path, None)[0]
    else:
        from htflearn.complete.images import read_gray

        mask = read_gray(path) > 0
    if mask.dtype != bool:
        if not np.isin(mask, (0, 1)).all():
            raise UserError(f"expected a mask of true and false (or 1 and 0), got others in {path}")
        mask = mask != 0
    if mask.shape != shape[: mask.ndim] or (mask.ndim < len(shape) and mask.ndim != 2):
        raise UserError(
            f"expected a mask of shape {list(shape)}, as the tensor, but {path} has the shape "
            f"{list(mask.shape)}"
        )
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def _save_npy(to: Path, array: np.ndarray) -> None:
    with open(to, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _save_npz(to: Path, key: str, array: np.ndarray, beside: Path | None) -> None:
    """An archive of the array, and of everything else in the archive ``beside``, byte for byte."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as made:
        if beside is not None:
            try:
                with zipfile.ZipFile(beside) as given:
                    for name in given.namelist():
                        if name != f"{key}.npy":
                            with given.open(name) as source, made.open(name, "w") as copy:
                                shutil.copyfileobj(source, copy)
            except (zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{beside} is damaged: {reason(error)}") from error
        with made.open(f"{key}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)


def _save_pt(to: Path, content: Any, key: str | None, dtype: Any) -> None:
    import torch

    def tensor(array: np.ndarray) -> torch.Tensor:
        made = torch.from_numpy(np.ascontiguousarray(array))
        return made.to(dtype) if isinstance(dtype, torch.dtype) else made

    named = isinstance(content, dict)
    with open(to, "wb") as file:  # of a file that PyTorch opens it does not say why it cannot write
        torch.save({**content, key: tensor(content[key])} if named else tensor(content), file)
