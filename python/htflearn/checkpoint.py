"""Checkpoints that are whole at every moment, and models rebuilt from their file alone.

A folder of checkpoints holds ``step-N`` (``model.safetensors``: weights, with the layout in the
metadata; ``state.pt``: optimizer, random generators and the trainer's state) and ``latest``, a file
with the name of the newest one. A checkpoint is written under another name, synced, renamed, and
only then pointed at; older ones go last. Whenever the process dies, ``latest`` names a whole one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import htfkernels as hk
from htflearn.errors import UserError

__all__ = [
    "find_weights",
    "layout_to_dict",
    "load_checkpoint",
    "load_model",
    "replace_file",
    "save_checkpoint",
    "save_model",
]

_WEIGHTS, _STATE, _LATEST = "model.safetensors", "state.pt", "latest"
_Path = str | os.PathLike[str]


def save_checkpoint(
    path: _Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint, whole or not at all, and removes the older ones of the folder.

    PyTorch's random generators are saved with it.

    Args:
        path: the folder of checkpoints; made where it is missing.
        model: its ``state_dict`` is saved.
        optimizer: its ``state_dict`` is saved.
        state: tensors and plain values; ``state["iteration"]`` names the checkpoint.

    Returns:
        the checkpoint's own folder.

    Raises:
        OSError: it cannot be written. The checkpoint before is then still there.

    Example:
        >>> model = matrix_factorization(6, 5)
        >>> _ = save_checkpoint("run/checkpoints", model, state={"iteration": 0})
        >>> load_checkpoint("run/checkpoints", model)
        {'iteration': 0}
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(state or {})
    name = _free_name(folder, f"step-{int(state.get('iteration', 0)):09d}")
    draft = folder / ".draft"
    if draft.exists():  # of a process that was killed
        shutil.rmtree(draft)
    draft.mkdir()
    save_model(draft / _WEIGHTS, model)
    plain = {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "random": _random_state(),
        "state": state,
    }
    with open(draft / _STATE, "wb") as file:
        torch.save(plain, file)
        _sync(file)
    _sync_folder(draft)
    os.rename(draft, folder / name)
    _sync_folder(folder)
    replace_file(folder / _LATEST, name)
    for other in folder.iterdir():
        if other.name != name and other.name.startswith("step-"):
            shutil.rmtree(other, ignore_errors=True)
    return folder / name


def load_checkpoint(
    path: _Path, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Reads the newest checkpoint of a folder into a model and an optimizer.

    Args:
        path: the folder of checkpoints, the folder around a ``checkpoints``, or one checkpoint.
        model: gets the weights.
        optimizer: gets its state, and PyTorch's random generators get theirs.

    Returns:
        the ``state`` that was saved.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or it is of another model.
    """
    last = None
    while True:
        # A running trainer may replace the checkpoint between our look and our reading it.
        found = _find(path)
        try:
            return _read(found, model, optimizer)
        except FileNotFoundError as error:
            if found == last:
                raise UserError(f"the checkpoint {found} lacks a file: {error.filename}") from error
            last = found


