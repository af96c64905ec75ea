"""Pathfinder: the label is right, only the dots tell it, and snakes keep clear of each other."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_figures import keep_figures, texts_overlap
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_edt, label

from htflearn.errors import UserError
from htflearn.locality import sheets
from htflearn.locality.pathfinder import PathfinderSetting, generate, sample
from htflearn.locality.shards import ShardedImages
from htflearn.locality.sheets import contact_sheet

SMALL = PathfinderSetting(path_length=3, canvas=64)
SETTINGS = [PathfinderSetting(n) for n in (3, 5, 9)] + [
    PathfinderSetting(n, canvas=64) for n in (2, 4, 6)
]


def name(setting: PathfinderSetting) -> str:
    return f"{setting.path_length}-of-{setting.canvas}"


def between_segments(one: np.ndarray, other: np.ndarray) -> float:
    """Distance of two segments ``[2, 2]``, by the textbook's cases."""

    def cross(u: np.ndarray, v: np.ndarray) -> float:
        return float(u[0] * v[1] - u[1] * v[0])

    def to_segment(p: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
        t = np.dot(p - a, b - a) / np.dot(b - a, b - a)
        return math.dist(p, a + min(max(t, 0.0), 1.0) * (b - a))

    a, b, c, d = *one, *other
    sides = cross(b - a, c - a) * cross(b - a, d - a), cross(d - c, a - c) * cross(d - c, b - c)
    if max(sides) < 0:
        return 0.0
    ends = (to_segment(a, c, d), to_segment(b, c, d), to_segment(c, a, b), to_segment(d, a, b))
    return min(ends)


def all_snakes(meta: dict[str, Any]) -> list[np.ndarray]:
    return [*meta["targets"], *meta["distractors"]]


def dots_connected(meta: dict[str, Any], gap: float) -> bool:
    """Whether a walk over dashes whose tips are a gap apart leads from dot to dot."""
    dashes = np.concatenate(all_snakes(meta))
    tips = dashes.reshape(-1, 2)
    apart = np.hypot(*(tips[:, None] - tips[None]).transpose(2, 0, 1))
    near = (apart < 1.01 * gap).reshape(len(dashes), 2, len(dashes), 2).any(axis=(1, 3))
    starts = [int(np.hypot(*(tips - dot).T).argmin()) // 2 for dot in meta["dots"]]
    reached = np.zeros(len(dashes), bool)
    reached[starts[0]] = True
    for _ in dashes:
        reached |= near[reached].any(axis=0)
    return bool(reached[starts[1]])


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_the_dots_are_connected_where_the_label_is_1(setting: PathfinderSetting) -> None:
    for index in range(20):
        _, label_, meta = sample(setting, 3, index)
        assert dots_connected(meta, setting.measures.gap) == (label_ == 1)
        assert (len(set(meta["dot_snakes"])) == 1) == (label_ == 1)
        for dot, snake in zip(meta["dots"], meta["dot_snakes"], strict=True):
            ends = meta["targets"][snake].reshape(-1, 2)[[0, -1]]
            assert min(math.dist(dot, end) for end in ends) == 0


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.canvas == 300], ids=name)
def test_the_picture_alone_shows_the_label(setting: PathfinderSetting) -> None:
    """Ink that flows over the gaps, but not from snake to snake, joins the dots or not."""
    measures = setting.measures
    for index in range(20):
        image, label_, _ = sample(setting, 4, index)
        ink = image > 100
        # Deep inside the ink there are only the dots.
        cores, dots = label(distance_transform_edt(ink) > measures.thickness)
        assert dots == 2
        flow, _ = label(distance_transform_edt(~ink) < 0.65 * measures.gap)
        first, second = (flow[cores == k][0] for k in (1, 2))
        assert (first == second) == (label_ == 1)


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_snakes_keep_clear(setting: PathfinderSetting) -> None:
    measures = setting.measures
    least = measures.clearance + measures.thickness
    for index in range(4):
        _, _, meta = sample(setting, 5, index)
        snakes = [s.reshape(-1, 2) for s in all_snakes(meta)]
        bodies = [np.stack([s[:-1], s[1:]], axis=1) for s in snakes]  # dashes and gaps
        for i, body in enumerate(bodies):
            low, high = snakes[i].min(), snakes[i].max()
            assert measures.padding <= low + 1e-9
            assert high <= setting.canvas - 1 - measures.padding + 1e-9
            for other in bodies[:i]:
                assert min(between_segments(s, t) for s in body for t in other) >= least
            for j, dash in enumerate(body[::2]):
                for far in body[::2][j + 2 :]:
                    assert between_segments(dash, far) >= least
        around_dot = measures.dot_radius + measures.thickness / 2 + 1.5 * measures.clearance
        for dot, own in zip(meta["dots"], meta["dot_snakes"], strict=True):
            for other in bodies[:own] + bodies[own + 1 :]:
                point = np.stack([dot, dot + 1e-9])
                assert min(between_segments(point, s) for s in other) >= around_dot - 1e-6


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_snakes_have_their_lengths_gaps_and_turns(setting: PathfinderSetting) -> None:
    measures = setting.measures
    for index in range(4):
        _, _, meta = sample(setting, 6, index)
        assert meta["targets"].shape == (2, setting.path_length, 2, 2)
        assert meta["distractors"].shape == (
            measures.distractors,
            measures.distractor_length,
            2,
            2,
        )
        for snake in all_snakes(meta):
            along = snake[:, 1] - snake[:, 0]
            gaps = snake[1:, 0] - snake[:-1, 1]
            np.testing.assert_allclose(np.hypot(*along.T), measures.dash_length)
            np.testing.assert_allclose(np.hypot(*gaps.T), measures.gap)
            cosines = (along[1:] * along[:-1]).sum(1) / measures.dash_length**2
            assert (cosines >= math.cos(setting.continuity) - 1e-9).all()


