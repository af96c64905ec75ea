"""The checks of kernels, tried on the CPU's; and the commands. A GPU's kernels are checked in
test_cuda_verify.py and test_triton_verify.py."""

from __future__ import annotations

import random
import re
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from fake_gpu import SPEC, WRONG, Machine, failing, restart
from torch._subclasses.fake_tensor import FakeTensorMode

import htfkernels as hk
from htfkernels import __main__ as main
from htfkernels import info, testing
from htfkernels.runtime import dispatch, plan
from htfkernels.runtime.dispatch import choose
from htfkernels.runtime.operations import OPERATIONS, families
from htfkernels.runtime.verdicts import Place, Verdict
from htfkernels.schedule.index_plan import BILINEAR, FRAMED_ROOT, WALK
from htfkernels.verify import checks
from htfkernels.verify import run as verify
from htflearn import cli

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def machine(verifying, monkeypatch):
    return Machine(monkeypatch)


EVALUATE = OPERATIONS["evaluate"].backends["cpp"].family


def test_every_kernel_is_in_a_family():
    for operation in OPERATIONS.values():
        for backend, runs in operation.backends.items():
            assert runs.family is not None and runs.family.backend == backend
            assert operation.name in runs.family.ops
    assert {str(f) for f in families()} == set(checks.CHECKS) == set(checks.CASES)
    for runs in (r for o in OPERATIONS.values() for r in o.backends.values()):
        for dtype in runs.dtypes if runs.family.backend == "cuda" else ():
            assert runs.family.math(dtype, "ieee") in runs.family.maths
    slog = OPERATIONS["slog"].backends["triton"].family
    assert slog.math(F32, "tf32x3") == "tf32x3" and slog.math(torch.float16, "ieee") == "float16"


@pytest.mark.parametrize("name", ["cuda planned", "cuda training step"])
def test_the_cases_take_every_form_of_an_index_plan(name):
    cases = {case.name: case for case in (*testing.cases(), *testing.small_cases())}
    chosen = [cases[n] for n in checks.CASES[name]]
    plans = [hk.IndexPlan.make(c.layout, testing.make_inputs(c, F32).indices) for c in chosen]
    assert {p.form for p in plans} == {WALK, BILINEAR, FRAMED_ROOT}


@pytest.mark.parametrize("family", [f for f in families() if f.backend == "cpp"], ids=str)
def test_the_cpus_kernels_pass(family):
    for math in family.maths:
        verdict = verify.check(family, math, Place("cpu", "the CPU"))
        assert verdict.failure is None and verdict.cases >= 1
        # Only float64 may agree to the last bit with the formula, which is evaluated in it.
        assert verdict.error > 0 or math == "float64"
        assert verdict.error <= verdict.allowed and verdict.seconds > 0


def spoil(monkeypatch, change):
    """Puts an error into the results of the compiled kernels."""
    real = checks.compiled.call

    def call(name, *arguments):
        found = real(name, *arguments)
        first = found if isinstance(found, torch.Tensor) else found[0]
        changed = change(first)
        return changed if isinstance(found, torch.Tensor) else [changed, *found[1:]]

    monkeypatch.setattr(checks.compiled, "call", call)


def one_entry(by):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] *= by
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (one_entry(1.00001), "forward: the error is .*e-06 of the scale, and 1.0e-06 is allowed"),
        (one_entry(torch.nan), "forward: the error is inf of the scale"),
        (lambda t: torch.cat([t, t]), "forward: the error is inf of the scale"),
        (failing(MemoryError("no memory\nat all")), "raises MemoryError: no memory"),
    ],
    ids=["a wrong number", "NaN", "another shape", "an exception"],
)
def test_an_error_is_found(change, sentence, monkeypatch):
    spoil(monkeypatch, change)
    verdict = verify.check(EVALUATE, "ieee", Place("cpu", "the CPU"))
    assert re.fullmatch(f"evaluate on small_irregular,? {sentence}.*", verdict.failure)
    assert verdict.cases == 1 and verdict.lasting == ("raises" not in sentence)


def test_an_error_in_gradients_is_found(monkeypatch):
    real = checks.compiled.call

    def call(name, *arguments):
        found = real(name, *arguments)
        return [g * 1.001 for g in found] if name == "evaluate_backward" else found

    monkeypatch.setattr(checks.compiled, "call", call)
    verdict = verify.check(EVALUATE, "ieee", Place("cpu", "the CPU"))
    assert "backward: the error is" in verdict.failure


