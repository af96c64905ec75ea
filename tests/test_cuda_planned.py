"""Planned evaluation in CUDA C++: values, gradients, launches, bits."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.cuda import planned
from htfkernels.ops.evaluate_at import cuda as backend
from htfkernels.ops.evaluate_at.planned_reference import evaluate_at_planned
from htfkernels.runtime import cuda_module as module
from htfkernels.runtime import operations
from htfkernels.schedule.index_plan import BILINEAR, FRAMED_ROOT, NO_OPERAND, WALK

pytest.importorskip("htfkernels._plan")

ON = module.device_type()
REASON = module.why_not(ON)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

CASES = {case.name: case for case in testing.cases()}
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MODES = [(F32, "ieee"), (F32, "tf32"), (F32, "tf32x3"), (BF16, "ieee"), (F64, "ieee")]
NAMES = ["ieee", "tf32", "tf32x3", "bf16", "f64"]


def index_sets(layout):
    few = torch.stack([torch.randint(d, (6,)) for d in layout.mode_dims], dim=1)
    return {
        "random": torch.stack([torch.randint(d, (130,)) for d in layout.mode_dims], dim=1),
        "duplicates": few[torch.randint(6, (150,))],
        "one": few[:1],
        "none": few[:0],
    }


def grid(dims, keep):
    """So many of all index tuples."""
    size = torch.Size(dims).numel()
    chosen = torch.randperm(size)[:keep]
    return torch.stack(torch.unravel_index(chosen, tuple(dims)), dim=1)


def by_reference(plan):
    def run(*weights):
        out = evaluate_at_planned(plan.layout, weights, plan)
        return out.squeeze(-1) if plan.layout.out_features == 1 else out

    return run


def by_kernels(plan, precision):
    def run(*weights):
        return hk.evaluate_at(plan.layout.tree, weights, plan, layout=plan.layout)

    def chosen(*weights):
        with hk.use_backend("cuda"), hk.use_precision(precision):
            return run(*weights)

    return chosen


def check(layout, indices, dtype, precision="ieee"):
    plan = hk.IndexPlan.make(layout, indices.to(ON))
    case = testing.Case("", layout, len(indices))
    weights = testing.make_inputs(case, dtype, ON).weights
    exact, kernels = by_reference(plan), by_kernels(plan, precision)
    value = kernels(*weights)
    assert value.dtype == dtype
    arguments = (torch.rand_like(value), *weights)
    grads = testing.gradients(kernels)(*arguments)
    for found, function, given, direction in (
        (value, exact, weights, "forward"),
        (grads, testing.gradients(exact), arguments, "backward"),
    ):
        expected, scale = testing.exact(function, given)
        allowed = testing.tolerance(dtype, direction, precision, len(layout.tree.nodes))
        testing.assert_matches(found, expected, dtype, direction, scale, allowed)
    return plan


@pytest.mark.parametrize("case", testing.cases() + testing.small_cases(), ids=str)
def test_values_and_gradients(case):
    for indices in index_sets(case.layout).values():
        check(case.layout, indices, F64)


def test_every_form_is_tested():
    forms, single, part = set(), False, False
    for case in testing.cases():
        for indices in index_sets(case.layout).values():
            plan = hk.IndexPlan.make(case.layout, indices)
            forms.add(plan.form)
            single |= any(row.right == NO_OPERAND for row in plan.framed)
            part |= any(row.step < 0 for row in plan.framed)
    assert forms == {WALK, BILINEAR, FRAMED_ROOT}
    assert single and part


@pytest.mark.parametrize("mode", MODES[:4], ids=NAMES[:4])
@pytest.mark.parametrize(
    "name", ["balanced8_rank64", "chain4_linear", "shared8", "shared_mixed", "random9", "primes"]
)
def test_each_precision(name, mode):
    layout = CASES[name].layout
    sets = index_sets(layout)
    for kind in ("random", "duplicates"):
        check(layout, sets[kind], *mode)


def paper(rank=40, dim=4):
    """The paper's completion, smaller: half of the entries of an order-4 tensor."""
    layout = hk.Layout.make(hk.ModeTree.balanced(4), dim, rank)
    return layout, grid([dim] * 4, dim**4 // 2)


@pytest.mark.parametrize("mode", MODES, ids=NAMES)
def test_the_papers_setting(mode):
    assert check(*paper(), *mode).form == BILINEAR


def test_the_papers_setting_takes_five_launches():
    layout, indices = paper()
    plan = hk.IndexPlan.make(layout, indices.to(ON))
    weights = testing.make_inputs(testing.Case("", layout, 1), F32, ON).weights
    counted = import_module("htfkernels._C_emulated" if module.emulated() else "htfkernels._C_cuda")
    fixed = (layout.program, plan.table, plan.lists)
    before = counted.launches()
    out, kept = backend.evaluate_at_planned_keeping(weights, *fixed, len(plan), 1, precision="ieee")
    between = counted.launches()
    backend.evaluate_at_planned_backward(
        out, weights, kept, *fixed, [True] * len(weights), precision="ieee"
    )
    assert (between - before, counted.launches() - between) == (2, 3)


LENGTHS = {planned.FORWARD: 21, planned.PRODUCTS: 26, planned.SEGMENTS: 32}  # of records


def launches(plan, dtype, precision):
    """Kind, configuration and jobs of each launch of a forward and backward pass."""
    needs = [True] * len(plan.layout.groups)
    like = torch.empty(0, dtype=dtype, device=ON)
    fixed = (plan.layout.program, plan.table, plan.lists)
    numbers = planned.schedule(*fixed, like, precision, needs).table.tolist()
    at = planned.HEADER
    for _ in range(numbers[8] + numbers[9]):
        kind, config, jobs = numbers[at : at + 3]
        length = LENGTHS[kind]
        at += 3
        yield kind, config, [numbers[at + j * length : at + (j + 1) * length] for j in range(jobs)]
        at += jobs * length


def test_split_sums_are_tested():
    layout, batch = SHAPES["split sums"]
    indices = torch.stack([torch.randint(d, (batch,)) for d in layout.mode_dims], dim=1)
    made = list(launches(hk.IndexPlan.make(layout, indices.to(ON)), F32, "ieee"))
    sums = [job for kind, _, jobs in made if kind == planned.SEGMENTS for job in jobs]
    assert any(job[8] > 1 and job[0] == planned.COLUMN for job in sums)  # of a frame
    assert any(job[0] == planned.PARTS and not job[10] for job in sums)  # its parts' sum


SHAPES = {
    "two indices a mode": (hk.Layout.make(hk.ModeTree.balanced(4), 2, [20, 9]), 700),
    # A leaf's and a frame's rows are read so often that their sums are split.
    "split sums": (hk.Layout.make(hk.ModeTree.balanced(3), [1, 2, 900], [100, 90]), 2600),
    "walked": (hk.Layout.make(hk.ModeTree.balanced(4), [40, 50, 3, 60], [5, 12]), 1100),
    "walked, outputs": (hk.Layout.make(hk.ModeTree.balanced(3), [50, 40, 60], [24, 17], 3), 300),
    "nine operands": (hk.Layout.make(hk.ModeTree.flat(9), 3, 20, 2), 90),
    "nine operands, sum": (hk.Layout.make(hk.ModeTree.flat(9), 3, 20, root="sum"), 90),
    "many weights": (hk.Layout.make(hk.ModeTree.flat(30), list(range(1, 31)), 4), 40),
    "wide": (hk.Layout.make(hk.ModeTree.balanced(4), 3, [300, 260]), 60),
}


@pytest.mark.parametrize("mode", [MODES[0], MODES[4]], ids=[NAMES[0], NAMES[4]])
@pytest.mark.parametrize("name", list(SHAPES))
def test_other_shapes(name, mode):
    layout, batch = SHAPES[name]
    indices = torch.stack([torch.randint(d, (batch,)) for d in layout.mode_dims], dim=1)
    check(layout, indices, *mode)


@pytest.fixture
def few_processors(monkeypatch):
    """Tiles as for many rows, where there are few."""
    monkeypatch.setattr(planned, "WANTED_BLOCKS", 2)


@pytest.mark.parametrize("mode", MODES, ids=NAMES)
def test_larger_tiles(few_processors, mode):
    configs = set()
    for layout, indices in (
        (hk.Layout.make(hk.ModeTree.balanced(2), [7, 11], 66, 70), grid([7, 11], 77).repeat(2, 1)),
        (
            hk.Layout.make(hk.ModeTree.balanced(2), [9, 16], 130, 10),
            grid([9, 16], 144).repeat(2, 1),
        ),
        (
            hk.Layout.make(hk.ModeTree.balanced(4), [14, 14, 2, 3], [200, 130]),
            grid([14, 14, 2, 3], 700),
        ),
    ):
        plan = check(layout, indices, *mode)
        configs |= {(kind, config) for kind, config, _ in launches(plan, *mode)}
    larger = {planned.SQUARE, planned.LARGE}
    for kind in (planned.FORWARD, planned.PRODUCTS):
        assert larger <= {config for k, config in configs if k == kind}


def everything(plan, weights, precision):
    fixed = (plan.layout.program, plan.table, plan.lists)
    outputs = plan.layout.out_features
    out, kept = backend.evaluate_at_planned_keeping(
        weights, *fixed, len(plan), outputs, precision=precision
    )
    needs = [True] * len(weights)
    grads = backend.evaluate_at_planned_backward(
        out, weights, kept, *fixed, needs, precision=precision
    )
    return [out, *grads]


@pytest.mark.skipif(not module.emulated(), reason="there are two orders only in an emulation")
@pytest.mark.parametrize("mode", MODES, ids=NAMES)
@pytest.mark.parametrize("blocks", [264, 2])
def test_the_order_of_threads_changes_nothing(monkeypatch, mode, blocks):
    from htfkernels import _C_emulated

    monkeypatch.setattr(planned, "WANTED_BLOCKS", blocks)
    walked = hk.Layout.make(hk.ModeTree.balanced(3), [50, 40, 60], [24, 17], 3)
    columns = [torch.randint(d, (300,)) for d in walked.mode_dims]
    for layout, indices in (paper(136 if blocks == 2 else 40), (walked, torch.stack(columns, 1))):
        plan = hk.IndexPlan.make(layout, indices)
        weights = testing.make_inputs(testing.Case("", layout, 1), mode[0]).weights
        forward = everything(plan, weights, mode[1])
        _C_emulated.set_backward(True)
        try:
            backward = everything(plan, weights, mode[1])
        finally:
            _C_emulated.set_backward(False)
        assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("name", ["paper", "balanced8_rank64", "shared8", "chain5_sum", "random9"])
def test_sums_of_squares(name):
    layout, indices = paper() if name == "paper" else (CASES[name].layout, None)
    indices = index_sets(layout)["random"] if indices is None else indices
    plan = hk.IndexPlan.make(layout, indices.to(ON))
    weights = list(testing.make_inputs(testing.Case("", layout, 1), F32, ON).weights)
    needs = [1] * len(weights)
    made = planned.schedule(
        layout.program, plan.table, plan.lists, weights[0], "ieee", [True] * len(weights)
    )
    out, frames = module.call("evaluate_at_planned", weights, *made)
    *grads, squares = module.call(
        "evaluate_at_planned_backward", torch.ones_like(out), weights, frames, *made, needs, True
    )
    expected = sum(float(g.double().square().sum()) for g in grads)
    assert squares.dtype == F64
    assert float(squares.sum()) == pytest.approx(expected, rel=1e-6)


def test_only_what_is_asked_for():
    layout = CASES["random9"].layout
    for kind in ("random", "duplicates"):
        plan = hk.IndexPlan.make(layout, index_sets(layout)[kind].to(ON))
        weights = testing.make_inputs(testing.Case("", layout, 1), F64, ON).weights
        whole = everything(plan, weights, "ieee")
        fixed = (layout.program, plan.table, plan.lists)
        for i in range(len(weights)):
            needs = [i == j for j in range(len(weights))]
            grads = backend.evaluate_at_planned_backward(
                whole[0], weights, weights[0].new_empty(0), *fixed, needs, precision="ieee"
            )
            assert torch.equal(grads[i], whole[1 + i])
            assert all(g.numel() == 0 for j, g in enumerate(grads) if j != i)
        none = [False] * len(weights)
        grads = backend.evaluate_at_planned_backward(
            whole[0], weights, weights[0].new_empty(0), *fixed, none, precision="ieee"
        )
        assert all(g.numel() == 0 for g in grads)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_any_strides_and_alignment(dtype):
    layout, indices = paper(16)
    plan = hk.IndexPlan.make(layout, indices.to(ON))
    weights = testing.make_inputs(testing.Case("", layout, 1), dtype, ON).weights
    expected = everything(plan, weights, "ieee")
    strided = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights]
    shifted = []
    for w in weights:
        room = torch.empty(w.numel() + 1, dtype=dtype, device=ON)[1:].view(w.shape)
        shifted.append(room.copy_(w))
    for others in (strided, shifted):
        found = everything(plan, others, "ieee")
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    wide = expected[0].unsqueeze(1).repeat(1, 2)[:, 0]
    fixed = (layout.program, plan.table, plan.lists)
    grads = backend.evaluate_at_planned_backward(
        wide, weights, weights[0].new_empty(0), *fixed, [True] * 3, precision="ieee"
    )
    assert all(torch.equal(a, b) for a, b in zip(expected[1:], grads, strict=True))


