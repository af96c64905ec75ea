"""Damaged files: a reader returns, or says in one sentence what is wrong with the file."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import htfkernels as hk
import htflearn
from htflearn.checkpoint import load_checkpoint, load_model, save_checkpoint, save_model
from htflearn.complete.arrays import ArraySource, read_mask
from htflearn.complete.images import ImageSource
from htflearn.complete.tables import TableSource
from htflearn.errors import UserError
from htflearn.locality.labelled import read_labelled
from htflearn.locality.shards import ShardedImages, ShardWriter, write_shard
from htflearn.metrics import MetricsFile

sys.path.append(str(Path(__file__).parents[1] / "learn"))
from test_labelled import cifar10_binary, cifar10_python, cifar100_python, write_idx

LONGEST = 1000
"""Characters of a message: more is a dump."""

Reader = Callable[[Path], object]


class Kind:
    """Files that one reader reads together, written once; a case damages a copy of one of them."""

    def __init__(self, write: Callable[[Path], None], read: Reader) -> None:
        self.write, self.read = write, read
        self.files: dict[str, bytes] = {}

    def contents(self, folder: Path) -> dict[str, bytes]:
        if not self.files:
            made = folder / "made"
            made.mkdir()
            self.write(made)
            for path in sorted(made.rglob("*")):
                if path.is_file():
                    self.files[str(path.relative_to(made))] = path.read_bytes()
            shutil.rmtree(made)
        return self.files


def _model() -> hk.HTF:
    torch.manual_seed(0)
    return hk.HTF(hk.ModeTree.balanced(4), 3, [3, 2])


def _write_checkpoint(folder: Path) -> None:
    model = _model()
    optimizer = htflearn.GroupRMSprop(model.parameters(), lr=0.01)
    model.full_tensor().sum().backward()
    optimizer.step()
    save_checkpoint(folder, model, optimizer, {"iteration": 3, "losses": [1.0, 0.5]})


def _read_checkpoint(folder: Path) -> None:
    model = _model()
    load_checkpoint(folder, model, htflearn.GroupRMSprop(model.parameters(), lr=0.01))


def _write_table(folder: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    columns = {"i": [0, 1, 2, 0], "j": [0, 1, 0, 1], "value": [1.0, 2.5, None, -1.0]}
    write = pa.csv.write_csv if suffix == "csv" else pa.parquet.write_table
    write(pa.table(columns), folder / f"t.{suffix}")


def _write_shards(folder: Path) -> None:
    writer = ShardWriter(folder, 6, (4, 4), {"made": "to be damaged"}, 3)
    for shard in writer.missing():
        images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
        write_shard(writer.path, shard, images, np.array([0, 1, 0]))
    writer.finish()


def _write_pt(folder: Path) -> None:
    torch.save({"a": torch.arange(12.0).reshape(3, 4)}, folder / "t.pt")


def _array(name: str) -> Reader:
    return lambda folder: ArraySource.open(folder / name, None, None, None).entries.checked()


def _labelled(folder: Path) -> None:
    read_labelled(folder, "test")


KINDS = {
    "tree": Kind(
        lambda folder: (folder / "tree.json").write_text(hk.ModeTree.halves(8).to_json()) and None,
        lambda folder: hk.ModeTree.from_json((folder / "tree.json").read_text(errors="replace")),
    ),
    "model": Kind(
        lambda folder: save_model(folder / "m.safetensors", _model()),
        lambda folder: load_model(folder / "m.safetensors"),
    ),
    "checkpoint": Kind(_write_checkpoint, _read_checkpoint),
    "metrics": Kind(
        lambda folder: (
            (folder / "m.jsonl").write_text('{"iteration": 0, "loss": 1.5}\n' * 4) and None
        ),
        lambda folder: MetricsFile(folder / "m.jsonl", 120).__exit__(None, None, None),
    ),
    "npy": Kind(
        lambda folder: np.save(folder / "t.npy", np.array([[1.0, np.nan], [3.0, 4.0]])),
        _array("t.npy"),
    ),
    "npz": Kind(
        lambda folder: np.savez_compressed(folder / "t.npz", t=np.eye(3)),
        _array("t.npz"),
    ),
    "pt": Kind(_write_pt, _array("t.pt")),
    "mask": Kind(
        lambda folder: np.save(folder / "mask.npy", np.array([[True, False], [True, True]])),
        lambda folder: read_mask(folder / "mask.npy", (2, 2)),
    ),
    "csv": Kind(
        lambda folder: _write_table(folder, "csv"),
        lambda folder: TableSource.open(folder / "t.csv").entries.checked(),
    ),
    "parquet": Kind(
        lambda folder: _write_table(folder, "parquet"),
        lambda folder: TableSource.open(folder / "t.parquet").entries.checked(),
    ),
    "png": Kind(
        lambda folder: Image.new("RGBA", (5, 4), (1, 2, 3, 0)).save(folder / "t.png"),
        lambda folder: ImageSource.open(folder / "t.png").entries.checked(),
    ),
    "idx": Kind(lambda folder: write_idx(folder / "d") and None, lambda f: _labelled(f / "d")),
    "idx.gz": Kind(
        lambda folder: write_idx(folder / "d", packed=True) and None, lambda f: _labelled(f / "d")
    ),
    "cifar-10": Kind(
        lambda folder: cifar10_python(folder / "d") and None, lambda f: _labelled(f / "d")
    ),
    "cifar-10 binary": Kind(
        lambda folder: cifar10_binary(folder / "d") and None, lambda f: _labelled(f / "d")
    ),
    "cifar-100": Kind(
        lambda folder: cifar100_python(folder / "d") and None, lambda f: _labelled(f / "d")
    ),
    "shards": Kind(_write_shards, lambda folder: ShardedImages(folder).verify()),
}

_folder: Path | None = None


def _workspace() -> Path:
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="htf-fuzz-"))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder


def case(seed: int) -> str:
    """Damages one file of one kind, and reads it."""
    draw = random.Random(seed)
    name = [*KINDS][seed % len(KINDS)]
    kind, folder = KINDS[name], _workspace()
    contents = dict(kind.contents(folder))
    victim = draw.choice([*contents])
    contents[victim] = _damaged(draw, contents[victim])
    here = folder / "case"
    for path, content in contents.items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(content)
    # Trees are a library's: their reader raises what a library raises.
    answer = (ValueError,) if name == "tree" else (UserError,)
    try:
        kind.read(here)
    except answer as error:
        message = str(error)
        assert message.strip(), f"{name}: {type(error).__name__} without a message"
        assert len(message) <= LONGEST, f"{name}: {len(message)} characters: {message[:LONGEST]}"
        return f"{name} refused"
    finally:
        shutil.rmtree(here)
    return f"{name} read"


def _damaged(draw: random.Random, content: bytes) -> bytes:
    kind = draw.randrange(9)
    at = draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return b""
    if kind == 2:
        return draw.choice(_TEXTS)
    if kind == 3:
        return content[:at] + draw.choice(_TEXTS) + content[at:]
    if kind == 4:
        end = draw.randrange(at, min(at + 40, len(content)) + 1)
        return content[:at] + content[end:]
    if kind == 5:
        start = draw.randrange(len(content) + 1)
        piece = content[start : start + draw.randrange(1, 60)]
        return content[:at] + piece + content[at + len(piece) :]
    changed = bytearray(content)
    # Headers are short, and what is in them matters most.
    reach = draw.choice((64, 512, len(content)))
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(min(reach, len(content))) if content else 0
        if kind == 6 and content:
            changed[place] ^= 1 << draw.randrange(8)
        elif content:
            changed[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    return bytes(changed)


_TEXTS = (
    b"null",
    b"[]",
    b"{}",
    b"0",
    b"-1",
    b"NaN",
    b'"text"',
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"9" * 5000,
    b"\xff\xfe\x00",
    b"\x00" * 64,
    b"\n\n",
    json.dumps({"iteration": None}).encode(),
    b"../../outside",
    b"/etc/passwd",
)