def test_slog_is_not_checked_while_a_graph_is_traced(monkeypatch):
    """It takes the reference then, which is right whatever the kernels are."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    slog = OPERATIONS["slog"].backends["triton"].family
    verdict = verify.check(slog, "ieee", Place("cpu", "the CPU"))
    assert "raises RuntimeError: torch.compile traces" in verdict.failure and not verdict.lasting


def test_a_device_that_is_lost_is_noticed(monkeypatch):
    place = Place("cuda:0", "Some GPU")
    synchronize = failing(RuntimeError("an illegal memory access was encountered"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert verify._lost(place) and not verify._lost(Place("cpu", "the CPU"))
    verdict = verify.check(EVALUATE, "ieee", place)  # no such device here, or none that answers
    assert verdict.lost and not verdict.lasting and verdict.failure.startswith("the cases raises")


def random_numbers():
    return torch.get_rng_state().tolist(), random.getstate()


def state():
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.get_default_device(), torch.is_autocast_enabled("cpu"), dispatch.requested(),
        hk.runtime.precision.float32_precision(), list(warnings.filters), torch.get_num_threads(),
    )  # fmt: skip


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(F64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
    "backend": lambda: hk.use_backend("reference"),
    "precision": lambda: hk.use_precision("tf32"),
    "anomaly": torch.autograd.detect_anomaly,
    "dual numbers": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_check_is_the_same_in_any_context_and_leaves_it_as_it_was(name):
    place = Place("cpu", "the CPU")
    plain = verify.check(EVALUATE, "ieee", place)
    numbers = random_numbers()
    with CONTEXTS[name]():
        before = state()
        found = verify.check(EVALUATE, "ieee", place)
        assert state() == before
    assert random_numbers() == numbers
    assert (found.failure, found.cases, found.error) == (None, plain.cases, plain.error)


def test_a_check_under_transforms(monkeypatch):
    found = []

    def function(x):
        found.append(verify.check(EVALUATE, "ieee", Place("cpu", "the CPU")).failure)
        return x.sum()

    torch.func.vmap(torch.func.grad(function))(torch.ones(3, 2))
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    assert found == [None, None]


def test_a_gpu_that_tells_of_waiting_does_not_tell_of_the_check(monkeypatch):
    modes = ["warn"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with verify._in_force(EVALUATE, "ieee", Place("cuda:0", "Some GPU")):
        assert modes[-1] == "default"
    assert modes[-1] == "warn"


# -- all of them ----------------------------------------------------------------------------------


def test_words_choose_kernels():
    assert len(verify.chosen()) == sum(len(f.maths) for f in families())
    found = [f"{f} {m}" for f, m in verify.chosen(["index plan", "slog tf32", "cpp spectra"])]
    assert found == ["cuda index plan int64", "triton slog tf32", "cpp spectra float64"]
    with pytest.raises(ValueError, match="expected kernels among cuda group rmsprop, cuda"):
        verify.chosen(["cuda", "cpp tf32"])


def test_rows_are_found_anew_and_kept(machine, monkeypatch):
    machine.verdicts["cuda planned"] = WRONG
    with pytest.warns(RuntimeWarning):
        assert choose(SPEC, "auto")[0] == "triton"
    del machine.verdicts["cuda planned"]
    layout = testing.cases()[0].layout
    assert plan.make_plan("evaluate_at_planned", layout, F32, "cpu", "auto").backend == "triton"
    found = list(verify.rows(verify.chosen(["planned ieee"])))
    assert [(str(r.family), r.math, r.device, r.failed) for r in found] == [
        ("cuda planned", "ieee", "Some GPU", False)
    ]
    assert plan.make_plan("evaluate_at_planned", layout, F32, "cpu", "auto").backend == "cuda"
    restart()
    assert choose(SPEC, "auto")[0] == "cuda" and hk.backends()["cuda"] is None


def test_info_says_what_is_known(machine):
    assert [state for state, _ in info._verified("triton")] == ["not checked yet"]
    machine.verdicts["cuda spectra"] = WRONG
    list(verify.rows(verify.chosen(["cuda spectra", "cuda index plan"])))
    found = dict(info._verified("cuda"))
    assert found["verified"] == "index plan int64" and found["FAILED"] == "spectra float64"
    assert found["not checked yet"].startswith("group rmsprop ieee, ")


def test_nothing_more_is_run_on_a_device_that_is_lost(machine):
    machine.verdicts["cuda planned"] = Verdict("it raises", lasting=False, lost=True)
    found = list(verify.rows(verify.chosen(["cuda planned", "cuda spectra"])))
    assert [r.failed for r in found] == [True] + 5 * [False]
    assert found[-1].state == "cannot run"
    assert verify.notes(found) == [
        "cuda planned (ieee): it raises",
        "cuda planned, cuda spectra: cuda planned (ieee) has left the device unusable",
    ]
    assert machine.checks == ["cuda planned ieee"]


@pytest.fixture
def commands(capsys):
    """Runs `htf verify` and `python -m htfkernels verify`: exit code, output, errors of each."""

    def run(*arguments):
        found = []
        for command in (cli.run, main.main):
            code = command(["verify", *arguments])
            printed = capsys.readouterr()
            found.append((code, printed.out, printed.err))
        return found

    return run


def test_the_command_shows_what_was_found(commands, monkeypatch):
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: "there is no CUDA device")
    for code, out, _ in commands("cpp group", "triton slog"):
        assert code == 0
        lines = [line.split() for line in out.splitlines() if "cpp group rmsprop" in line]
        assert [line[3] for line in lines] == ["ieee", "bfloat16", "float64"]
        assert all(line[-1] == "verified" for line in lines)
        assert "\ntriton slog: there is no CUDA device\n" in out


def test_the_command_fails_where_kernels_do(commands, monkeypatch):
    spoil(monkeypatch, one_entry(2))
    for code, out, _ in commands("cpp evaluate ieee"):
        assert code == 1
        assert "FAILED\n" in out.replace(" ", "")
        assert "\ncpp evaluate (ieee): evaluate on small_irregular, forward: the error is" in out


def test_the_command_refuses_what_is_not_there(commands):
    for code, out, errors in commands("cpp", "fortran"):
        assert code == 2 and out == ""
        assert "expected kernels among cuda group" in errors
    assert main.main(["nonsense"]) == 2
