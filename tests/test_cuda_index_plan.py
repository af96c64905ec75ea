"""Index plans built on a GPU, or in an emulation of it, are those the CPU builds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htfkernels import Layout, ModeTree, index_plan, testing, use_backend
from htfkernels.cuda import module
from htfkernels.cuda.index_loops import IN_RANGE, OnDevice
from htfkernels.index_build import Builder, OnCpu, Request
from htfkernels.index_plan import BILINEAR, FRAMED_ROOT, NO_OPERAND, WALK, IndexPlan

ON = module.device_type()
REASON = module.why_not(ON)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

native = pytest.importorskip("htfkernels._plan")


def uniform(layout, batch):
    return torch.stack([torch.randint(d, (batch,)) for d in layout.mode_dims], dim=1)


def grid(layout):
    """All index tuples, or the first of them."""
    count = min(layout.num_entries // layout.out_features, 600)
    rest, columns = torch.arange(count), []
    for d in reversed(layout.mode_dims):
        columns.append(rest % d)
        rest = rest // d
    return torch.stack(columns[::-1], dim=1)


def index_sets(layout):
    few = uniform(layout, 5)
    return {
        "random": uniform(layout, 65),
        "many": uniform(layout, 400),
        "grid": grid(layout),
        "duplicates": few[torch.randint(5, (90,))],
        "the same": few[:1].expand(40, -1),
        "two": few[:2],
        "one": few[:1],
        "none": few[:0],
    }


def assert_same(layout, indices):
    """The plan, built both ways."""
    table, lists, form, framed, cuts = Builder(layout, indices, OnCpu).build()
    builder = Builder(layout, indices.to(ON), OnDevice)
    made = builder.build()
    assert made[0].device.type == "cpu" and made[1].device.type == ON
    assert torch.equal(made[0], table)
    assert made[1].dtype == torch.int32 and torch.equal(made[1].cpu(), lists)
    assert made[2:] == (form, framed, cuts)
    return form, framed, builder.loops.waits


@pytest.fixture(params=["forward", "backward"] if module.emulated() else ["gpu"])
def order(request):
    """Both orders of threads, where there are two."""
    if request.param == "backward":
        from htfkernels import _C_emulated

        _C_emulated.set_backward(True)
        yield
        _C_emulated.set_backward(False)
    else:
        yield


def flat_layout(**options):
    return Layout.make(ModeTree.flat(5), [3, 2, 9, 4, 2], 6, **options)


def all_cases():
    more = [
        testing.Case("flat5", flat_layout(), 1),
        testing.Case("flat5_sum", flat_layout(root="sum"), 1),
        testing.Case("flat5_outputs", flat_layout(out_features=3), 1),
    ]
    return testing.cases() + testing.small_cases() + more


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_equal_to_the_cpu_plan(case):
    for indices in index_sets(case.layout).values():
        assert_same(case.layout, indices)


@given(st.integers(2, 9), st.integers(0, 10**6), st.integers(0, 120))
def test_random_trees(order, seed, batch):
    torch.manual_seed(seed)
    dims = torch.randint(1, 7, (order,)).tolist()
    layout = Layout.make(testing.random_tree(order, seed), dims, 2, 1 + seed % 2)
    assert_same(layout, uniform(layout, batch))


# Cells in a table, keys of 32 bits, keys of 64 bits.
@pytest.mark.parametrize("dim", [40, 50_000, 2**31 - 1])
@pytest.mark.parametrize("batch", [2, 1024, 20_000])
def test_every_way_of_combining(dim, batch, order):
    layout = Layout.make(ModeTree.balanced(4), [dim, dim, 3, dim], 1)
    some = uniform(layout, max(batch // 5, 1))
    # Lists of a start for every index would take gigabytes.
    if dim < 2**20:
        assert assert_same(layout, some[torch.randint(len(some), (batch,))])[0] == FRAMED_ROOT
        assert_same(layout, uniform(layout, batch))
    loops = OnDevice(layout, some.to(ON))
    columns = [c.cpu().numpy() for c in some.int().unbind(1)]
    for a, b in [(0, 1), (2, 3), (3, 2)]:
        left, right = layout.mode_dims[a], layout.mode_dims[b]
        asked = Request(columns[a].copy(), left, columns[b].copy(), right)
        expected = native.distinct_pairs(*asked, len(some))
        there = [torch.from_numpy(x).to(ON) if hasattr(x, "shape") else x for x in asked]
        (found,) = loops.distinct_pairs([Request(*there)], len(some))
        for mine, exact in zip(found, expected, strict=True):
            assert torch.equal(mine.cpu(), torch.from_numpy(exact))
        if (rows := len(expected[1])) > 0:
            assert loops.distinct_pairs([Request(*there)], rows - 1) == [None]
            assert loops.distinct_pairs([Request(*there)], rows) != [None]


def test_the_widest_cells_of_a_table_and_of_keys():
    """The last cells there can be: nothing overflows."""
    layout = Layout.make(ModeTree.balanced(2), 2, 1)
    loops = OnDevice(layout, torch.zeros(2, 2, dtype=torch.int64, device=ON))
    rows = [31, 32, 33, 96, 97, 1024, 2**15, 2**16, 2**31 - 1]
    for left in rows:
        for right in (*rows, 1):
            a = torch.tensor([left - 1, 0, left - 1, left - 1, left // 2, 0], dtype=torch.int32)
            b = torch.tensor([right - 1, 0, 0, right - 1, right // 2, 0], dtype=torch.int32)
            expected = native.distinct_pairs(a.numpy(), left, b.numpy(), right, 6)
            (found,) = loops.distinct_pairs([Request(a.to(ON), left, b.to(ON), right)], 6)
            for mine, exact in zip(found, expected, strict=True):
                assert torch.equal(mine.cpu(), torch.from_numpy(exact))


def test_many_tiles_of_a_table(order):
    """More than a block has threads, and sectors full of pairs."""
    layout = Layout.make(ModeTree.balanced(2), [7000, 1100], 1)
    i = torch.arange(3200)
    indices = torch.stack([i * 2, i % 1100], dim=1)
    indices[100:500, 0] = 17
    indices[100:500, 1] = torch.arange(500, 900)
    form, framed, _ = assert_same(layout, indices.repeat(2, 1))
    assert form == FRAMED_ROOT and framed[0].rows == 3200


def test_many_tiles_of_keys():
    layout = Layout.make(ModeTree.balanced(2), 20_000, 1)
    some = uniform(layout, 200_000)
    form, _, _ = assert_same(layout, some[torch.randint(len(some), (550_000,))])
    assert form == FRAMED_ROOT


@given(st.integers(0, 3000), st.integers(0, 300), st.integers(0, 99))
def test_group_and_starts(n, buckets, seed):
    torch.manual_seed(seed)
    n = n if buckets else 0
    ids = torch.randint(max(buckets, 1), (n,), dtype=torch.int32)
    start, order = native.group(ids.numpy(), buckets)
    mine = module.call("plan_group", ids.to(ON), buckets)
    assert torch.equal(mine[0].cpu(), torch.from_numpy(start))
    assert torch.equal(mine[1].cpu(), torch.from_numpy(order))
    ascending = ids.sort().values
    assert torch.equal(
        module.call("plan_starts", ascending.to(ON), buckets).cpu(),
        torch.from_numpy(native.starts(ascending.numpy(), buckets)),
    )


@pytest.mark.parametrize("modes", [1, 2, 3, 8, 31, 32, 33, 70])
def test_columns_of_any_strides(modes, order):
    samples = 4200 if modes < 3 else 300
    dims = torch.randint(1, 50, (modes,)).tolist()
    indices = torch.stack([torch.randint(d, (samples,)) for d in dims], dim=1)
    double = indices.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)
    ways = [indices, indices.t().contiguous().t(), double[::2, ::3], indices[:1].expand(300, -1)]
    for same in ways:
        bad = torch.full((modes,), IN_RANGE, dtype=torch.int32, device=ON)
        there = same.to(ON) if ON == "cpu" or same.is_contiguous() else _moved(same)
        made = module.call("plan_columns", there, dims, bad)
        assert torch.equal(made.cpu(), same.t().int())
        assert (bad == IN_RANGE).all()


def _moved(x):
    """On the device, with the same strides."""
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=ON)
    return moved.copy_(x) if 0 not in x.stride() else x[:1].to(ON).expand(len(x), -1)


def test_out_of_range(order):
    layout = Layout.make(ModeTree.balanced(40), 5, 2)
    good = uniform(layout, 300)
    for mode, sample in [(0, 0), (1, 299), (33, 150), (39, 7)]:
        for index in (5, -1, 2**40, -(2**63)):
            bad = good.clone()
            bad[sample, mode] = index
            bad[sample + 1 :: 3, mode] = 77  # the first is named
            sentence = (
                f"IndexPlan: index {index} of mode {mode} is out of range, its dimension is 5"
            )
            with pytest.raises(IndexError, match=f"^{sentence}$"):
                Builder(layout, bad.to(ON), OnDevice).build()
    alone = good[:1].clone()
    alone[0, 3] = 9
    with pytest.raises(IndexError, match="index 9 of mode 3"):
        Builder(layout, alone.to(ON), OnDevice).build()


def test_waits():
    """One for each height of a binary tree; fewer where nothing is left to combine."""
    layout = Layout.make(ModeTree.balanced(16), 2, 1)
    same = uniform(layout, 1).expand(10, -1)
    assert assert_same(layout, same)[2] == 4
    assert assert_same(layout, uniform(layout, 10))[2] <= 4
    assert assert_same(layout, same[:1])[2] == 1  # whether the indices are in range
    assert assert_same(layout, same[:0])[2] == 0
    assert assert_same(flat_layout(), uniform(flat_layout(), 1).expand(9, -1))[2] == 4


def test_the_three_forms_and_irregular_trees():
    layout = Layout.make(ModeTree.balanced(4), 3, 5)
    assert assert_same(layout, grid(layout))[0] == BILINEAR
    assert assert_same(layout, grid(layout).repeat(2, 1))[0] == FRAMED_ROOT
    chain = Layout.make(ModeTree.chain(4), 6, 2)
    form, framed, _ = assert_same(chain, uniform(chain, 200))
    assert form == FRAMED_ROOT and any(row.right == NO_OPERAND for row in framed)
    tall = Layout.make(ModeTree.from_nested((((0, 1), 2, 3), (4, (5, 6, 7)))), 2, 2)
    for batch in (3, 40, 600):
        assert_same(tall, uniform(tall, batch))


def test_make_builds_where_the_kernels_run(monkeypatch):
    layout = Layout.make(ModeTree.balanced(4), 3, 5)
    indices = uniform(layout, 50).to(ON)
    built = []

    class Watched(OnDevice):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            built.append(self)

    monkeypatch.setattr(index_plan, "OnDevice", Watched)
    with use_backend("cuda"):
        plan = IndexPlan.make(layout, indices)
    assert len(built) == 1 and plan.lists.device == indices.device
    with use_backend("reference"):
        other = IndexPlan.make(layout, indices)
        assert len(built) == 1  # too few to be worth it
        assert torch.equal(plan.table, other.table) and torch.equal(plan.lists, other.lists)
        monkeypatch.setattr(index_plan, "WORTH_LAUNCHES", 50)
        IndexPlan.make(layout, indices)
    assert len(built) == (2 if ON == "cuda" else 1)
    assert plan.form in (WALK, BILINEAR, FRAMED_ROOT) and plan.framed == other.framed


def test_bad_arguments():
    ids = torch.zeros(4, dtype=torch.int32, device=ON)
    counts = torch.zeros(2, dtype=torch.int32, device=ON)
    with pytest.raises(RuntimeError, match=r"plan_pairs: ids must be .* got Int \[4\] and Int \[3"):
        module.call("plan_pairs", ids, 2, ids[:3], 2, 1, counts, 0)
    with pytest.raises(RuntimeError, match=r"plan_pairs: counts must be .* with an entry 2"):
        module.call("plan_pairs", ids, 2, ids, 2, 1, counts, 2)
    with pytest.raises(RuntimeError, match="plan_pairs: rows and limit must be below"):
        module.call("plan_pairs", ids, 2**31, ids, 2, 1, counts, 0)
    for op in ("plan_group", "plan_starts"):
        with pytest.raises(RuntimeError, match=f"{op}: expected contiguous ids"):
            module.call(op, ids[::2], 3)
    with pytest.raises(RuntimeError, match=r"plan_columns: indices must be Long \[B, 3\]"):
        module.call("plan_columns", ids.view(2, 2), [1, 2, 3], counts)
    with pytest.raises(RuntimeError, match="plan_columns: bad must be"):
        module.call(
            "plan_columns", torch.zeros(2, 3, dtype=torch.int64, device=ON), [1] * 3, counts
        )
    with pytest.raises(RuntimeError, match="plan_columns: dims must be in"):
        module.call("plan_columns", torch.zeros(2, 2, dtype=torch.int64, device=ON), [0, 1], counts)
