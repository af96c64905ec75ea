"""Kernels of a GPU are taken by `auto` once they have been checked: what is run, kept and said."""

from __future__ import annotations

import json
import multiprocessing
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import GPU, SPEC, WRONG, Machine, failing, restart

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import plan, verdicts
from htfkernels.runtime.dispatch import Spec, choose
from htfkernels.runtime.operations import OPERATIONS
from htfkernels.runtime.verdicts import Place, Verdict
from htfkernels.verify import run as verify

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def machine(verifying, monkeypatch):
    return Machine(monkeypatch)


def test_checked_once_and_kept(machine, verifying):
    assert choose(SPEC, "auto")[0] == "cuda"
    assert choose(SPEC, "auto")[0] == "cuda"
    assert machine.checks == ["cuda planned ieee"]
    restart()
    assert choose(SPEC, "auto")[0] == "cuda"
    assert len(machine.checks) == 1 and len(list(verifying.iterdir())) == 1
    # Other kernels, and other ways of rounding, are checked when they are wanted.
    choose(Spec("evaluate_at_planned", F32, "cpu", precision="tf32"), "auto")
    choose(Spec("spectra", F32, "cpu", precision="tf32"), "auto")
    choose(Spec("spectra", F64, "cpu"), "auto")
    assert machine.checks[1:] == ["cuda planned tf32", "cuda spectra float64"]
    choose(Spec("evaluate_at_planned", F32, "cpu"), "reference")
    assert len(machine.checks) == 3


