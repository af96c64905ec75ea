"""Checkpoints: whole at every moment, and models rebuilt from their file alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import largest_file
from safetensors.torch import save_file
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
from htflearn.checkpoint import (
    find_weights,
    layout_to_dict,
    remove_leftovers,
    restored,
    save_model,
)


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
        copied = Path(shutil.copytree(folder, tmp_path / f"copy of {number}"))
        remove_leftovers(copied)
        newest = find_weights(copied).parent
        assert {*copied.iterdir()} == {copied / "latest", newest}
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


def test_a_disk_without_room(tmp_path: Path) -> None:
    """Of the two files that a checkpoint has, safetensors writes one, and torch.save the other."""
    model = matrix_factorization(40, 40)
    adam = torch.optim.Adam(model.parameters())
    model.full_tensor().sum().backward()
    adam.step()
    for size, optimizer in ((4096, None), (30_000, adam)):
        with largest_file(size), pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, model, optimizer)
        assert not list(tmp_path.iterdir()), "what could not be finished takes no room"
    with largest_file(4096), pytest.raises(OSError, match="File too large"):
        save_model(tmp_path / "model.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_draft_with_a_half_written_file_of_safetensors_is_removed(tmp_path: Path) -> None:
    model, optimizer = make()
    draft = tmp_path / ".draft-0123456789abcdef"
    draft.mkdir()
    (draft / ".tmpHrh8zk").write_text("half")
    written = save_checkpoint(tmp_path, model, optimizer)
    assert {*tmp_path.iterdir()} == {tmp_path / "latest", written}


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    model, optimizer = make()
    folder, outside = tmp_path / "run", tmp_path / "step-000000007"
    save_checkpoint(folder, model, optimizer, {"iteration": 1})
    save_checkpoint(outside, model, optimizer, {"iteration": 7})
    (folder / "step-notes.txt").write_text("mine")
    for name in ("step-by-step", "step-12", "step-000000001-old", ".draft-mine", "step-000000009"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("mine")
    for name in ("step-000000009", "step-000000001"):
        (folder / name / "notes.txt").write_text("mine")
    (folder / "step-000000003").mkdir()
    (folder / "step-000000004").symlink_to(outside / "step-000000007")
    (folder / ".draft").symlink_to(outside / "step-000000007")

    def everything() -> set[Path]:
        return {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}

    before = everything()
    save_checkpoint(folder, model, optimizer, {"iteration": 2})
    save_checkpoint(folder, model, optimizer, {"iteration": 3})
    made = {Path("run/step-000000003-2"), *(Path("run/step-000000003-2") / n for n in FILES)}
    assert everything() == before | made
    assert (outside / "latest").read_text() == "step-000000007"


FILES = ("model.safetensors", "state.pt")


def test_no_link_that_lies_in_wait_is_followed(tmp_path: Path) -> None:
    model, optimizer = make()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("latest", ".latest.draft", "step-000000000"):
        (folder / name).symlink_to(victim)
    saved = save_checkpoint(folder, model, optimizer)
    assert victim.read_text() == "precious" and saved.name == "step-000000000-2"
    assert load_checkpoint(folder) == {} and not (folder / "latest").is_symlink()


@pytest.mark.parametrize(
    "name", ["../other/step-000000001", "/{0}/other/step-000000001", "", ".", "..", "other",
             "step-1", "step-000000001/", "step-000000001\n../other", "step-000000002", "x" * 9999,
             "step-" + 251 * "9"]
)  # fmt: skip
def test_the_newest_is_a_checkpoint_beside_its_name(name: str, tmp_path: Path) -> None:
    model, _ = make()
    for folder in ("run", "other"):
        save_checkpoint(tmp_path / folder, model, state={"iteration": 1})
    (tmp_path / "run" / "step-000000002").symlink_to(tmp_path / "other" / "step-000000001")
    latest = tmp_path / "run" / "latest"
    latest.write_text(name.format(tmp_path))
    for load in (load_checkpoint, load_model):
        with pytest.raises(UserError, match="expected the name of a checkpoint beside it in"):
            load(tmp_path / "run")
    latest.unlink()
    latest.symlink_to(tmp_path / "other" / "latest")
    with pytest.raises(UserError, match="expected the name of a checkpoint beside it in"):
        load_model(tmp_path / "run")


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


GOOD = {"optimizer": None, "random": {}, "state": {}}


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (None, "does not hold the state of a training"),
        ([1], "does not hold the state of a training"),
        ({}, "does not hold the state of a training"),
        ({**GOOD, "state": [1]}, "does not hold the state of a training"),
        ({**GOOD, "optimizer": "x"}, "is damaged"),
        ({**GOOD, "optimizer": {"param_groups": 3}}, "is damaged"),
        ({**GOOD, "optimizer": {"state": {}, "param_groups": []}}, "another optimizer"),
        ({**GOOD, "optimizer": {}, "random": None}, "is damaged"),
    ],
    ids=range(8),
)
def test_a_state_of_something_else(saved: object, says: str, tmp_path: Path) -> None:
    model, optimizer = make()
    written = save_checkpoint(tmp_path, model, optimizer)
    torch.save(saved, written / "state.pt")
    with pytest.raises(UserError, match=says):
        load_checkpoint(tmp_path, model, optimizer)


@pytest.mark.parametrize("random", [None, {}, {"cpu": 3}, {"cpu": torch.zeros(3), "cuda": []}])
def test_random_numbers_of_something_else(random: object, tmp_path: Path) -> None:
    model, optimizer = make()
    written = save_checkpoint(tmp_path, model, optimizer)
    saved = torch.load(written / "state.pt", weights_only=True)
    torch.save({**saved, "random": random}, written / "state.pt")
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path, model, optimizer)


@dataclass
class State:
    count: int = 0
    seconds: float = 0.0
    found: dict[str, int] = field(default_factory=dict)


def test_the_state_of_a_training() -> None:
    assert restored(State, {"count": 3, "seconds": 1}, "run") == State(3, 1)
    for saved, says in (
        ({"iteration": 3}, "is of another training: it has 'iteration'"),
        ({"__class__": 3}, "is of another training"),
        ({"count": "3"}, "its count is not of type int"),
        ({"count": None}, "its count is not of type int"),
        ({"seconds": torch.ones(2)}, "its seconds is not of type float"),
        ({"found": [1]}, "its found is not of type dict"),
    ):
        with pytest.raises(UserError, match=says):
            restored(State, saved, "run")


LAYOUT = layout_to_dict(matrix_factorization(6, 5).layout)


@pytest.mark.parametrize(
    "layout",
    [
        "null", "[]", "", "[" * 100_000, "{}", '{"tree": ' * 900 + "1" + "}" * 900,
        *(json.dumps({**LAYOUT, key: value}) for key, value in (
            ("tree", None), ("tree", {"order": 2, "parents": "22"}), ("ranks", [1]),
            ("ranks", [[1]] * 2), ("mode_dims", [10**30, 5]), ("mode_dims", "65"),
            ("mode_dims", {}), ("out_features", 0), ("root", []), ("root", None),
        )),
    ],
    ids=range(16),
)  # fmt: skip
def test_layouts_of_something_else(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(make()[0].state_dict(), path, {"htf": layout})
    with pytest.raises(UserError, match=r"the layout in .*model\.safetensors") as raised:
        load_model(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


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
