"""The Triton kernels over gathered rows: dtypes, forms of plans, parts of sums, what is kept."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import dispatch
from htfkernels.schedule.index_plan import BILINEAR, FRAMED_ROOT, NO_OPERAND, WALK

if dispatch.interpreted():
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("no CUDA device, and TRITON_INTERPRET is not set", allow_module_level=True)
pytest.importorskip("triton")

from htfkernels.ops.evaluate_at import triton as at
from htfkernels.ops.full_tensor import triton as full
from htfkernels.schedule.frames import grid_frames, planned_frames, sample_frames
from htfkernels.triton import gather_run, launch, memory
from htfkernels.triton.gather_records import Job
from htfkernels.triton.gather_tables import DOT, PRODUCT, SUM, Tables, kind_of
from htfkernels.triton.segments import add_parts, segment_gradient

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

T, make = hk.ModeTree, hk.Layout.make
IRREGULAR = T.from_nested((((0,), 3), 1, (2, (4, 5, 6, 7, 8))))
LAYOUTS = {
    "pairs": make(T.balanced(4), 3, [17, 16]),
    "outputs": make(T.balanced(3), [2, 5, 3], [16, 7], 3),
    "irregular": make(IRREGULAR, [2, 3, 1, 2, 2, 1, 2, 1, 2], 5, 2),
    "shared": make(T.balanced(4), 2, [16, 3], share_weights=True),
    "cp": make(T.flat(3), [3, 2, 4], 9, root="sum"),
    "matrices": make(T.chain(4), [6, 5], [9, 1, 4], root="sum"),
    "chain": make(T.from_nested((((0, 1),),)), 3, [4, 3, 16]),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_triton():
    with hk.use_backend("triton"):
        yield


def inputs_of(layout, dtype=torch.float64, batch=40):
    return testing.make_inputs(testing.Case("", layout, batch), dtype, DEVICE)


def check(function, arguments, dtype):
    """Values and gradients against the reference in float64."""
    expected, scale = testing.exact(function, arguments)
    actual = function(*arguments)
    assert actual.dtype == dtype
    testing.assert_matches(actual, expected, dtype, "forward", scale)
    given = (1 + torch.rand_like(actual), *arguments)
    run = testing.gradients(function)
    expected, scale = testing.exact(run, given)
    actual = run(*given)
    assert all(g.dtype == dtype and g.is_contiguous() for g in actual)
    testing.assert_matches(actual, expected, dtype, "backward", scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("op", ["evaluate_at", "full_tensor"])
def test_values_and_gradients(op, name, dtype):
    case = testing.Case(name, LAYOUTS[name], 40)
    function, arguments = testing.operation(op, case, inputs_of(LAYOUTS[name], dtype))
    check(function, arguments, dtype)


def planned(layout, indices):
    plan = hk.IndexPlan.make(layout, indices)
    return plan, lambda *weights: hk.evaluate_at(layout.tree, weights, plan, layout=layout)


def index_sets(layout, batch):
    """Tuples that are framed up to the root, up to two frames, and hardly at all."""
    few = torch.stack([torch.randint(d, (4,)) for d in layout.mode_dims], dim=1)
    many = [torch.randint(d, (batch,)) for d in layout.mode_dims]
    some = [c if n % 2 else c[:4].repeat(batch // 4) for n, c in enumerate(many)]
    return [t.to(DEVICE) for t in (few.repeat(batch // 4, 1), torch.stack(many, 1),
                                   torch.stack(some, 1), few)]  # fmt: skip


PLANNED = {
    "pairs": (make(T.balanced(4), 4, [17, 16]), 120),
    "outputs": (make(T.balanced(3), [3, 5, 4], [16, 7], 3), 40),
    "flat": (make(T.flat(5), [3, 2, 9, 4, 2], 6, root="sum"), 60),
    "walked": (make(IRREGULAR, [3, 4, 3, 2, 4, 3, 2, 5, 2], 5), 40),
    "one_child": (make(T.from_nested(((((0,),), 1), ((2, (3,)),))), 4, 7), 60),
    "shared": (make(T.balanced(4), 3, [16, 3], share_weights=True), 60),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANNED)
def test_plans(name, dtype):
    layout, batch = PLANNED[name]
    weights = inputs_of(layout, dtype).weights
    for indices in index_sets(layout, batch)[: 4 if dtype == torch.float64 else 2]:
        check(planned(layout, indices)[1], weights, dtype)


def test_every_form_of_plan_is_among_them():
    forms, single, virtual = set(), False, False
    for layout, batch in PLANNED.values():
        for indices in index_sets(layout, batch):
            plan = planned(layout, indices)[0]
            forms.add(plan.form)
            single |= any(row.right == NO_OPERAND for row in plan.framed)
            virtual |= any(row.step < 0 for row in plan.framed)
    assert forms == {WALK, BILINEAR, FRAMED_ROOT} and single and virtual


def calls(layout, dtype=torch.float32, batch=300):
    """For each operation: weights, its keeping function, its backward one."""
    inputs = inputs_of(layout, dtype, batch)
    weights, indices, program = list(inputs.weights), inputs.indices, layout.program
    plan = hk.IndexPlan.make(layout, indices)
    lists, outputs = (program, plan.table, plan.lists), layout.out_features
    entries = layout.num_entries // outputs
    how = {"precision": "ieee"}
    return {
        "evaluate_at": (
            weights,
            lambda w: at.evaluate_at_keeping(w, indices, program, outputs, **how),
            lambda g, w, k, n: at.evaluate_at_backward(g, w, indices, k, program, n, **how),
        ),
        "evaluate_at_planned": (
            weights,
            lambda w: at.evaluate_at_planned_keeping(w, *lists, batch, outputs, **how),
            lambda g, w, k, n: at.evaluate_at_planned_backward(g, w, k, *lists, n, **how),
        ),
        "full_tensor": (
            weights,
            lambda w: [full.full_tensor(w, program, entries, outputs, **how), w[0].new_empty(0)],
            lambda g, w, k, n: full.full_tensor_backward(g, w, program, n, **how),
        ),
    }


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("op", ["evaluate_at", "evaluate_at_planned", "full_tensor"])
def test_the_same_bits(op):
    """Twice; from what was kept or computed again; for all weights or for some."""
    layout = make(T.balanced(4), [2, 3, 2, 3], [16, 5], 2, share_weights=True)
    weights, keeping, backward = calls(layout)[op]
    result, kept = keeping(weights)
    assert torch.equal(result, keeping(weights)[0])
    grad, every = torch.rand_like(result), [True] * len(weights)
    grads = backward(grad, weights, kept, every)
    assert same(grads, backward(grad, weights, kept, every))
    assert same(grads, backward(grad, weights, kept.new_empty(0), every))
    for chosen in range(len(weights)):
        needs = [i == chosen for i in range(len(weights))]
        some = backward(grad, weights, kept, needs)
        assert [g.numel() > 0 for g in some] == needs
        assert torch.equal(some[chosen], grads[chosen])
    assert all(g.numel() == 0 for g in backward(grad, weights, kept, [False] * len(weights)))


@pytest.mark.parametrize("op", ["evaluate_at", "evaluate_at_planned", "full_tensor"])
def test_strided_arguments(op):
    layout = LAYOUTS["pairs"]
    weights, keeping, backward = calls(layout, batch=20)[op]
    strided = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights]
    result, kept = keeping(weights)
    assert torch.equal(result, keeping(strided)[0])
    every, ones = [True] * len(weights), torch.ones_like(result)
    expanded = ones[:1].expand_as(ones)
    assert same(backward(ones, weights, kept, every), backward(expanded, strided, kept, every))


def test_strided_indices():
    layout = LAYOUTS["outputs"]
    inputs = inputs_of(layout)
    weights, how = list(inputs.weights), {"precision": "ieee"}
    wide = torch.full((40, 9), 10**9, device=DEVICE)[:, 1:7:2].copy_(inputs.indices)
    for indices in (wide, inputs.indices.t().contiguous().t(), inputs.indices[:1].expand(40, -1)):
        plain = indices.contiguous()
        one, kept = at.evaluate_at_keeping(weights, plain, layout.program, 3, **how)
        two, _ = at.evaluate_at_keeping(weights, indices, layout.program, 3, **how)
        assert torch.equal(one, two)
        needs = [True] * len(weights)
        rest = (kept, layout.program, needs)
        assert same(
            at.evaluate_at_backward(one, weights, plain, *rest, **how),
            at.evaluate_at_backward(one, weights, indices, *rest, **how),
        )


def field(schedule, launch_of, name):
    """A field of all jobs of one kernel."""
    found = []
    for step in schedule.launches:
        if step.kernel is launch_of:
            jobs = step.table[step.work[: step.programs].unique().long()]
            found += jobs[:, Job._fields.index(name)].tolist()
    return found


def test_long_sums_are_summed_in_parts():
    layout = make(T.balanced(2), 2, 16, 2)
    program, device = layout.program, torch.device(DEVICE)
    made = gather_run.Evaluation(sample_frames(program, 3000), torch.float32, "ieee", device)
    schedule = made.backward([True, True])
    assert min(field(schedule, segment_gradient, "splits")) > 1
    assert field(schedule, add_parts, "rows")
    function, arguments = testing.operation(
        "evaluate_at", testing.Case("", layout, 3000), inputs_of(layout, torch.float32, 3000)
    )
    check(function, arguments, torch.float32)


def test_launches_grow_with_the_depth():
    """Two levels more, four times the nodes: a launch or a few more for each level."""

    def launches(order):
        layout = make(T.balanced(order), 3, 16)
        nodes = sample_frames(layout.program, 10)
        made = gather_run.Evaluation(nodes, torch.float32, "ieee", torch.device(DEVICE))
        needs = [True] * len(layout.groups)
        return len(made.forward.launches), len(made.backward(needs).launches)

    assert [launches(order) for order in (16, 64, 256)] == [(4, 9), (6, 13), (8, 17)]


def test_too_many_rows_of_a_grid():
    """Fewer than 2^31 may be too many: the last tile's end does not fit into 32 bits."""

    def rows(*dims):
        layout = make(T.from_nested(((0, 1), 2)), [*dims, 2], 1)
        made = grid_frames(layout.program)
        Tables(made, torch.float32, "ieee").node_job(0)
        return made.frames[0].rows

    assert rows(2048, 2**20 - 32) == launch.MOST
    for dims in ((8, 2**28 - 1), (2048, 2**20)):
        with pytest.raises(
            ValueError, match=r"up to \d+ rows of a product of frames, got 21474836"
        ):
            rows(*dims)


