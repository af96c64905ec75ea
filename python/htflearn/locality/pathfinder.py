"""Pathfinder: are the two dots at the ends of the same dashed snake?

The task of Linsley et al., "Learning long-range spatial dependencies with horizontal gated
recurrent units" (NeurIPS 2018), as Razin, Maman and Cohen (ICML 2022) use it: the longer the paths,
the farther a network has to see. Every picture holds two long snakes, short distractors, and two
dots on ends of the long ones. The dots alone tell the classes apart: where the snakes lie is drawn
without regard to the label, and how far the dots are apart has the same distribution in both. How
the dashes under the dots lie to each other is made alike as well as the paths' length allows.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.locality.shards import ShardWriter, write_shard
from htflearn.locality.snakes import Measures, draw, lay_out

__all__ = ["PathfinderSetting", "generate", "sample"]

_VERSION = 1
"""Of the generator: another number where the same seed gives other pictures."""

_DISTRACTOR_DASHES = 30  # of all distractors together, where the canvas has room
_CROWDED = 0.28  # of the canvas within the padding, taken by snakes and their clearance
_SHARD_BYTES = 2**26


@dataclass(frozen=True)
class PathfinderSetting:
    """What pictures of Pathfinder look like. Lengths are in pixels; those that are None follow the
    canvas: at 300 pixels much like the published ones, on small canvases thick enough to be seen.

    Args:
        path_length: dashes of each of the two long snakes.
        canvas: height and width.
        padding: no snake comes closer to the border.
        dash_length: from tip to tip.
        gap: between the dashes of a snake.
        thickness: of a dash.
        clearance: least distance between what is drawn of different snakes, and of dashes of one
            snake that do not follow each other; one and a half times that around a dot.
        continuity: largest turn from a dash to the next, in radians.
        contrast: brightness of the dashes, drawn for each from these; 1 is white.
        distractors: how many short snakes; None for as many as hold 30 dashes, fewer where the
            canvas is small.
        distractor_length: dashes of each of them; None for a third of ``path_length``.
        dot_radius: of the discs at two ends.
        alike: whether the second long snake is placed so that its end dash lies to the first one's
            start as that one's own end dash does. Otherwise, as published, dashes under the dots
            that point at each other give much away.

    Raises:
        ValueError: a measure is out of its range, or the snakes cannot fit into the canvas.

    Example:
        >>> setting = PathfinderSetting(path_length=9)
        >>> setting.measures.distractors, setting.measures.distractor_length
        (10, 3)
    """

    path_length: int
    canvas: int = 300
    padding: float | None = None
    dash_length: float | None = None
    gap: float | None = None
    thickness: float | None = None
    clearance: float | None = None
    continuity: float = 0.9
    contrast: tuple[float, ...] = (1.0,)
    distractors: int | None = None
    distractor_length: int | None = None
    dot_radius: float | None = None
    alike: bool = True

    def __post_init__(self) -> None:
        whole = {"path_length": 2, "canvas": 16, "distractors": 0, "distractor_length": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"expected {name} to be a whole number from {least}, got {value}")
        if not 0 < self.continuity <= np.pi / 2:
            raise ValueError(
                f"expected continuity to be a turn above 0 and up to pi / 2, got {self.continuity}"
            )
        object.__setattr__(self, "contrast", tuple(float(level) for level in self.contrast))
        if not self.contrast or not all(0 < level <= 1 for level in self.contrast):
            raise ValueError(
                f"expected contrast to hold levels above 0 and up to 1, got {self.contrast}"
            )
        _check_room(self.measures)

    @cached_property
    def measures(self) -> Measures:
        """Every measure as a number."""
        gap = self._scaled("gap", 5.0, 2.5)
        thickness = self._scaled("thickness", 2.0, 1.4)
        dash_length = self._scaled("dash_length", 10.0, 4.5)
        clearance = 1.6 * gap if self.clearance is None else float(self.clearance)
        padding = self._scaled("padding", 22.0, 4.0)
        length = self.distractor_length
        if length is None:
            length = max(1, round(self.path_length / 3))
        distractors = self.distractors
        if distractors is None:
            room = _CROWDED * (self.canvas - 2 * padding) ** 2
            dashes = room / ((dash_length + gap) * (thickness + clearance)) - 2 * self.path_length
            distractors = int(max(0.0, min(_DISTRACTOR_DASHES, dashes)) / length)
        return Measures(
            canvas=self.canvas,
            padding=padding,
            path_length=self.path_length,
            dash_length=dash_length,
            gap=gap,
            thickness=thickness,
            clearance=clearance,
            continuity=float(self.continuity),
            contrast=self.contrast,
            distractors=distractors,
            distractor_length=length,
            dot_radius=self._scaled("dot_radius", 5.0, 2.2),
            alike=self.alike,
        )

    def _scaled(self, name: str, published: float, least: float) -> float:
        given = getattr(self, name)
        if given is None:
            return max(published * self.canvas / 300, least)
        if not 0 < given < np.inf:
            raise ValueError(f"expected {name} to be above 0, got {given}")
        return float(given)


def sample(
    setting: PathfinderSetting, seed: int, index: int, split: str = "train"
) -> tuple[np.ndarray, int, dict[str, Any]]:
    """A picture, its label, and what it shows.

    It depends on the arguments alone, not on which other pictures are made or where. Of the
    pictures 2k and 2k + 1 one has label 0 and one label 1.

    Args:
        setting: what pictures look like.
        seed: of the data set, from 0.
        index: of the picture, from 0.
        split: pictures of different splits are independent.

    Returns:
        the picture, uint8 ``[canvas, canvas]``; the label, 1 where the dots are the two ends of one
        snake, 0 where they are ends of two; and ``targets`` ``[2, path_length, 2, 2]`` and
        ``distractors`` ``[distractors, distractor_length, 2, 2]`` (dash, tip, row and column) with
        ``dots`` ``[2, 2]`` and ``dot_snakes``, the targets they are on.

    Raises:
        ValueError: the seed or the index is negative.
        UserError: no place was found for the snakes in a bounded number of tries.

    Example:
        >>> image, label, meta = sample(PathfinderSetting(path_length=5), seed=0, index=0)
        >>> image.shape, meta["targets"].shape
        ((300, 300), (2, 5, 2, 2))
    """
    if seed < 0 or index < 0:
        raise ValueError(f"expected a seed and an index from 0, got {seed} and {index}")
    entropy = (seed, zlib.crc32(split.encode()))
    coin = np.random.SeedSequence(entropy, spawn_key=(0, index // 2)).generate_state(1)[0]
    label = int(coin + index) % 2
    stream = np.random.SeedSequence(entropy, spawn_key=(1, index))
    rng = np.random.Generator(np.random.PCG64(stream))
    measures = setting.measures
    snakes = lay_out(rng, measures)
    first, second = snakes.targets
    dots = np.stack([first[0], first[-1] if label else second[0]])
    meta = {
        "targets": snakes.targets.reshape(2, -1, 2, 2),
        "distractors": snakes.distractors.reshape(
            measures.distractors, measures.distractor_length, 2, 2
        ),
        "dots": dots,
        "dot_snakes": (0, 0) if label else (0, 1),
    }
    return draw(snakes, dots, rng, measures), label, meta


def generate(
    setting: PathfinderSetting,
    count: int,
    out: str | os.PathLike[str],
    seed: int = 0,
    processes: int | None = None,
    split: str = "train",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Makes a data set, or what is still missing of it.

    Args:
        setting: what pictures look like.
        count: of pictures; of an even count exactly half have label 1.
        out: the directory; read it with :class:`htflearn.locality.shards.ShardedImages`.
        seed: of the data set, from 0.
        processes: that work at once; None for one each core. The pictures do not depend on it.
        split: pictures of different splits are independent.
        progress: called with the number of pictures there are so far.

    Returns:
        the directory.

    Raises:
        ValueError: the count or the seed is negative.
        UserError: the directory holds another data set or cannot be written, or no place was found
            for a picture's snakes. Finished shards stay: calling again goes on from there.

    Example:
        >>> path = generate(PathfinderSetting(path_length=5, canvas=64), 1000, "data/train")
        >>> len(ShardedImages(path))
        1000
    """
    if count < 1 or seed < 0:
        raise ValueError(f"expected a count from 1 and a seed from 0, got {count} and {seed}")
    about = {
        "generator": "pathfinder",
        "generator_version": _VERSION,
        "setting": asdict(setting.measures),
        "seed": seed,
        "split": split,
    }
    shape = (setting.canvas, setting.canvas)
    writer = ShardWriter(out, count, shape, about, max(1, _SHARD_BYTES // setting.canvas**2))
    missing = writer.missing()
    done = count - sum(len(writer.indices(shard)) for shard in missing)
    jobs = [(writer.path, shard, writer.indices(shard), setting, seed, split) for shard in missing]
    workers = min(processes or os.cpu_count() or 1, len(jobs))
    if progress is not None:
        progress(done)
    if workers <= 1:
        for job in jobs:
            done += _make_shard(*job)
            if progress is not None:
                progress(done)
    else:
        # Not forked: the parent's threads (PyTorch has some) would leave their locks taken.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, _end_with_parent) as pool:
            futures = [pool.submit(_make_shard, *job) for job in jobs]
            try:
                for future in as_completed(futures):
                    done += future.result()
                    if progress is not None:
                        progress(done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    writer.finish()
    return writer.path


def _end_with_parent() -> None:
    """Lets a worker die where the parent is killed: by itself it would wait for more work."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)  # at any moment: shards are written whole or not at all

    threading.Thread(target=wait, daemon=True).start()


def _make_shard(
    path: Path, shard: int, indices: range, setting: PathfinderSetting, seed: int, split: str
) -> int:
    images = np.empty((len(indices), setting.canvas, setting.canvas), np.uint8)
    labels = np.empty(len(indices), np.uint8)
    for i, index in enumerate(indices):
        images[i], labels[i], _ = sample(setting, seed, index, split)
    write_shard(path, shard, images, labels)
    return len(indices)


def _check_room(measures: Measures) -> None:
    inner = measures.canvas - 1 - 2 * measures.padding
    pitch = measures.dash_length + measures.gap
    if measures.dash_length <= measures.thickness:
        raise ValueError(
            f"expected dashes longer than their thickness of {measures.thickness:g}, got a "
            f"dash_length of {measures.dash_length:g}"
        )
    if not measures.clearance > measures.gap:  # refuses NaN too
        raise ValueError(
            f"expected a clearance above the gap of {measures.gap:g}, or one could not tell which "
            f"dashes follow each other; got {measures.clearance:g}"
        )
    least = max(measures.dot_radius, measures.thickness / 2) + 1
    if measures.padding < least:
        raise ValueError(
            f"expected a padding from {least:g}, which holds a dot, got {measures.padding:g}"
        )
    # Within half a circle a path cannot come back: what it spans there has to fit.
    bend = min(measures.path_length * measures.continuity, np.pi) / 2
    span = 2 * bend / measures.continuity * pitch * np.sin(bend) / bend - pitch
    diagonal = np.sqrt(2) * max(inner, 0)
    if span > diagonal:
        raise ValueError(
            f"expected a path that fits into the canvas, but {measures.path_length} dashes span at "
            f"least {span:.0f} pixels, and within the padding there are {diagonal:.0f}"
        )
    dashes = 2 * measures.path_length + measures.distractors * measures.distractor_length
    taken = dashes * pitch * (measures.thickness + measures.clearance)
    if taken > 0.6 * max(inner, 0) ** 2:
        raise ValueError(
            f"expected snakes that fit into the canvas, but {dashes} dashes and their clearance "
            f"take {taken:,.0f} of the {max(inner, 0) ** 2:,.0f} square pixels within the padding"
        )
    # Two dashes at the sharpest turn, with dots on their outer tips.
    chord = 2 * measures.dash_length * np.cos(measures.continuity / 2) + measures.gap
    if chord < 2 * measures.dot_radius + measures.clearance:
        raise ValueError(
            f"expected dots that keep apart where two dashes span {chord:.1f}, got a dot_radius of "
            f"{measures.dot_radius:g} with a clearance of {measures.clearance:g}"
        )
