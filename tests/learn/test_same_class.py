"""Is Same Class: where the images stand, which pairs are drawn, bad settings."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from htflearn.errors import UserError
from htflearn.locality.labelled import LabelledImages
from htflearn.locality.same_class import SameClass, SameClassSetting, same_class

FASHION = Path("/usr/share/datasets/fashion-mnist")


def images(
    count: int = 60, classes: int = 5, shape: tuple[int, int, int] = (3, 4, 4)
) -> LabelledImages:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(count) % classes)
    pixels = rng.integers(1, 256, (count, *shape), dtype=np.uint8)
    return LabelledImages(pixels, labels, tuple(f"class {c}" for c in range(classes)), "made up")


def setting(distance: int = 3, **changes: object) -> SameClassSetting:
    given: dict = {"canvas": (8, 16), "train_pairs": 101, "test_pairs": 40, **changes}
    return SameClassSetting(distance, **given)


@pytest.mark.parametrize("distance", [0, 1, 20, 100, 160])
def test_patches(distance: int) -> None:
    left, right = SameClassSetting(distance).patches(32, 32)
    assert left[::2] == right[::2] == (96, 128)
    assert left[3] - left[1] == right[3] - right[1] == 32
    assert right[1] - left[3] == distance
    # Symmetric: as much room at the left as at the right, but for an odd pixel.
    assert 224 - right[3] - left[1] == distance % 2


@pytest.mark.parametrize("background", [0, (7, 8, 9)])
@pytest.mark.parametrize("size", [None, 2])
def test_canvases(size: int | None, background: int | tuple[int, ...]) -> None:
    data = SameClass(images(), setting(image_size=size), "train", background)
    height = size or 4
    assert data.images.shape == (60, 3, height, height)
    assert data.shape == (3, 8, 16)
    rows = torch.tensor([5, 0, 100])
    canvases = data.batch(rows)
    assert canvases.dtype == torch.uint8
    for row, canvas in zip(rows, canvases, strict=True):
        expected = torch.empty(3, 8, 16, dtype=torch.uint8)
        expected[:] = torch.tensor(background, dtype=torch.uint8).reshape(-1, 1, 1)
        for image, (top, left, bottom, right) in zip(data.pairs[row], data.patches, strict=True):
            expected[:, top:bottom, left:right] = data.images[image]
        assert torch.equal(canvas, expected)
    for same in ([5, 0, 100], np.array([5, 0, 100])):
        assert torch.equal(data.batch(same), canvases)
    assert data.batch([]).shape == (0, 3, 8, 16)
    with pytest.raises(IndexError):
        data.batch([101])


@pytest.mark.parametrize("count", [1, 2, 7, 40, 101, 300])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_pairs(count: int, classes: int) -> None:
    given = images(60, classes)
    data = SameClass(given, setting(train_pairs=count), "train")
    assert len(data) == len(data.labels) == len(data.pairs) == count
    of = given.labels[data.pairs.numpy()]
    assert data.labels.tolist() == (of[:, 0] == of[:, 1]).tolist()
    assert int(data.labels.sum()) == count // 2
    assert (data.pairs[:, 0] != data.pairs[:, 1]).all()
    assert len({frozenset(pair) for pair in data.pairs.tolist()}) == count
    for label in (0, 1):
        for side in (0, 1):
            frequency = np.bincount(of[data.labels.numpy() == label, side], minlength=classes)
            assert np.ptp(frequency) <= 1
    different = of[data.labels.numpy() == 0]
    together = [int((different == pair).all(axis=1).sum()) for pair in np.ndindex(classes, classes)]
    apart = [n for n, (a, b) in zip(together, np.ndindex(classes, classes), strict=True) if a != b]
    assert max(apart) - min(apart) <= 1


def test_few_images_give_every_pair_before_any_twice() -> None:
    # Of 2 classes of 4 and of 5 images, 6 and 10 pairs are of one class and 20 of both.
    labels = np.repeat([0, 1], [4, 5])
    given = LabelledImages(np.zeros((9, 1, 4, 4), np.uint8), labels, ("a", "b"), "here")
    data = SameClass(given, setting(train_pairs=80), "train")
    counts = {frozenset(pair): 0 for pair in combinations(range(9), 2)}
    for pair in data.pairs.tolist():
        counts[frozenset(pair)] += 1
    for pair, count in counts.items():
        own = labels[list(pair)]
        expected = {2} if own[0] != own[1] else {3, 4} if own[0] == 0 else {2}
        assert count in expected


def test_pairs_are_shuffled_and_both_sides_alike() -> None:
    data = SameClass(images(600), setting(train_pairs=1000), "train")
    assert 200 < int(data.labels[:500].sum()) < 300
    same = data.pairs[data.labels == 1]
    assert 200 < int((same[:, 0] < same[:, 1]).sum()) < 300


def test_pairs_depend_on_seed_split_and_epoch_only() -> None:
    given = images()
    data = SameClass(given, setting(), "train")
    first = data.pairs
    assert torch.equal(SameClass(given, setting(8, canvas=(32, 32)), "train").pairs, first)
    assert torch.equal(SameClass(given, setting(image_size=2), "train").pairs, first)
    others = [
        SameClass(given, setting(seed=1), "train").pairs,
        SameClass(given, setting(test_pairs=101), "test").pairs,
    ]
    data.redraw(1)
    others.append(data.pairs)
    assert not any(torch.equal(pairs, first) for pairs in others)
    again = SameClass(given, setting(), "train")
    again.redraw(5)
    again.redraw(1)
    assert torch.equal(again.pairs, data.pairs)
    data.redraw(0)
    assert torch.equal(data.pairs, first)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        data.redraw(-1)


def test_to_device() -> None:
    data = SameClass(images(), setting(), "train")
    moved = data.to("meta")
    moved.redraw(2)
    assert moved.images.device == moved.pairs.device == moved.labels.device
    assert moved.batch([0, 1]).shape == (2, 3, 8, 16)
    assert data.pairs.device.type == "cpu"


def test_source_is_not_changed() -> None:
    given = images()
    given.images.setflags(write=False)
    data = SameClass(given, setting(), "train")
    assert np.array_equal(data.images.numpy(), given.images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance": -1}, "distance and seed must not be negative, got -1 and 0"),
        ({"seed": -1}, "distance and seed"),
        ({"canvas": (0, 8)}, "canvas must be a positive"),
        ({"train_pairs": 0}, "train_pairs must be positive, got 0"),
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"image_size": 9}, "9 x 9 pixels do not fit a canvas of 8 x 16; 8 x 8 fit at most"),
        ({"image_size": 6, "distance": 5}, "8 x 16 at a distance of 4 at most, got 5"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setting(**changes)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"two images of 4 x 4 .* distance of 8 at most, got 9"):
        SameClass(images(), setting(9), "train")
    with pytest.raises(ValueError, match=r'"train" or "test", got .val.'):
        SameClass(images(), setting(), "val")  # type: ignore[arg-type]
    for background in ((1, 2), 256, (-1, 0, 0)):
        with pytest.raises(ValueError, match=r"in 0..255, one value or 3, got"):
            SameClass(images(), setting(), "train", background)
    with pytest.raises(UserError, match=r"expected two images or more of every class, .* class 0"):
        SameClass(images(5), setting(), "train")
    with pytest.raises(ValueError, match='background must be "black" or "mean"'):
        same_class("nowhere", setting(), "white")  # type: ignore[arg-type]


def save(path: Path, value: int, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), value).save(path)


def test_splits_come_from_their_own_images(tmp_path: Path) -> None:
    for split, value in (("train", 10), ("test", 200)):
        for c in range(2):
            for n in range(3):
                save(tmp_path / split / f"class {c}" / f"{n}.png", value + n)
    train, test = same_class(tmp_path, setting(train_pairs=8, test_pairs=6), "mean")
    assert (len(train), len(test)) == (8, 6)
    assert train.images.unique().tolist() == [10, 11, 12]
    assert test.images.unique().tolist() == [200, 201, 202]
    # The background of both is the mean of the training images.
    assert train.batch([0])[0, 0, 0, 0] == test.batch([0])[0, 0, 0, 0] == 11
    assert same_class(tmp_path, setting())[0].batch([0])[0, 0, 0, 0] == 0
    save(tmp_path / "test" / "class 0" / "0.png", 0, "RGB")
    with pytest.raises(UserError, match=r"images of \[1, 4, 4\] and \[3, 4, 4\]"):
        same_class(tmp_path, setting())


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not installed")
def test_fashion_mnist() -> None:
    train, test = same_class(FASHION, SameClassSetting(100, (64, 224), image_size=14))
    assert (len(train), len(test)) == (5000, 10000)
    assert train.batch(range(64)).shape == (64, 1, 64, 224)
    assert int(test.labels.sum()) == 5000
