"""Control-C and other signals in long calls of the compiled operators."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import htfkernels as hk
from htfkernels.runtime.compiled import call

pytestmark = pytest.mark.skipif(
    hk.backends()["cpp"] is not None, reason=f"cpp: {hk.backends()['cpp']}"
)

DELAY = 0.15


def zeros(order: int, dim: int, rank: int, dtype: torch.dtype = torch.float32) -> hk.HTF:
    """A model whose weights cost nothing to draw."""
    model = hk.HTF(hk.ModeTree.balanced(order), dim, rank, dtype=dtype, device="meta")
    model = model.to_empty(device="cpu").requires_grad_(False)
    for weight in model.weights:
        weight.zero_()
    return model


@contextmanager
def arriving(number: signal.Signals, delay: float = DELAY) -> Iterator[list[float]]:
    """Sends this process a signal after a delay; the list gets the time at which it was sent, in
    seconds of this process: others may have the cores meanwhile."""
    sent: list[float] = []

    def send() -> None:
        time.sleep(delay)
        sent.append(time.process_time())
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield sent
    finally:
        sender.join()


@contextmanager
def handling(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def interrupt(run: Callable[[], Any]) -> None:
    """Interrupts a call that would take more than a second."""
    finished = False
    with arriving(signal.SIGINT) as sent, pytest.raises(KeyboardInterrupt):
        run()
        finished = True
        time.sleep(DELAY)  # the signal of a test whose call is too short to be interrupted
    assert not finished
    assert time.process_time() - sent[0] < 0.5


def evaluate() -> Callable[[], Any]:
    model = zeros(16, 16, 256)
    x = torch.zeros(1, 16, 16).expand(250_000, 16, 16)
    return lambda: model(x)


def evaluate_at() -> Callable[[], Any]:
    model = zeros(16, 16, 256)
    indices = torch.zeros(1, 16, dtype=torch.int64).expand(250_000, 16)
    return lambda: call("evaluate_at", list(model.weights), indices, model.layout.program, 1)


def evaluate_backward() -> Callable[[], Any]:
    model = zeros(16, 16, 256)
    y = model(torch.zeros(30_000, 16, 16, requires_grad=True))
    return lambda: y.sum().backward(retain_graph=True)


def evaluate_at_planned() -> Callable[[], Any]:
    model = zeros(8, 8, 2500)
    half = torch.cartesian_prod(*[torch.arange(8)] * 4)
    both = torch.cat([torch.cat([half, half.roll(shift, 0)], 1) for shift in range(3)])
    plan = model.index_plan(both)
    return lambda: model.at(plan)


def full_tensor() -> Callable[[], Any]:
    model = zeros(8, 8, 2000)
    return model.full_tensor


def full_tensor_backward() -> Callable[[], Any]:
    model = zeros(8, 8, 1200)
    grad = torch.zeros(1).expand(8**8)
    needs = [1] * len(model.weights)
    return lambda: call(
        "full_tensor_backward", grad, list(model.weights), model.layout.program, needs
    )


def spectra(method: str, rank: int) -> Callable[[], Any]:
    model = hk.HTF(hk.ModeTree.balanced(8), 16, rank, dtype=torch.float64).requires_grad_(False)
    return lambda: model.matricization_spectra(method=method)


def trace_ranks() -> Callable[[], Any]:
    model = hk.HTF(hk.ModeTree.balanced(16), 16, 512, dtype=torch.float64)
    return lambda: sum(model.renyi2_ranks().values()).backward()


def small_svd() -> Callable[[], Any]:
    matrices = torch.randn(8, 350, 350, dtype=torch.float64)
    return lambda: call("small_svd", matrices)


def index_plan() -> Callable[[], Any]:
    plan = pytest.importorskip("htfkernels._plan")
    ids = numpy.random.default_rng(0).integers(2**31 - 1, size=10**7, dtype=numpy.int32)
    return lambda: plan.distinct_pairs(ids, 2**31 - 1, ids, 2**31 - 1, 10**7)


LONG = {
    "evaluate": evaluate,
    "evaluate_at": evaluate_at,
    "evaluate_backward": evaluate_backward,
    "evaluate_at_planned": evaluate_at_planned,
    "full_tensor": full_tensor,
    "full_tensor_backward": full_tensor_backward,
    "spectra-qr": lambda: spectra("qr", 512),
    "spectra-gram": lambda: spectra("gram", 1000),
    "trace_ranks": trace_ranks,
    "small_svd": small_svd,
    "index_plan": index_plan,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_call_is_interrupted(name: str) -> None:
    interrupt(LONG[name]())


@pytest.mark.parametrize("count", [1, 2])
def test_the_call_after_it_is_right(count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    model = hk.HTF(hk.ModeTree.balanced(16), 16, 256)
    x = torch.randn(1, 16, 16).expand(250_000, 16, 16)
    expected = model(x[:500])
    interrupt(lambda: model(x))
    begun = time.process_time()
    time.sleep(0.05)
    assert time.process_time() - begun < 0.04  # no thread goes on
    assert torch.equal(model(x[:500]), expected)


def test_an_interrupted_call_gives_its_memory_back() -> None:
    run, resident = evaluate_backward(), []
    for _ in range(2):
        interrupt(run)
        gc.collect()
        hk.release_memory()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
    assert resident[1] - resident[0] < 2**24  # the gradients of the inputs alone have more


def test_an_interrupted_compiled_call() -> None:
    model = zeros(16, 16, 256)
    x = torch.zeros(1, 16, 16).expand(250_000, 16, 16)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (500, 600):  # from the second on, for any number of rows
        run(x[:rows])
    interrupt(lambda: run(x))


class Ended(Exception):
    """What a user's own handler raises."""


