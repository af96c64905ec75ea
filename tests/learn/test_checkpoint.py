"""Checkpoints: whole at every moment, and models rebuilt from their file alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import htfkernels as hk
from htflearn import (
    GroupRMSprop,
    UserError,
    load_checkpoint,
    load_model,
    matrix_factorization,
    save_checkpoint,
    tensor_factorization,
)
from htflearn import checkpoint as module
from htflearn.checkpoint import save_model


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = matrix_factorization(6, 5, init_std=0.3)
    return model, GroupRMSprop(model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model.full_tensor().square().sum().backward()  # type: ignore[operator]
    optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_round_trip(tmp_path: Path) -> None:
    model, optimizer = make()
    step(model, optimizer)
    state = {"iteration": 1, "text": "a", "tensor": torch.arange(3), "number": float("inf")}
    save_checkpoint(tmp_path / "checkpoints", model, optimizer, state)
    drawn = torch.rand(3)
    other, other_optimizer = make()
    found = load_checkpoint(tmp_path, other, other_optimizer)
    assert found["iteration"] == 1 and found["text"] == "a" and found["number"] == float("inf")
    assert torch.equal(found["tensor"], torch.arange(3))
    assert torch.equal(torch.rand(3), drawn), "the random generator continues"
    step(model, optimizer)
    step(other, other_optimizer)
    assert same(model, other)


MODELS: dict[str, Callable[[], hk.HTF]] = {
    "mf": lambda: matrix_factorization(6, 5, depth=4, hidden=7),
    "tf": lambda: tensor_factorization((3, 4, 5), 6, dtype=torch.float64),
    "irregular": lambda: hk.HTF(hk.ModeTree.from_nested(((0, 3), (2, (1,)))), (2, 3, 4, 5), 3, 2),
    "shared": lambda: hk.HTF(hk.ModeTree.balanced(8), 3, [2, 4, 5], share_weights=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_its_file_alone(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    save_model(tmp_path / "model.safetensors", model)
    before = torch.get_rng_state()
    for path in (tmp_path / "model.safetensors", tmp_path):
        loaded = load_model(path)
        assert loaded.layout == model.layout and same(model, loaded)
        assert torch.equal(loaded.full_tensor(), model.full_tensor())
        assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(before, torch.get_rng_state())


def test_one_checkpoint_is_kept(tmp_path: Path) -> None:
    model, optimizer = make()
    for iteration in (0, 1, 1, 2, 0):
        written = save_checkpoint(tmp_path, model, optimizer, {"iteration": iteration})
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["latest", written.name])
        assert load_checkpoint(tmp_path)["iteration"] == iteration
        assert load_checkpoint(written)["iteration"] == iteration


class Crash(BaseException):
    """The process dying: nothing catches it."""


OPERATIONS: list[tuple[Any, str]] = [
    (os, "rename"),
    (os, "replace"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (torch, "save"),
    (module, "save_file"),
]


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> Callable[[], int]:
    """Raises before or after the given file operation; counts them."""
    count = 0

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number and not after:
                raise Crash
            result = original(*args, **kwargs)
            if count >= number and after:
                raise Crash
            return result

        return run

    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    return lambda: count


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_operation_leaves_one_or_the_other(after: bool, tmp_path: Path) -> None:
    old, optimizer = make()
    new, _ = make()
    step(new, GroupRMSprop(new.parameters()))
    outcomes, number, done = [], 0, False
    while not done:
        number += 1
        folder = tmp_path / f"{number}"
        save_checkpoint(folder, old, optimizer, {"iteration": 5})
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, number, after)
            try:
                save_checkpoint(folder, new, optimizer, {"iteration": 6})
                done = True
            except Crash:
                pass
        loaded = load_model(folder)
        iteration = load_checkpoint(folder, loaded)["iteration"]
        assert same(loaded, {5: old, 6: new}[iteration])
        outcomes.append(iteration)
        # And a later one is not troubled by what was left.
        save_checkpoint(folder, new, optimizer, {"iteration": 6})
        assert len(list(folder.iterdir())) == 2
    assert number > 8 and outcomes == sorted(outcomes) and set(outcomes) == {5, 6}


def test_a_disk_that_is_full_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    save_checkpoint(tmp_path, model, optimizer, {"iteration": 5})

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, model, optimizer, {"iteration": 6})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["iteration"] == 5


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="there is no checkpoint in"):
            load_checkpoint(path)
        with pytest.raises(UserError, match="there is no checkpoint in"):
            load_model(path)


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "gone"])
def test_damaged_files(file: str, damage: str, tmp_path: Path) -> None:
    model, optimizer = make()
    written = save_checkpoint(tmp_path, model, optimizer, {"iteration": 5})
    path = written / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if damage == "cut" else b"x" * 200)
    with pytest.raises(UserError, match=r"cannot be read|lacks a file"):
        load_checkpoint(tmp_path, model, optimizer)


def test_weights_of_another_model(tmp_path: Path) -> None:
    model, optimizer = make()
    save_checkpoint(tmp_path, model, optimizer)
    other = matrix_factorization(6, 7)
    with pytest.raises(UserError, match="another model"):
        load_checkpoint(tmp_path, other)
    with pytest.raises(UserError, match="another optimizer"):
        load_checkpoint(
            tmp_path, model, torch.optim.SGD([{"params": [p]} for p in model.parameters()])
        )


def test_weights_that_are_no_htf(tmp_path: Path) -> None:
    save_model(tmp_path / "model.safetensors", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"not those of an htfkernels\.HTF"):
        load_model(tmp_path / "model.safetensors")


def test_a_model_whose_checkpoint_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the file is gone before safetensors looks for it, or between its look and its
    reading."""
    model, _ = make()
    real = module.safe_open
    for gone in (FileNotFoundError("gone"), RuntimeError("unable to open file")):
        save_checkpoint(tmp_path, model, state={"iteration": 0})
        errors = [gone]

        def replaced(file: Path, *arguments: Any, errors: Any = errors, **options: Any) -> Any:
            if errors:
                save_checkpoint(tmp_path, model, state={"iteration": 1})
                raise errors.pop()
            return real(file, *arguments, **options)

        monkeypatch.setattr(module, "safe_open", replaced)
        assert same(load_model(tmp_path), model) and not errors
    (module.find_weights(tmp_path)).unlink()
    with pytest.raises(UserError, match="there is no file"):
        load_model(tmp_path)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", [GroupRMSprop, torch.optim.Adam])
def test_how_steps_are_executed_is_not_taken_from_a_checkpoint(
    kind: Any, before: bool, tmp_path: Path
) -> None:
    """A run from a CPU goes on in a CUDA graph, and one from there on a CPU."""
    model = matrix_factorization(6, 5)
    # PyTorch's Adam takes a capturable step on a GPU alone, but keeps the setting anywhere.
    save_checkpoint(tmp_path, model, kind(model.parameters(), lr=0.5, capturable=before))
    other = kind(model.parameters(), capturable=not before)
    load_checkpoint(tmp_path, model, other)
    (group,) = other.param_groups
    assert group["lr"] == 0.5 and group["capturable"] is not before
