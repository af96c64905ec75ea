"""``htf bench --device cuda``: what of it a machine without a GPU can check."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from functools import lru_cache
from math import inf
from types import ModuleType
from typing import Any

import opt_einsum
import pytest
import torch
from torch import Tensor

import htfkernels as hk
from htflearn import cli
from htflearn.bench import (
    Implementation,
    Prepared,
    device,
    gpu_implementations,
    implementations,
    report,
)
from htflearn.bench import measure as measuring
from htflearn.bench import run as bench
from htflearn.bench.accuracy import TOLERANCE, judge
from htflearn.bench.device import Machine, Replay
from htflearn.bench.gpu_implementations import GPU_IMPLEMENTATIONS
from htflearn.bench.implementations import OURS
from htflearn.bench.measure import measure
from htflearn.bench.workloads import Problem, workloads

GRAPH = f"{OURS}, CUDA graph"
ANY = Machine(1.0, 1.0)


def run(*arguments: object) -> int:
    return cli.run(["bench", *map(str, arguments)])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
        (["--device", "cuda"], "--device cuda needs a CUDA device, and PyTorch finds none"),
        (["--precision", "half"], "--precision must be one of ieee, tf32, tf32x3, got 'half'"),
        (
            ["--precision", "tf32"],
            "--precision tf32 is of float32 on a GPU, got --dtype float32 on cpu",
        ),
        (
            ["-w", "huge"],
            "--workload: 'huge' needs the memory and speed of a GPU: --device cuda or --scale tiny",
        ),
        (
            ["-i", GRAPH],
            f"--implementation: {GRAPH!r} needs --device cuda, got --device cpu",
        ),
        (["--budget", "0"], "--budget must be positive, got 0"),
        (["--compile-limit", "-1"], "--compile-limit must be positive, got -1"),
    ],
)
def test_bad_input(
    arguments: list[str], sentence: str, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"htf: {sentence}")


def test_what_needs_a_gpu_is_listed_there_only(capsys: pytest.CaptureFixture[str]) -> None:
    only_there = ["huge", *GPU_IMPLEMENTATIONS]
    assert run("--list") == 0
    printed = capsys.readouterr().out
    assert not [name for name in only_there if f"  {name} " in printed]
    assert run("--list", "--device", "cuda") == 0
    printed = capsys.readouterr().out
    assert not [name for name in only_there if f"  {name} " not in printed]


def test_huge() -> None:
    huge = workloads()["huge"]
    assert huge.sizes == {"N": 1024, "D": 64, "R": 256, "B": 4096}
    assert huge.near_one and huge.needs_gpu and not workloads("tiny")["huge"].needs_gpu
    assert [name for name, w in workloads().items() if w.needs_gpu] == ["huge"]


def test_no_workload_is_begun_after_the_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    where = ("-w", "wide", "-w", "small", "-i", OURS, "--pass", "forward")
    assert run("--scale", "tiny", "--repeats", 1, "--budget", 2, *where) == 0
    printed = capsys.readouterr()
    assert "wide" in printed.out and "small" not in printed.out
    assert "small: not begun, 2 s are over" in printed.err


def test_what_does_not_fit_is_left_out_and_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exact(problem: Problem) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "_exact", exact)
    assert run("--scale", "tiny", "-w", "small", "-i", OURS) == 1
    assert "small: left out, it does not fit" in capsys.readouterr().err


def test_what_fails_of_ours_is_an_error_on_a_gpu() -> None:
    row = {"implementation": GRAPH, "median_ms": None, "off": None, "error": "failed: RuntimeError"}
    assert bench._ours_is_wrong(row, "cuda") and not bench._ours_is_wrong(row, "cpu")
    assert not bench._ours_is_wrong(row | {"error": "it differs at indices only"}, "cuda")
    assert not bench._ours_is_wrong(row | {"implementation": "folded bmm"}, "cuda")


def test_precision_is_ours_and_that_of_pytorch() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    for name, theirs in (("tf32", "tf32"), ("ieee", "ieee"), ("tf32x3", "ieee")):
        with device.precision(name):
            assert torch.backends.cuda.matmul.fp32_precision == theirs
            # What torch.compile asks for raises where only the newer setting was made.
            expected = "high" if theirs == "tf32" else "highest"
            assert torch.get_float32_matmul_precision() == expected
            assert torch.backends.cuda.matmul.allow_tf32 == (theirs == "tf32")
            assert hk.runtime.precision.float32_precision() == name
        assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("kind", ["tf32", torch.bfloat16, torch.float16])
def test_a_common_factor_is_allowed_and_nothing_else(kind: Any) -> None:
    dtype = torch.float32 if kind == "tf32" else kind
    off, allowed = judge(dtype, "cuda", "tf32", nodes=511)
    exact = [torch.randn(50, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)]
    lost = [e * 0.7 for e in exact]
    assert off(lost, exact) < 1e-12 < allowed < 0.3
    assert off([e + 0.01 * e.abs().max() for e in exact], exact) < allowed
    assert judge(dtype, "cuda", "tf32", nodes=127)[0](lost, exact) > allowed / 2
    assert judge(dtype, "cuda", "tf32", nodes=7)[0](lost, exact) > allowed
    for wrong in (
        [-exact[0], exact[1]],
        [exact[0].flip(0), exact[1]],
        [torch.zeros(50), exact[1]],
        [exact[0], torch.where(exact[1] == exact[1].max(), torch.nan, exact[1])],
        [exact[0], exact[1].T],
        [torch.where(exact[0] == exact[0].max(), 0.0, exact[0]), exact[1]],
    ):
        assert not off(wrong, exact) < allowed


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_on_a_cpu_no_factor_is_taken_out(dtype: torch.dtype) -> None:
    off, allowed = judge(dtype, "cpu", "ieee", nodes=2047)
    exact = [torch.randn(50, dtype=torch.float64)]
    assert allowed == TOLERANCE[dtype] and off([0.7 * exact[0]], exact) == pytest.approx(0.3)
    assert judge(torch.float32, "cuda", "tf32x3", 7)[1] == TOLERANCE[torch.float32]


def test_a_dtype_that_cannot_hold_the_results() -> None:
    problem = workloads("tiny")["paper"].build(torch.float16)
    (row,) = measure(problem, {OURS: implementations.IMPLEMENTATIONS[OURS]}, ["forward"], 1, ANY)
    assert row["error"] == "all results are below what torch.float16 can hold"


class Rounded(torch.autograd.Function):
    """A product as tensor cores take it: operands of 10 bits of mantissa, sums in float32."""

    half = 0  # added to what is cut off: rounds to nearest

    @classmethod
    def tf32(cls, x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + cls.half) & -8192).view(torch.float32)

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.bmm(Rounded.tf32(x), Rounded.tf32(w))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = (Rounded.tf32(t) for t in ctx.saved_tensors)
        grad = Rounded.tf32(grad)
        return torch.bmm(grad, w.mT), torch.bmm(x.mT, grad)


@lru_cache(maxsize=1)
def with_truth(name: str, dtype: torch.dtype) -> tuple[Problem, Any]:
    problem = workloads()[name].build(dtype)
    return problem, measuring._exact(problem)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "cut", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["wide", "medium", "deep", "small", "ragged", "paper"])
def test_tolerances_are_those_of_the_rounding(
    rounding: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rounded, "half", 4096 if rounding == "nearest" else 0)
    dtype = getattr(torch, rounding, torch.float32)

    def multiply(x: Tensor, w: Tensor, dim: int) -> Tensor:
        if dtype == torch.float32:
            return Rounded.apply(x, w)
        return torch.bmm(x.float(), w.float()).to(dtype)

    monkeypatch.setattr(implementations, "_multiply", multiply)
    problem, truth = with_truth(name, dtype)
    nodes = len(problem.workload.layout.tree.nodes)
    judged = judge(dtype, "cuda", "tf32", nodes)
    ways = implementations.folded(problem)
    which = problem.workload.passes[-1]
    for x in ways.inputs:
        x.requires_grad_(which == "inputs")
    off = [
        measuring._error(problem, ways, p, measuring._runner(problem, ways, p), truth, judged)
        for p in ("forward", which)
    ]
    print(f"{name}, {rounding}: off by {max(off):.1e}, allowed {judged[1]:.1e}")
    if (name, rounding) == ("paper", "float16"):
        assert max(off) == 1  # its entries are below the smallest number
    else:
        assert max(off) < judged[1] / 2


class FakeGraph:
    """Stands for a captured graph; ``work`` is what a replay does."""

    work: Any = staticmethod(lambda: None)

    def replay(self) -> None:
        type(self).work()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: Any) -> None:
            assert isinstance(other, Stream)

    used = iter([5 * 2**20])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(used))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())


def test_a_replay_has_results_only_of_what_it_writes(
    fake_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = [torch.ones(3), torch.ones(2, 2)]
    replay = Replay(lambda: out)
    assert device.peak_mb(replay, "cuda") == 3.0
    monkeypatch.setattr(FakeGraph, "work", staticmethod(lambda: out[0].fill_(7.0)))
    first, second = replay()
    assert first.tolist() == [7.0] * 3 and second.isnan().all()


def test_an_empty_graph_is_wrong(fake_cuda: None) -> None:
    problem = workloads("tiny")["small"].build(torch.float32)
    (row,) = measure(problem, {GRAPH: GPU_IMPLEMENTATIONS[GRAPH]}, ["forward"], 1, ANY)
    assert row["off"] == inf and row["error"].startswith("wrong") and row["median_ms"] is None


@pytest.mark.parametrize("workload", ["small", "ragged", "paper", "dense"])
def test_captured_steps_are_those_of_the_model(
    workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[Any] = []

    def replay(step: Any) -> Any:
        captured.append(step)
        return step

    monkeypatch.setattr(measuring, "Replay", replay)
    ways = {n: i for n, i in GPU_IMPLEMENTATIONS.items() if n.endswith("CUDA graph")}
    problem = workloads("tiny")[workload].build(torch.float32)
    rows = measure(problem, ways, problem.workload.passes, 1, ANY)
    timed = [row for row in rows if row["error"] is None]
    assert len(timed) == len(captured) == len(rows) // (2 if workload == "dense" else 1)
    prepared = ways[GRAPH].prepare(problem)
    assert all(w is not m for w, m in zip(prepared.weights, problem.model.weights, strict=True))


@pytest.mark.slow
def test_autotuned() -> None:
    problem = workloads("tiny")["small"].build(torch.float32)
    name = "folded bmm, max-autotune"
    rows = measure(problem, {name: GPU_IMPLEMENTATIONS[name]}, ["forward", "backward"], 1, ANY)
    assert all(row["error"] is None and row["peak_mb"] is None for row in rows)


def test_autotuned_arguments_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[Tensor] = []
    monkeypatch.setattr(torch._dynamo, "mark_static_address", marked.append)
    problem = workloads("tiny")["small"].build(torch.float32)
    prepared = gpu_implementations._autotuned(problem)
    assert len(marked) == len(list(problem.model.weights)) + len(prepared.inputs)
    assert prepared.before is not None and not prepared.allocates


@pytest.mark.parametrize("workload", ["small", "ragged", "paper", "dense"])
def test_cutensornet_gets_the_network(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = workloads("tiny")[workload].build(torch.float64)
    ways = {"cuTensorNet": GPU_IMPLEMENTATIONS["cuTensorNet"]}
    monkeypatch.setattr(gpu_implementations, "find_spec", lambda name: None)
    missing = measure(problem, ways, ["forward"], 1, ANY)[0]["error"]
    assert missing == "it is not installed: pip install cuquantum-python-cu13"

    calls: list[Any] = []

    def contract(equation: str, *operands: Tensor, optimize: dict[str, Any]) -> Tensor:
        calls.append(optimize)
        return opt_einsum.contract(equation, *operands, optimize=optimize["path"])

    package, module = ModuleType("cuquantum"), ModuleType("cuquantum.tensornet")
    module.contract = contract
    monkeypatch.setitem(sys.modules, "cuquantum", package)
    monkeypatch.setitem(sys.modules, "cuquantum.tensornet", module)
    monkeypatch.setattr(gpu_implementations, "find_spec", lambda name: object())
    rows = measure(problem, ways, problem.workload.passes, 1, ANY)
    assert all(row["error"] is None for row in rows)
    assert all(len(pair) == 2 for pair in calls[0]["path"][:-1])


def test_compiling_is_cut_short_where_asked() -> None:
    def stubborn() -> None:
        for _ in range(2):  # as a compiler that goes on with the next kernel
            try:
                time.sleep(10)
            except Exception:
                pass
        raise AssertionError("not cut short")

    def wrapping() -> None:
        try:
            stubborn()
        except Exception as error:
            raise RuntimeError("a kernel failed") from error

    def prepare(problem: Problem) -> Prepared:
        return Prepared(wrapping, [])

    problem = workloads("tiny")["small"].build(torch.float32)
    ways = {"slow": Implementation("", prepare, limit=300.0)}
    (row,) = measure(problem, ways, ["forward"], 1, ANY, limit=0.05)
    assert row["error"] == "compiling it takes more than 0.05 s"


def test_time_on_a_gpu_is_that_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def elapsed_time(self, last: Event) -> float:
            return 5.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    taken, result = device.seconds(lambda: order.append("run") or 3, "cuda")
    assert (taken, result) == (0.005, 3)
    assert order == ["synchronize", "record", "run", "record", "synchronize"]


def test_provenance_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "Some GPU", 9, 0, 2**36, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(device, "driver_version", lambda: "580.1")
    found = device.described("tf32")
    assert found["gpu"] == "Some GPU" and found["gpu_capability"] == "9.0"
    assert found["gpu_memory_gb"] == 64.0 and found["precision"] == "tf32"
    assert found["driver"] == "580.1" and set(found["backends"]) == set(hk.backends())


def test_nothing_tells_where_files_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/htf", "bench", "--out", "/a/b/c.json", "--out=/d/e.json"])
    monkeypatch.setattr(report, "_commit", lambda folder: None)
    monkeypatch.setenv("HTF_COMMIT", "abc")
    made = report.provenance({"float32": ANY}, "tiny")
    assert made["command"] == "htf bench --out c.json --out=e.json" and made["commit"] == "abc"
    error = OSError("cannot load /opt/lib/python3/x.so: 3/4 of it, and lib/y.so")
    assert measuring._sentence(error) == (
        "failed: OSError: cannot load x.so: 3/4 of it, and lib/y.so"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("workload", ["small", "ragged", "paper", "dense"])
def test_on_a_gpu(workload: str) -> None:
    problem = workloads("tiny")[workload].build(torch.float32, "cuda")
    ways = {n: i for n, i in bench._on_gpu().items() if "compiled" not in n and "max" not in n}
    rows = measure(problem, ways, problem.workload.passes, 2, ANY)
    assert not [r for r in rows if (r["error"] or "").startswith(("wrong", "failed"))]
