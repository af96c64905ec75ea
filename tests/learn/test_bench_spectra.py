"""``htf bench`` of spectra: all implementations agree, and one that is wrong is not timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import htfkernels as hk
from htfkernels.testing import random_tree
from htflearn import cli
from htflearn.bench import (
    Implementation,
    Prepared,
    folded_spectra,
    report,
    spectra,
    spectra_implementations,
)
from htflearn.bench.implementations import OURS
from htflearn.bench.measure import Machine, measure
from htflearn.bench.spectra_implementations import SPECTRA
from htflearn.bench.workloads import PASSES, Problem, Workload, workloads

NAMES = [name for name, w in workloads("tiny").items() if w.kind == "spectra"]
PASSES_OF_SPECTRA = workloads("tiny")["spectra-64"].passes
LIBRARIES = ["tensap"]


@pytest.fixture(autouse=True)
def no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_commit", lambda folder: "abc+changes")


def problem(tree: hk.ModeTree, dims: Any, ranks: Any) -> Problem:
    layout = hk.Layout.make(tree, dims, ranks)
    return Workload("some", "", "spectra", layout, 1, dtype=torch.float64).build(torch.float32)


def rows_of(
    given: Problem, ways: dict[str, Implementation], passes: tuple[str, ...] = PASSES_OF_SPECTRA
) -> dict[tuple[str, str], dict[str, Any]]:
    names = {text: name for name, text in PASSES.items()}
    rows = measure(given, ways, passes, 1, Machine(1.0, 1.0))
    return {(row["implementation"], names[row["pass"]]): row for row in rows}


def installed() -> dict[str, Implementation]:
    return {name: way for name, way in SPECTRA.items() if name not in LIBRARIES}


@pytest.mark.parametrize(
    ("order", "dims", "ranks"),
    [
        *[(w.layout.tree.order, w.layout.mode_dims, w.layout.ranks[0]) for w in
          (workloads("tiny")[name] for name in NAMES)],
        (4, 7, 3),  # more rows than columns from the leaves on
        (8, 2, [5, 4, 3]),  # ranks that change
        (2, 5, 4),
    ],
)  # fmt: skip
def test_all_agree(order: int, dims: Any, ranks: Any) -> None:
    found = rows_of(problem(hk.ModeTree.balanced(order), dims, ranks), installed())
    assert {which for _, which in found} == set(PASSES_OF_SPECTRA)
    for (name, which), row in found.items():
        if row["error"] is None:
            assert 0 <= row["off"] < spectra.TOLERANCES[which] / 100 and row["median_ms"] > 0
        else:
            assert name in (f"{OURS}, QR", f"{OURS}, values") or "entries" in row["error"], row
    timed = {key for key, row in found.items() if row["error"] is None}
    assert timed >= {(n, p) for n in (OURS, "folded linalg") for p in PASSES_OF_SPECTRA}


@pytest.mark.parametrize("seed", range(3))
def test_irregular_trees(seed: int) -> None:
    """The engine against the tensor itself and the reference backend; the others say no."""
    tree = random_tree(5, seed)
    ranks = {node: 2 + node.index % 3 for node in tree.interior}
    found = rows_of(problem(tree, [2, 3, 2, 4, 3], ranks), installed())
    for which in PASSES_OF_SPECTRA:
        assert found[OURS, which]["error"] is None, found[OURS, which]
        assert found[f"{OURS}, dense", which]["off"] < spectra.TOLERANCES[which] / 100
        for name in ("folded linalg", "batch-major, dense"):
            assert found[name, which]["error"].startswith("it takes balanced binary trees")


def spoiled(spoil: Callable[[list[Tensor]], list[Tensor]], slope: float = 1.0) -> Implementation:
    """The folded one with changed values, or with right values and wrong derivatives."""

    def prepare(given: Problem) -> Prepared:
        ways = SPECTRA["folded linalg"].prepare(given)
        passes = dict(ways.by_pass)
        for which in ("forward-qr", "forward-gram", "forward-renyi2"):
            run = ways.computes(which)
            passes[which] = lambda run=run: spoil(list(run()))
        for which in ("backward-effective", "backward-renyi2"):
            run = ways.computes(which)
            passes[which] = lambda run=run: slope * run() + (1 - slope) * run().detach()
        return Prepared(None, [], by_pass=passes, by_node=ways.by_node)

    return Implementation("", prepare)


def last_of_one_node(by: float) -> Callable[[list[Tensor]], list[Tensor]]:
    def spoil(levels: list[Tensor]) -> list[Tensor]:
        node = levels[1][1:2]
        change = by * (node[:, :1] if node.dim() > 1 else node)
        end = torch.cat([node[:, :-1], node[:, -1:] + change], 1) if node.dim() > 1 else node + by
        return [levels[0], torch.cat([levels[1][:1], end, levels[1][2:]]), *levels[2:]]

    return spoil


def test_the_wrong_are_caught_and_not_timed() -> None:
    given = workloads("tiny")["spectra-64"].build(torch.float64)
    ways = {
        OURS: SPECTRA[OURS],
        "1e-9": spoiled(last_of_one_node(1e-9)),
        "1e-3": spoiled(last_of_one_node(1e-3), slope=1.001),
        "nan": spoiled(lambda levels: [torch.nan * x for x in levels], slope=torch.nan),
        "short": spoiled(lambda levels: levels[1:]),
        "order": spoiled(lambda levels: [x.flip(0) for x in levels]),
    }
    found = rows_of(given, ways)
    refused = {key for key, row in found.items() if row["error"] is not None}
    every = set(PASSES_OF_SPECTRA)
    forward = {which for which in every if which.startswith("forward")}
    assert refused == {
        ("1e-9", "forward-qr"),
        *(("1e-3", which) for which in every),
        *(("nan", which) for which in every),
        *(("short", which) for which in forward),
        *(("order", which) for which in forward),
    }
    for key in refused:
        assert found[key]["error"].startswith("wrong: off by")
        assert found[key]["median_ms"] is None and found[key]["repeats"] == 0


def test_ours_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPECTRA, OURS, spoiled(last_of_one_node(1e-3)))
    arguments = ["--scale", "tiny", "--repeats", "1", "-w", "spectra-64", "--pass", "forward-gram"]
    assert cli.run(["bench", *arguments]) == 1


def test_values_that_are_missing_or_zero() -> None:
    right = [torch.tensor([2.0, 1.0]), torch.tensor([1.0])]
    error = lambda *result: spectra.error("forward-qr", result, right)  # noqa: E731
    assert error(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0
    assert error(torch.tensor([2.0]), torch.tensor([1.0])) == 0.5
    assert error(torch.tensor([2.0, 1.0])) == torch.inf


def test_flops_are_counted_where_no_tensor_can_be_formed() -> None:
    counted = {
        name: [which for which in w.passes if w.build(torch.float64).flops(which)]
        for name, w in workloads("full").items()
        if w.kind == "spectra" and name != "spectra-paper"
    }
    assert set(map(tuple, counted.values())) == {("forward-qr",)}
    small = workloads("full")["spectra-paper"].build(torch.float64)
    assert all(small.flops(which) is None for which in small.workload.passes)


def test_multiply_adds() -> None:
    def count(order: int, dim: int, rank: int) -> float:
        layout = hk.Layout.make(hk.ModeTree.balanced(order), dim, rank)
        work = spectra.multiply_adds(layout)
        assert work is not None
        return work

    # A tree twice as large has as many nodes more, each with three products of triangular factors.
    rank = 64
    rows = sum((rank - max(i, j)) ** 2 for i in range(rank) for j in range(rank))
    assert rank**4 / 6 == pytest.approx(rows, rel=0.05)
    more = count(512, 512, 512) - count(256, 512, 512)
    assert more / (256 * 3 * 512**4 / 6) == pytest.approx(1.0, rel=0.05)
    # Nothing has more rows than columns: E W^T of the root, then a 2 x 2 matrix for each leaf.
    assert count(2, 2, 8) == 8 + 2 * (2 * 2 * 8 + 4 * 8 // 3)
    flat = hk.Layout.make(hk.ModeTree.flat(3), 2, 8)
    assert spectra.multiply_adds(flat) is None and spectra.num_values(flat) == 6


def test_ranks_of_values() -> None:
    s = torch.rand(5, 4, dtype=torch.float64).sort(descending=True).values
    torch.testing.assert_close(folded_spectra.effective_ranks(s), hk.effective_rank(s))
    torch.testing.assert_close(folded_spectra.renyi2_ranks(s), hk.renyi2_rank(s))


def run(out: Path, *arguments: object) -> dict[str, Any]:
    options = ("--scale", "tiny", "--repeats", 1, "--out", out, *arguments)
    assert cli.run(["bench", *map(str, options)]) == 0
    return json.loads(out.read_text())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command and rows; always float64; ``--pass forward`` asks for those of spectra."""
    where = ("-w", "small", "-w", "spectra-paper", "-i", OURS, "-i", "folded linalg")
    data = run(tmp_path / "a.json", *where, "--pass", "forward", "--dtype", "bfloat16")
    found = {(r["workload"], r["implementation"], r["pass"], r["dtype"]) for r in data["rows"]}
    forward = [PASSES[which] for which in ("forward-qr", "forward-gram", "forward-renyi2")]
    assert found == {
        ("small", OURS, "forward", "bfloat16"),
        *(("spectra-paper", n, p, "float64") for n in (OURS, "folded linalg") for p in forward),
    }
    assert data["provenance"]["dtype"] == "bfloat16, float64"
    assert set(data["provenance"]["gemm_gflops_by_dtype"]) == {"bfloat16", "float64"}
    assert all(row["floor_ms"] > 0 and row["error"] is None for row in data["rows"])
    assert data["rows"][-1]["sizes"] == {"N": 4, "D": 3, "R": 8}
    assert "float64" in capsys.readouterr().out
    assert cli.run(["bench", "--compare", *[str(tmp_path / "a.json")] * 2]) == 0


def test_tensap(tmp_path: Path) -> None:
    pytest.importorskip("tensap")
    data = run(tmp_path / "a.json", "-i", "tensap")
    found = {(r["workload"], r["pass"]): r for r in data["rows"]}
    for name in NAMES:
        row = found[name, PASSES["forward-gram"]]
        assert row["error"] is None and row["off"] < 1e-9
        assert "1e-7" in found[name, PASSES["forward-qr"]]["error"]
    assert data["provenance"]["tensap"]


def test_no_tensap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spectra_implementations, "find_spec", lambda name: None)
    rows = run(tmp_path / "a.json", "-w", "spectra-64", "-i", "tensap")["rows"]
    assert {row["error"] for row in rows} == {"it is not installed: pip install tensap"}
