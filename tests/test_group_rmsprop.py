"""The compiled step of GroupRMSprop: against the formula in float64, opcheck, bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import htfkernels as hk
from htfkernels import testing

pytestmark = pytest.mark.skipif(
    hk.backends()["cpp"] is not None, reason=f"cpp: {hk.backends()['cpp']}"
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Empty, smaller than a vector, odd, of several blocks, and large enough for a second thread.
SHAPES = [(0,), (), (3, 5), (17,), (2, 4096), (4, 33, 1001)]


def step_(*arguments: Any) -> Tensor:
    return torch.ops.htfkernels.group_rmsprop_(*arguments)


def arguments_of(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    def draw() -> list[Tensor]:
        return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]

    wide = torch.promote_types(dtype, torch.float32)
    return {
        "params": draw(),
        "grads": draw(),
        "average": torch.tensor(2.5, dtype=wide),
        "lr": [0.3 / (i + 1) for i in range(len(shapes))],
        "weight_decay": [0.1 * (i % 2) for i in range(len(shapes))],
        "alpha": 0.9,
        "eps": 1e-3,
        "step": 4,
    }


def formula(a: dict[str, Any]) -> tuple[list[Tensor], float]:
    settings = {k: v for k, v in a.items() if k != "average"}
    return testing.group_rmsprop(average=float(a["average"]), **settings)


def copied(a: dict[str, Any]) -> dict[str, Any]:
    return {**a, "params": [p.clone() for p in a["params"]]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_formula(dtype: torch.dtype) -> None:
    arguments = arguments_of(dtype)
    expected, average = formula(arguments)
    before = [g.clone() for g in arguments["grads"]]
    new = step_(*arguments.values())
    eps = torch.finfo(new.dtype).eps
    assert new.dtype == arguments["average"].dtype and new.shape == ()
    assert float(new) == pytest.approx(average, rel=4 * eps)
    assert float(arguments["average"]) == 2.5
    for p, e in zip(arguments["params"], expected, strict=True):
        # bfloat16 is rounded once: to the nearest, but where float32's error crosses a tie.
        bound = torch.finfo(dtype).eps * (0.51 if dtype == torch.bfloat16 else 2)
        assert bool(((p.double() - e).abs() <= bound * e.abs() + 4 * eps).all())
    assert all(torch.equal(g, b) for g, b in zip(arguments["grads"], before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    arguments = arguments_of(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            again = copied(arguments)
            results.append([step_(*again.values()), *again["params"]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_does_not_matter(dtype: torch.dtype) -> None:
    arguments = arguments_of(dtype)
    expected = copied(arguments)
    step_(*expected.values())
    memory = [torch.zeros(p.numel() + 1, dtype=dtype) for p in arguments["params"]]
    shifted = [m[1:].view(p.shape) for m, p in zip(memory, arguments["params"], strict=True)]
    for s, p in zip(shifted, arguments["params"], strict=True):
        s.copy_(p)
    step_(*{**arguments, "params": shifted}.values())
    assert all(torch.equal(s, p) for s, p in zip(shifted, expected["params"], strict=True))
    assert all(m[0] == 0 for m in memory)


def test_parameters_that_share_memory_change_one_after_the_other() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        memory = torch.randn(300_000)
        params = [memory[:200_000], memory[100_000:]]
        arguments = arguments_of(torch.float32, [(200_000,), (200_000,)])
        arguments |= {"params": params, "weight_decay": [0.0, 0.0]}
        expected = memory.clone()
        squares = sum(float(g.double().square().sum()) for g in arguments["grads"])
        corrected = (0.9 * 2.5 + 0.1 * squares) / (1 - 0.9**4)
        for at, g, lr in zip((0, 100_000), arguments["grads"], arguments["lr"], strict=True):
            expected[at : at + 200_000] -= lr / (math.sqrt(corrected) + 1e-3) * g
        step_(*arguments.values())
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(memory, expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_zero_and_of_the_smallest_numbers() -> None:
    arguments = arguments_of(torch.float32, [(40,), (5,)])
    arguments |= {"average": torch.zeros(()), "weight_decay": [0.0, 0.0]}
    arguments["grads"] = [torch.zeros(40), torch.full((5,), 1e-42)]
    before = arguments["params"][0].clone()
    assert step_(*arguments.values()).item() == 0
    assert torch.equal(arguments["params"][0], before)
    assert all(bool(p.isfinite().all()) for p in arguments["params"])


def test_a_gradient_that_is_not_finite_shows() -> None:
    for bad in (math.nan, math.inf):
        arguments = arguments_of(torch.float32, [(40,), (5,)])
        arguments["grads"][0][7] = bad
        assert not step_(*arguments.values()).isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    arguments = arguments_of(dtype, SHAPES[2:5])
    op = torch.ops.htfkernels.group_rmsprop_.default
    torch.library.opcheck(op, tuple(arguments.values()))


def first(values: list[Tensor], change: Any) -> list[Tensor]:
    return [change(values[0]), *values[1:]]


# What is spoiled, how, and what the message has to name.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no params": (dict.fromkeys(("params", "grads", "lr", "weight_decay"), lambda v: []), "params"),
    "a gradient too few": ({"grads": lambda v: v[:-1]}, "grads"),
    "a rate too many": ({"lr": lambda v: [*v, 1.0]}, "lr"),
    "a decay too few": ({"weight_decay": lambda v: v[:-1]}, "weight_decay"),
    "half params": ({"params": lambda v: [p.half() for p in v]}, "params .* Half"),
    "params of two dtypes": ({"params": lambda v: [v[0], v[1].double()]}, r"params\[1\]"),
    "a gradient of another dtype": (
        {"grads": lambda v: first(v, torch.Tensor.double)},
        r"grads\[0\]",
    ),
    "a gradient of another shape": (
        {"grads": lambda v: first(v, lambda g: g.t().contiguous())},
        r"grads\[0\]",
    ),
    "a parameter with strides": (
        {"params": lambda v: first(v, torch.Tensor.t)},
        r"params\[0\]",
    ),
    "an average of another dtype": ({"average": torch.Tensor.double}, "average"),
    "an average of one dimension": ({"average": lambda v: v[None]}, "average"),
    "an alpha of one": ({"alpha": lambda v: 1.0}, "alpha"),
    "step zero": ({"step": lambda v: 0}, "step"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what: str) -> None:
    spoil, words = BAD[what]
    arguments = arguments_of(torch.float32, [(3, 4), (5,)])
    before = [p.clone() for p in arguments["params"]]
    spoiled = arguments | {name: change(arguments[name]) for name, change in spoil.items()}
    with pytest.raises(RuntimeError, match=f"^group_rmsprop_: .*{words}"):
        step_(*spoiled.values())
    assert all(torch.equal(p, b) for p, b in zip(arguments["params"], before, strict=True))
