"""What all tests share: the backends and devices they run on, and reproducible hypothesis."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from htfkernels import testing
from htfkernels.runtime import cuda_module, dispatch, plan, verdicts

settings.register_profile(
    "reproducible", derandomize=True, deadline=None, database=None, max_examples=30
)
settings.load_profile("reproducible")

# The C++ kernels' memory comes full of NaN: nothing may be read before it is written.
os.environ["HTF_POISON"] = "1"

# Kernels are what the tests look at: no verdict on them is wanted beforehand, and none is left in
# the user's cache folder. The tests of verdicts ask for theirs.
os.environ["HTF_VERIFY"] = "0"

# On tensors as small as these a second thread costs more than it brings, and far more where the
# cores are shared; the tests of threads ask for theirs.
torch.set_num_threads(1)

# Behind an `&` a shell has Control-C ignored, and tests that wait for what they interrupt would
# wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone runs on all cores; named files run in this process. ``-n`` says otherwise.

    A worker takes as long to start as many a file takes to run.
    """
    if hasattr(config, "workerinput"):  # of pytest-xdist: this is a worker
        return
    option = config.option
    everything = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if everything and getattr(option, "numprocesses", 0) is None and not option.collectonly:
        option.numprocesses = "auto"
        option.maxprocesses = option.maxprocesses or 8  # each holds a PyTorch of its own
        option.dist = "worksteal" if option.dist == "no" else option.dist


def pytest_collection_finish() -> None:
    """Collecting garbage no longer walks over all that was imported and collected so far.

    `htf bench` collects before each timing, and a test that loses references of its own may too.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """Random weights and inputs do not depend on which tests ran before."""
    # torch.manual_seed would note the whole stack for each kind of device that is not there.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def verifying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As a machine where nothing is known of any kernels, and ``auto`` takes those of GPUs that run
    on the CPU in this process; the cache folder."""
    monkeypatch.delenv("HTF_VERIFY")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_ON_CPU", {})
    verdicts.forget()
    plan.make_plan.cache_clear()
    yield tmp_path / "htfkernels" / "verified"
    verdicts.forget()
    plan.make_plan.cache_clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Target:
    """A backend on a device, in force during the test that asks for it."""

    backend: str
    device: str

    def require(self, op: str = "evaluate", dtype: torch.dtype = torch.float64) -> None:
        """Skips the test where the backend cannot run the operation, with the backend's reason."""
        reason = dispatch.why_not(self.backend, dispatch.Spec(op, dtype, self.device))
        if reason is not None:
            pytest.skip(f"{self.backend}: {reason}")


def _target(backend: str, device: str) -> object:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    name = backend if device == "cpu" else f"{backend}-{device}"
    return pytest.param(Target(backend, device), marks=marks, id=name)


CPU = [_target("reference", "cpu"), _target("cpp", "cpu")]
INTERPRETED = [_target("triton", "cpu")] if dispatch.interpreted() else []
EMULATED = [_target("cuda", "cpu")] if cuda_module.emulated() else []
GPU = [_target(b, "cuda") for b in ("reference", "cuda", "triton") if torch.cuda.is_available()]


def _enter(target: Target) -> Iterator[Target]:
    with dispatch.use_backend(target.backend):
        yield target


@pytest.fixture(params=[*CPU, *INTERPRETED, *EMULATED, *GPU])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend on every device."""
    yield from _enter(request.param)


@pytest.fixture(params=CPU)
def cpu_target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend that runs on the CPU."""
    yield from _enter(request.param)


def _names(argument: str | tuple[str, ...]) -> list[str]:
    return [n.strip() for n in argument.split(",")] if isinstance(argument, str) else list(argument)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``op`` with ``case``: every operation on every case it fits; ``small_case``: small ones."""
    explicit = {
        n for m in metafunc.definition.iter_markers("parametrize") for n in _names(m.args[0])
    }
    names = {"op", "case", "small_case"} & set(metafunc.fixturenames)
    if names & explicit:
        return
    if names == {"op"}:
        metafunc.parametrize("op", testing.OPS)
    elif names == {"op", "case"}:
        calls = [(op, c) for op in testing.OPS for c in testing.cases() if c.fits(op)]
        metafunc.parametrize(("op", "case"), calls, ids=[f"{op}-{c}" for op, c in calls])
    elif names == {"op", "small_case"}:
        calls = [(op, c) for op in testing.OPS for c in testing.small_cases()]
        metafunc.parametrize(("op", "small_case"), calls, ids=[f"{op}-{c}" for op, c in calls])
    elif names == {"case"}:
        metafunc.parametrize("case", testing.cases(), ids=str)
    elif names == {"small_case"}:
        metafunc.parametrize("small_case", testing.small_cases(), ids=str)