def test_kinds_of_nodes():
    """The end tensor's root is a matrix product; one column needs no tensor cores."""
    grid = grid_frames(make(T.balanced(4), 3, 16).program).frames
    assert [kind_of(n) for n in grid] == [DOT, DOT, PRODUCT, DOT]
    assert grid[-1].transposed and (grid[-1].rows, grid[-1].columns) == (9, 9)
    samples = sample_frames(make(T.balanced(4), 3, 16).program, 7).frames
    assert [kind_of(n) for n in samples] == [DOT, DOT, SUM]
    layout = make(T.balanced(4), 3, 16)
    plan = hk.IndexPlan.make(layout, torch.zeros(8, 4, dtype=torch.int64))
    assert kind_of(planned_frames(layout.program, plan.table).frames[-1]) == PRODUCT


def test_a_second_call_makes_no_tables():
    layout = LAYOUTS["pairs"]
    like = inputs_of(layout).weights[0]
    counted = []

    def nodes():
        counted.append(1)
        return sample_frames(layout.program, 5)

    program = layout.program.clone()
    first = gather_run.evaluation(program, like, 5, "ieee", nodes)
    assert gather_run.evaluation(program, like, 5, "ieee", nodes) is first
    assert first.backward([True, True, True]) is first.backward((1, 1, 1))
    assert len(counted) == 1
    for batch in range(6, 90):  # the first one's is given up for later ones
        gather_run.evaluation(program, like, batch, "ieee", nodes)
    assert gather_run.evaluation(program, like, 5, "ieee", nodes) is not first


