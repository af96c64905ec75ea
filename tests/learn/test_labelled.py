"""Labelled images: every format read right, everything wrong told in a sentence."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from htflearn.errors import UserError
from htflearn.locality import labelled
from htflearn.locality.area import area_average
from htflearn.locality.labelled import LabelledImages, mean_std, read_labelled

FASHION = Path("/usr/share/datasets/fashion-mnist")
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8)
GRAY_LABELS = np.uint8([1, 2, 3, 1, 2, 3])
ROWS = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)
ROW_LABELS = [0, 1, 2] * 3 + [0]
NAMES = ["airplane", "automobile", "bird"]


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_idx(folder: Path, separator: str = "-", packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, flip in (("train", 1), ("t10k", -1)):
        for kind, array in (("images-idx3", GRAY[::flip]), ("labels-idx1", GRAY_LABELS[::flip])):
            name = f"{prefix}-{kind}-ubyte".replace("-idx", f"{separator}idx")
            content = idx(array)
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def python2_batch(rows: np.ndarray, labels: list[int], key: str) -> bytes:
    """A batch as Python 2 pickled it: strings without an encoding, NumPy's old module."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    numbers = b"(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR("
        + b"K\x01K"
        + bytes([len(rows)])
        + b"M\x00\x0c\x86"
        + b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        + b"K\x00tb\x89T"
        + struct.pack("<i", rows.size)
        + rows.tobytes()
        + b"tb"
    )
    return b"\x80\x02}(" + text(key) + b"]" + numbers + text("data") + array + b"u."


def cifar10_python(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for n in range(5):
        batch = python2_batch(ROWS[2 * n : 2 * n + 2], ROW_LABELS[2 * n : 2 * n + 2], "labels")
        (folder / f"data_batch_{n + 1}").write_bytes(batch)
    (folder / "test_batch").write_bytes(python2_batch(ROWS[:3], ROW_LABELS[:3], "labels"))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}, protocol=2))
    return folder


def cifar10_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    records = np.c_[np.uint8(ROW_LABELS), ROWS]
    for n in range(5):
        (folder / f"data_batch_{n + 1}.bin").write_bytes(records[2 * n : 2 * n + 2].tobytes())
    (folder / "test_batch.bin").write_bytes(records[:3].tobytes())
    (folder / "batches.meta.txt").write_text("\n".join([*NAMES, ""]))
    return folder


def cifar100_python(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "train").write_bytes(python2_batch(ROWS, ROW_LABELS, "fine_labels"))
    (folder / "test").write_bytes(python2_batch(ROWS[:3], ROW_LABELS[:3], "fine_labels"))
    names = {"fine_label_names": NAMES, "coarse_label_names": ["all"]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    return folder


def cifar100_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    records = np.c_[np.full(10, 9, np.uint8), np.uint8(ROW_LABELS), ROWS]
    (folder / "train.bin").write_bytes(records.tobytes())
    (folder / "test.bin").write_bytes(records[:3].tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES))
    return folder


