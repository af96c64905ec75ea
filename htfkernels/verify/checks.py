"""What kernels are checked with: small cases against the reference formulas.

Cases, inputs and tolerances are those of :mod:`htfkernels.testing`; the formula runs in float64 on
the CPU. :mod:`htfkernels.verify.run` runs the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from htfkernels import testing
from htfkernels.ops.completion_step.cuda import LOSSES, completion_step_
from htfkernels.ops.group_rmsprop.cuda import group_rmsprop_
from htfkernels.runtime import compiled
from htfkernels.runtime.dispatch import use_backend
from htfkernels.runtime.operations import Family
from htfkernels.runtime.precision import PRECISIONS
from htfkernels.schedule.index_plan import IndexPlan
from htfkernels.spectra.matricizations import ACCURACY
from htfkernels.spectra.trace_ranks import run_trace_ranks
from htfkernels.tree import ModeTree
from htfkernels.tree.layout import Layout

__all__ = ["CASES", "CHECKS", "Checks", "Held", "Numbers", "held", "numbers_of"]

# The cases of a family run all of its kernels, at sizes that no tile divides. Triton compiles each
# kernel first, so its families have as few cases as that takes.
CASES: dict[str, tuple[str, ...]] = {
    "cuda tree": (
        "small_irregular", "shared_mixed", "balanced7_arity3", "chain4_linear", "random7_outputs",
    ),
    "cuda planned": ("small_irregular", "shared_mixed", "halves8", "chain4_linear", "chain2_sum"),
    "cuda index plan": ("small_irregular", "halves8", "random9"),
    "cuda spectra": ("small_irregular", "primes", "chain5_sum"),
    "cuda training step": ("balanced4", "halves8", "chain2_sum"),
    "cuda group rmsprop": ("primes",),
    "triton evaluate": ("order2_wide", "shared_mixed"),
    "triton gather": ("shared_mixed",),
    "triton slog": ("primes", "small_shared"),
    "cpp evaluate": ("small_irregular", "shared_mixed", "primes", "balanced16_rank16"),
    "cpp entries": ("small_irregular", "shared_mixed", "halves8", "chain2_sum"),
    "cpp spectra": ("small_irregular", "primes", "chain5_sum"),
    "cpp trace ranks": ("small_irregular", "primes"),
    "cpp group rmsprop": ("primes",),
}  # fmt: skip
# Index plans combine pairs in four ways, by how many pairs there may be.
_LONG_MODES = (40, 700, 50_000, 70_000)


class Held(NamedTuple):
    """A result held against the formula.

    Attributes:
        what: of it, such as ``"backward"``.
        error: relative to its condition scale.
        allowed: of that; 0 where results are equal or wrong.
    """

    what: str
    error: float
    allowed: float

    @property
    def part(self) -> float:
        """The part of what is allowed that the error takes; above 1 it is wrong."""
        if self.allowed == 0:
            return 0.0 if self.error == 0 else inf
        return self.error / self.allowed


class Numbers(NamedTuple):
    """What numbers a check is about, and where they are."""

    dtype: torch.dtype
    precision: str
    device: str

    def tolerance(self, direction: testing.Direction, case: testing.Case) -> float:
        return testing.tolerance(self.dtype, direction, self.precision, len(case.tree.nodes))


def numbers_of(math: str, device: str) -> Numbers:
    """The numbers of one of a family's ``maths``."""
    if math in PRECISIONS:
        return Numbers(torch.float32, math, device)
    return Numbers(getattr(torch, math), "ieee", device)


Checks = Iterator[tuple[str, Callable[[], Iterable[Held]]]]
"""Names of cases, each with a function that runs it."""


# -- operations of a tree -------------------------------------------------------------------------


def held(op: str, case: testing.Case, numbers: Numbers) -> Iterator[Held]:
    """An operation's values and gradients on the backend in force.

    Args:
        op: one that :func:`htfkernels.testing.operation` knows.
        case: what it is run on.
        numbers: dtype, precision and device.
    """
    dtype, _, device = numbers
    function, arguments = testing.operation(op, case, testing.make_inputs(case, dtype, device))
    formula = "evaluate" if op == "slog" else op
    reference, given = testing.operation(formula, case, testing.make_inputs(case, dtype))
    exact, scale = testing.exact(reference, given)
    cotangent = torch.linspace(0.5, 1.5, exact.numel(), dtype=torch.float64).view_as(exact)
    cotangent = cotangent.to(dtype)
    allowed = {d: numbers.tolerance(d, case) for d in ("forward", "backward")}
    if op == "spectra":
        # Relative to the largest singular value; of derivatives two digits less are left.
        scale = exact.amax().expand_as(exact)
        method = "qr" if dtype == torch.float64 else "gram"
        accuracy = max(ACCURACY[method], torch.finfo(dtype).eps)
        allowed = {"forward": accuracy, "backward": 100 * accuracy}
    yield Held("forward", testing.error(function(*arguments), exact, scale), allowed["forward"])

    def backward(what: str, count: int) -> Held:
        """By the first so many arguments."""

        def of_some(run: testing.Function, every: Sequence[Tensor]) -> testing.Function:
            return testing.gradients(lambda *some: run(*some, *every[count:]))

        expected, scale = testing.exact(
            of_some(reference, [a.double() for a in given]), (cotangent, *given[:count])
        )
        if op == "spectra":
            scale = [e.abs().amax().expand_as(e) for e in expected]
        found = of_some(function, arguments)(cotangent.to(device), *arguments[:count])
        return Held(what, testing.error(found, expected, scale), allowed["backward"])

    yield backward("backward", len(arguments))
    weights = len(case.layout.groups)
    if len(arguments) > weights:  # kernels that have vectors' gradients to compute are others
        yield backward("backward to the weights", weights)


