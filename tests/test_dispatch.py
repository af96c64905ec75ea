"""Which backend runs, and what is said where one cannot."""

from __future__ import annotations

import threading

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import dispatch
from htfkernels.runtime.dispatch import Spec, choose, requested, use_backend, why_not

SPEC = Spec("evaluate", torch.float32, "cpu")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("HTF_BACKEND", raising=False)


def test_backends_are_listed_with_reasons():
    listed = hk.backends()
    assert tuple(listed) == dispatch.BACKENDS == ("reference", "cpp", "cuda", "triton")
    assert listed["reference"] is None
    for name, reason in listed.items():
        assert reason is None or (len(reason) > 20 and "\n" not in reason), name


def test_auto_is_the_default():
    assert requested() == "auto"
    backends = [n for n in dispatch._PREFERENCE if n not in dispatch._ON_CPU]
    assert choose(SPEC, "auto")[0] == next(n for n in backends if why_not(n, SPEC) is None)


def test_use_backend_nests_and_restores():
    with use_backend("reference"):
        assert requested() == "reference"
        with use_backend("cpp"):
            assert requested() == "cpp"
            with use_backend("auto"):
                assert requested() == "auto"
        assert requested() == "reference"
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert requested() == "reference"
    assert requested() == "auto"


def test_use_backend_holds_in_its_thread_only():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_environment(monkeypatch):
    monkeypatch.setenv("HTF_BACKEND", "reference")
    assert requested() == "reference"
    with use_backend("auto"):
        assert requested() == "auto"
    monkeypatch.setenv("HTF_BACKEND", "fortran")
    with pytest.raises(ValueError, match=r"HTF_BACKEND: expected one of reference, cpp.*'fortran'"):
        requested()


def test_environment_is_read_by_a_call(monkeypatch):
    monkeypatch.setenv("HTF_BACKEND", "triton")
    model = hk.HTF(hk.ModeTree.flat(3), 2, 2)
    if why_not("triton", SPEC) is None:
        pytest.skip("triton runs on this device")
    with pytest.raises(RuntimeError, match="evaluate: backend 'triton' was asked for, but"):
        model(torch.randn(1, 3, 2))


def test_unknown_names():
    with (
        pytest.raises(ValueError, match=r"use_backend: expected one of .*auto, got 'c'"),
        use_backend("c"),
    ):
        pass


@pytest.mark.parametrize("name", dispatch.BACKENDS)
@pytest.mark.parametrize("op", testing.OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_forced_backend_runs_or_raises_its_reason(name, op, device):
    for dtype in (torch.float32, torch.float16, torch.complex64):
        spec = Spec(op, dtype, device)
        reason = why_not(name, spec)
        if reason is None:
            assert choose(spec, name) == (name, "asked for")
        else:
            with pytest.raises(RuntimeError) as caught:
                choose(spec, name)
            assert str(caught.value) == f"{op}: backend {name!r} was asked for, but {reason}"
        assert why_not(choose(spec, "auto")[0], spec) is None


def test_cpp_says_what_it_cannot():
    assert "cuda" in why_not("cpp", Spec("evaluate", torch.float32, "cuda"))
    assert "float16" in why_not("cpp", Spec("evaluate", torch.float16, "cpu"))
    assert "slog" in why_not("cpp", Spec("slog", torch.float32, "cpu"))


def test_auto_gives_the_reasons_of_those_it_passed_over():
    name, why = choose(Spec("evaluate", torch.float16, "cpu"), "auto")
    assert name == "reference"
    assert "float16" in why


def test_half_precision_runs_on_the_reference():
    model = hk.HTF(hk.ModeTree.flat(3), 2, 2, dtype=torch.float16)
    x = torch.randn(5, 3, 2, dtype=torch.float16)
    assert model(x).dtype == torch.float16
    with (
        use_backend("cpp"),
        pytest.raises(RuntimeError, match="evaluate: backend 'cpp' was asked for, but cpp"),
    ):
        model(x)


@pytest.mark.parametrize("op", testing.OPS)
def test_the_backend_asked_for_is_the_one_that_runs(op, monkeypatch):
    """The reference and the compiled operator each run when, and only when, they are asked for."""
    import importlib

    module = importlib.import_module(f"htfkernels.ops.{op}")
    calls = []
    original = getattr(module.reference, op)
    monkeypatch.setattr(module.reference, op, lambda *a: calls.append("reference") or original(*a))
    case = testing.small_cases()[0]
    function, arguments = testing.operation(op, case, testing.make_inputs(case, torch.float32))
    with use_backend("reference"):
        function(*arguments)
    assert calls == ["reference"]
    reason = why_not("cpp", Spec(op, torch.float32, "cpu"))
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    with use_backend("cpp"):
        function(*arguments)
    assert calls == ["reference"]
