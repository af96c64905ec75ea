"""Entries by an index plan: the kernels against the formula in float64, on every form of plan."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.ops.evaluate_at.reference import evaluate_at
from htfkernels.schedule.index_plan import BILINEAR, FRAMED_ROOT, NO_OPERAND, WALK

pytest.importorskip("htfkernels._plan")

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def index_sets(layout):
    few = torch.stack([torch.randint(d, (6,)) for d in layout.mode_dims], dim=1)
    many = [torch.randint(d, (800,)) for d in layout.mode_dims]
    return {
        "random": torch.stack(many, dim=1),
        "few": few,
        "duplicates": few[torch.randint(6, (200,))],
        "one mode moves": few[:1].expand(90, -1) * 0 + torch.stack([c[:90] for c in many], 1) // 2,
        "one": few[:1],
        "none": few[:0],
    }


def function_of(case, indices):
    """The planned and the plain evaluation as functions of the weights."""
    layout = case.layout
    plan = hk.IndexPlan.make(layout, indices)

    def planned(*weights):
        return hk.evaluate_at(case.tree, weights, plan, layout=layout)

    def plain(*weights):
        out = evaluate_at(layout, weights, indices)
        return out.squeeze(-1) if layout.out_features == 1 else out

    return plan, planned, plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(target, case, dtype):
    target.require("evaluate_at_planned", dtype)
    inputs = testing.make_inputs(case, dtype, target.device)
    for name, indices in index_sets(case.layout).items():
        if name == "random" and dtype == torch.bfloat16 and target.backend == "reference":
            continue  # PyTorch adds up the gradients of a row's 800 users in bfloat16
        plan, planned, plain = function_of(case, indices.to(target.device))
        expected, scale = testing.exact(plain, inputs.weights)
        actual = planned(*inputs.weights)
        testing.assert_matches(actual, expected, dtype, "forward", scale)
        assert actual.dtype == dtype, name
        arguments = (torch.rand_like(actual), *inputs.weights)
        expected, scale = testing.exact(testing.gradients(plain), arguments)
        testing.assert_matches(
            testing.gradients(planned)(*arguments), expected, dtype, "backward", scale
        )
        assert len(plan) == len(indices)


def test_every_form_is_tested():
    forms, single, virtual = set(), False, False
    for case in testing.cases():
        for indices in index_sets(case.layout).values():
            plan = hk.IndexPlan.make(case.layout, indices)
            forms.add(plan.form)
            single |= any(row.right == NO_OPERAND for row in plan.framed)
            virtual |= any(row.step < 0 for row in plan.framed)
    assert forms == {WALK, BILINEAR, FRAMED_ROOT}
    assert single and virtual


def paper(dtype=torch.float64, rank=24):
    model = hk.HTF(hk.ModeTree.balanced(4), 8, [rank, rank], dtype=dtype)
    flat = torch.randperm(4096)[:2048]
    return model, torch.stack(torch.unravel_index(flat, (8,) * 4), dim=1)


def test_gradcheck_and_second_derivatives(cpu_target):
    layout = hk.Layout.make(testing.random_tree(5, 2), [2, 3, 2, 3, 2], 3, 2)
    case = testing.Case("", layout, 40)
    indices = torch.stack([torch.randint(d, (40,)) for d in layout.mode_dims], dim=1)
    _, planned, _ = function_of(case, indices)
    weights = testing.make_inputs(case, torch.float64).weights
    leaves = tuple(w.requires_grad_() for w in weights)
    assert torch.autograd.gradcheck(planned, leaves)
    assert torch.autograd.gradgradcheck(planned, leaves, fast_mode=True)


def test_only_what_is_asked_for(cpu_target):
    model, indices = paper()
    plan = model.index_plan(indices)
    everything = torch.autograd.grad(model.at(plan).square().sum(), list(model.parameters()))
    for i, expected in enumerate(everything):
        for j, p in enumerate(model.parameters()):
            p.requires_grad_(i == j)
        (alone,) = torch.autograd.grad(model.at(plan).square().sum(), [model.weights[i]])
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("batch", [100, 2048, 30_000])
def test_the_same_bits_for_any_number_of_threads(batch):
    model = hk.HTF(hk.ModeTree.balanced(6), 12, 40, dtype=torch.float32)
    indices = torch.randint(12, (batch, 6))
    plan = model.index_plan(indices)
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            value = model.at(plan)
            grads = torch.autograd.grad(value.square().sum(), list(model.parameters()))
        finally:
            torch.set_num_threads(1)
        seen.append((value, *grads))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_func_and_compile(cpu_target):
    model, indices = paper()
    plan = model.index_plan(indices)
    weights = {k: v.detach() for k, v in model.named_parameters()}

    class AtPlan(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model.at(plan)

    wrapped = AtPlan()
    named = {f"model.{k}": v for k, v in weights.items()}

    def loss(parameters):
        return torch.func.functional_call(wrapped, parameters, ()).square().sum()

    expected = torch.autograd.grad(wrapped().square().sum(), list(model.parameters()))
    for a, b in zip(torch.func.grad(loss)(named).values(), expected, strict=True):
        testing.assert_matches(a, b, torch.float64, "backward")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(cpu_target, backend):
    if cpu_target.backend == "reference":
        pytest.skip("the reference follows the lists' values, which a trace does not know")
    cpu_target.require("evaluate_at_planned")
    model, indices = paper()
    plan = model.index_plan(indices)
    expected = torch.autograd.grad(model.at(plan).square().sum(), list(model.parameters()))
    compiled = torch.compile(lambda: model.at(plan).square().sum(), fullgraph=True, backend=backend)
    found = torch.autograd.grad(compiled(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        testing.assert_matches(a, b, torch.float64, "backward")


def test_opcheck(small_case):
    layout = small_case.layout
    inputs = testing.make_inputs(small_case, torch.float64)
    for name, indices in index_sets(layout).items():
        # Tracing sees sizes and no indices: with and without any is enough.
        utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
        utils += ["test_aot_dispatch_dynamic"] * (name in ("random", "none"))
        plan = hk.IndexPlan.make(layout, indices)
        weights = [w.requires_grad_() for w in inputs.weights]
        fixed = (layout.program, plan.table, plan.lists)
        torch.library.opcheck(
            torch.ops.htfkernels.evaluate_at_planned.default,
            (weights, *fixed, len(plan), layout.out_features),
            test_utils=utils,
        )
        several = () if layout.out_features == 1 else (layout.out_features,)
        grad = torch.rand(len(plan), *several, dtype=torch.float64)
        bare = [w.detach() for w in weights]
        torch.library.opcheck(
            torch.ops.htfkernels.evaluate_at_planned_backward.default,
            (grad, bare, grad.new_empty(0), *fixed, [1] * len(bare)),
            test_utils=utils,
        )


def test_kept_or_computed_again():
    """A backward pass without what the forward pass kept gives the same bits."""
    from htfkernels.runtime.compiled import ops

    model, indices = paper()
    plan, weights = model.index_plan(indices), [p.detach() for p in model.parameters()]
    fixed = (model.layout.program, plan.table, plan.lists)
    out, kept = ops.evaluate_at_planned_keeping(weights, *fixed, len(plan), 1)
    assert kept.numel() > 0
    needs = [1] * len(weights)
    once = ops.evaluate_at_planned_backward(out, weights, kept, *fixed, needs)
    again = ops.evaluate_at_planned_backward(out, weights, kept.new_empty(0), *fixed, needs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="kept must be what the forward operation returned"):
        ops.evaluate_at_planned_backward(out, weights, kept[1:], *fixed, needs)


def test_bad_plans_are_named(cpu_target):
    model, indices = paper()
    plan = model.index_plan(indices)
    other = hk.HTF(hk.ModeTree.balanced(4), 8, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="of another tree or other dimensions"):
        other.at(plan)
    from htfkernels.runtime.compiled import ops

    weights = [p.detach() for p in model.parameters()]
    fixed = (model.layout.program, plan.table, plan.lists)
    with pytest.raises(RuntimeError, match="batch must be 2048, got 3"):
        ops.evaluate_at_planned(weights, *fixed, 3, 1)
    for i in range(len(plan.table)):
        broken = plan.table.clone()
        broken[i] += 1 << 40
        with pytest.raises(RuntimeError, match=r"the plan does not fit|batch must be"):
            ops.evaluate_at_planned(weights, fixed[0], broken, fixed[2], 2048, 1)
    with pytest.raises(RuntimeError, match="the plan does not fit"):
        ops.evaluate_at_planned(weights, *fixed[:2], plan.lists[:-1], 2048, 1)