def save(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (value, 0, 255) if mode == "RGB" else value
    Image.new(mode, size, colour).save(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("inner", ["", "raw"])
def test_idx(tmp_path: Path, separator: str, packed: bool, inner: str) -> None:
    write_idx(tmp_path / inner, separator, packed)
    train, test = read_labelled(tmp_path, "train"), read_labelled(str(tmp_path), "test")
    assert np.array_equal(train.images, GRAY[:, None])
    assert np.array_equal(test.images, GRAY[::-1, None])
    # The files' labels 1, 2, 3 are the names.
    assert train.names == ("1", "2", "3")
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert train.source == f"train of {tmp_path}"


def test_fashion_mnist_is_known_by_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.arange(20, dtype=np.uint8) % 10
    images = RNG.integers(0, 256, (20, 4, 5), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    assert read_labelled(tmp_path, "test").names == tuple("0123456789")
    monkeypatch.setattr(labelled, "_FASHION_MNIST_LABELS", {zlib.crc32(labels.tobytes())})
    found = read_labelled(tmp_path, "test")
    assert found.names[0] == "T-shirt/top" and found.names[9] == "ankle boot"
    assert found.labels.tolist() == labels.tolist()


CIFARS = [
    (cifar10_python, "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    (cifar10_binary, "cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    (cifar100_python, "cifar-100-python", "cifar-100-python.tar.gz"),
    (cifar100_binary, "cifar-100-binary", "cifar-100-binary.tar.gz"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("make", "name", "archive"), CIFARS)
@pytest.mark.parametrize("given", ["folder", "around", "archive", "around archive"])
def test_cifar(
    tmp_path: Path, make: Callable[[Path], Path], name: str, archive: str, given: str
) -> None:
    folder = make(tmp_path / "made" / name)
    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed" / archive
    with tarfile.open(packed, "w:gz") as file:
        file.add(folder, arcname=name)
    path = {
        "folder": folder,
        "around": folder.parent,
        "archive": packed,
        "around archive": packed.parent,
    }[given]
    train, test = read_labelled(path, "train"), read_labelled(path, "test")
    assert np.array_equal(train.images, ROWS.reshape(-1, 3, 32, 32))
    assert train.labels.tolist() == ROW_LABELS
    assert np.array_equal(test.images, train.images[:3])
    assert train.names == test.names == tuple(NAMES)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_of_splits(tmp_path: Path, held_out: str) -> None:
    for split, shift in (("train", 0), (held_out, 100)):
        for c, name in enumerate(("cat", "dog")):
            for n in range(2):
                save(tmp_path / split / name / f"{n}.png", shift + 10 * c + n)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    train, test = read_labelled(tmp_path, "train"), read_labelled(tmp_path, "test")
    assert train.images.shape == (4, 3, 4, 4)
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert test.images[:, 0, 0, 0].tolist() == [100, 101, 110, 111]
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.names == ("cat", "dog")


def test_folders_of_classes_are_split_by_name(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for n in range(10):
            save(tmp_path / "one" / name / f"{n}.png", n, "L")
    os.rename(tmp_path / "one", tmp_path / "two")
    train, test = (read_labelled(tmp_path / "two", split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(test.labels).tolist() == [2, 2]
    values = [set(data.images[data.labels == 0, 0, 0, 0].tolist()) for data in (train, test)]
    assert values[0] | values[1] == set(range(10))
    # Written down, as it must never change.
    assert sorted(values[1]) == [5, 9]


def test_modes_and_sizes(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png", 10, "L")
    save(tmp_path / "cat" / "b.png", 1, "1")
    save(tmp_path / "dog" / "a.png", 20, "L")
    save(tmp_path / "dog" / "b.png", 30, "L")
    gray = read_labelled(tmp_path, "train")
    assert gray.images.shape == (2, 1, 4, 4)
    save(tmp_path / "dog" / "a.png", 20, "RGB", (8, 6))
    save(tmp_path / "dog" / "b.png", 20, "RGB", (8, 6))
    with pytest.raises(UserError, match=r"cat/.\.png has 4 x 4 pixels and .*dog/.\.png 6 x 8"):
        read_labelled(tmp_path, "train")
    mixed = read_labelled(tmp_path, "train", size=2)
    assert mixed.images.shape == (2, 3, 2, 2)
    assert mixed.images[1, :, 0, 0].tolist() == [20, 0, 255]


def bomb() -> bytes:
    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("exit 1",)

    return pickle.dumps({"data": Runs(), "labels": []})


def put(path: Path, name: str, content: bytes) -> None:
    (path / name).write_bytes(content)


def truncated(path: Path, name: str, cut: int) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:-cut])


def text(content: str) -> bytes:
    return content.encode()


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("empty", lambda p: None, "train-images-idx3.*cifar-10-batches-py.*nothing is downloaded"),
    (
        "idx: no labels",
        lambda p: (write_idx(p) / "train-labels-idx1-ubyte").unlink(),
        "train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz in .* is missing",
    ),
    (
        "idx: other magic",
        lambda p: put(write_idx(p), "train-images-idx3-ubyte", b"\x89PNG1234567890123"),
        "starts with 00 00 08 03, but .* starts with 89 50 4e 47",
    ),
    (
        "idx: other dimensions",
        lambda p: put(write_idx(p), "train-labels-idx1-ubyte", idx(GRAY)),
        "with 1 dimensions",
    ),
    (
        "idx: empty",
        lambda p: put(write_idx(p), "train-images-idx3-ubyte", b""),
        "starts with nothing",
    ),
    (
        "idx: header cut off",
        lambda p: put(write_idx(p), "train-images-idx3-ubyte", bytes((0, 0, 8, 3, 0))),
        "starts with 00 00 08 03 00$",
    ),
    (
        "idx: cut off",
        lambda p: truncated(write_idx(p), "train-images-idx3-ubyte", 1),
        r"expected 136 bytes for the dimensions \[6, 4, 5\], but .* has 135",
    ),
    (
        "idx: too long",
        lambda p: put(write_idx(p), "train-labels-idx1-ubyte", idx(GRAY_LABELS) + b"1"),
        "expected 14 bytes .* has 15",
    ),
    (
        "idx: absurd dimensions",
        lambda p: put(
            write_idx(p), "train-images-idx3-ubyte", bytes((0, 0, 8, 3)) + b"\xff" * 12 + b"1"
        ),
        "train-images-idx3-ubyte is to hold .* GB, more than the .* of memory",
    ),
    (
        "idx: other count",
        lambda p: put(write_idx(p), "train-labels-idx1-ubyte", idx(GRAY_LABELS[:5])),
        "holds 6 images and .* 5 labels",
    ),
    (
        "idx: no images",
        lambda p: (
            put(write_idx(p), "train-images-idx3-ubyte", idx(GRAY[:0])),
            put(p, "train-labels-idx1-ubyte", idx(GRAY_LABELS[:0])),
        ),
        "expected images, but train of .* holds none",
    ),
    (
        "idx: one class",
        lambda p: put(write_idx(p), "train-labels-idx1-ubyte", idx(0 * GRAY_LABELS)),
        "two classes or more, but train of .* only one",
    ),
    (
        "gzip: not packed",
        lambda p: put(write_idx(p, packed=True), "train-images-idx3-ubyte.gz", idx(GRAY)),
        "train-images-idx3-ubyte.gz cannot be read: Not a gzipped file",
    ),
    (
        "gzip: cut off",
        lambda p: truncated(write_idx(p, packed=True), "train-images-idx3-ubyte.gz", 9),
        "train-images-idx3-ubyte.gz cannot be read",
    ),
    (
        "cifar: no batch",
        lambda p: (cifar10_python(p / "cifar-10-batches-py") / "data_batch_3").unlink(),
        "data_batch_1, .* batches.meta in .*, but data_batch_3 is missing",
    ),
    (
        "cifar: no names",
        lambda p: (cifar10_binary(p / "cifar-10-batches-bin") / "batches.meta.txt").unlink(),
        "batches.meta.txt is missing",
    ),
    (
        "cifar: pickle cut off",
        lambda p: truncated(cifar10_python(p / "cifar-10-batches-py"), "data_batch_2", 50),
        "expected a pickle, but data_batch_2 in .* is damaged or cut off",
    ),
    (
        "cifar: pickle runs",
        lambda p: put(cifar10_python(p / "cifar-10-batches-py"), "data_batch_1", bomb()),
        "data_batch_1 in .* asks for (posix|nt).system, but only arrays",
    ),
    (
        "cifar: no dictionary",
        lambda p: put(cifar10_python(p / "cifar-10-batches-py"), "data_batch_1", pickle.dumps([])),
        "expected a dictionary with 'data'",
    ),
    (
        "cifar: labels beyond the range",
        lambda p: put(
            cifar10_python(p / "cifar-10-batches-py"),
            "data_batch_1",
            pickle.dumps({"data": ROWS[:1], "labels": [2**70]}, 3),
        ),
        "expected a list of whole numbers as labels",
    ),
    (
        "cifar: damaged lzma",
        lambda p: put(p, "cifar-10-python.tar.gz", b"\xfd7zXZ\x00" + b"x" * 99),
        "cannot be read as an archive",
    ),
    (
        "cifar: no labels",
        lambda p: put(
            cifar10_python(p / "cifar-10-batches-py"),
            "data_batch_1",
            python2_batch(ROWS[:2], [0, 1], "fine_labels"),
        ),
        "expected a dictionary with 'labels'",
    ),
    (
        "cifar: no images",
        lambda p: put(
            cifar10_python(p / "cifar-10-batches-py"),
            "data_batch_1",
            pickle.dumps({"data": [1], "labels": [1]}),
        ),
        r"expected images uint8 \[M, 3072\], but .* list",
    ),
    (
        "cifar: other count",
        lambda p: put(
            cifar10_python(p / "cifar-10-batches-py"),
            "data_batch_1",
            python2_batch(ROWS[:2], [0, 1, 2], "labels"),
        ),
        "holds 2 images and 3 labels",
    ),
    (
        "cifar: record cut off",
        lambda p: truncated(cifar10_binary(p / "cifar-10-batches-bin"), "data_batch_2.bin", 1),
        "multiple of 3073 bytes, .* data_batch_2.bin in .* has 6145",
    ),
    (
        "cifar: label outside",
        lambda p: put(cifar10_binary(p / "cifar-10-batches-bin"), "batches.meta.txt", text("a\nb")),
        r"expected labels in 0..1, .* image 2 of train of .* has the label 2",
    ),
    (
        "cifar: empty class",
        lambda p: put(
            cifar10_binary(p / "cifar-10-batches-bin"), "batches.meta.txt", text("a\nb\nc\nd")
        ),
        "expected images of every class, but train of .* has none of d$",
    ),
    (
        "cifar: empty class of a long name",
        lambda p: put(
            cifar10_binary(p / "cifar-10-batches-bin"),
            "batches.meta.txt",
            text("a\nb\nc\n" + "d" * 100_000),
        ),
        "has none of d{80}$",
    ),
    (
        "cifar: damaged archive",
        lambda p: put(p, "cifar-10-python.tar.gz", b"nothing of the kind"),
        "cannot be read as an archive",
    ),
    (
        "folders: no split",
        lambda p: save(p / "train" / "cat" / "a.png", 1) or (p / "train").rename(p / "x"),
        "expected IDX files",
    ),
    (
        "folders: unreadable",
        lambda p: [
            save(p / "train" / name / "a.png", 1) or put(p / "train" / name, "b.png", b"PNG")
            for name in ("cat", "dog")
        ],
        "cat/b.png cannot be read as an image",
    ),
    (
        "folders: deep",
        lambda p: save(p / "train" / "cat" / "a.png", 1000, "I;16"),
        "8 bits a channel, but .*a.png has more",
    ),
    (
        "folders: empty class",
        lambda p: save(p / "cat" / "a.png", 1) or save(p / "cat" / "b.png", 1) or (p / "d").mkdir(),
        "expected images in .*d, but the class has none",
    ),
    (
        "folders: lone image",
        lambda p: [save(p / name / "a.png", 1) for name in ("cat", "dog")],
        "expected two images or more in .*cat, .* there is one",
    ),
    (
        "folders: one class",
        lambda p: [save(p / "cat" / f"{n}.png", 1) for n in range(3)],
        "two classes or more, but train of .* has only one",
    ),
]


@pytest.mark.parametrize(("make", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        read_labelled(tmp_path, "train")
    assert "\n" not in str(raised.value)


def test_batches_written_again_by_python_3(tmp_path: Path) -> None:
    """Whoever reads them with encoding="bytes" has keys and names of bytes."""
    folder = cifar10_python(tmp_path / "cifar-10-batches-py")
    for n in range(5):
        rows, labels = ROWS[2 * n : 2 * n + 2], ROW_LABELS[2 * n : 2 * n + 2]
        batch = pickle.dumps({b"data": rows, b"labels": labels}, 4)
        put(folder, f"data_batch_{n + 1}", batch)
    names = [name.encode() for name in NAMES]
    put(folder, "batches.meta", pickle.dumps({b"label_names": names}, 4))
    train = read_labelled(tmp_path, "train")
    assert np.array_equal(train.images, ROWS.reshape(-1, 3, 32, 32))
    assert train.labels.tolist() == ROW_LABELS and train.names == tuple(NAMES)


def packed_idx(path: Path) -> None:
    write_idx(path, packed=True)
    shape = struct.pack(">3I", 6, 40, 50)
    endless = bytes((0, 0, 8, 3)) + shape + bytes(10**6)
    put(path, "train-images-idx3-ubyte.gz", gzip.compress(endless))


def packed_cifar(path: Path) -> None:
    folder = cifar10_python(path / "made")
    put(folder, "data_batch_1", bytes(10**6))
    with tarfile.open(path / "cifar-10-python.tar.gz", "w:gz") as file:
        file.add(folder, arcname="cifar-10-batches-py")
    shutil.rmtree(path / "made")


@pytest.mark.parametrize("make", [packed_idx, packed_cifar])
def test_files_that_unpack_to_more_than_the_memory(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 10_000}
    monkeypatch.setattr("os.sysconf", memory.__getitem__)
    with pytest.raises(UserError, match=r"is to hold .* GB, more than the .* GB of memory"):
        read_labelled(tmp_path, "train")


def test_a_packed_file_without_end_is_read_no_further(tmp_path: Path) -> None:
    packed_idx(tmp_path)
    with pytest.raises(UserError, match=r"expected 12016 bytes .* has 12017 bytes or more"):
        read_labelled(tmp_path, "train")


@pytest.mark.parametrize("link", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_an_archive_are_not_followed(tmp_path: Path, link: bytes) -> None:
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as file:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.type, member.linkname = link, "/etc/hostname"
        file.addfile(member)
    with pytest.raises(UserError, match="but there is none of them"):
        read_labelled(tmp_path, "train")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*nowhere; expected IDX .*www.cs.toronto"):
        read_labelled(tmp_path / "nowhere", "train")
    (tmp_path / "file.txt").write_text("no images")
    with pytest.raises(UserError, match=r"in .*file.txt, but there is none"):
        read_labelled(tmp_path / "file.txt", "train")
    other = tmp_path / "other.tar.gz"
    with tarfile.open(other, "w:gz") as file:
        file.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(UserError, match=r"in .*other.tar.gz, but there is none"):
        read_labelled(other, "train")
    save(tmp_path / "train" / "cat" / "a.png", 1)
    with pytest.raises(UserError, match="expected a folder test or val"):
        read_labelled(tmp_path, "test")


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'"train" or "test", got .valid.'):
        read_labelled(tmp_path, "valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be positive"):
        read_labelled(tmp_path, "train", size=0)
    with pytest.raises(ValueError, match="images must be uint8"):
        LabelledImages(np.zeros((2, 4, 4), np.uint8), np.array([0, 1]), ("a", "b"), "here")
    with pytest.raises(ValueError, match=r"labels must be int64 \[2\]"):
        LabelledImages(np.zeros((2, 1, 4, 4), np.uint8), np.array([0]), ("a", "b"), "here")


def test_area_average() -> None:
    images = RNG.integers(0, 256, (3, 2, 12, 8), dtype=np.uint8)
    halved = area_average(images, 4)
    assert np.array_equal(halved, np.rint(images.reshape(3, 2, 4, 3, 4, 2).mean(axis=(3, 5))))
    # Shares of pixels: the middle one of three falls into both halves.
    assert area_average(np.uint8([[[[0, 90, 30]] * 3]]), 2)[0, 0, 0].tolist() == [30, 50]
    assert area_average(np.uint8([[[[7]]]]), 3).tolist() == [[[[7] * 3] * 3]]
    square = images[:, :, :8]
    assert area_average(square, 8) is square


def test_mean_std() -> None:
    images = RNG.integers(0, 256, (1100, 3, 4, 5), dtype=np.uint8)
    for given in (images, torch.from_numpy(images)):
        mean, std = mean_std(given)
        assert mean.dtype == std.dtype == torch.float32
        assert np.allclose(mean, images.mean(axis=(0, 2, 3)))
        assert np.allclose(std, images.std(axis=(0, 2, 3)))


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not installed")
def test_fashion_mnist() -> None:
    data = read_labelled(FASHION, "test", size=14)
    assert data.images.shape == (10000, 1, 14, 14)
    assert np.bincount(data.labels).tolist() == [1000] * 10