def test_schedules_are_kept():
    layout, indices = paper()
    plan = hk.IndexPlan.make(layout, indices.to(ON))
    like = torch.empty(0, device=ON)
    fixed = (layout.program, plan.table, plan.lists, like)
    once = planned.schedule(*fixed, "tf32", [True] * 3)
    assert planned.schedule(*fixed, "tf32", [1] * 3).table is once.table
    assert planned.schedule(*fixed, "ieee", [True] * 3).table is not once.table


def test_bad_arguments():
    layout, indices = paper()
    plan = hk.IndexPlan.make(layout, indices.to(ON))
    weights = list(testing.make_inputs(testing.Case("", layout, 1), F32, ON).weights)
    made = planned.schedule(layout.program, plan.table, plan.lists, weights[0], "ieee", [1] * 3)
    out, frames = module.call("evaluate_at_planned", weights, *made)
    with pytest.raises(RuntimeError, match="expected 3 folded weights, got 2"):
        module.call("evaluate_at_planned", weights[1:], *made)
    with pytest.raises(RuntimeError, match=r"weights must be contiguous .* of dtype Float"):
        module.call("evaluate_at_planned", [w.double() for w in weights], *made)
    with pytest.raises(RuntimeError, match="not of this version"):
        module.call("evaluate_at_planned", weights, made.table[:-1], made.lists)
    with pytest.raises(RuntimeError, match="lists must be contiguous int32"):
        module.call("evaluate_at_planned", weights, made.table, made.lists.long())

    def backward(grad=out, kept=frames, needs=(1, 1, 1), table=made.table):
        arguments = (grad, weights, kept, table, made.lists, list(needs), False)
        return module.call("evaluate_at_planned_backward", *arguments)

    with pytest.raises(RuntimeError, match="grad must be contiguous, of 128 numbers"):
        backward(out[1:])
    with pytest.raises(RuntimeError, match="kept must be what the forward operation returned"):
        backward(kept=frames[1:])
    with pytest.raises(RuntimeError, match="needs must have 3 entries, got 1"):
        backward(needs=[1])
    with pytest.raises(RuntimeError, match="schedule was made for other gradients"):
        backward(needs=[1, 0, 1])


