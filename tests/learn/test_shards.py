"""Shards on disk: what was written is read back, and what is damaged is told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from htflearn.errors import UserError
from htflearn.locality.shards import ShardedImages, ShardWriter, write_shard

COUNT, SIZE, SHAPE = 10, 4, (3, 5, 6)


def contents(shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (COUNT, *shape), np.uint8), rng.integers(0, 7, COUNT)


def write(path: Path, shape: tuple[int, ...] = SHAPE) -> Path:
    images, labels = contents(shape)
    writer = ShardWriter(path, COUNT, shape, {"made": "by a test"}, SIZE)
    for shard in writer.missing():
        indices = writer.indices(shard)
        write_shard(path, shard, images[indices], labels[indices])
    writer.finish()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ShardedImages:
    return ShardedImages(write(tmp_path_factory.mktemp("shards")))


@pytest.mark.parametrize("shape", [(5, 6), SHAPE])
def test_what_was_written_is_read_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = ShardedImages(write(tmp_path, shape))
    images, labels = contents(shape)
    assert len(data) == COUNT and data.shape == shape
    assert (data.labels == labels).all() and data.labels.dtype == np.int64
    assert (data.images(range(COUNT)) == images).all()
    assert data.meta["made"] == "by a test"
    assert [shard["count"] for shard in data.meta["shards"]] == [4, 4, 2]
    data.verify()
    names = {file.name for file in tmp_path.iterdir()}
    shards = {f"{kind}-{i:05d}.npy" for kind in ("images", "labels") for i in range(3)}
    assert names == shards | {"plan.json", "meta.json"}


@given(indices=st.lists(st.integers(-COUNT, COUNT - 1), max_size=20))
def test_images_come_in_the_order_asked_for(written: ShardedImages, indices: list[int]) -> None:
    got = written.images(indices)
    assert (got == contents()[0][indices]).all()
    assert got.dtype == np.uint8 and got.shape == (len(indices), *SHAPE) and got.flags.writeable


@pytest.mark.parametrize("index", [COUNT, -COUNT - 1])
def test_there_is_no_image_beyond_the_last(written: ShardedImages, index: int) -> None:
    with pytest.raises(IndexError, match=f"expected indices below {COUNT}, got {index}"):
        written.images([0, index])


def test_another_process_gets_the_path_and_not_the_images(written: ShardedImages) -> None:
    sent = pickle.dumps(written)
    assert len(sent) < 500
    assert (pickle.loads(sent).images([3]) == written.images([3])).all()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)


def garble(file: Path) -> None:
    file.write_bytes(b"garbage")


def reshape(file: Path) -> None:
    np.save(file, np.load(file)[:1])


@pytest.mark.parametrize("name", ["images-00001.npy", "labels-00001.npy"])
@pytest.mark.parametrize("damage", [Path.unlink, cut, garble, reshape])
def test_a_damaged_shard_is_told_and_made_again(tmp_path: Path, name: str, damage: Any) -> None:
    write(tmp_path)
    before = (tmp_path / name).read_bytes()
    damage(tmp_path / name)
    with pytest.raises(UserError, match=name):
        ShardedImages(tmp_path)
    writer = ShardWriter(tmp_path, COUNT, SHAPE, {"made": "by a test"}, SIZE)
    assert writer.missing() == [1]
    with pytest.raises(UserError, match="lacks 1 of its 3 shards"):
        writer.finish()
    with pytest.raises(UserError, match="is not finished"):
        ShardedImages(tmp_path)
    write(tmp_path)
    assert (tmp_path / name).read_bytes() == before
    ShardedImages(tmp_path).verify()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    write(tmp_path)
    flip(tmp_path / "images-00002.npy")
    data = ShardedImages(tmp_path)
    with pytest.raises(UserError, match=r"images-00002.npy is damaged: remove it and generate"):
        data.verify()
    write(tmp_path)  # whole by its size: nothing is written over
    flip(tmp_path / "labels-00000.npy")
    with pytest.raises(UserError, match=r"labels-00000.npy is damaged"):
        ShardedImages(tmp_path)


def damaged_meta(meta: dict[str, Any], key: str, value: Any) -> str:
    return json.dumps({**meta, key: value})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("format", 99, "expected a data set of format 1"),
        ("count", 11, "its shards do not hold 11 images"),
        ("shards", None, "is damaged"),
        ("shards", [{}], "is damaged"),
        ("shape", [5, 6], "images-00000.npy is damaged"),
        ("shape", 3, "is damaged"),
    ],
)
def test_a_damaged_meta_is_told(tmp_path: Path, key: str, value: Any, says: str) -> None:
    file = write(tmp_path) / "meta.json"
    file.write_text(damaged_meta(json.loads(file.read_text()), key, value))
    with pytest.raises(UserError, match=says):
        ShardedImages(tmp_path)


@pytest.mark.parametrize("text", ["", "[1", "[]", "null"])
def test_files_that_are_no_json_objects_are_told(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta.json"):
        ShardedImages(tmp_path)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan.json cannot be read|holds another data set"):
        write(tmp_path)


def test_a_directory_without_a_data_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no data set in"):
        ShardedImages(tmp_path)
    with pytest.raises(UserError, match="there is no data set in"):
        ShardedImages(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError):
        ShardedImages(file)
    with pytest.raises(UserError, match="cannot be written"):
        write(file)


def test_images_of_unknown_origin_are_not_written_over(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "plan.json").unlink()
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"holds images, but no plan.json"):
        write(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_a_shard_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = contents()
    writer = ShardWriter(tmp_path, COUNT, SHAPE, {}, COUNT)

    def full(file: Any, array: np.ndarray) -> None:
        file.write(b"half of ")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            write_shard(tmp_path, 0, images, labels)
    assert writer.missing() == [0]
    (tmp_path / ".htf-0123456789abcdef.npy").write_bytes(b"of a killed process")
    writer = ShardWriter(tmp_path, COUNT, SHAPE, {}, COUNT)
    write_shard(tmp_path, 0, images, labels)
    writer.finish()
    assert not list(tmp_path.glob(".*"))
    assert (ShardedImages(tmp_path).images(range(COUNT)) == images).all()


def test_wrong_numbers_are_told(tmp_path: Path) -> None:
    for count, size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="expected a count and a shard size from 1"):
            ShardWriter(tmp_path, count, SHAPE, {}, size)