def save_model(path: _Path, model: nn.Module) -> None:
    """Writes a model's weights as safetensors; for an :class:`htfkernels.HTF` with its layout.

    Args:
        path: the file.
        model: its ``state_dict`` is saved.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt"}
    if isinstance(model, hk.HTF):
        del tensors["_extra_state"]  # the layout, which is in the metadata
        metadata["htf"] = json.dumps(layout_to_dict(model.layout))
    save_file(tensors, path, metadata)
    with open(path, "rb+") as file:
        _sync(file)


def load_model(path: _Path) -> hk.HTF:
    """Rebuilds a model from its file alone.

    Args:
        path: a ``.safetensors`` file, a checkpoint, or a folder of checkpoints.

    Returns:
        the model, on the CPU, in the dtype it was saved in.

    Raises:
        UserError: there is no such file, it cannot be read, or it does not hold an HTF.

    Example:
        >>> save_model("model.safetensors", matrix_factorization(6, 5))
        >>> load_model("model.safetensors").full_tensor().shape
        torch.Size([6, 5])
    """
    last = None
    while True:  # as in load_checkpoint
        file = find_weights(path)
        try:
            tensors, metadata = _read_weights(file)
            break
        except FileNotFoundError as error:
            if file == last:
                raise UserError(f"there is no file {file}") from error
            last = file
    if "htf" not in metadata:
        raise UserError(f"{file} holds weights, but not those of an htfkernels.HTF")
    try:
        layout = _layout_from_dict(json.loads(metadata["htf"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the layout in {file} cannot be read: {error}") from error
    model = hk.HTF(
        layout.tree,
        layout.mode_dims,
        dict(zip(layout.tree.interior, layout.ranks, strict=True)),
        layout.out_features,
        layout.root,
        layout.share_weights,
        device="meta",  # the weights come from the file: nothing to allocate or to draw here
    )
    _load_weights(model, tensors, file, assign=True)
    return model


def find_weights(path: _Path) -> Path:
    """The file that :func:`load_model` reads: of a folder of checkpoints that of the newest one.

    Args:
        path: a file, a checkpoint, a folder of checkpoints, or the folder around a ``checkpoints``.

    Returns:
        the file. A running trainer may replace it at any moment.

    Raises:
        UserError: there is no checkpoint.

    Example:
        >>> _ = save_checkpoint("run/checkpoints", matrix_factorization(6, 5))
        >>> find_weights("run").parent.name
        'step-000000000'
    """
    return Path(path) if Path(path).is_file() else _find(path) / _WEIGHTS


def replace_file(path: _Path, text: str) -> None:
    """Writes a text file, whole or not at all: whoever reads it sees the old text or the new."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.draft")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)
    os.replace(draft, target)
    _sync_folder(target.parent)


def _free_name(folder: Path, name: str) -> str:
    """A name no checkpoint has: that of an earlier run stays until ours is pointed at."""
    free, number = name, 1
    while (folder / free).exists():
        number += 1
        free = f"{name}-{number}"
    return free


def _find(path: _Path) -> Path:
    given = Path(path)
    if (given / _WEIGHTS).is_file():
        return given
    for folder in (given, given / "checkpoints"):
        try:
            return folder / (folder / _LATEST).read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / _LATEST} cannot be read: {error}") from error
    raise UserError(f"there is no checkpoint in {given}")


def _read(found: Path, model: Any, optimizer: Any) -> dict[str, Any]:
    try:
        saved = torch.load(found / _STATE, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        raise UserError(f"{found / _STATE} cannot be read: {error}") from error
    if model is not None:
        tensors, _ = _read_weights(found / _WEIGHTS)
        _load_weights(model, tensors, found)
    if optimizer is not None and saved["optimizer"] is not None:
        try:
            _keep_capturable(saved["optimizer"], optimizer)
            optimizer.load_state_dict(saved["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{found} is of another optimizer: {error}") from error
        _set_random_state(saved["random"])
    return saved["state"]


def _keep_capturable(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """How steps are executed belongs to the device a run goes on with, not to what it has learned;
    PyTorch's optimizers would take it from the saved groups, and place their counts by it."""
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        if "capturable" in own:
            group["capturable"] = own["capturable"]


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as weights:
            tensors = {k: weights.get_tensor(k) for k in weights.keys()}
            metadata = weights.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, RuntimeError) as error:
        if not file.exists():  # removed while it was being opened: safetensors tells it in two ways
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
        raise UserError(f"{file} cannot be read as safetensors: {error}") from error
    if "htf" in metadata:  # for load_state_dict, which compares it with the model's
        tensors["_extra_state"] = torch.tensor([*metadata["htf"].encode()], dtype=torch.uint8)
    return tensors, metadata


def _load_weights(
    model: nn.Module, tensors: dict[str, Tensor], source: Path, assign: bool = False
) -> None:
    try:
        model.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{source} holds the weights of another model: {detail}") from error


def layout_to_dict(layout: hk.Layout) -> dict[str, Any]:
    """A layout as JSON holds it."""
    found: dict[str, Any] = json.loads(layout.to_json())
    return found


def _layout_from_dict(saved: dict[str, Any]) -> hk.Layout:
    tree = hk.ModeTree.from_json(json.dumps(saved["tree"]))
    ranks = dict(zip(tree.interior, saved["ranks"], strict=True))
    return hk.Layout.make(
        tree,
        saved["mode_dims"],
        ranks,
        saved["out_features"],
        saved["root"],
        saved["share_weights"],
    )


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["cpu"])
    if saved["cuda"] and torch.cuda.device_count() == len(saved["cuda"]):
        torch.cuda.set_rng_state_all(saved["cuda"])


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
