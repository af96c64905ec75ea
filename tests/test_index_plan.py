"""Index plans: values and gradients against the reference, the format by brute force."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from index_plan_format import Check, uniform

from htfkernels import Layout, ModeTree, testing
from htfkernels.ops.evaluate_at.planned_reference import evaluate_at_planned
from htfkernels.ops.evaluate_at.reference import evaluate_at
from htfkernels.schedule.index_cache import index_plan
from htfkernels.schedule.index_plan import BILINEAR, FRAMED_ROOT, WALK, IndexPlan

native = pytest.importorskip("htfkernels._plan")


def grid(layout):
    """All index tuples, or as many of the first as a test can take."""
    count = min(layout.num_entries // layout.out_features, 2000)
    shape = [min(d, 2001) for d in layout.mode_dims]
    rest = numpy.arange(count)
    columns = []
    for d in reversed(shape):
        columns.append(rest % d)
        rest = rest // d
    return torch.from_numpy(numpy.stack(columns[::-1], axis=1))


def index_sets(layout):
    few = uniform(layout, 5)
    return {
        "random": uniform(layout, 65),
        "many": uniform(layout, 700),
        "grid": grid(layout),
        "duplicates": few[torch.randint(5, (90,))],
        "the same": few[:1].expand(40, -1),
        "two": few[:2],
        "one": few[:1],
        "none": few[:0],
    }


SETS = ["random", "many", "grid", "duplicates", "the same", "two", "one", "none"]


def flat_layout(**options):
    return Layout.make(ModeTree.flat(5), [3, 2, 9, 4, 2], 6, **options)


def all_cases():
    more = [
        testing.Case("flat5", flat_layout(), 1),
        testing.Case("flat5_sum", flat_layout(root="sum"), 1),
        testing.Case("flat5_outputs", flat_layout(out_features=3), 1),
    ]
    return testing.cases() + testing.small_cases() + more


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_values_and_gradients(case, kind):
    layout = case.layout
    indices = index_sets(layout)[kind]
    plan = IndexPlan.make(layout, indices)
    weights = testing.make_inputs(case, torch.float64).weights

    def planned(*weights):
        return evaluate_at_planned(layout, weights, plan)

    def exact(*weights):
        return evaluate_at(layout, weights, indices)

    # Every term is a product of weights, so that the values at their magnitudes are the scale.
    sizes = [w.abs() for w in weights]
    testing.assert_matches(
        planned(*weights), exact(*weights), torch.float64, "forward", exact(*sizes)
    )
    cotangent = torch.rand(len(indices), layout.out_features, dtype=torch.float64)
    gradients = testing.gradients(exact)
    testing.assert_matches(
        testing.gradients(planned)(cotangent, *weights),
        gradients(cotangent, *weights),
        torch.float64,
        "backward",
        gradients(cotangent, *sizes),
    )


def test_second_derivatives():
    case = testing.small_cases()[0]
    plan = IndexPlan.make(case.layout, uniform(case.layout, 9))
    weights = [w.requires_grad_() for w in testing.make_inputs(case, torch.float64, seed=1).weights]

    def planned(*weights):
        return evaluate_at_planned(case.layout, weights, plan)

    assert torch.autograd.gradcheck(planned, weights)
    assert torch.autograd.gradgradcheck(planned, weights, fast_mode=True)


# -- the format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_format(case, kind):
    Check(IndexPlan.make(case.layout, index_sets(case.layout)[kind])).run()


@given(st.integers(2, 9), st.integers(0, 10**6), st.integers(0, 120))
def test_format_of_random_trees(order, seed, batch):
    torch.manual_seed(seed)
    dims = torch.randint(1, 7, (order,)).tolist()
    layout = Layout.make(testing.random_tree(order, seed), dims, 2, 1 + seed % 2)
    Check(IndexPlan.make(layout, uniform(layout, batch))).run()


def test_the_three_forms_and_the_trivial_plan():
    layout = Layout.make(ModeTree.balanced(4), 3, 5)
    apart = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    trivial = IndexPlan.make(layout, apart)
    assert trivial.form == WALK and not trivial.framed and len(trivial.cuts) == 4
    everything = grid(layout)
    assert IndexPlan.make(layout, everything).form == BILINEAR
    assert IndexPlan.make(layout, everything.repeat(2, 1)).form == FRAMED_ROOT
    several = Layout.make(ModeTree.balanced(4), 3, 5, out_features=2)
    assert IndexPlan.make(several, everything).form == WALK


def test_wide_modes_go_by_sorting():
    """More possible pairs than a table takes."""
    layout = Layout.make(ModeTree.balanced(4), 50_000, 1)
    some = uniform(layout, 300)
    plan = IndexPlan.make(layout, some[torch.randint(300, (1000,))])
    assert plan.form == FRAMED_ROOT
    Check(plan).run()
    assert not IndexPlan.make(layout, uniform(layout, 1000)).framed


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_any_integers(dtype):
    layout = Layout.make(ModeTree.balanced(4), [2, 3, 100, 5], 3)
    indices = uniform(layout, 500)
    plan, again = IndexPlan.make(layout, indices), IndexPlan.make(layout, indices.to(dtype))
    assert torch.equal(again.table, plan.table) and torch.equal(again.lists, plan.lists)


@pytest.mark.parametrize(
    "form",
    [
        torch.Tensor.tolist,
        lambda t: tuple(map(tuple, t.tolist())),
        lambda t: list(t),
        lambda t: t.numpy(),
        lambda t: t.numpy().astype(">i4"),
        lambda t: t.flip(0).numpy()[::-1],
    ],
    ids=["list", "tuple", "tensors", "array", "big_endian", "backwards"],
)
def test_lists_and_arrays(form):
    layout = Layout.make(ModeTree.balanced(4), [2, 3, 100, 5], 3)
    indices = uniform(layout, 500)
    plan, again = IndexPlan.make(layout, indices), index_plan(layout, form(indices))
    assert torch.equal(again.table, plan.table) and torch.equal(again.lists, plan.lists)
    assert torch.equal(again.indices, indices)


def test_any_strides():
    layout = Layout.make(ModeTree.balanced(9), 3, 2)
    indices = uniform(layout, 500)
    plan = IndexPlan.make(layout, indices)
    double = indices.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    for same in (indices.t().contiguous().t(), double[::2, ::2], indices.flip(0).flip(0)):
        again = IndexPlan.make(layout, same)
        assert torch.equal(again.table, plan.table) and torch.equal(again.lists, plan.lists)
        assert again.indices is same


def test_the_same_for_any_number_of_threads():
    layout = Layout.make(ModeTree.balanced(4), [40, 30, 500, 700], 2)
    indices = uniform(layout, 300_000)
    indices[:, 2:] = indices[torch.randint(60_000, (300_000,)), 2:]
    plans = []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            plans.append(IndexPlan.make(layout, indices))
    finally:
        torch.set_num_threads(1)
    for plan in plans[1:]:
        assert torch.equal(plan.table, plans[0].table) and torch.equal(plan.lists, plans[0].lists)
    Check(plans[0]).run()


# -- the compiled loops ---------------------------------------------------------------------------


@given(
    st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1), st.integers(0, 200), st.integers(0, 99)
)
def test_distinct_pairs(na, nb, n, seed):
    draw = numpy.random.default_rng(seed)
    a = draw.choice(draw.integers(na, size=8), n).astype(numpy.int32)
    b = draw.choice(draw.integers(nb, size=8), n).astype(numpy.int32)
    pairs, inverse = numpy.unique(numpy.stack([a, b], axis=1), axis=0, return_inverse=True)
    ids, left, right = native.distinct_pairs(a, na, b, nb, len(pairs))
    assert (ids == inverse.reshape(-1)).all()
    assert (numpy.stack([left, right], axis=1) == pairs).all()
    if n:
        assert native.distinct_pairs(a, na, b, nb, len(pairs) - 1) is None


def test_the_loops_check_what_they_index_with():
    bad = numpy.array([0, 3], dtype=numpy.int32)
    for ids in (bad, -bad):
        with pytest.raises(ValueError, match=r"distinct_pairs: an id is not in 0 \.\. 2"):
            native.distinct_pairs(ids, 3, abs(bad), 4, 9)
        with pytest.raises(ValueError, match=r"group: an id is not in 0 \.\. 2"):
            native.group(ids, 3)
    with pytest.raises(ValueError, match="starts: ids must ascend"):
        native.starts(bad[::-1].copy(), 4)
    with pytest.raises(ValueError, match="different lengths"):
        native.distinct_pairs(bad, 4, bad[:1], 4, 9)
    with pytest.raises(ValueError, match="no mode 2"):
        native.columns(numpy.zeros((3, 2), dtype=numpy.int64), [2], [1])


# -- the object -----------------------------------------------------------------------------------


def test_errors():
    layout = Layout.make(ModeTree.balanced(4), [2, 3, 4, 5], 2)
    good = uniform(layout, 6)
    for bad in (good[:, :3], good[0], good.double(), good.bool()):
        with pytest.raises(ValueError, match=r"IndexPlan: indices must be integers \[B, 4\], got"):
            IndexPlan.make(layout, bad)
    with pytest.raises(ValueError, match="IndexPlan: layout must be a Layout, got ModeTree"):
        IndexPlan.make(layout.tree, good)
    with pytest.raises(ValueError, match="IndexPlan: indices on the meta device have no values"):
        index_plan(layout, good.to("meta"))
    for index in (3, -1, 2**40):
        bad = good.clone()
        bad[4, 1] = index
        sentence = f"index {index} of mode 1 is out of range, its dimension is 3"
        with pytest.raises(IndexError, match=f"^IndexPlan: {sentence}$"):
            index_plan(layout, bad)
    other = ModeTree.balanced(3)
    with pytest.raises(ValueError, match="is not a node of this plan's tree"):
        IndexPlan.make(layout, good).rows_of(other.root)


def test_is_frozen():
    layout = Layout.make(ModeTree.balanced(4), 2, 2)
    plan = IndexPlan.make(layout, uniform(layout, 6))
    with pytest.raises(AttributeError):
        plan.form = WALK
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert moved.lists.is_meta and moved.indices.is_meta and not moved.table.is_meta


def test_rows_and_multiply_adds():
    layout = Layout.make(ModeTree.balanced(4), 2, [3, 5])
    tree = layout.tree
    plan = IndexPlan.make(layout, grid(layout))
    assert [plan.rows_of(node) for node in tree.nodes] == [2, 2, 2, 2, 4, 4, 16]
    # A node over two leaves: the product and [3, 5]; the root: the product and [5, 1].
    assert plan.multiply_adds() == (2 * 4 * (3 + 15) + 5 * (16 + 4), 16 * (2 * (3 + 15) + 5 + 5))
    twice = IndexPlan.make(layout, grid(layout).repeat(2, 1))
    assert twice.rows_of(tree.root) == 16
    assert twice.multiply_adds()[0] == 2 * 4 * (3 + 15) + 16 * (5 + 5)
    for case in testing.cases():
        trivial = IndexPlan.make(case.layout, uniform(case.layout, 1))
        planned, per_sample = trivial.multiply_adds()
        assert planned == per_sample or trivial.form == BILINEAR


def test_printing():
    layout = Layout.make(ModeTree.balanced(4), 2, [3, 5])
    plan = IndexPlan.make(layout, grid(layout))
    assert str(plan).splitlines() == [
        "index plan of 16 samples, order 4: bilinear in two frames, 2 of 3 nodes framed",
        "{0,1}: 4 of 16 rows, 75.0% saved",
        "{2,3}: 4 of 16 rows, 75.0% saved",
        "{0-3}: 16 of 16 rows, 0.0% saved (per sample)",
        "multiply-adds: 244 instead of 736, 66.8% saved; the plan takes "
        f"{plan.lists.numel() * 4 + plan.table.numel() * 8:,} bytes",
    ]
    assert repr(plan) == (
        "IndexPlan(batch=16, order=4, bilinear in two frames, 2 of 3 nodes framed)"
    )
    big = Layout.make(ModeTree.balanced(64), 2, 3)
    lines = str(IndexPlan.make(big, uniform(big, 100))).splitlines()
    assert len(lines) == 2 + 6
    assert lines[1] == "level 1: 32 nodes, 128 of 3,200 rows, 96.0% saved"
    assert "0.0% saved" in str(IndexPlan.make(layout, grid(layout)[:0]))


def test_when_a_plan_pays():
    tree = ModeTree.balanced(8)
    assert IndexPlan.pays(Layout.make(tree, 4, 64), 8192)
    assert not IndexPlan.pays(Layout.make(tree, 4, 64), 0)
    assert IndexPlan.pays(Layout.make(ModeTree.flat(8), 4, 64), 8192)  # a part of the root
    assert not IndexPlan.pays(Layout.make(tree, 4, 1), 256)  # little to save
    assert not IndexPlan.pays(Layout.make(tree, 5000, 64), 8192)  # no repetition
    assert not IndexPlan.pays(Layout.make(tree, 10**9, 64), 8192)
    assert not IndexPlan.pays(Layout.make(tree, 2**31, 64), 8192)
    assert not IndexPlan.pays(Layout.make(tree, 4, 64), 2**31)
    with pytest.raises(ValueError, match="pays: layout must be a Layout, got ModeTree"):
        IndexPlan.pays(tree, 8192)
    for batch, what in ((-1, "not be negative, got -1"), (2.5, "be an integer, got 2.5")):
        with pytest.raises(ValueError, match=f"pays: batch must {what}"):
            IndexPlan.pays(Layout.make(tree, 4, 64), batch)
