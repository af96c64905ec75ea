"""Metrics: lines that are kept are those that were written."""

from __future__ import annotations

from pathlib import Path

import pytest
from full_disk import largest_file

from htflearn.errors import UserError
from htflearn.metrics import MetricsFile

LINES = b'{"iteration": 0}\n{"iteration": 5}\n'


def test_what_lies_behind_the_lines_kept_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES + b'{"iteration": 10, "cut o')
    with MetricsFile(path, len(LINES), {"iteration": 5}) as metrics:
        assert metrics.lines == [{"iteration": 0}, {"iteration": 5}]
        metrics.append({"iteration": 10})
        assert metrics.sync() == path.stat().st_size
    assert path.read_bytes() == LINES + b'{"iteration": 10}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected whole lines of 34 bytes in all, got 0"),
        (LINES[:20], "expected whole lines of 34 bytes in all, got 20"),
        (b"x" * 99, "expected whole lines of 34 bytes"),
        (b"x" * 33 + b"\n", "line 1 of .*metrics.jsonl cannot be read as JSON"),
        (b"\xff" * 33 + b"\n", "line 1 of .*metrics.jsonl cannot be read as JSON"),
        (b'{"iteration": 0}\n' + b"[]".ljust(16) + b"\n", "line 2 of .*expected a JSON object"),
        (LINES.replace(b"5", b"6"), "expected iteration 5 in the last line kept"),
        (b'{"iteration": 0}\n{"repetition":5}\n', "expected iteration 5 in the last line kept"),
    ],
    ids=range(8),
)
def test_other_content_is_told_and_left_alone(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        MetricsFile(path, len(LINES), {"iteration": 5})
    assert path.read_bytes() == content


@pytest.mark.parametrize("keep", [-1, 10**30])
def test_absurd_sizes_are_told(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES)
    with pytest.raises(UserError, match="expected whole lines of"):
        MetricsFile(path, keep)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        MetricsFile(tmp_path / "absent", 5)


def test_a_disk_without_room(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.append({"iteration": 0})
        with (
            largest_file(20),
            pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No"),
        ):
            metrics.append({"iteration": 5})
    assert path.read_bytes() == b'{"iteration": 0}\n' and metrics.lines == [{"iteration": 0}]
