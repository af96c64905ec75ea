"""Index plans: values and gradients against the reference, the format by brute force, the cache."""

from __future__ import annotations

import gc
import weakref

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htfkernels import Layout, ModeTree, index_build, testing
from htfkernels import index_plan as module
from htfkernels.index_plan import (
    BILINEAR,
    FRAMED_ROOT,
    NO_OPERAND,
    WALK,
    IndexPlan,
    index_plan,
    program_steps,
)
from htfkernels.ops.evaluate_at.planned_reference import evaluate_at_planned
from htfkernels.ops.evaluate_at.reference import evaluate_at

native = pytest.importorskip("htfkernels._plan")


def uniform(layout, batch):
    return torch.stack([torch.randint(d, (batch,)) for d in layout.mode_dims], dim=1)


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


class Check:
    """Reads a plan's table as a kernel does, and holds it against the rule, by numpy.unique."""

    def __init__(self, plan):
        self.plan, self.layout = plan, plan.layout
        self.steps = program_steps(plan.layout)
        self.x = plan.indices.numpy()
        self.limit = len(self.x) // 2
        self.used = 0
        flat = plan.table.tolist()
        self.version, self.batch, framed, cuts, self.form, length, order, steps = flat[:8]
        assert (self.version, order, steps) == (1, self.layout.tree.order, len(self.steps))
        assert self.batch == len(self.x) == plan.batch == len(plan)
        assert plan.table.dtype == torch.int64 and plan.lists.dtype == torch.int32
        assert self.form == plan.form and length == plan.lists.numel()
        self.framed = [flat[8 + 10 * i : 18 + 10 * i] for i in range(framed)]
        self.cuts = [flat[8 + 10 * framed + 6 * i :][:6] for i in range(cuts)]
        assert len(flat) == 8 + 10 * framed + 6 * cuts
        assert [list(row) for row in plan.framed] == self.framed
        assert [list(row) for row in plan.cuts] == self.cuts
        self.ids, self.level, self.members = [], [], []  # of the framed rows

    def list(self, offset, count):
        assert offset >= 0 and offset + count <= self.plan.lists.numel()
        self.used += count
        return self.plan.lists[offset : offset + count].numpy()

    def operand(self, code):
        """Each sample's row, the number of rows, the level, the program steps that are in it."""
        if code >= 0:
            return self.ids[code], self.framed[code][3], self.level[code], self.members[code]
        step = self.steps[-(code + 1)]
        assert step.mode >= 0
        return self.x[:, step.mode], step.rows, 0, [-(code + 1)]

    def grouped(self, start, order, ids, rows):
        start, order = self.list(start, rows + 1), self.list(order, len(ids))
        assert start[0] == 0 and start[-1] == len(ids) and (numpy.diff(start) >= 0).all()
        assert (order == numpy.argsort(ids, kind="stable")).all()
        assert (numpy.diff(start) == numpy.bincount(ids, minlength=rows)).all()

    def run(self):
        for k, row in enumerate(self.framed):
            self.framed_row(k, *row)
        walked = self.rule()
        for operand, parent, at, start, order, rows in self.cuts:
            assert operand < len(self.framed)
            ids, count, _, _ = self.operand(operand)
            assert rows == count
            assert (self.list(at, self.batch) == ids).all()
            if self.form == WALK:
                assert start == order == -1
            else:
                self.grouped(start, order, ids, rows)
            assert parent == -1 if self.form == FRAMED_ROOT else parent in walked
        assert self.used == self.plan.lists.numel()
        root = len(self.steps) - 1
        if self.form == FRAMED_ROOT:
            assert len(self.cuts) == 1 and not walked
            assert self.framed[self.cuts[0][0]][0] == root
        bilinear = walked == {root} and len(self.cuts) == 2 and self.layout.out_features == 1
        assert (self.form == BILINEAR) == bilinear
        assert (self.form == FRAMED_ROOT) == (root not in walked)

    def framed_row(self, k, step, left, right, rows, left_ids, right_ids, *rest):
        left_start, right_start, right_order, level = rest
        assert left < k and right < k
        ids, count, below, members = self.operand(left)
        if right == NO_OPERAND:
            assert rows == count <= self.limit and [left_ids, right_ids, *rest[:3]] == [-1] * 5
        else:
            other, others, second, more = self.operand(right)
            pairs, inverse = numpy.unique(
                numpy.stack([ids, other], axis=1), axis=0, return_inverse=True
            )
            assert rows == len(pairs) <= self.limit
            assert (self.list(left_ids, rows) == pairs[:, 0]).all()
            assert (self.list(right_ids, rows) == pairs[:, 1]).all()
            starts = self.list(left_start, count + 1)
            assert (starts == numpy.searchsorted(pairs[:, 0], numpy.arange(count + 1))).all()
            self.grouped(right_start, right_order, pairs[:, 1], others)
            assert min(members) < min(more)
            ids, below, members = inverse.reshape(-1), max(below, second), members + more
        assert level == 1 + below
        parents = {self.steps[m].parent for m in members}
        assert len(parents) == 1
        if step >= 0:
            assert parents == {step}
            assert sorted(members) == self.children(step)
            members = [step]
        self.ids.append(ids)
        self.level.append(level)
        self.members.append(members)

    def children(self, step):
        return [s for s, other in enumerate(self.steps) if other.parent == step]

    def rule(self):
        """Which nodes have to be walked, with which operands; the plan's cuts are these."""
        walked, expected, ready = set(), [], {}  # ready: a step's code
        of_framed = {row[0]: k for k, row in enumerate(self.framed) if row[0] >= 0}
        parts = {(r[1], r[2]): k for k, r in enumerate(self.framed)}
        made = 0
        for s, step in enumerate(self.steps):
            if step.mode >= 0:
                ready[s] = -(s + 1)
                continue
            children = self.children(s)
            codes = [ready[c] for c in children if c in ready]
            whole = len(codes) == len(children)
            key = lambda c: min(self.operand(c)[3])  # noqa: E731
            if whole and len(codes) == 1 and self.operand(codes[0])[1] <= self.limit:
                ready[s] = of_framed[s]
                made += 1
                continue
            while len(codes) > 1 and self.limit:
                pair = sorted(codes, key=lambda c: (self.operand(c)[1], key(c)))[:2]
                left, right = sorted(pair, key=key)
                both = numpy.stack([self.operand(left)[0], self.operand(right)[0]], axis=1)
                if len(numpy.unique(both, axis=0)) > self.limit:
                    break
                k = parts[left, right]
                made += 1
                codes = [c for c in codes if c not in pair] + [k]
            if whole and len(codes) == 1 and len(children) > 1:
                ready[s] = of_framed[s]
                assert ready[s] == codes[0]
                continue
            walked.add(s)
            expected += [(c, s) for c in sorted(codes, key=key)]
        assert made == len(self.framed)
        if self.form != FRAMED_ROOT:
            assert [tuple(cut[:2]) for cut in self.cuts] == expected
        return walked


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