def test_the_picture_is_what_meta_says() -> None:
    setting = PathfinderSetting(path_length=5, contrast=(0.4, 1.0))
    measures = setting.measures
    for index in range(4):
        image, _, meta = sample(setting, 7, index)
        rows, columns = np.indices(image.shape)
        expected = np.zeros(image.shape, bool)
        doubt = np.zeros(image.shape, bool)
        for start, end in np.concatenate(all_snakes(meta)):
            ahead = (end - start) / measures.dash_length
            along = (rows - start[0]) * ahead[0] + (columns - start[1]) * ahead[1]
            cap = measures.thickness / 2
            along = along.clip(cap, measures.dash_length - cap)
            distance = np.hypot(
                rows - start[0] - along * ahead[0], columns - start[1] - along * ahead[1]
            )
            expected |= distance < cap
            doubt |= distance < cap + 0.5
        for dot in meta["dots"]:
            distance = np.hypot(rows - dot[0], columns - dot[1])
            expected |= distance < measures.dot_radius
            doubt |= distance < measures.dot_radius + 0.5
            assert image[distance < measures.dot_radius - 0.6].min() == 255
        assert (image[expected] > 0.45 * 0.4 * 255).all()
        assert (image[~doubt] == 0).all()
        assert (image == round(0.4 * 255)).any()  # dashes of the lower level


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    ranks = scores.argsort().argsort()
    ones = labels == 1
    below = ranks[ones].sum() - ones.sum() * (ones.sum() - 1) / 2
    return float(below / (ones.sum() * (~ones).sum()))


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[5]], ids=name)
def test_neither_the_dots_distance_nor_the_ink_tell_the_label(setting: PathfinderSetting) -> None:
    count = 300  # the standard error of the area is then 0.033
    distances, ink, labels = np.empty(count), np.empty(count), np.empty(count)
    for index in range(count):
        image, labels[index], meta = sample(setting, 8, index)
        distances[index] = math.dist(*meta["dots"])
        ink[index] = image.sum(dtype=np.int64)
        first, second = meta["targets"].reshape(2, -1, 2)
        assert math.dist(first[0], first[-1]) == pytest.approx(math.dist(first[0], second[0]))
    assert labels.sum() == count / 2
    assert abs(area_under_curve(distances, labels) - 0.5) < 0.1
    assert abs(area_under_curve(ink, labels) - 0.5) < 0.1


def facing(meta: dict[str, Any], label_: int) -> float:
    """How much the dashes under the dots point at each other, from -2 to 2."""
    targets, line = meta["targets"], meta["dots"][1] - meta["dots"][0]
    one = targets[0, 0, 1] - targets[0, 0, 0]
    last = targets[0, -1, ::-1] if label_ else targets[1, 0]
    return float(line @ (one - (last[1] - last[0])) / np.hypot(*line) / np.hypot(*one))


def test_dashes_under_the_dots_are_made_alike() -> None:
    areas = []
    for alike in (True, False):
        setting = PathfinderSetting(path_length=9, alike=alike)
        drawn = [sample(setting, 9, index) for index in range(200)]
        scores = np.array([facing(meta, label_) for _, label_, meta in drawn])
        areas.append(area_under_curve(scores, np.array([label_ for _, label_, _ in drawn])))
    assert abs(areas[0] - 0.5) < 0.12 and areas[1] > 0.75


