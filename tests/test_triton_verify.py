"""The Triton kernels under the check, on a GPU or in Triton's interpreter, there on a tiny case:
what is right passes, an error that is put in is found, and `auto` takes the next backend."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import dispatch, verdicts
from htfkernels.runtime.dispatch import Spec, choose
from htfkernels.runtime.operations import families
from htfkernels.verify import checks
from htfkernels.verify import run as verify

pytest.importorskip("triton")

ON = dispatch.device_of("triton")
REASON = dispatch.why_not("triton", Spec("evaluate", torch.float32, ON))


def runs(test):
    """Of tests that run kernels."""
    test = pytest.mark.skipif(REASON is not None, reason=str(REASON))(test)
    return pytest.mark.gpu(test) if ON == "cuda" else test


TRITON = [f for f in families() if f.backend == "triton"]
CASES = {c.name: c for c in (*testing.cases(), *testing.small_cases())}
F32 = torch.float32


@pytest.fixture
def tiny(monkeypatch):
    """The interpreter is slow."""
    if ON == "cpu":
        monkeypatch.setattr(checks, "CASES", {str(f): ("small_numbers",) for f in TRITON})


@runs
@pytest.mark.parametrize("family", TRITON, ids=str)
def test_the_kernels_pass(family, tiny):
    for math in ("tf32", "float16") if ON == "cpu" else family.maths:
        verdict = verify.check(family, math, verdicts.places(ON)[0])
        assert verdict.failure is None, verdict.failure


@runs
@pytest.mark.parametrize("kind", ["wrong", "nan", "raises"])
def test_auto_takes_the_next_backend(kind, tiny, verifying, monkeypatch):
    from htfkernels.ops.evaluate import triton as kernels

    real = kernels.evaluate_keeping

    def spoiled(*args, **kwargs):
        result, kept = real(*args, **kwargs)
        if kind == "raises":
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        return [result * (1.01 if kind == "wrong" else torch.nan), kept]

    monkeypatch.setattr(kernels, "evaluate_keeping", spoiled)
    monkeypatch.setattr(dispatch.cuda_module, "why_not", lambda device: "there is none")
    checked, check = [], verify.check
    monkeypatch.setattr(verify, "check", lambda *a: checked.append(a[1]) or check(*a))
    case = CASES["small_numbers"]
    function, arguments = testing.operation("evaluate", case, testing.make_inputs(case, F32, ON))
    exact, scale = testing.exact(function, arguments)
    with pytest.warns(RuntimeWarning, match=r"triton evaluate \(ieee\) fail on .*: evaluate on"):
        value = function(*arguments)
    testing.assert_matches(value, exact, F32, "forward", scale)
    assert choose(Spec("evaluate", F32, ON), "auto")[0] in ("cpp", "reference")
    assert checked == ["ieee"]
    name, why = choose(Spec("evaluate", F32, ON), "triton")
    assert name == "triton" and why.startswith("asked for, although the kernels triton evaluate")


@runs
def test_a_right_family_is_taken_and_remembered(tiny, verifying, monkeypatch):
    monkeypatch.setattr(dispatch.cuda_module, "why_not", lambda device: "there is none")
    checked, check = [], verify.check
    monkeypatch.setattr(verify, "check", lambda *a: checked.append(a[1]) or check(*a))
    for _ in range(2):
        assert choose(Spec("full_tensor", F32, ON), "auto")[0] == "triton"
        verdicts.forget()
    assert checked == ["ieee"] and len(list(verifying.glob("*.json"))) == 1
    assert hk.backends()["triton"] is None


def test_the_cases_take_every_kind_of_launch():
    """In float32 by TF32, where leaves may be formed in their parents' kernels."""
    from htfkernels.triton.tables import Fused, Ragged, Tables, Uniform

    found = set()
    for name in checks.CASES["triton evaluate"]:
        program = CASES[name].layout.program
        tables = Tables(program, torch.device("cpu"), (F32, "tf32"))
        found |= {type(launched) for launched in tables.launches}
    assert found == {Fused, Ragged, Uniform}