def test_errors(monkeypatch):
    layout = Layout.make(ModeTree.balanced(4), [2, 3, 4, 5], 2)
    good = uniform(layout, 6)
    for bad in (good.int(), good[:, :3], good[0], good.double()):
        with pytest.raises(ValueError, match=r"IndexPlan: indices must be int64 \[B, 4\], got"):
            IndexPlan.make(layout, bad)
    with pytest.raises(ValueError, match="got list"):
        index_plan(layout, good.tolist())
    for index in (3, -1, 2**40):
        bad = good.clone()
        bad[4, 1] = index
        sentence = f"index {index} of mode 1 is out of range, its dimension is 3"
        with pytest.raises(IndexError, match=f"^IndexPlan: {sentence}$"):
            index_plan(layout, bad)
    other = ModeTree.balanced(3)
    with pytest.raises(ValueError, match="no node of this plan's tree"):
        IndexPlan.make(layout, good).rows_of(other.root)

    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(index_build, "import_module", missing)
    with pytest.raises(RuntimeError, match=r"IndexPlan: .*htfkernels\._plan cannot be loaded"):
        IndexPlan.make(layout, good)


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
    assert not IndexPlan.pays(Layout.make(tree, 4, 1), 8192)  # nothing to save
    assert not IndexPlan.pays(Layout.make(tree, 5000, 64), 8192)  # no repetition
    assert not IndexPlan.pays(Layout.make(tree, 10**9, 64), 8192)


# -- the cache ------------------------------------------------------------------------------------


def test_a_plan_is_kept_with_its_tensor():
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    other = Layout.make(ModeTree.halves(4), 2, 3)
    indices = uniform(layout, 50)
    plan = index_plan(layout, indices)
    assert plan.indices is indices and index_plan(layout, indices) is plan
    assert index_plan(other, indices).layout is other
    assert index_plan(layout, indices) is plan
    assert index_plan(layout, indices.clone()) is not plan
    lists = plan.lists
    del plan
    assert index_plan(layout, indices).lists is lists  # not built again
    indices[0] = 0
    again = index_plan(layout, indices)
    assert again.lists is not lists
    Check(again).run()


def test_a_plan_of_inference_mode():
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    with torch.inference_mode():
        indices = uniform(layout, 50)
        Check(index_plan(layout, indices)).run()


@pytest.mark.parametrize("first", ["plan", "tensor"])
def test_memory_is_given_back_without_the_collector(first):
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    indices = uniform(layout, 50)
    plan = index_plan(layout, indices)
    before = len(module._plans)
    alive = [weakref.ref(indices), weakref.ref(plan), weakref.ref(plan.lists)]
    gc.disable()
    try:
        if first == "plan":
            del plan
            assert [r() is not None for r in alive] == [True, False, True]
            del indices
        else:
            del indices
            assert [r() is not None for r in alive] == [True, True, True]
            del plan
        assert [r() for r in alive] == [None, None, None]
        assert len(module._plans) == before - 1
    finally:
        gc.enable()


def test_examples_in_docstrings_run():
    import doctest

    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