def test_empty_batch():
    layout = LAYOUTS["irregular"]
    weights = [w.requires_grad_() for w in inputs_of(layout).weights]
    indices = torch.zeros(0, 9, dtype=torch.int64, device=DEVICE)
    for given in (indices, hk.IndexPlan.make(layout, indices)):
        out = hk.evaluate_at(layout.tree, weights, given, layout=layout)
        assert out.shape == (0, 2)
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.sum(), weights))


def test_unwritten_memory_is_full_of_nan(monkeypatch):
    like = torch.zeros(1, device=DEVICE)
    monkeypatch.setenv("HTF_POISON", "1")
    assert memory.empty((3, 2), like, torch.float16).isnan().all()
    assert memory.empty(3, like, torch.int32).shape == (3,)


def test_too_many_tiles():
    with pytest.raises(ValueError, match="tiles in one launch"):
        launch.launch(None, 2**31, (), {}, launch.Config(16, 16, 16))


def test_too_many_tiles_make_no_table():
    """It would have an entry for each."""
    nodes = sample_frames(make(T.balanced(2), 3, 16).program, 2**40)
    with pytest.raises(ValueError, match="tiles in one launch"):
        gather_run.Evaluation(nodes, torch.float32, "ieee", torch.device(DEVICE))


def test_sizes_beyond_32_bits():
    """Of a mode: rows of its weight are those of a gradient. And of a rank."""
    for dim, rank in ((2**31, 1), (1, 2**31)):
        nodes = sample_frames(make(T.balanced(2), dim, rank).program, 5)
        with pytest.raises(
            ValueError, match="rows or columns of a weight or frame, got 2147483648"
        ):
            made = gather_run.Evaluation(nodes, torch.float32, "ieee", torch.device(DEVICE))
            made.backward([True, True])
