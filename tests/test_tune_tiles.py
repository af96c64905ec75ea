"""The script that holds tables of tiles against timing: what it would time, without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from htfkernels.triton import configs, launch

PATH = Path(__file__).parent.parent / "bench" / "tune_tiles.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("tune_tiles", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPES", ((8, 32, 64), (16, 64, 64)))
    monkeypatch.setattr(module, "NODES", 8)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_launch_takes_the_tile_it_is_given(script, dtype):
    works = list(script.works(dtype, "tf32", torch.device("cpu")))
    assert {work.kernel for work in works} == {
        f"{kernel} {direction}"
        for kernel in ("fused", "uniform")
        for direction in ("forward", "backward")
    }
    for work in works:
        table = script.chosen(work)
        others = list(script.neighbours(table))
        assert table not in others
        assert len(set(others)) == len(others) > 10
        seen = []
        with (
            mock.patch.object(configs, work.table, lambda *shape, tile=others[-1]: tile),
            launch.recorded(lambda *launched, seen=seen: seen.append(launched[3])),
        ):
            work.run()
        assert [(c["BM"], c["BK"]) for c in seen] == [(others[-1].m, others[-1].k)]


def test_without_a_gpu_it_says_so(script, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune_tiles.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main() == 2
    assert "there is no CUDA device" in capsys.readouterr().err