def _cases(family: Family) -> list[testing.Case]:
    every = {case.name: case for case in (*testing.cases(), *testing.small_cases())}
    return [every[name] for name in CASES[str(family)]]


def _operations(family: Family, numbers: Numbers) -> Checks:
    if "slog" in family.ops and torch.compiler.is_compiling():
        raise RuntimeError("torch.compile traces in another thread, which takes the reference")
    for case in _cases(family):
        for op in family.ops:
            if case.fits(op):
                yield f"{op} on {case}", partial(held, op, case, numbers)


def _spectra(family: Family, numbers: Numbers) -> Checks:
    """By QR, as weights in float64 are, and by Gram matrices, as those in float32."""
    for case in _cases(family):
        for dtype in (torch.float64, torch.float32):
            name = str(dtype).removeprefix("torch.")
            given = numbers._replace(dtype=dtype)
            yield f"spectra on {case} in {name}", partial(held, "spectra", case, given)


def _trace_ranks(family: Family, numbers: Numbers) -> Checks:
    for case in _cases(family):
        for stable in (False, True):
            name = "stable ranks" if stable else "Renyi-2 ranks"
            yield f"{name} on {case}", partial(_ranks, case, numbers, stable)


def _ranks(case: testing.Case, numbers: Numbers, stable: bool) -> Iterator[Held]:
    weights = testing.make_inputs(case, numbers.dtype, numbers.device).weights

    def ranks(*weights: Tensor) -> Tensor:
        return torch.stack([*run_trace_ranks(case.layout, weights, None, stable).values()])

    exact, _ = testing.exact(ranks, weights)
    cotangent = torch.linspace(1, 2, len(exact), dtype=numbers.dtype)
    derivatives, _ = testing.exact(testing.gradients(ranks), (cotangent, *weights))
    allowed = numbers.tolerance("backward", case)
    yield Held("forward", testing.error(ranks(*weights), exact, exact), allowed)
    found = testing.gradients(ranks)(cotangent, *weights)
    # They cancel, down to 0 where a rank is 1: relative to rank over weight.
    scale = [exact.sum() / w.double().abs().mean().expand_as(w) for w in weights]
    yield Held("backward", testing.error(found, derivatives, scale), allowed)


# -- index plans ----------------------------------------------------------------------------------


def _index_plans(family: Family, numbers: Numbers) -> Checks:
    cases = _cases(family)
    for dim in _LONG_MODES:
        layout = Layout.make(ModeTree.balanced(4), [dim, dim, 3, dim], 1)
        cases.append(testing.Case(f"modes_of_{dim}", layout, 300))
    for case in cases:
        yield f"the index plan of {case}", partial(_index_plan, case, numbers.device)


def _index_plan(case: testing.Case, device: str) -> Iterator[Held]:
    """Number by number that of the CPU."""
    some = testing.make_inputs(case, torch.float32).indices
    indices = some.repeat(3, 1)  # so that nodes have fewer rows than there are samples
    made = IndexPlan.make(case.layout, indices.to(device))
    with use_backend("reference"):
        expected = IndexPlan.make(case.layout, indices)
    for name in ("table", "lists"):
        mine, theirs = getattr(made, name).cpu(), getattr(expected, name)
        wrong = inf if mine.shape != theirs.shape else float((mine != theirs).sum())
        yield Held(name, wrong, 0.0)


# -- training -------------------------------------------------------------------------------------

_AVERAGE, _COUNT, _ALPHA, _EPS = 2.5, 3, 0.9, 1e-3