def test_a_failure_is_one_warning_and_the_next_backend_runs(machine, caplog):
    machine.verdicts["cuda planned"] = WRONG
    with pytest.warns(RuntimeWarning) as caught:
        backend, why = choose(SPEC, "auto")
    assert backend == "triton"
    sentence = f"the kernels cuda planned (ieee) fail on Some GPU: {WRONG.failure}"
    assert why == sentence and str(caught[0].message).startswith(sentence)
    assert len(caught) == 1 and "HTF_VERIFY=0" in str(caught[0].message)
    assert hk.backends() == {"reference": None, "cpp": None, "cuda": sentence, "triton": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(SPEC, "auto")[0] == "triton"
        assert choose(SPEC, "cuda") == ("cuda", f"asked for, although {sentence}")
    assert machine.checks == ["cuda planned ieee", "triton gather ieee"]
    restart()
    with pytest.warns(RuntimeWarning, match="fail on Some GPU"):
        assert choose(SPEC, "auto")[0] == "triton"
    assert len(machine.checks) == 2


def test_the_slower_kernels_are_taken_where_the_faster_fail(machine):
    layout = hk.Layout.make(hk.ModeTree.balanced(256), 64, 64)
    spec = Spec("evaluate", torch.bfloat16, "cpu", layout, 65536)
    assert choose(spec, "auto")[0] == "triton"
    assert machine.checks == ["triton evaluate bfloat16"]
    restart()
    machine.verdicts["triton evaluate"] = WRONG
    verdicts.record(OPERATIONS["evaluate"].backends["triton"].family, "bfloat16", GPU, WRONG)
    assert choose(spec, "auto")[0] == "cuda"
    verdicts.record(OPERATIONS["evaluate"].backends["cuda"].family, "bfloat16", GPU, WRONG)
    assert choose(spec, "auto")[0] == "cpp"


def test_a_warning_that_is_an_error_is_raised_once(machine):
    machine.verdicts["cuda planned"] = WRONG
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            choose(SPEC, "auto")
        assert choose(SPEC, "auto")[0] == "triton"


@pytest.mark.parametrize("what", ["name", "capability", "driver", "torch", "sources"])
def test_another_machine_or_version_is_checked_again(what, machine):
    choose(SPEC, "auto")
    restart()
    if what in machine.versions:
        machine.versions = {**machine.versions, what: "another"}
    else:
        machine.places = [Place(**{**vars(GPU), what: "another"})]
    choose(SPEC, "auto")
    assert len(machine.checks) == 2


def test_every_kind_of_gpu_is_checked(machine):
    machine.places = [GPU, Place("cpu", "Another GPU", "8.6", "580.1")]
    choose(SPEC, "auto")
    assert len(machine.checks) == 2
    machine.places = machine.places[1:]
    choose(Spec("evaluate_at_planned", F32, "cpu", precision="tf32"), "auto")
    assert len(machine.checks) == 3


def test_what_a_verdict_depends_on(monkeypatch):
    monkeypatch.setattr(verdicts, "_fingerprint", lambda backend: f"sources of {backend}")
    assert verdicts._versions.__wrapped__("cuda") == {
        "htfkernels": hk.__version__,
        "sources": "sources of cuda",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


class Library:
    """NVML, as far as it is asked."""

    def __init__(self, code):
        self.code = code

    def nvmlInit_v2(self):
        return self.code

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"580.65.06"
        return 0

    def nvmlShutdown(self):
        return 0


def test_the_drivers_version(monkeypatch):
    asked = verdicts.driver_version.__wrapped__
    for load, version in (
        (lambda name: Library(0), "580.65.06"),
        (lambda name: Library(9), None),
        (failing(OSError("no such file")), None),
    ):
        monkeypatch.setattr(verdicts.ctypes, "CDLL", load)
        assert asked() == version


def test_places_are_one_of_each_kind(monkeypatch):
    gpus = [("A", 9, 0), ("B", 8, 6), ("A", 9, 0), ("Old", 7, 5)]
    monkeypatch.setattr(verdicts, "driver_version", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=gpus[i][0], major=gpus[i][1], minor=gpus[i][2]),
    )
    found = verdicts.places("cuda")
    assert [p.device for p in found] == ["cuda:2", "cuda:1"]
    assert found == [Place("cuda:0", "A", "9.0", "580.1"), Place("cuda:1", "B", "8.6", "580.1")]


def test_the_fingerprint_is_that_of_all_sources_and_of_the_compiled_module(monkeypatch, tmp_path):
    module = tmp_path / "module.so"
    module.write_bytes(b"first")
    monkeypatch.setattr(verdicts.cuda_module, "file", lambda: module)
    first, triton = verdicts._fingerprint("cuda"), verdicts._fingerprint("triton")
    module.write_bytes(b"other")
    assert verdicts._fingerprint("cuda") != first
    assert verdicts._fingerprint("triton") == triton != first
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(verdicts, "__file__", str(package / "runtime/verdicts.py"))
    (package / "a.py").write_text("1")
    first = verdicts._fingerprint("triton")
    (package / "a.py").write_text("2")
    assert verdicts._fingerprint("triton") != first


DAMAGED = [
    b"", b"{", b"null", b"[1]", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"depends_on": {}}',
    b'{"depends_on": %s, "verdict": null}', b'{"depends_on": %s, "verdict": {"failure": 3}}',
    b'{"depends_on": %s, "verdict": {"failure": null, "cases": "x"}}',
    b'{"depends_on": %s, "verdict": {"unknown": null}}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_written_anew(content, machine, verifying):
    choose(SPEC, "auto")
    (path,) = verifying.iterdir()
    found = json.loads(path.read_text())
    if b"%s" in content:
        content %= json.dumps(found["depends_on"]).encode()
    path.write_bytes(content)
    restart()
    assert choose(SPEC, "auto")[0] == "cuda"
    assert len(machine.checks) == 2 and json.loads(path.read_text()) == found


@pytest.mark.parametrize("kind", ["file", "relative", "full"])
def test_a_folder_that_cannot_be_written_is_no_error(kind, machine, tmp_path, monkeypatch, caplog):
    if kind == "full":
        monkeypatch.setattr(verdicts.os, "replace", failing(OSError(28, "No space left")))
    else:
        (tmp_path / "file").touch()
        where = {"file": str(tmp_path / "file"), "relative": "somewhere"}[kind]
        monkeypatch.setenv("XDG_CACHE_HOME", where)
    with caplog.at_level("INFO", "htfkernels"):
        assert choose(SPEC, "auto")[0] == choose(SPEC, "auto")[0] == "cuda"
    assert len(machine.checks) == 1
    assert kind == "relative" or "cannot be kept" in caplog.text
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "file"] == []


