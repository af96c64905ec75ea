"""``htf complete`` on input that is wrong: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import htfkernels as hk
from htflearn import cli

Case = tuple[str, Callable[[Path], None], tuple[object, ...], str]

RNG = np.random.default_rng(0)
TENSOR = RNG.random((6, 5, 4))
TENSOR[0, 0] = np.nan
TABLE = "user,item,score\n" + "".join(
    f"{u},{i},{'' if u == i else u + i}\n" for u in range(6) for i in range(5)
)


def array(value: object, key: str | None = None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        if key is None:
            np.save(path, np.asarray(value), allow_pickle=True)
        else:
            np.savez(path, **{name: np.asarray(value) for name in key.split(",")})

    return make


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def table(**columns: object) -> Callable[[Path], None]:
    return lambda path: parquet.write_table(pa.table(columns), path)


def image(pixels: np.ndarray) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(pixels).save(path)


def saved(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def nothing(path: Path) -> None:
    """No file at all."""


def cut(make: Callable[[Path], None], size: int) -> Callable[[Path], None]:
    def shortened(path: Path) -> None:
        make(path)
        path.write_bytes(path.read_bytes()[:size])

    return shortened


def with_file(
    make: Callable[[Path], None], name: str, other: Callable[[Path], None]
) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        make(path)
        other(path.with_name(name))

    return both


def npy(header: str) -> Callable[[Path], None]:
    size = len(header).to_bytes(2, "little")
    return lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + size + header.encode())


def with_member(value: np.ndarray, name: str, damaged: bool = False) -> Callable[[Path], None]:
    """An archive of an array ``a`` and of something else."""

    def make(path: Path) -> None:
        np.savez(path, a=value)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "by hand")
        if damaged:
            path.write_bytes(path.read_bytes().replace(b"by hand", b"by HAND"))

    return make


DIGITS, HUGE = "9" * 5000, "9" * 400

GOOD, PHOTO = array(TENSOR), image(np.full((20, 18, 3), 9, np.uint8))
GIF = [Image.new("L", (9, 9), n) for n in (0, 200)]
SPARSE = np.full((6, 5, 4), np.nan)
SPARSE[0, 0, 0] = 1.0
INFINITE = np.where(np.isnan(TENSOR), np.inf, TENSOR)
TREE = text(hk.ModeTree.balanced(4).to_json())
LOOP = text(json.dumps({"order": 2, "parents": [2, 3, 3, 2]}))

CASES: list[Case] = [
    # Not a tensor.
    ("t.npy", nothing, (), "there is no file"),
    ("t", lambda p: p.mkdir(), (), "is a directory"),
    ("t.txt", text("1 2 3"), (), "expected a file ending in .npy"),
    ("t.npy", text("no array"), (), "it is not a NumPy file"),
    ("t.npy", text(b""), (), "cannot be read"),
    ("t.npy", cut(GOOD, 300), (), "cannot be read"),
    ("t.npy", npy("(" * 5000), (), "cannot be read"),
    ("t.npy", npy("-" * 5000 + "1"), (), "cannot be read"),
    ("t.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (9999,) * 9}"), (), "read"),
    ("t.npy", array([{"a": 1}, None]), (), "holds objects"),
    ("t.npy", array([["a", "b"], ["c", "d"]]), (), "dtype <U1"),
    ("t.npy", array(np.ones((3, 3), complex)), (), "dtype complex128"),
    ("t.npy", array(1.5), (), "the shape []"),
    ("t.npy", array(np.ones((0, 4))), (), "the shape [0, 4]"),
    ("t.npy", GOOD, ("--key", "a"), "holds a single array"),
    ("t.npz", text("PK no zip"), (), "cannot be read"),
    ("t.npz", cut(array(TENSOR, "a"), 200), (), "cannot be read"),
    ("t.npz", array(TENSOR, "a,b"), (), "holds several arrays (a, b)"),
    ("t.npz", array(TENSOR, "a,b"), ("--key", "c"), "has no array 'c', only a, b"),
    ("t.npz", with_member(TENSOR, "notes.txt"), ("--key", "notes.txt"), "notes.txt in"),
    ("t.npz", with_member(TENSOR, "notes.txt", True), ("--key", "a"), "is damaged: Bad CRC-32"),
    ("t.pt", text("no tensor"), (), "cannot be read"),
    ("t.pt", cut(saved(torch.ones(9, 9)), 400), (), "cannot be read"),
    ("t.pt", saved([1, 2]), (), "holds a list"),
    ("t.pt", saved({"a": 1}), (), "holds no array"),
    ("t.pt", saved(torch.nn.Linear(2, 2)), (), "nothing else"),
    ("t.pt", saved(torch.eye(3).to_sparse()), (), "dense tensor"),
    ("t.pt", saved(torch.ones(3, 3, device="meta")), (), "holds torch.float32"),
    ("t.pt", saved(torch.ones(3, 3).to(torch.float8_e5m2)), (), "holds torch.float8_e5m2"),
    # What is known of it.
    ("t.npy", array(np.full((3, 3), np.nan)), (), "all 9 entries are missing"),
    ("t.npy", array(SPARSE), (), "needs at least 13 of 120, got 1"),
    ("t.npy", array(INFINITE), (), "expected finite entries, got inf at index [0, 0, 0]"),
    ("t.npy", array(np.ones((4, 4))), (), "nothing is missing"),
    ("t.npy", GOOD, ("--hide", 0), "--hide expects a fraction"),
    ("t.npy", GOOD, ("--hide", 1.5), "--hide expects a fraction"),
    ("t.npy", GOOD, ("--hide", 0.99), "too few known entries"),
    ("t.npy", GOOD, ("--held-out", 0), "--held-out expects a fraction"),
    ("t.npy", array([[1.0, np.nan]]), ("--held-out", 0.9), "too few known entries"),
    ("t.npy", GOOD, ("--mask", "m.npy"), "there is no file m.npy"),
    (
        "t.npy",
        with_file(GOOD, "m.npy", array(np.ones((6, 4, 4), bool))),
        ("--mask", "{folder}/m.npy"),
        "expected a mask of shape [6, 5, 4]",
    ),
    (
        "t.npy",
        with_file(GOOD, "m.npy", array(TENSOR)),
        ("--mask", "{folder}/m.npy"),
        "expected a mask of true and false",
    ),
    # Shapes, trees, ranks.
    ("t.npy", array(np.arange(50) * 1.0), ("--hide", 0.1), "order 2 or more, got the shape [50]"),
    ("t.npy", GOOD, ("--quantize",), "--quantize splits modes of length 16"),
    ("t.npy", array(np.ones((99, 9))), ("--hide", 0.1, "--factors", "4,4"), "makes 16 positions"),
    ("t.npy", GOOD, ("--factors", "8,x"), "--factors expects"),
    ("t.npy", GOOD, ("--factors", DIGITS), "--factors expects"),
    ("t.npy", GOOD, ("--factors", "auto,8", "--no-quantize"), "give one of them"),
    ("t.npy", GOOD, ("--tree", "oak"), "--tree expects auto"),
    ("t.npy", GOOD, ("--tree", "no.json"), "there is no file of the tree no.json"),
    (
        "t.npy",
        with_file(GOOD, "tree.json", TREE),
        ("--tree", "{folder}/tree.json"),
        "is of order 4, but the tensor has 3 modes",
    ),
    (
        "t.npy",
        with_file(GOOD, "tree.json", LOOP),
        ("--tree", "{folder}/tree.json"),
        "expected a mode tree",
    ),
    (
        "t.npy",
        with_file(GOOD, "tree.json", text("{")),
        ("--tree", "{folder}/tree.json"),
        "got no JSON",
    ),
    (
        "t.npy",
        with_file(GOOD, "tree.json", text("[" * 100_000)),
        ("--tree", "{folder}/tree.json"),
        "the JSON is nested too deeply",
    ),
    ("t.npy", GOOD, ("--ranks", "1,2,3"), "--ranks expects 1 number or 2"),
    ("t.npy", GOOD, ("--ranks", "0"), "--ranks expects positive whole numbers"),
    ("t.npy", GOOD, ("--ranks", "a"), "--ranks expects positive whole numbers"),
    ("t.npy", GOOD, ("--ranks", "999999"), "weights, more than"),
    ("t.npy", GOOD, ("--ranks", HUGE), "at most 268,435,456, got '9999"),
    ("t.npy", GOOD, ("--ranks", DIGITS), "--ranks expects positive whole numbers"),
    # Training.
    ("t.npy", GOOD, ("--loss", "l3"), "--loss expects one of l2, l1, huber"),
    ("t.npy", GOOD, ("--optimizer", "lbfgs"), "--optimizer expects one of"),
    ("t.npy", GOOD, ("--dtype", "int8"), "--dtype expects one of"),
    ("t.npy", GOOD, ("--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
    ("t.npy", GOOD, ("--lr", "-1"), "--lr must be positive, got -1"),
    ("t.npy", GOOD, ("--lr", "nan"), "--lr must be positive, got nan"),
    ("t.npy", GOOD, ("--lr", "inf"), "--lr must be finite, got inf"),
    ("t.npy", GOOD, ("--iterations", "0"), "--iterations must be positive, got 0"),
    ("t.npy", GOOD, ("--iterations", HUGE), "--iterations must be at most 9,223,372,036,854"),
    ("t.npy", GOOD, ("--iterations", f"-{HUGE}"), "--iterations must be positive, got -9999"),
    ("t.npy", GOOD, ("--batch-size", "0"), "--batch-size must be positive, got 0"),
    ("t.npy", GOOD, ("--weight-decay", "-1"), "--weight-decay must not be negative, got -1"),
    ("t.npy", GOOD, ("--seed", "-1"), "--seed expects"),
    ("t.npy", GOOD, ("--smooth-modes", "3"), "--smooth-modes expects modes from 0 to 2"),
    ("t.npy", GOOD, ("--smooth-modes", DIGITS), "--smooth-modes expects modes from 0 to 2"),
    # Outputs.
    ("t.npy", GOOD, ("--out", "{folder}/no/t.npy"), "does not exist"),
    ("t.npy", GOOD, ("--out", "{folder}/o.csv"), "expected an output ending in .npy"),
    ("t.npy", GOOD, ("--out", "{folder}/t.npy"), "is the input"),
    ("t.npy", GOOD, ("--out", "{folder}/earlier.npy"), "exists; give --force"),
    # Tables.
    ("t.csv", text(""), (), "cannot be read as a table"),
    ("t.csv", text("a,b\n1,2,3\n"), (), "cannot be read as a table"),
    ("t.csv", text("a,b,c\n"), (), "holds no rows"),
    ("t.csv", text("a,a,c\n1,2,3\n"), (), "has 'a' twice"),
    ("t.csv", text("0,1,2.5\n1,1,3.5\n"), (), "expected the names of the columns"),
    ("t.csv", text("score\n1\n"), (), "expected columns of indices"),
    ("t.csv", text(TABLE + "1,1,abc\n"), (), "got 'abc' in row 31"),
    ("t.csv", text(TABLE + "-1,1,3\n"), (), "has -1 in row 31"),
    ("t.csv", text(TABLE + ",1,3\n"), (), "is empty in row 31"),
    ("t.csv", text(TABLE + "1.5,1,3\n"), (), "expected integers or labels"),
    ("t.csv", text(TABLE + "77777,1,3\n"), (), "give --labels user"),
    ("t.csv", text(TABLE), ("--dims", "5,5"), "has the index 5 in row 26, out of range"),
    ("t.csv", text(TABLE), ("--dims", "5"), "--dims expects 2 sizes"),
    ("t.csv", text(TABLE), ("--dims", "a,b"), "--dims expects positive whole numbers"),
    ("t.csv", text(TABLE), ("--dims", DIGITS), "--dims expects positive whole numbers"),
    ("t.csv", text(b"\xff,b,v\n1,2,3\n"), (), "cannot be read as a table"),
    ("t.csv", text(TABLE), ("--value-column", "stars"), "has no column 'stars'"),
    ("t.csv", text(TABLE), ("--index-columns", "user,page"), "has no column 'page'"),
    ("t.csv", text(TABLE), ("--index-columns", "user,score"), "an index and the value"),
    ("t.csv", text(TABLE), ("--index-columns", "user,user"), "names a column twice"),
    ("t.csv", text(TABLE), ("--labels", "score"), "is not an index column"),
    ("t.csv", text(TABLE), ("--mask", "m.npy"), "--mask is for array and image files"),
    ("t.csv", text(TABLE), ("--all", "--dims", "9999,9999"), "--all would write"),
    ("t.csv", text("a,b,v\n" + "1,1,\n" * 9), (), "all 4 entries are missing"),
    ("t.parquet", text("no table"), (), "cannot be read as a table"),
    ("t.parquet", table(a=[0, 1, 2], v=[[1], [2], [3]]), (), "expected numbers"),
    ("t.parquet", table(a=[[0], [1]], b=[0, 1], v=[1.0, 2.0]), (), "expected integers or labels"),
    # Pictures.
    ("p.png", text("no picture"), (), "cannot be read as one"),
    ("p.png", cut(PHOTO, 60), (), "cannot be read"),
    ("p.png", text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), (), "as one"),
    ("p.png", PHOTO, (), "nothing is missing"),
    ("p.png", PHOTO, ("--hide", 0.5, "--out", "{folder}/o.blp"), "o.blp cannot be written: Unsup"),
    ("p.png", PHOTO, ("--key", "a"), "--key is for array files"),
    ("p.png", PHOTO, ("--hide", 0.5, "--out", "{folder}/p.npy"), "an output that is a picture"),
    ("p.png", image(np.zeros((9, 9, 4), np.uint8)), (), "all 243 entries are missing"),
    (
        "p.png",
        with_file(PHOTO, "m.png", image(np.zeros((20, 17), np.uint8))),
        ("--mask", "{folder}/m.png"),
        "expected a mask of shape [20, 18]",
    ),
    (
        "p.gif",
        lambda p: GIF[0].save(p, save_all=True, append_images=GIF[1:]),
        (),
        "holds 2 frames",
    ),
]


def folder_of(path: Path) -> dict[str, bytes | None]:
    return {p.name: p.read_bytes() if p.is_file() else None for p in path.iterdir()}


@pytest.mark.parametrize(
    ("name", "make", "options", "sentence"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES]
)
def test_bad_input(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    make: Callable[[Path], None],
    options: tuple[object, ...],
    sentence: str,
) -> None:
    make(tmp_path / name)
    (tmp_path / "earlier.npy").write_bytes(b"an earlier result")
    before = folder_of(tmp_path)
    filled = [str(option).format(folder=tmp_path) for option in options]
    assert cli.run(["complete", str(tmp_path / name), "--iterations", "2", *filled]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("htf: ") and shown.err.count("\n") == 1, shown.err
    assert sentence in shown.err
    assert folder_of(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("p.png", PHOTO, ("--out", "{folder}/o.blp")),
        ("t.npz", with_member(TENSOR, "notes.txt", True), ("--key", "a")),
    ],
)
def test_a_result_that_cannot_be_written_is_told_before_the_training(
    name: str,
    make: Callable[[Path], None],
    options: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path / name)
    monkeypatch.setattr("htflearn.train.Trainer.fit", lambda *_: pytest.fail("it trained"))
    filled = [option.format(folder=tmp_path) for option in options]
    assert cli.run(["complete", str(tmp_path / name), "--hide", "0.5", *filled]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("t.npz", lambda path: np.savez_compressed(path, a=np.zeros(10**5))),
        ("t.pt", saved(torch.zeros(10**5))),
        ("t.parquet", table(a=[1] * 10**5, v=[1.0] * 10**5)),
    ],
)
def test_files_that_unpack_to_more_than_the_memory(
    name: str,
    make: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path / name)
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 100_000}
    monkeypatch.setattr("os.sysconf", memory.__getitem__)
    assert cli.run(["complete", str(tmp_path / name), "--hide", "0.5"]) == 2
    assert f"{name} is to hold" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GOOD(tmp_path / "t.npy")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert cli.run(["complete", str(tmp_path / "t.npy"), "--out", str(locked / "o.npy")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_by_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    GOOD(tmp_path / "t.npy")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
    assert cli.run(["complete", str(tmp_path / "t.npy")]) == 2
    assert "cannot be written: Permission denied" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["t.npy"]


def test_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    GOOD(tmp_path / "t.npy")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    options = ("--iterations", "2", "--quiet")
    assert cli.run(["complete", str(tmp_path / "t.npy"), *options]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["t.npy"]
