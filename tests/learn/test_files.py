"""Files whole or not at all, safe from links that lie in wait; and JSON from anywhere."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import largest_file
from matplotlib.figure import Figure
from safetensors.torch import save_file

from htflearn.errors import Extras, Incomplete, UserError
from htflearn.figures import save_figure
from htflearn.files import (
    append,
    check_fits,
    check_output,
    parse_object,
    read_object,
    remove_drafts,
    replace_file,
    whole_file,
)


def test_no_link_that_lies_in_wait_is_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    folder.mkdir()
    names = ("numbers.json", "figure.png")
    for name in names:
        for draft in (f".{name}.draft", f".{name}.draft.png", f"{name}.tmp", ".draft"):
            (folder / draft).unlink(missing_ok=True)
            (folder / draft).symlink_to(victim)
    before = set(folder.iterdir())
    replace_file(folder / names[0], "[]")
    save_figure(Figure(), folder / names[1])
    assert victim.read_text() == "precious"
    assert set(folder.iterdir()) == before | {folder / name for name in names}
    # Nor is the name itself, where it is one.
    (folder / "link.json").symlink_to(victim)
    replace_file(folder / "link.json", "{}")
    assert victim.read_text() == "precious" and not (folder / "link.json").is_symlink()


def test_drafts_are_new_files_of_names_that_cannot_be_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with whole_file(tmp_path / "a.txt") as first, whole_file(tmp_path / "a.txt") as second:
        assert first.parent == second.parent == tmp_path and first.suffix == second.suffix == ".txt"
        assert first.name != second.name
    monkeypatch.setattr("secrets.token_hex", lambda size: "foreseen")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".htf-foreseen.txt").symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "b.txt", "text")
    assert victim.read_text() == "precious"


def test_drafts_that_a_killed_process_has_left_are_removed_and_nothing_else(
    tmp_path: Path,
) -> None:
    def killed(path: Path) -> None:
        with whole_file(path) as draft:
            draft.write_text("half")
            os._exit(9)

    child = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "a.txt",))
    child.start()
    child.join(30)
    (left,) = tmp_path.iterdir()
    for name in ("a.txt", ".htf-notes.txt", left.name.replace("txt", "d")):
        (tmp_path / name).mkdir() if name.endswith("d") else (tmp_path / name).write_text("kept")
    kept = set(tmp_path.iterdir()) - {left}
    remove_drafts(tmp_path)
    assert child.exitcode == 9 and len(kept) == 3 and set(tmp_path.iterdir()) == kept


def test_what_is_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    replace_file(path, "old")
    for error in (KeyboardInterrupt, ValueError("a bug")):
        with pytest.raises((KeyboardInterrupt, ValueError)), whole_file(path) as draft:
            draft.write_text("half")
            raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(NotADirectoryError):
        replace_file(path / "b.txt", "")


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    replace_file(tmp_path / "replaced", "")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write_pt(path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(torch.zeros(9999), file)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("x" * 99999),
    "safetensors": lambda path: save_file({"a": torch.zeros(9999)}, path),
    "npy": lambda path: np.save(path, np.zeros(9999)),
    "pt": write_pt,
    "png": lambda path: Figure(figsize=(30, 30)).savefig(path, format="png"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_without_room_is_an_error_of_the_system(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"file.{kind}"
    with largest_file(4096), pytest.raises(OSError) as raised, whole_file(path) as draft:
        WRITERS[kind](draft)
    # NumPy does not say which error it met.
    assert raised.value.strerror in ("File too large", "No space left on device")
    assert raised.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_lines_are_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with open(path, "ab", buffering=0) as file:
        append(file, b"first\n")
        with largest_file(10), pytest.raises(OSError, match="No space left on device"):
            append(file, b"second\n")
        append(file, b"third\n")
    assert path.read_bytes() == b"first\nthird\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"[]", "expected a JSON object, got list"),
        (b"1" * 5000, "cannot be read as JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=range(8),
)
def test_json_from_anywhere(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        read_object(tmp_path / "a.json")
    assert "a.json" in str(raised.value) and len(str(raised.value)) < 400
    assert parse_object('{"a": [1]}', "text") == {"a": [1]}


def test_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    check_output(tmp_path / "file")
    check_output(tmp_path / "new", force=False)
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} exists; give --force to replace it, or"):
            check_output(tmp_path / name, force=False)
    with pytest.raises(UserError, match=r"--json must be a file, and .* is a directory"):
        check_output(tmp_path, option="json")
    with pytest.raises(UserError, match="--out must be a file, and /dev/null is a device"):
        check_output(Path("/dev/null"))


def test_more_than_the_memory() -> None:
    check_fits(2**20, "small")
    with pytest.raises(UserError, match=r"large is to hold 1,000,000,000 GB, more than the \d+ GB"):
        check_fits(10**18, "large")


def test_extras_are_told_together(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "htflearn.errors")
    extras = Extras()
    extras.done("the result")
    with extras.making("the figure"):
        raise OSError(28, os.strerror(28), "/a/b")
    with extras.making("the ranks"):
        raise ZeroDivisionError("a bug")
    for error in (KeyboardInterrupt, BrokenPipeError):
        with pytest.raises(error), extras.making("nothing"):
            raise error
    with pytest.raises(Incomplete) as raised:
        extras.done("the result")
    assert raised.value.made == "the result"
    assert raised.value.sentences == (
        "the figure could not be made: No space left on device",
        "the ranks could not be made: ZeroDivisionError: a bug",
    )
    (record,) = caplog.records  # with its traceback, for whoever looks for it
    assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError
