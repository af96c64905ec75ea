"""Checkpoints that are whole at every moment, and models rebuilt from their file alone.

A folder of checkpoints holds ``step-N`` (``model.safetensors``: weights, with the layout in the
metadata; ``state.pt``: optimizer, random generators and the trainer's state) and ``latest``, a file
with the name of the newest one. A checkpoint is written under another name, synced, renamed, and
only then pointed at; older ones go last. Whenever the process dies, ``latest`` names a whole one.
Only folders that hold these files and nothing else are removed, and only what lies in the folder
of checkpoints is read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import htfkernels as hk
from htflearn.errors import UserError, reason
from htflearn.files import disk_errors, parse_object, sync, whole_file

__all__ = [
    "find_weights",
    "has_checkpoint",
    "layout_to_dict",
    "load_checkpoint",
    "load_model",
    "remove_leftovers",
    "restored",
    "save_checkpoint",
    "save_model",
    "taken_from",
]

_WEIGHTS, _STATE, _LATEST = "model.safetensors", "state.pt", "latest"
_FILES = (_WEIGHTS, _STATE, _LATEST)  # the last only until the folder's is replaced by it
_OTHERS = re.compile(r"\.tmp\w+")  # safetensors writes such a file first
_STEP = re.compile(r"step-\d{9,19}(-\d{1,9})?")
_DRAFT = re.compile(r"\.draft(-[0-9a-f]{16})?")
_Path = str | os.PathLike[str]
_LONGEST_NAME = 256
_State = TypeVar("_State")


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
        ValueError: the iteration is negative.
        OSError: it cannot be written. The checkpoint before is then still there.

    Example:
        >>> model = matrix_factorization(6, 5)
        >>> _ = save_checkpoint("run/checkpoints", model, state={"iteration": 0})
        >>> load_checkpoint("run/checkpoints", model)
        {'iteration': 0}
    """
    state = dict(state or {})
    iteration = int(state.get("iteration", 0))
    if iteration < 0:
        raise ValueError(f"save_checkpoint: the iteration must not be negative, got {iteration}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_drafts(folder)
    name = _free_name(folder, f"step-{iteration:09d}")
    draft = _draft(folder)
    draft.mkdir()
    plain = {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "random": _random_state(),
        "state": state,
    }
    try:
        with disk_errors(folder):
            _write_weights(draft / _WEIGHTS, model)
            with open(draft / _STATE, "wb") as file:
                torch.save(plain, file)
            (draft / _LATEST).write_text(name, encoding="utf-8")
            for written in _FILES:
                sync(draft / written)
            sync(draft)
            os.rename(draft, folder / name)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)  # a full disk has better use for it
        raise
    sync(folder)
    os.replace(folder / name / _LATEST, folder / _LATEST)
    sync(folder)
    _remove_older(folder, name)
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
    """Writes a model's weights as safetensors, whole or not at all; for an :class:`htfkernels.HTF`
    with its layout.

    Args:
        path: the file.
        model: its ``state_dict`` is saved.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as draft:
        _write_weights(draft, model)


def _write_weights(path: Path, model: nn.Module) -> None:
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt"}
    if isinstance(model, hk.HTF):
        del tensors["_extra_state"]  # the layout, which is in the metadata
        metadata["htf"] = json.dumps(layout_to_dict(model.layout))
    save_file(tensors, path, metadata)


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
    saved = parse_object(metadata["htf"], f"the layout in {file}")
    try:
        layout = _layout_from_dict(saved)
        model = hk.HTF(
            layout.tree,
            layout.mode_dims,
            dict(zip(layout.tree.interior, layout.ranks, strict=True)),
            layout.out_features,
            layout.root,
            layout.share_weights,
            device="meta",  # the weights come from the file: nothing to allocate or to draw here
        )
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise UserError(f"the layout in {file} cannot be read: {kind}: {reason(error)}") from error
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


def has_checkpoint(folder: _Path) -> bool:
    """Whether a folder of checkpoints has one, or what should be one."""
    return os.path.lexists(Path(folder) / _LATEST)


def remove_leftovers(folder: _Path) -> None:
    """Removes all but the newest checkpoint, which a process that is killed may leave.

    Args:
        folder: of checkpoints, where this process goes on.

    Raises:
        UserError: there is no checkpoint.
    """
    _remove_older(Path(folder), _find(folder).name)


def restored(kind: type[_State], saved: dict[str, Any], path: _Path) -> _State:
    """A training's state from what :func:`load_checkpoint` returned.

    Args:
        kind: a dataclass, each field with a default.
        saved: what was returned.
        path: where from, for the message.

    Raises:
        UserError: a field that the dataclass has not, or a value of another type than its default.
    """
    state: Any = kind()
    known = {field.name for field in fields(state)}
    for name, value in saved.items():
        expected = type(getattr(state, name)) if name in known else None
        if expected is None:
            raise UserError(f"the checkpoint in {path} is of another training: it has {name!r}")
        if not isinstance(value, (int, float) if expected is float else expected):
            raise UserError(
                f"the checkpoint in {path} is damaged: its {name} is not of type "
                f"{expected.__name__}"
            )
        setattr(state, name, value)
    return state


@contextmanager
def taken_from(path: _Path) -> Iterator[None]:
    """Tells in a sentence that what the block takes from a checkpoint is something else.

    Raises:
        UserError: the block has raised one of the exceptions that come of it.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise UserError(f"the checkpoint in {path} is damaged: {kind}: {reason(error)}") from error