def test_a_sample_depends_on_its_arguments_alone() -> None:
    image, label_, _ = sample(SMALL, 0, 5)
    for index in (4, 5, 6):
        sample(SMALL, 0, index)
    again, label_again, _ = sample(dataclasses.replace(SMALL), 0, 5)
    assert (image == again).all() and label_ == label_again
    others = [sample(SMALL, 0, 6), sample(SMALL, 1, 5), sample(SMALL, 0, 5, split="test")]
    assert all((image != other).any() for other, _, _ in others)


def test_labels_are_balanced_in_pairs_but_in_no_fixed_order() -> None:
    labels = np.array([sample(SMALL, 0, index)[1] for index in range(60)]).reshape(-1, 2)
    assert (labels.sum(axis=1) == 1).all()
    assert 0 < labels[:, 0].sum() < 30


@given(
    st.integers(2, 6),
    st.integers(56, 160),
    st.floats(0.1, 1.5),
    st.integers(0, 10),
    st.integers(0, 1000),
)
def test_any_setting_is_refused_or_gives_clear_pictures(
    path_length: int, canvas: int, continuity: float, distractors: int, seed: int
) -> None:
    try:
        setting = PathfinderSetting(
            path_length, canvas, continuity=continuity, distractors=distractors
        )
        image, label_, meta = sample(setting, seed, 0)
    except (ValueError, UserError):
        return
    assert image.shape == (canvas, canvas) and image.dtype == np.uint8
    assert len(meta["distractors"]) == distractors
    assert dots_connected(meta, setting.measures.gap) == (label_ == 1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"path_length": 1}, "path_length to be a whole number from 2, got 1"),
        ({"path_length": 2.5}, "path_length to be a whole number from 2, got 2.5"),
        ({"canvas": 4}, "canvas to be a whole number from 16, got 4"),
        ({"distractor_length": 0}, "distractor_length to be a whole number from 1, got 0"),
        ({"distractors": -1}, "distractors to be a whole number from 0, got -1"),
        ({"continuity": 0.0}, "continuity to be a turn above 0"),
        ({"continuity": 3.0}, "continuity to be a turn above 0"),
        ({"contrast": ()}, "contrast to hold levels"),
        ({"contrast": (0.5, 1.5)}, "contrast to hold levels"),
        ({"gap": 0.0}, "gap to be above 0, got 0.0"),
        ({"thickness": math.nan}, "thickness to be above 0, got nan"),
        ({"dash_length": 1.0}, "dashes longer than their thickness of 2"),
        ({"clearance": 4.0}, "a clearance above the gap of 5"),
        ({"clearance": math.nan}, "a clearance above the gap of 5"),
        ({"padding": 3.0}, "a padding from 6, which holds a dot, got 3"),
        ({"dot_radius": 12.0}, "dots that keep apart"),
        ({"canvas": 64, "path_length": 30, "continuity": 0.05}, "a path that fits"),
        ({"canvas": 64, "path_length": 40}, "snakes that fit into the canvas"),
        ({"distractors": 1000}, "snakes that fit into the canvas"),
    ],
)
def test_wrong_settings_are_told_in_a_sentence(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="expected ") as caught:
        PathfinderSetting(**{"path_length": 5, **wrong})
    assert says in str(caught.value)


def test_a_crowded_canvas_is_told_and_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htflearn.locality.snakes._LAYOUTS", 20)
    setting = PathfinderSetting(path_length=4, canvas=64, distractors=28)
    with pytest.raises(UserError, match="no place for two paths of 4 dashes and 28 distractors"):
        sample(setting, 0, 0)


