"""Small labelled images on the disk, and grids that train on them in a second."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from htflearn.locality.setting import Setting


def write_images(folder: Path, count: int = 40, size: int = 6, classes: int = 2) -> Path:
    """IDX files of bright and dark images: the class is easy to tell."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        labels = (np.arange(count) % classes).astype(np.uint8)
        images = rng.integers(0, 80, (count, size, size)) + 150 * labels[:, None, None] // classes
        for name, array in (("images-idx3", images.astype(np.uint8)), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{prefix}-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


def tiny(data: Path, **changes: object) -> Setting:
    """A grid of Is Same Class."""
    setting = {
        "task": "isc",
        "distances": (0, 20),
        "coefficients": (0.0, 1.0),
        "seeds": (0,),
        "data": str(data),
        "canvas": (6, 40),
        "train_size": 48,
        "test_size": 20,
        "network": "small",
        "epochs": 2,
        "batch": 16,
        "every": 2,
    }
    return Setting(**{**setting, **changes})  # type: ignore[arg-type]


def tiny_pathfinder(**changes: object) -> Setting:
    """A grid of Pathfinder."""
    setting = {
        "task": "pathfinder",
        "distances": (2,),
        "coefficients": (1.0,),
        "seeds": (0,),
        "canvas": (32, 32),
        "image_size": 16,
        "train_size": 48,
        "test_size": 20,
        "network": "small",
        "epochs": 1,
        "batch": 16,
    }
    return Setting(**{**setting, **changes})  # type: ignore[arg-type]
