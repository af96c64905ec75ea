"""``htf complete``: formats there and back, and every way to say that an entry is missing."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import csv, parquet

from htflearn import cli
from htflearn.complete.arrays import ArraySource
from htflearn.complete.images import ImageSource
from htflearn.complete.tables import TableSource

RNG = np.random.default_rng(0)
SHAPE = (6, 5, 4)


def htf(file: Path, *options: object) -> int:
    quick = ("--iterations", 8, "--weight-decay", 0, "--quiet")
    return cli.run(["complete", str(file), *map(str, quick), *map(str, options)])


def report(file: Path) -> dict:
    return json.loads(file.with_name(f"{file.stem}-completed.json").read_text())


def gaps(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).random(shape) < 0.3


def given(dtype: str = "float64") -> np.ndarray:
    tensor = RNG.random(SHAPE).astype(dtype)
    tensor[gaps()] = np.nan
    return tensor


def check(before: np.ndarray, after: np.ndarray, missing: np.ndarray) -> None:
    assert after.dtype == before.dtype and after.shape == before.shape
    assert np.array_equal(after[~missing], before[~missing])
    assert np.isfinite(after.astype(float)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_npy(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "t.npy", given(dtype))
    assert htf(tmp_path / "t.npy") == 0
    check(np.load(tmp_path / "t.npy"), np.load(tmp_path / "t-completed.npy"), gaps())


def test_npz_keeps_what_else_is_in_it(tmp_path: Path) -> None:
    odd = np.array(["labels"], dtype=object)
    np.savez(tmp_path / "t.npz", a=given(), more=np.arange(3), odd=odd)
    assert htf(tmp_path / "t.npz", "--key", "a") == 0
    with np.load(tmp_path / "t.npz") as before, np.load(tmp_path / "t-completed.npz") as after:
        assert sorted(after.files) == ["a", "more", "odd"]
        check(before["a"], after["a"], gaps())
        assert np.array_equal(after["more"], np.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pt(tmp_path: Path, dtype: torch.dtype) -> None:
    before = torch.from_numpy(given()).to(dtype)
    torch.save(before, tmp_path / "t.pt")
    assert htf(tmp_path / "t.pt") == 0
    after = torch.load(tmp_path / "t-completed.pt", weights_only=True)
    assert after.dtype == dtype
    check(before.double().numpy(), after.double().numpy(), gaps())


def test_pt_with_keys(tmp_path: Path) -> None:
    before = torch.from_numpy(given())
    torch.save({"x": before, "name": "n", "y": torch.ones(2)}, tmp_path / "t.pt")
    assert htf(tmp_path / "t.pt", "--key", "x") == 0
    after = torch.load(tmp_path / "t-completed.pt", weights_only=True)
    assert list(after) == ["x", "name", "y"] and after["name"] == "n"
    check(before.numpy(), after["x"].numpy(), gaps())


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_another_array_format(tmp_path: Path, suffix: str) -> None:
    np.savez(tmp_path / "t.npz", given())
    out = tmp_path / f"out{suffix}"
    assert htf(tmp_path / "t.npz", "--out", out) == 0
    with np.load(tmp_path / "t.npz") as archive:
        before = archive["arr_0"]
    if suffix == ".pt":
        after = torch.load(out, weights_only=True).numpy()
    else:
        loaded = np.load(out)
        after = loaded["arr_0"] if suffix == ".npz" else loaded
    check(before, after, gaps())


def test_a_mask_and_nan(tmp_path: Path) -> None:
    known = RNG.random(SHAPE) > 0.2
    np.save(tmp_path / "t.npy", given())
    for name, mask in (("m.npy", known), ("ints.npy", known.astype(int))):
        np.save(tmp_path / name, mask)
        source = ArraySource.open(tmp_path / "t.npy", mask=tmp_path / name)
        assert np.array_equal(source.known, known & ~gaps())
    torch.save(torch.from_numpy(known), tmp_path / "m.pt")
    assert htf(tmp_path / "t.npy", "--mask", tmp_path / "m.pt") == 0
    missing = gaps() | ~known
    check(np.load(tmp_path / "t.npy"), np.load(tmp_path / "t-completed.npy"), missing)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_integers_are_rounded_and_clipped(tmp_path: Path, dtype: str) -> None:
    missing = gaps()
    tensor = RNG.integers(0, 2 if dtype == "bool" else 17, SHAPE).astype(dtype)
    if dtype == "bool":
        np.save(tmp_path / "m.npy", ~missing)
        options: tuple[object, ...] = ("--mask", tmp_path / "m.npy")
    else:
        tensor[missing] = 99
        options = ("--missing", 99)
    np.save(tmp_path / "t.npy", tensor)
    assert htf(tmp_path / "t.npy", *options) == 0
    after = np.load(tmp_path / "t-completed.npy")
    check(tensor, after, missing)
    known = tensor[~missing]
    assert known.min() <= after.min() and after.max() <= known.max()


def test_predictions_of_integers_stay_in_range(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", RNG.integers(3, 6, SHAPE))
    entries = ArraySource.open(tmp_path / "t.npy").entries
    assert entries.finish(np.array([-5.0, 3.4, 4.6, 99.0])).tolist() == [3, 3, 5, 5]


# -- tables ---------------------------------------------------------------------------------------


def rows(users: int = 6, items: int = 5) -> dict[str, list]:
    cells = [(u, i) for u in range(users) for i in range(items)]
    values = [None if (u + 2 * i) % 5 == 0 else (u + 1) * (i + 2) / 4 for u, i in cells]
    return {"user": [u for u, _ in cells], "item": [i for _, i in cells], "score": values}


def save(table: pa.Table, path: Path) -> None:
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)


def load(path: Path) -> pa.Table:
    return csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    columns = rows()
    save(pa.table(columns), tmp_path / f"t{suffix}")
    assert htf(tmp_path / f"t{suffix}") == 0
    after = load(tmp_path / f"t-completed{suffix}").to_pydict()
    assert after["user"] == columns["user"] and after["item"] == columns["item"]
    for before, value in zip(columns["score"], after["score"], strict=True):
        assert np.isfinite(value) and before in (None, value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_labels_come_back(tmp_path: Path, suffix: str) -> None:
    columns = rows()
    columns["user"] = [f"u{9 - u}" for u in columns["user"]]
    columns["item"] = [100_000 * i for i in columns["item"]]
    save(pa.table(columns), tmp_path / f"t{suffix}")
    options = ("--labels", "item", "--value-column", "score", "--index-columns", "item,user")
    assert htf(tmp_path / f"t{suffix}", *options) == 0
    after = load(tmp_path / f"t-completed{suffix}").to_pydict()
    assert after["user"] == columns["user"] and after["item"] == columns["item"]
    assert report(tmp_path / f"t{suffix}")["shape"] == [5, 6]
    assert report(tmp_path / f"t{suffix}")["names"] == ["item", "user"]


def test_csv_is_quoted_where_it_must_be(tmp_path: Path) -> None:
    columns = rows()
    save(pa.table(columns), tmp_path / "t.csv")
    assert htf(tmp_path / "t.csv") == 0
    assert '"' not in (tmp_path / "t-completed.csv").read_text()
    columns["user"] = [f'Doe, "J" {u}' for u in columns["user"]]
    columns["big, score"] = columns.pop("score")
    save(pa.table(columns), tmp_path / "q.csv")
    assert htf(tmp_path / "q.csv") == 0
    after = load(tmp_path / "q-completed.csv").to_pydict()
    assert after["user"] == columns["user"] and list(after) == list(columns)


def test_categories_and_dates(tmp_path: Path) -> None:
    import datetime

    columns = rows()
    users = pa.array([f"u{u}" for u in columns["user"]]).dictionary_encode()
    days = pa.array([datetime.date(2024, 1, 1 + i) for i in columns["item"]])
    save(pa.table({"u": users, "day": days, "v": columns["score"]}), tmp_path / "t.parquet")
    assert htf(tmp_path / "t.parquet") == 0
    after = load(tmp_path / "t-completed.parquet")
    assert after["day"].to_pylist() == days.to_pylist()
    assert after["u"].to_pylist() == users.to_pylist()


def test_every_cell(tmp_path: Path) -> None:
    columns = rows()
    kept = [k for k, v in enumerate(columns["score"]) if v is not None]
    table = pa.table({name: [column[k] for k in kept] for name, column in columns.items()})
    save(table, tmp_path / "t.csv")
    assert htf(tmp_path / "t.csv", "--all", "--dims", "7,5") == 0
    after = load(tmp_path / "t-completed.csv").to_pydict()
    cells = list(zip(after["user"], after["item"], strict=True))
    assert cells == [(u, i) for u in range(7) for i in range(5)]
    found = dict(zip(cells, after["score"], strict=True))
    for k in kept:
        assert found[columns["user"][k], columns["item"][k]] == columns["score"][k]
    assert all(np.isfinite(v) for v in found.values())


def test_hidden_rows_are_predicted(tmp_path: Path) -> None:
    save(pa.table(rows()), tmp_path / "t.csv")
    assert htf(tmp_path / "t.csv", "--hide", 0.25) == 0
    numbers = report(tmp_path / "t.csv")
    after = load(tmp_path / "t-completed.csv")["score"].to_pylist()
    same = [v == w for v, w in zip(rows()["score"], after, strict=True) if v is not None]
    assert len(same) - sum(same) == numbers["hidden"] == round(0.25 * len(same))


def test_several_values_of_a_cell(tmp_path: Path) -> None:
    columns = rows()
    columns["user"] += [1, 1, 0]
    columns["item"] += [1, 1, 0]
    columns["score"] += [4.0, 10.0, None]
    save(pa.table(columns), tmp_path / "t.csv")
    source = TableSource.open(tmp_path / "t.csv")
    cell = (source.entries.indices == [1, 1]).all(axis=1)
    assert source.entries.values[cell].tolist() == [(1.5 + 4 + 10) / 3]
    assert htf(tmp_path / "t.csv") == 0
    after = load(tmp_path / "t-completed.csv")["score"].to_pylist()
    assert after[-3:-1] == [4.0, 10.0]
    assert "1 cells have several values" in " ".join(report(tmp_path / "t.csv")["notes"])


def test_a_row_without_a_value_of_a_known_cell(tmp_path: Path) -> None:
    columns = rows()
    columns["user"].append(1)
    columns["item"].append(1)
    columns["score"].append(None)
    save(pa.table(columns), tmp_path / "t.csv")
    assert htf(tmp_path / "t.csv") == 0
    assert load(tmp_path / "t-completed.csv")["score"].to_pylist()[-1] == 1.5


def test_whole_numbers_of_a_table_stay_so(tmp_path: Path) -> None:
    columns = rows()
    columns["score"] = [None if v is None else int(4 * v) for v in columns["score"]]
    save(pa.table(columns), tmp_path / "t.csv")
    assert htf(tmp_path / "t.csv") == 0
    assert load(tmp_path / "t-completed.csv")["score"].type == pa.int64()


# -- pictures -------------------------------------------------------------------------------------


def picture(mode: str, size: tuple[int, int] = (20, 18)) -> Image.Image:
    height, width = size
    ramp = np.add.outer(np.arange(height) * 5, np.arange(width) * 7) % 256
    if mode == "L":
        return Image.fromarray(ramp.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((ramp * 200).astype(np.uint16))
    colours = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2).astype(np.uint8)
    return Image.fromarray(colours).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_pictures(tmp_path: Path, mode: str) -> None:
    picture(mode).save(tmp_path / "p.png")
    assert htf(tmp_path / "p.png", "--hide", 0.6) == 0
    before = np.array(Image.open(tmp_path / "p.png"))
    after = np.array(Image.open(tmp_path / "p-completed.png"))
    assert after.dtype == before.dtype and after.shape == before.shape
    source = ImageSource.open(tmp_path / "p.png")
    source.entries = source.entries.hide(0.6, 0)
    assert np.array_equal(after[source.shown()], before[source.shown()])
    numbers = report(tmp_path / "p.png")
    assert numbers["hidden"] == round(0.6 * 20 * 18) * (3 if mode == "RGB" else 1)
    assert numbers["models"][1]["picture_psnr"] > numbers["models"][1]["hidden_psnr"] > 0
    panels = Image.open(tmp_path / "p-completed-panels.png")
    assert panels.width > 3 * 18 and panels.height > 20


def test_transparent_pixels_are_missing(tmp_path: Path) -> None:
    pixels = np.array(picture("RGBA"))
    pixels[::2, ::3, 3] = 0
    pixels[1, 1, 3] = 90
    Image.fromarray(pixels).save(tmp_path / "p.png")
    assert htf(tmp_path / "p.png") == 0
    after = np.array(Image.open(tmp_path / "p-completed.png"))
    missing = pixels[..., 3] == 0
    assert np.array_equal(after[~missing], pixels[~missing])
    assert (after[missing][:, 3] == 255).all()
    assert Image.open(tmp_path / "p-completed-panels.png").width < 3 * 18


@pytest.mark.parametrize("name", ["m.png", "m.npy"])
def test_a_mask_of_pixels(tmp_path: Path, name: str) -> None:
    known = RNG.random((20, 18)) > 0.4
    if name == "m.png":
        Image.fromarray((known * 255).astype(np.uint8)).save(tmp_path / name)
    else:
        np.save(tmp_path / name, known)
    picture("RGB").save(tmp_path / "p.png")
    assert htf(tmp_path / "p.png", "--mask", tmp_path / name) == 0
    before = np.array(Image.open(tmp_path / "p.png"))
    after = np.array(Image.open(tmp_path / "p-completed.png"))
    assert np.array_equal(after[known], before[known])
    assert report(tmp_path / "p.png")["known"] == 3 * known.sum()


def test_pictures_are_split_into_blocks(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "p.png")
    for options, shape in (
        ((), [9, 64, 3]),
        (("--no-quantize",), [20, 18, 3]),
        (("--quantize",), [15, 6, 4, 3]),  # 20 = 5 2 2, 18 = 3 3 2
        (("--factors", "5,4"), [25, 16, 3]),
    ):
        assert htf(tmp_path / "p.png", "--hide", 0.5, "--force", *options) == 0
        assert report(tmp_path / "p.png")["split_shape"] == shape


def test_jpeg_says_that_it_is_lossy(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "p.jpg")
    assert htf(tmp_path / "p.jpg", "--hide", 0.5) == 0
    assert "lossy" in " ".join(report(tmp_path / "p.jpg")["notes"])
    assert Image.open(tmp_path / "p-completed.jpg").format == "JPEG"
    assert htf(tmp_path / "p.jpg", "--hide", 0.5, "--out", tmp_path / "q.png") == 0
    assert Image.open(tmp_path / "q.png").format == "PNG"


@pytest.mark.parametrize("mode", ["P", "1", "CMYK"])
def test_other_kinds_of_pictures(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    picture(mode).save(path)
    assert htf(path, "--hide", 0.5) == 0
    shape = [20, 18] if mode == "1" else [20, 18, 3]
    assert report(path)["shape"] == shape


def test_results_have_ordinary_permissions(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", given())
    assert htf(tmp_path / "t.npy") == 0
    mask = os.umask(0)
    os.umask(mask)
    for path in tmp_path.glob("t-completed*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