class _Step:
    """Numbers of an optimizer's step, which differ between parameters, and moves as large as the
    parameters are."""

    def __init__(self, numbers: Numbers, params: Sequence[Tensor]) -> None:
        wide = torch.promote_types(numbers.dtype, torch.float32)
        self.average = torch.tensor(_AVERAGE, dtype=wide, device=numbers.device)
        self.count = torch.tensor(float(_COUNT), dtype=torch.float64, device=numbers.device)
        self.lr = [3.0 / (i + 1) for i in range(len(params))]
        self.decay = [0.1 * (i % 2) for i in range(len(params))]

    def held(
        self,
        params: Sequence[Tensor],
        average: Tensor,
        before: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Tensor],
        allowed: float,
    ) -> Iterator[Held]:
        """What it came to, against the formula; ``scales`` are the gradients'."""
        settings = (self.lr, self.decay, _ALPHA, _EPS)
        expected, mean = testing.group_rmsprop(before, grads, _AVERAGE, _COUNT + 1, *settings)
        denominator = sqrt(mean / (1 - _ALPHA ** (_COUNT + 1))) + _EPS
        sizes = [size / denominator for size in self.lr]
        scale = [
            p.double().abs() * (1 + size * w) + size * s
            for p, s, size, w in zip(before, scales, sizes, self.decay, strict=True)
        ]
        yield Held("the weights", testing.error(params, expected, scale), allowed)
        exact = torch.tensor(mean, dtype=torch.float64)
        yield Held("the average", testing.error(average, exact, exact), 2 * allowed)


def _optimizer_steps(family: Family, numbers: Numbers) -> Checks:
    for case in _cases(family):
        yield f"a step on {case}", partial(_optimizer_step, case, numbers, family.backend)


def _optimizer_step(case: testing.Case, numbers: Numbers, backend: str) -> Iterator[Held]:
    before, grads = (testing.make_inputs(case, numbers.dtype, seed=seed).weights for seed in (0, 1))
    params, given = ([t.to(numbers.device, copy=True) for t in some] for some in (before, grads))
    step = _Step(numbers, params)
    settings = (step.lr, step.decay, _ALPHA, _EPS)
    average = step.average
    if backend == "cuda":
        group_rmsprop_(params, given, average, step.count, *settings)
    else:
        arguments = (params, given, average, *settings, _COUNT + 1)
        average = compiled.call("group_rmsprop_", *arguments)
    scales = [g.double().abs() for g in grads]
    yield from step.held(params, average, before, grads, scales, numbers.tolerance("forward", case))


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(LOSSES, (F.mse_loss, F.l1_loss, F.huber_loss), strict=True)
)


def _training_steps(family: Family, numbers: Numbers) -> Checks:
    for case in _cases(family):
        for loss in LOSSES:
            yield f"a step by {loss} on {case}", partial(_training_step, case, numbers, loss)


def _training_step(case: testing.Case, numbers: Numbers, loss: str) -> Iterator[Held]:
    dtype, precision, device = numbers
    inputs = testing.make_inputs(case, dtype)
    predict, before = testing.operation("evaluate_at_planned", case, inputs)
    # Far below the entries: differences do not cancel.
    targets = torch.linspace(-3, -2, case.batch, dtype=torch.float64).to(dtype)

    def value(*weights: Tensor) -> Tensor:
        return _LOSSES[loss](predict(*weights), targets.double())

    one = torch.ones((), dtype=torch.float64)
    exact, scale = testing.exact(value, before)
    grads, scales = testing.exact(testing.gradients(value), (one, *before))
    with use_backend("reference"):
        plan = IndexPlan.make(case.layout, inputs.indices).to(device)
    params = [w.to(device, copy=True) for w in before]
    step, arrived = _Step(numbers, params), torch.zeros(1, dtype=torch.int32, device=device)
    found = completion_step_(
        case.layout, plan, params, [True] * len(params), targets.to(device), loss, step.average,
        step.count, arrived, step.lr, step.decay, _ALPHA, _EPS, precision=precision,
    )  # fmt: skip
    # The prediction's error, the gradient's, and that of its norm.
    allowed = numbers.tolerance("forward", case) + 2 * numbers.tolerance("backward", case)
    yield Held("the loss", testing.error(found, exact, scale), allowed)
    yield from step.held(params, step.average, before, grads, scales, allowed)
    yield Held("the count", abs(float(step.count) - _COUNT - 1), 0.0)


CHECKS: dict[str, Callable[[Family, Numbers], Checks]] = {
    "cuda tree": _operations,
    "cuda planned": _operations,
    "cuda index plan": _index_plans,
    "cuda spectra": _spectra,
    "cuda training step": _training_steps,
    "cuda group rmsprop": _optimizer_steps,
    "triton evaluate": _operations,
    "triton gather": _operations,
    "triton slog": _operations,
    "cpp evaluate": _operations,
    "cpp entries": _operations,
    "cpp spectra": _spectra,
    "cpp trace ranks": _trace_ranks,
    "cpp group rmsprop": _optimizer_steps,
}
