"""The compile gate reads machine code rightly, and fails for each reason that it says it does."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from htfkernels.runtime import dispatch
from htfkernels.schedule import index_plan

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if dispatch.interpreted():
    pytest.skip("kernels of Triton's interpreter have no machine code", allow_module_level=True)

from htfkernels.triton.launch import Config, launch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import compile_gate as gate  # noqa: E402
import compile_kernels as kernels  # noqa: E402


@triton.jit
def scale(x, y, count, step, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at * step, mask=at < count) * 2, mask=at < count)


@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 32)
    total = tl.zeros((M, N), ACC)
    for first in range(0, K, 32):
        left = tl.load(a + m[:, None] * K + first + k[None, :])
        right = tl.load(b + (first + k[:, None]) * N + n[None, :])
        total = tl.dot(left, right, total, input_precision=P, out_dtype=ACC)
    tl.store(c + m[:, None] * N + n[None, :], total.to(c.dtype.element_ty))


@triton.jit
def broken(x, y, M: tl.constexpr):
    at = tl.arange(0, M)
    tl.store(y + at, tl.load(x + tl.arange(0, 2 * M)))


def run_scale(count=100, step=1, dtype=torch.float32, first=0, block=64):
    x = torch.empty(count * max(step, 1) + first, dtype=dtype)[first:]
    args = (x, torch.empty(count, dtype=dtype), count, step)
    launch(scale, 2, args, {"BLOCK": block}, Config(block, 1, 1, warps=2, stages=1))


def run_product(dtype=torch.float32, precision="ieee", m=64, n=64, warps=4, stages=3, K=256):
    a, b, c = (torch.empty(size, dtype=dtype) for size in (m * K, K * n, m * n))
    total = tl.float64 if dtype == torch.float64 else tl.float32
    constants = {"M": m, "N": n, "P": precision, "ACC": total}
    launch(product, 1, (a, b, c, K), constants, Config(m, n, 32, warps, stages))


def run_broken():
    args = (torch.empty(64), torch.empty(64))
    launch(broken, 1, args, {"M": 32}, Config(32, 1, 1))


def only(launches):
    (launched,) = launches
    return launched


_reports: dict[tuple[str, str, int], kernels.Report] = {}


def compiled(launched, arch):
    """Compiled once for all tests."""
    key = launched.name, launched.key, arch
    if key not in _reports:
        _reports[key] = kernels.compile_launch(launched, arch)
    return replace(_reports[key], cases=tuple(launched.cases))


def report(run, arch=90):
    return compiled(only(kernels.collect(run)), arch)


def test_launches_are_specialised_as_on_a_gpu():
    """1 becomes a constant, divisible sizes and aligned pointers are said to be; what is not, is
    not."""
    key = only(kernels.collect(lambda: run_scale(count=160, step=1))).key
    assert key == "x:*fp32/16 y:*fp32/16 count:i32/16 step=1 BLOCK=64 warps=2 stages=1"
    key = only(kernels.collect(lambda: run_scale(count=100, step=3, first=1))).key
    assert key == "x:*fp32 y:*fp32/16 count:i32 step:i32 BLOCK=64 warps=2 stages=1"
    types = [torch.float64, torch.float16, torch.bfloat16, torch.int64]
    keys = [only(kernels.collect(lambda t=t: run_scale(dtype=t))).key for t in types]
    assert [key.split("/16 ")[0] for key in keys] == ["x:*fp64", "x:*fp16", "x:*bf16", "x:*i64"]
    key = only(kernels.collect(lambda: run_product(torch.bfloat16, "tf32"))).key
    assert key.endswith(" K:i32/16 M=64 N=64 P=tf32 ACC=fp32 warps=4 stages=3")


def test_large_sizes_are_64_bit():
    def run():
        args = (torch.empty(16), torch.empty(16), 2**31 + 16, 2**31 - 1)
        launch(scale, 1, args, {"BLOCK": 64}, Config(64, 1, 1))

    key = only(kernels.collect(run)).key
    assert "count:i64/16 step:i32 " in key


def test_a_configuration_is_one_launch():
    def run():
        run_scale(count=100)
        run_scale(count=101)  # another size, the same code
        run_scale(count=100, block=128)

    assert len(kernels.collect(run)) == 2
    launches, failures = kernels.collect_all([("a", run), ("b", run_scale), ("c", run_product)])
    assert not failures
    assert [launch.cases for launch in launches] == [["a", "b"], ["a"], ["c"]]


def test_recording_leaves_triton_as_it_was():
    from triton import knobs
    from triton.runtime.driver import driver

    before = driver._active, knobs.runtime.jit_cache_hook, knobs.cache.dir
    report(run_scale)
    assert (driver._active, knobs.runtime.jit_cache_hook, knobs.cache.dir) == before


def test_failing_cases_are_named():
    def fails():
        raise ValueError("no such\ntree")

    _, failures = kernels.collect_all([("good", run_scale), ("bad", fails), ("idle", lambda: None)])
    assert failures == ["case bad: ValueError: no such tree", "case idle: it launches nothing"]


def test_only_jit_functions_are_taken():
    def run():
        launch(lambda *_: None, 1, (), {}, Config(1, 1, 1))

    with pytest.raises(TypeError, match="launched, which is no triton"):
        kernels.collect(run)


@pytest.mark.parametrize(
    ("dtype", "precision", "arch", "expected"),
    [
        (torch.float32, "ieee", 90, ""),
        (torch.float32, "tf32", 80, "HMMA"),
        (torch.float32, "tf32", 90, "HGMMA"),
        (torch.bfloat16, "ieee", 80, "HMMA"),
        (torch.float16, "ieee", 90, "HGMMA"),
        (torch.float64, "ieee", 80, "DMMA"),
    ],
    ids=str,
)
def test_tensor_cores_are_seen(dtype, precision, arch, expected):
    found = report(lambda: run_product(dtype, precision), arch).found
    assert found.tensor == expected
    assert found.shared > 0 and found.registers >= 24 and found.code % 16 == 0 and found.code > 500


def test_spills_are_seen():
    roomy = report(lambda: run_product(m=32, n=32)).found
    tight = report(lambda: run_product(precision="tf32", m=64, n=128, warps=1), 80).found
    assert (roomy.stack, roomy.local) == (0, 0)
    assert tight.stack > 0 and tight.local > 0 and tight.registers == 255


def test_hard_limits_need_no_table():
    """What a block of the architecture does not have is refused, were it in the table or not."""
    wide = lambda: run_product(torch.bfloat16, m=128, n=256, warps=8, stages=8)  # noqa: E731
    reports = [report(wide, arch) for arch in (80, 90)]
    assert min(r.found.shared for r in reports) > 166912
    table = gate.updated({}, reports, map(gate.target, (80, 90)))
    violations = gate.check(reports, table)
    assert any("a block of sm_80 has 166912" in v for v in violations)
    fitting = [replace(r, found=r.found._replace(shared=1000)) for r in reports]
    assert not gate.check(fitting, table)


def test_two_kernels_of_one_name_are_told(measured):
    reports, _ = measured
    assert gate.limits(reports) == []
    told = gate.limits([*reports, reports[0]])
    assert told == [f"{gate._about(reports[0])}: there are two of this name; rename one"]


def test_what_does_not_compile_is_named():
    launches = kernels.collect(run_scale) + kernels.collect(run_broken)
    reports = kernels.compile_all(launches, [90], processes=2)
    good, bad = reports
    assert good.error is None and bad.error is not None
    assert good.found == report(run_scale).found
    table = gate.updated({}, reports, [gate.target(90)])
    assert list(table) == [launches[0].name]
    violation = only(gate.check(reports, table))
    assert "broken" in violation and "does not compile" in violation and "\n" not in violation


def test_a_compiler_that_dies_is_named(monkeypatch):
    """And what its siblings were at is not lost."""
    launches, _ = kernels.collect_all([("one", run_scale), ("two", run_product)])
    compile_one = kernels._compile

    def dies(launch, arch):
        if launch.cases == ["two"]:
            os._exit(1)
        return compile_one(launch, arch)

    monkeypatch.setattr(kernels, "_compile", dies)
    good, bad = kernels.compile_all(launches, [80], processes=2)
    assert good.error is None and good.found.registers
    assert bad.error == "the compiler's process died"
    assert "launched by two: it does not compile" in only(gate.limits([good, bad]))


def test_kernels_compiled_together_are_read_apart():
    """They are disassembled in one file."""
    runs = [run_scale, lambda: run_product(torch.bfloat16), lambda: run_scale(block=512)]
    launches = [launch for run in runs for launch in kernels.collect(run)]
    together = kernels.compile_all(launches, [80, 90], processes=2)
    apart = [compiled(launch, arch) for arch in (80, 90) for launch in launches]
    assert [r.found for r in together] == [r.found for r in apart]
    assert [r.found.tensor for r in together] == ["", "HMMA", "", "", "HGMMA", ""]


@pytest.fixture
def measured():
    """Reports of two kernels for two architectures, without compiling: and their table."""
    launches, _ = kernels.collect_all([("one", run_scale), ("two", run_product)])
    found = kernels.Needs(33, 1024, 0, 0, 1000, "HMMA")
    reports = [
        kernels.Report(launch.name, launch.key, arch, tuple(launch.cases), found)
        for arch in (80, 90)
        for launch in launches
    ]
    return reports, gate.updated({}, reports, map(gate.target, (80, 90)))


def test_what_is_within_the_ceilings_passes(measured):
    reports, table = measured
    assert not gate.check(reports, table)
    assert not gate.check(reports[:2], table)  # one architecture alone


@pytest.mark.parametrize(
    ("field", "within", "above", "message"),
    [
        ("registers", 40, 41, "41 registers, and the ceiling is 40"),
        ("shared", 1024, 1025, "1025 bytes of shared memory, and the ceiling is 1024"),
        ("stack", 0, 8, "8 bytes of stack (spilled registers), and the ceiling is 0"),
        ("local", 0, 1, "1 loads and stores of local memory"),
        ("code", 1104, 1168, "1168 bytes of code, and the ceiling is 1152"),
        ("tensor", "HMMA", "", "are none, and the table expects HMMA"),
        ("tensor", "HMMA", "HGMMA", "are HGMMA, and the table expects HMMA"),
    ],
)
def test_each_ceiling_is_held(measured, field, within, above, message):
    reports, table = measured
    first, *rest = reports
    passing = replace(first, found=first.found._replace(**{field: within}))
    assert not gate.check([passing, *rest], table)
    failing = replace(first, found=first.found._replace(**{field: above}))
    violation = only(gate.check([failing, *rest], table))
    assert message in violation and first.name in violation and "launched by one" in violation


def test_every_launch_has_a_row_and_every_row_a_launch(measured):
    reports, table = measured
    new = replace(reports[0], key=reports[0].key + " more=1")
    violation = only(gate.check([*reports, new], table))
    assert "a configuration without ceilings" in violation
    violation = only(gate.check(reports[1:], table))
    assert "nobody launches" in violation and reports[0].name in violation
    assert not gate.check(reports[1:], table, complete=False)
    chosen = [r for r in reports if gate.selected(r.name, r.key, "product")]
    assert len(chosen) == 2
    assert not gate.check(chosen, table, only="product")


def test_another_triton_needs_ceilings_of_its_own(measured, monkeypatch):
    reports, table = measured
    monkeypatch.setattr(kernels, "MINOR", "99.0")
    assert gate.check(reports, table) == [
        f"the table has no ceilings for triton 99.0 sm_{arch}: make them with --update"
        for arch in (80, 90)
    ]
    both = gate.updated(table, reports, map(gate.target, (80, 90)))
    assert not gate.check(reports, both)
    monkeypatch.undo()
    assert not gate.check(reports, both)


def test_updates_drop_what_is_gone_and_keep_what_was_not_looked_at(measured):
    reports, table = measured
    rows = lambda t: {row[:3] for row in gate._rows(t)}  # noqa: E731
    everything = {(r.name, r.key, r.target) for r in reports}
    assert rows(table) == everything
    both = [gate.target(80), gate.target(90)]
    dropped = gate.updated(table, reports[1:], both)
    assert rows(dropped) == everything - {(reports[0].name, reports[0].key, reports[0].target)}
    assert rows(gate.updated(table, [], [gate.target(90)])) == {
        r for r in everything if r[2].endswith("80")
    }
    assert rows(gate.updated(table, [], both, only="scale$")) == everything
    assert rows(gate.updated(table, [], both, complete=False)) == everything
    assert rows(gate.updated(table, [], both, only="product")) == {
        row for row in everything if "scale" in row[0]
    }


def test_the_table_survives_its_file(measured, tmp_path):
    _, table = measured
    path = tmp_path / "ceilings.json"
    assert gate.load(path) == {}
    gate.save(table, path)
    assert gate.load(path) == table
    gate.save({}, path)
    assert gate.load(path) == {}
    path.write_text(json.dumps({"columns": ["registers"], "kernels": {}}))
    with pytest.raises(ValueError, match="expected the columns registers, shared"):
        gate.load(path)


def test_the_command_checks_updates_and_prints(monkeypatch, tmp_path, capsys):
    path = tmp_path / "ceilings.json"
    monkeypatch.setattr(
        gate.compile_cases, "cases", lambda: [("one", run_scale), ("two", run_product)]
    )
    fast = ["--arch", "80", "--jobs", "2", "--ceilings", str(path)]
    monkeypatch.setattr(
        gate,
        "compile_all",
        lambda launches, archs, jobs: [compiled(one, a) for a in archs for one in launches],
    )
    assert gate.main(fast) == 1
    assert "the table has no ceilings for" in capsys.readouterr().err
    assert gate.main([*fast, "--update"]) == 0
    assert gate.main([*fast, "--table"]) == 0
    out, err = capsys.readouterr()
    assert "2 configurations" in out and "0 violations" in out and err == ""
    assert out.count("| triton") == 2
    monkeypatch.setattr(gate.compile_cases, "cases", lambda: [("one", run_scale)])
    assert gate.main(fast) == 1
    assert "nobody launches" in capsys.readouterr().err
    assert gate.main([*fast, "--only", "scale"]) == 0
    assert gate.main([*fast, "--cases", "one"]) == 0
    before = path.read_text()
    assert gate.main([*fast, "--cases", "one", "--update"]) == 0
    assert path.read_text() == before
    assert gate.main([*fast, "--update"]) == 0
    assert path.read_text() != before


def test_a_failing_case_does_not_touch_the_table(monkeypatch, tmp_path, capsys):
    path = tmp_path / "ceilings.json"
    monkeypatch.setattr(gate.compile_cases, "cases", lambda: [("idle", lambda: None)])
    assert gate.main(["--update", "--ceilings", str(path)]) == 1
    assert not path.exists()
    assert "case idle: it launches nothing" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["evaluate", "slog", "evaluate_at", "full_tensor"])
def test_every_case_launches_something(op):
    """On the models that the gate is run for, in the first dtype of each and on fewer rows: the
    gate itself says the same of all."""
    if find_spec(f"htfkernels.ops.{op}.triton") is None:
        pytest.skip(f"{op} has no Triton kernels")
    named = {"evaluate_at": ("at ", "planned "), "full_tensor": "tensor "}
    ours = named.get(op, f"{op} ")
    models = [
        m._replace(numbers=m.numbers[:1], batch=min(m.batch, 2**13))
        for m in gate.compile_cases.models()
    ]
    cases = [case for case in gate.compile_cases.cases(models) if case[0].startswith(ours)]
    launches, failures = kernels.collect_all(cases)
    assert not failures
    assert {name for launch in launches for name in launch.cases} == {name for name, _ in cases}


def test_the_models_visit_every_form_of_index_plan():
    models = [m for m in gate.compile_cases.models() if "planned" in m.ops and m.batch < 10**5]
    forms = {gate.compile_cases._plan(model).form for model in models}
    assert forms == {index_plan.WALK, index_plan.BILINEAR, index_plan.FRAMED_ROOT}