def test_the_default_folder_is_in_the_users_home(machine, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    choose(SPEC, "auto")
    assert len(list((tmp_path / ".cache" / "htfkernels" / "verified").glob("*.json"))) == 1


def test_a_link_in_place_of_the_file_is_replaced(machine, verifying, tmp_path):
    choose(SPEC, "auto")
    (path,) = verifying.iterdir()
    path.unlink()
    (tmp_path / "elsewhere").write_text("precious")
    path.symlink_to(tmp_path / "elsewhere")
    restart()
    choose(SPEC, "auto")
    assert not path.is_symlink() and (tmp_path / "elsewhere").read_text() == "precious"


def test_nothing_is_checked_where_all_is_trusted(machine, monkeypatch):
    machine.verdicts["cuda planned"] = WRONG
    monkeypatch.setenv("HTF_VERIFY", "0")
    assert choose(SPEC, "auto")[0] == "cuda"
    assert machine.checks == [] and hk.backends()["cuda"] is None


def test_an_exception_is_tried_again_in_the_next_process(machine, verifying):
    machine.verdicts["cuda planned"] = Verdict("it raises OutOfMemoryError: ", lasting=False)
    with pytest.warns(RuntimeWarning):
        choose(SPEC, "auto")
    choose(SPEC, "auto")
    assert machine.checks == ["cuda planned ieee", "triton gather ieee"]
    restart()
    del machine.verdicts["cuda planned"]
    assert choose(SPEC, "auto")[0] == "cuda"


def test_kernels_that_break_the_device_are_left_alone_by_the_next_process(machine):
    machine.verdicts["cuda planned"] = Verdict("it raises", lasting=False, lost=True)
    with pytest.raises(RuntimeError, match=r"cannot be used any more in this process; the next"):
        choose(SPEC, "auto")
    restart()
    with pytest.warns(RuntimeWarning, match="it raises"):
        assert choose(SPEC, "auto")[0] == "triton"
    assert machine.checks == ["cuda planned ieee", "triton gather ieee"]


@pytest.fixture
def capture(machine, monkeypatch):
    """A CUDA graph that is being captured, as long as the list has an entry."""
    machine.places = [Place("cuda:0", "Some GPU", "9.0", "580.1")]
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    return capturing


def test_nothing_is_checked_while_a_graph_is_captured(machine, capture):
    layout = testing.cases()[0].layout
    capture.append(True)
    with pytest.raises(
        verdicts.Unverified,
        match=r"cuda planned \(ieee\) have not been checked on Some GPU yet, .* take the step once",
    ):
        plan.make_plan("evaluate_at_planned", layout, F32, "cpu", "auto")
    by_name = plan.make_plan("evaluate_at_planned", layout, F32, "cpu", "cuda")
    assert (by_name.backend, by_name.why) == ("cuda", "asked for") and machine.checks == []
    capture.clear()
    assert plan.make_plan("evaluate_at_planned", layout, F32, "cpu", "auto").backend == "cuda"
    capture.append(True)
    restart()  # what is in the cache folder is known
    assert plan.make_plan("evaluate_at_planned", layout, F32, "cpu", "auto").backend == "cuda"
    assert machine.checks == ["cuda planned ieee"]


def test_threads_that_want_the_same_kernels_wait_for_one_check(machine):
    inside, go = threading.Barrier(4), threading.Event()
    real = machine.check

    def slowly(*args):
        go.wait(10)
        return real(*args)

    verify.check, before = slowly, verify.check
    found = []

    def run():
        inside.wait(10)
        found.append(choose(SPEC, "auto")[0])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    verify.check = before
    assert found == ["cuda"] * 3 and len(machine.checks) == 1


def _write_and_read(family, start, wrong):
    start.wait(10)
    for i in range(100):
        verdicts._write(family, "ieee", GPU, Verdict("x" * 5000, i))
        found = verdicts._read(family, "ieee", GPU)
        if found is None or len(found.failure or "") != 5000:
            wrong.value += 1


def test_two_processes_at_once(machine, verifying):
    choose(SPEC, "auto")
    family = OPERATIONS["evaluate_at_planned"].backends["cuda"].family
    context = multiprocessing.get_context("fork")
    start, wrong = context.Barrier(2), context.Value("i", 0)
    both = [context.Process(target=_write_and_read, args=(family, start, wrong)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0] and wrong.value == 0
    assert len(list(verifying.iterdir())) == 1