def test_wrong_numbers_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="from 0, got -1 and 0"):
        sample(SMALL, -1, 0)
    with pytest.raises(ValueError, match="a count from 1"):
        generate(SMALL, 0, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htflearn.locality.pathfinder._SHARD_BYTES", 8 * 64 * 64)


@pytest.mark.usefixtures("small_shards")
def test_processes_do_not_change_the_data_set(tmp_path: Path) -> None:
    counts: list[int] = []
    one = generate(SMALL, 20, tmp_path / "one", seed=2, processes=1, progress=counts.append)
    two = generate(SMALL, 20, tmp_path / "two", seed=2, processes=2)
    assert files(one) == files(two)
    assert counts == [0, 8, 16, 20]
    data = ShardedImages(one)
    assert len(data) == 20 and data.labels.sum() == 10
    for index in (0, 7, 8, 19):
        image, label_, _ = sample(SMALL, 2, index)
        assert (data.images([index])[0] == image).all() and data.labels[index] == label_
    assert data.meta["setting"]["distractors"] == SMALL.measures.distractors
    assert (data.meta["seed"], data.meta["split"]) == (2, "train")


@pytest.mark.usefixtures("small_shards")
def test_generation_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    whole = files(generate(SMALL, 20, tmp_path / "whole", processes=1))

    def interrupt(done: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, 20, part, processes=1, progress=interrupt)
    with pytest.raises(UserError, match="is not finished"):
        ShardedImages(part)
    kept = (part / "images-00000.npy").stat()
    (part / "images-00001.npy").write_bytes(whole["images-00001.npy"][:-1])
    counts: list[int] = []
    generate(SMALL, 20, part, processes=1, progress=counts.append)
    assert counts == [8, 16, 20]
    assert files(part) == whole
    assert (part / "images-00000.npy").stat().st_mtime_ns == kept.st_mtime_ns
    counts.clear()
    generate(SMALL, 20, part, processes=1, progress=counts.append)
    assert counts == [20]


@pytest.mark.slow
def test_a_killed_generation_leaves_no_worker_and_can_go_on(tmp_path: Path) -> None:
    out, setting, count = tmp_path / "part", PathfinderSetting(path_length=9), 3000
    script = tmp_path / "generate.py"
    script.write_text(
        "from htflearn.locality.pathfinder import PathfinderSetting, generate\n"
        "if __name__ == '__main__':\n"
        f"    generate(PathfinderSetting(path_length=9), {count}, {str(out)!r}, processes=2)\n"
    )
    # Whoever holds the pipe's other end lives: reading it ends with the last of them.
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
    while not list(out.glob("images-*.npy")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=30)
    assert not (out / "meta.json").exists()
    generate(setting, count, out, processes=1)
    data = ShardedImages(out)
    data.verify()
    for index in (0, count - 1):
        assert (data.images([index])[0] == sample(setting, 0, index)[0]).all()
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"split": "test"}, "its split is train, not test"),
        ({"count": 6}, "its count is 4, not 6"),
        (
            {"setting": dataclasses.replace(SMALL, continuity=0.5)},
            "its setting.continuity is 0.9, not 0.5",
        ),
    ],
)
def test_another_data_set_is_refused(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    asked: dict[str, Any] = {"setting": SMALL, "count": 4, "out": tmp_path, "processes": 1}
    generate(**asked)
    before = files(tmp_path)
    with pytest.raises(UserError, match="holds another data set") as caught:
        generate(**{**asked, **changed})
    assert says in str(caught.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("shape", "suffix"),
    [
        ((5, 8, 9), ".svg"),
        ((5, 1, 8, 9), ".png"),
        ((5, 3, 8, 9), ".png"),
        ((5, 8, 9, 3), ".pdf"),
    ],
)
def test_contact_sheets_take_every_kind_of_image(
    tmp_path: Path, shape: tuple[int, ...], suffix: str
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    boxes = [[(1.0, 2.0, 4.0, 5.0)], [], [], [], [(0.0, 0.0, 8.0, 9.0), (1.0, 1.0, 2.0, 2.0)]]
    file = tmp_path / f"sheet{suffix}"
    contact_sheet(images, [0, 1, 1, 0, 1], file, 3, "a title", ["two", "one"], boxes)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    if suffix == ".png":
        assert min(Image.open(file).size) > 100


@pytest.mark.parametrize("width", [6, 300])
def test_labels_of_a_contact_sheet_lie_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    drawn = keep_figures(monkeypatch, sheets)
    images = np.zeros((6, 6, width), np.uint8)
    labels = ["120 pixels apart, same class\nMountain goat…, Welsh corgi"] * 5 + ["one line"]
    contact_sheet(images, labels, tmp_path / "sheet.png", 3, "Is Same Class: samples")
    assert texts_overlap(drawn[0]) == []
    contact_sheet(images[:0], [], tmp_path / "none.png")


def test_contact_sheets_tell_what_is_wrong(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8), np.uint8)
    with pytest.raises(UserError, match=r"ends in .png, .svg, .pdf, got sheet.gif"):
        contact_sheet(images, [0, 1], tmp_path / "sheet.gif")
    with pytest.raises(ValueError, match="expected 2 labels, one an image, got 1"):
        contact_sheet(images, [0], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="expected uint8 images"):
        contact_sheet(images.astype(np.float32), [0, 1], tmp_path / "sheet.png")
    with pytest.raises(UserError, match="cannot be written"):
        contact_sheet(images, [0, 1], tmp_path / "nowhere" / "sheet.png")