def _free_name(folder: Path, name: str) -> str:
    """A name no checkpoint has: that of an earlier run stays until ours is pointed at."""
    free, number = name, 1
    while os.path.lexists(folder / free):
        number += 1
        free = f"{name}-{number}"
    return free


def _draft(folder: Path) -> Path:
    return folder / f".draft-{secrets.token_hex(8)}"


def _remove_drafts(folder: Path) -> None:
    """What processes that were killed have left."""
    for entry in _own(folder, _DRAFT):
        shutil.rmtree(entry, ignore_errors=True)


def _remove_older(folder: Path, newest: str) -> None:
    """All checkpoints but the newest."""
    for entry in _own(folder, _STEP):
        if entry.name != newest and (entry / _WEIGHTS).is_file():
            # What a kill would leave of it is then a draft: by its content nobody could tell.
            with suppress(OSError):
                os.rename(entry, _draft(folder))
    _remove_drafts(folder)


def _own(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """Folders of these names that hold files of ours and nothing else."""
    found = []
    for entry in folder.iterdir():
        if names.fullmatch(entry.name) and not entry.is_symlink():
            try:
                others = {file.name for file in entry.iterdir()} - set(_FILES)
                if all(_OTHERS.fullmatch(name) for name in others):
                    found.append(entry)
            except OSError:  # no folder, or one that we may not look into
                continue
    return found


def _find(path: _Path) -> Path:
    given = Path(path)
    if (given / _WEIGHTS).is_file():
        return given
    for folder in (given, given / "checkpoints"):
        latest = folder / _LATEST
        try:
            with open(latest, encoding="utf-8") as file:
                name = file.read(_LONGEST_NAME).strip()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{latest} cannot be read: {reason(error)}") from error
        if latest.is_symlink() or not _STEP.fullmatch(name) or (folder / name).is_symlink():
            raise UserError(f"expected the name of a checkpoint beside it in {latest}")
        return folder / name
    raise UserError(f"there is no checkpoint in {given}")


def _read(found: Path, model: Any, optimizer: Any) -> dict[str, Any]:
    try:
        saved = torch.load(found / _STATE, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        raise UserError(f"{found / _STATE} cannot be read: {reason(error)}") from error
    keys = {"optimizer", "random", "state"}
    if not isinstance(saved, dict) or not keys <= saved.keys():
        raise UserError(f"{found / _STATE} does not hold the state of a training")
    if not isinstance(saved["state"], dict):
        raise UserError(f"{found / _STATE} does not hold the state of a training")
    if model is not None:
        tensors, _ = _read_weights(found / _WEIGHTS)
        _load_weights(model, tensors, found)
    if optimizer is not None and saved["optimizer"] is not None:
        with taken_from(found):
            _keep_capturable(saved["optimizer"], optimizer)
            try:
                optimizer.load_state_dict(saved["optimizer"])
            except ValueError as error:
                raise UserError(f"{found} is of another optimizer: {reason(error)}") from error
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