def test_other_dtypes_are_left_to_others():
    spec = hk.runtime.dispatch.Spec("evaluate_at_planned", torch.float16, ON)
    assert "not in torch.float16" in str(hk.runtime.dispatch.why_not("cuda", spec))


@pytest.mark.parametrize(
    ("dims", "rank", "shared", "sentence"),
    [
        (10**7, 512, False, None),
        (10**7, 200, True, None),
        (10**7, 512, True, r"that nodes share have at most \d+ numbers, .* one of 10000000 by 512"),
        (2**31 - 2**16, 1, False, r"at most 2147418111 rows .* of 2147418112 by 1$"),
        (2**31 - 2**16 - 1, 1, True, None),
    ],
)
@pytest.mark.parametrize("op", ["evaluate_at_planned", "completion_step"])
def test_weights_beyond_32_bits_are_left_to_others(op, dims, rank, shared, sentence):
    layout = hk.Layout.make(hk.ModeTree.balanced(4), dims, rank, share_weights=shared)
    reason = operations.why_not("cuda", op, layout, F32)
    assert reason is None if sentence is None else re.search(sentence, reason)


def test_the_last_block_of_sums_looks_no_further_than_32_bits():
    """As many rows as a launch takes, and a block at the end that would look past 2^31."""
    layout, indices = paper()
    plan = hk.IndexPlan.make(layout, indices.to(ON))
    weights = list(testing.make_inputs(testing.Case("", layout, 1), F32, ON).weights)
    table, lists = planned.schedule(
        layout.program, plan.table, plan.lists, weights[0], "ieee", [1] * 3
    )
    out, frames = module.call("evaluate_at_planned", weights, table, lists)
    numbers = table.tolist()
    at, lengths = planned.HEADER, {planned.FORWARD: 21, planned.PRODUCTS: 26}
    while numbers[at] != planned.SEGMENTS:
        at += 3 + numbers[at + 2] * lengths[numbers[at]]
    source, others, _, width, rows, *_ = numbers[at + 3 :]
    numbers[at + 3 : at + 11] = [source, others, planned.MOST, width, rows, 0, 0, 2**15]
    arguments = (out, weights, frames, torch.tensor(numbers), lists, [1] * 3, False)
    with pytest.raises(RuntimeError, match="2147483648 rows, columns or blocks are too many"):
        module.call("evaluate_at_planned_backward", *arguments)
