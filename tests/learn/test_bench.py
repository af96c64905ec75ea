"""``htf bench``: rows are complete, wrong implementations are caught, files are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from htflearn import cli
from htflearn.bench import Implementation, Prepared, circuit, report
from htflearn.bench.implementations import IMPLEMENTATIONS, OURS
from htflearn.bench.measure import Machine, measure
from htflearn.bench.spectra_implementations import SPECTRA
from htflearn.bench.workloads import PASSES, Problem, workloads

FIELDS = {
    "workload", "sizes", "dtype", "implementation", "pass", "median_ms", "min_ms", "repeats",
    "gflops", "fraction_of_gemm", "flops", "bytes", "floor_ms", "bound", "peak_mb",
    "setup_seconds", "off", "error",
}  # fmt: skip
PROVENANCE = {
    "processor", "capability", "threads", "python", "torch", "htfkernels", "numpy", "opt_einsum",
    "cirkit", "tensap", "commit", "command", "date", "gemm_gflops", "copy_gb_per_s", "dtype",
    "scale", "environment",
}  # fmt: skip
# Without those that take longer than the rest: torch.compile, and opt_einsum's search for a path.
EVALUATED = [name for name, w in workloads("tiny").items() if w.kind != "spectra"]
QUICK = [name for name in IMPLEMENTATIONS if name not in ("folded bmm, compiled", "opt_einsum")]


@pytest.fixture(autouse=True)
def no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_commit", lambda folder: "abc+changes")


def run(*arguments: object) -> int:
    return cli.run(["bench", *map(str, arguments)])


def tiny(out: Path, *arguments: object) -> dict[str, Any]:
    assert run("--scale", "tiny", "--repeats", 2, "--out", out, *arguments) == 0
    return json.loads(out.read_text())


def only(names: list[str], option: str = "-i") -> list[str]:
    return [argument for name in names for argument in (option, name)]


def test_all_workloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny(tmp_path / "new" / "a.json", *only(QUICK), *only(EVALUATED, "-w"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
    assert set(data["provenance"]) >= PROVENANCE and data["provenance"]["gemm_gflops"] > 0
    printed = capsys.readouterr().out
    for name in EVALUATED:
        workload = workloads("tiny")[name]
        rows = [row for row in data["rows"] if row["workload"] == name]
        assert len(rows) == len(workload.passes) * len(QUICK) and name in printed
        for row in rows:
            assert set(row) == FIELDS
            assert row["floor_ms"] > 0 and row["bound"] in ("flops", "bytes")
            if row["error"] is None:
                assert 0 < row["min_ms"] <= row["median_ms"] and row["repeats"] == 2
                assert row["gflops"] > 0 and row["fraction_of_gemm"] > 0 and row["off"] < 1e-4
                assert row["peak_mb"] is None or row["peak_mb"] >= 0
            else:
                assert row["median_ms"] is None and row["off"] is None
                assert not row["error"].startswith(("wrong", "failed")), row
        timed = {row["implementation"] for row in rows if row["error"] is None}
        assert timed >= {OURS, "reference"} and len(timed) > 2


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    # The entries of the paper's model are below the smallest number of float16.
    where = ("-w", "small", "-w", "ragged" if dtype == "float16" else "paper")
    data = tiny(tmp_path / "a.json", "--dtype", dtype, *where, *only(QUICK))
    passes = {PASSES[which] for which in workloads("tiny")["small"].passes}
    assert {row["pass"] for row in data["rows"] if row["median_ms"]} == passes
    assert {row["dtype"] for row in data["rows"]} == {dtype}
    assert not [r for r in data["rows"] if (r["error"] or "").startswith(("wrong", "failed"))]


@pytest.mark.parametrize("name", EVALUATED)
def test_opt_einsum(name: str, tmp_path: Path) -> None:
    data = tiny(tmp_path / "a.json", "-w", name, "-i", "opt_einsum")
    assert all(row["error"] is None for row in data["rows"])


@pytest.mark.skipif(find_spec("cirkit") is None, reason="libcirkit is not installed")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_cirkit(dtype: str, tmp_path: Path) -> None:
    where = ("-w", "paper", "-w", "completion", "--dtype", dtype)
    data = tiny(tmp_path / "a.json", *where, "-i", "cirkit")
    assert len(data["rows"]) == 4 and all(row["error"] is None for row in data["rows"])
    assert data["provenance"]["cirkit"]


def test_no_cirkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(circuit, "find_spec", lambda name: None)
    where = ("-w", "paper", "-w", "small", "-w", "dense", "--pass", "forward")
    sentences = [row["error"] for row in tiny(tmp_path / "a.json", *where, "-i", "cirkit")["rows"]]
    assert sentences == [
        "its input layers take one index or number of each mode, not a vector",
        "it is not installed: pip install libcirkit",
        "it evaluates single entries only",
    ]


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    where = ("-w", "small", "-w", "ragged", "-w", "completion")
    rows = tiny(tmp_path / "a.json", *where, "-i", "folded bmm, compiled")["rows"]
    for row in rows:
        assert (row["error"] is not None) == (row["workload"] == "ragged"), row


def wrong(factor: float) -> Implementation:
    def prepare(problem: Problem) -> Prepared:
        x = problem.vectors.clone()
        # Right values, and gradients that are not: only the check of gradients can tell.
        weights = [w * factor - w.detach() * (factor - 1) for w in problem.model.weights]

        def forward() -> torch.Tensor:
            return torch.func.functional_call(
                problem.model, {f"weights.{i}": w for i, w in enumerate(weights)}, (x,)
            )

        return Prepared(forward, [x], lambda grads: list(grads[0].unbind(1)))

    return Implementation("wrong", prepare)


def broken(problem: Problem) -> Prepared:
    raise RuntimeError("out of order\nand more")


def test_the_wrong_are_caught_and_not_timed() -> None:
    problem = workloads("tiny")["small"].build(torch.float32)
    ways = {OURS: IMPLEMENTATIONS[OURS], "wrong": wrong(1.1), "broken": Implementation("", broken)}
    rows = measure(problem, ways, ["forward", "backward"], 2, Machine(1.0, 1.0))
    found = {(row["implementation"], row["pass"]): row for row in rows}
    assert found["wrong", "forward"]["median_ms"] > 0
    caught = found["wrong", "forward+backward"]
    assert caught["median_ms"] is None and caught["repeats"] == 0 and 0.05 < caught["off"] < 0.2
    assert caught["error"] == f"wrong: off by {caught['off']:.1e} of the largest number"
    assert found["broken", "forward"]["error"] == "failed: RuntimeError: out of order"
    assert all(found[OURS, name]["error"] is None for name in ("forward", "forward+backward"))


def test_ours_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, OURS, wrong(1.1))
    assert run("--scale", "tiny", "--repeats", 1, "-w", "small", "-i", OURS) == 1


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    data = tiny(first, "-w", "small", "-i", OURS, "--pass", "forward")
    data["rows"][0]["median_ms"] *= 2
    data["provenance"]["threads"] += 1
    report.save(second, data["provenance"], data["rows"])
    capsys.readouterr()
    assert run("--compare", first, second) == 0
    printed = capsys.readouterr().out
    assert "2.000" in printed and "small" in printed and "not the same threads" in printed


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--scale", "tiny", "--list") == 0
    printed = capsys.readouterr().out
    for name in (*workloads("tiny"), *IMPLEMENTATIONS, *SPECTRA, *PASSES):
        assert f"  {name} " in printed


def test_earlier_rows_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    out.write_text("earlier")
    assert run("--out", out) == 2
    assert "a.json exists; give --force to replace it, or another --out" in capsys.readouterr().err
    assert out.read_text() == "earlier"
    data = tiny(out, "-w", "small", "-i", OURS, "--pass", "forward", "--force")
    assert len(data["rows"]) == 1


def test_rows_are_saved_before_they_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(report, "print_workload", broken)
    with pytest.raises(ZeroDivisionError):
        run("--scale", "tiny", "--repeats", 1, "-w", "small", "-i", OURS, "--out", tmp_path / "a")
    assert len(report.load(tmp_path / "a")["rows"]) == 3


def test_an_output_is_proved_before_pytorch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = "import sys; from htflearn import cli; code = cli.run(['bench', '--out', sys.argv[1]])"
    command = [sys.executable, "-c", f"{code}; print('torch' in sys.modules, code)"]
    done = subprocess.run(
        [*command, str(tmp_path / "file" / "a.json")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False 2\n" and "cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-w", "nonsense"], "--workload: there is no 'nonsense', only wide; huge;"),
        (["-i", "nonsense"], "--implementation: there is no 'nonsense', only htfkernels;"),
        (["--pass", "nonsense"], "--pass: there is no 'nonsense', only forward; backward; inputs"),
        (
            ["--dtype", "int8"],
            "--dtype must be one of float32, float64, bfloat16, float16, got 'int8'",
        ),
        (["--scale", "huge"], "--scale must be one of full, tiny, got 'huge'"),
        (["--repeats", "0"], "--repeats must be positive, got 0"),
        (["--budget", "nan"], "--budget must be positive, got nan"),
        (["--compile-limit", "1e30"], "--compile-limit must be at most 1,000,000,000"),
        (["--threads", "0"], "--threads must be positive, got 0"),
        (["--out", "/proc/nowhere/a.json"], "the output directory /proc/nowhere cannot be written"),
        (["--compare", "/absent.json", "b.json"], "/absent.json cannot be read: No such file"),
        (["--compare", "/etc/hostname", "b.json"], "/etc/hostname cannot be read as JSON"),
    ],
)
def test_bad_input(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--scale", "tiny", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"htf: {sentence}")