def test_the_caller_gets_the_exception_of_the_handler() -> None:
    cause, error = ValueError(), Ended()

    def handler(*_: object) -> None:
        raise error from cause

    with handling(signal.SIGUSR1, handler), arriving(signal.SIGUSR1), pytest.raises(Ended) as got:
        evaluate_backward()()
    assert got.value is error and error.__cause__ is cause and error.__context__ is None


def test_a_handler_that_raises_nothing(threads: Callable[[int], None]) -> None:
    threads(2)
    model = hk.HTF(hk.ModeTree.balanced(16), 16, 256).requires_grad_(False)
    x = torch.randn(1, 16, 16).expand(150_000, 16, 16)
    expected, seen = model(x[:500]), []

    def handler(*_: object) -> None:
        seen.append((time.process_time(), model(x[:500])))

    with handling(signal.SIGUSR1, handler), arriving(signal.SIGUSR1, 0.05):
        begin = time.process_time()
        result = model(x)
        end = time.process_time()
    assert (result == expected[0]).all()
    ((at, inner),) = seen
    assert at - begin < 0.8 * (end - begin) and torch.equal(inner, expected)


def test_a_step_of_group_rmsprop_is_whole() -> None:
    """It writes into the parameters: half of a step could be neither repeated nor undone."""
    p, g = torch.zeros(2**24, dtype=torch.float64), torch.ones(2**20, dtype=torch.float64)
    params, average = list(p.split(len(g))), torch.zeros((), dtype=torch.float64)
    count = len(params)
    step = [params, [g] * count, average, [0.1] * count, [0.1] * count, 0.9, 1e-8, 1]
    begun = time.perf_counter()
    call("group_rmsprop_", *step)
    seconds = time.perf_counter() - begun
    model, x = zeros(4, 8, 64), torch.zeros(1000, 4, 8)

    def handler(*_: object) -> None:
        raise Ended

    with handling(signal.SIGALRM, handler):
        for part in (0.5, 0.65, 0.8):
            # A call looks for signals every tenth of a second: now, and in this part of the step.
            time.sleep(0.12)
            model(x)
            time.sleep(max(0, 0.1 - part * seconds))
            with pytest.raises(Ended):
                signal.setitimer(signal.ITIMER_REAL, part * seconds / 2)
                while True:
                    call("group_rmsprop_", *step)
            low, high = p.aminmax()
            assert low == high
