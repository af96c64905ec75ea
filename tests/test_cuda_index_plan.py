"""Index plans built on a GPU, or in an emulation of it, are those the CPU builds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htfkernels import Layout, ModeTree, testing, use_backend
from htfkernels.ops.index_plan import cuda as loops
from htfkernels.ops.index_plan.cuda import IN_RANGE, OnDevice
from htfkernels.runtime import cuda_module as module
from htfkernels.schedule import index_plan
from htfkernels.schedule.index_build import Builder, OnCpu, Request
from htfkernels.schedule.index_plan import BILINEAR, FRAMED_ROOT, NO_OPERAND, WALK, IndexPlan

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
        yield request.param
        _C_emulated.set_backward(False)
    else:
        yield request.param


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


def assert_pairs(requests):
    """All requests at once, against each by itself on the CPU; with limits that are just kept, and
    just exceeded by some."""
    n = len(requests[0].left_ids)
    exact = [native.distinct_pairs(r[0].numpy(), r[1], r[2].numpy(), r[3], n) for r in requests]
    rows = [len(left) for _, left, _ in exact]
    there = [[x.to(ON) if isinstance(x, torch.Tensor) else x for x in r] for r in requests]
    for limit in sorted({max(rows), min(rows), max(max(rows) - 1, 0)}):
        counts = torch.zeros(len(requests) + 3, dtype=torch.int32, device=ON)
        left, left_rows, right, right_rows = map(list, zip(*there, strict=True))
        made = module.call("plan_pairs", left, left_rows, right, right_rows, limit, counts, 2)
        assert counts.tolist() == [0, 0, *rows, 0]
        for i, (count, of_request) in enumerate(zip(rows, exact, strict=True)):
            if count <= limit:
                ids, left, right = made[3 * i : 3 * i + 3]
                for mine, expected in zip(
                    (ids, left[:count], right[:count]), of_request, strict=True
                ):
                    assert torch.equal(mine.cpu(), torch.from_numpy(expected))


def drawn(n, left, right):
    some = torch.randint(left, (max(n // 5, 1),)), torch.randint(right, (max(n // 5, 1),))
    which = torch.randint(len(some[0]), (n,))
    return Request(some[0][which].int(), left, some[1][which].int(), right)


# Few cells, a table, keys of 32 bits, keys of 64 bits.
@pytest.mark.parametrize("dim", [40, 700, 50_000, 2**31 - 1])
@pytest.mark.parametrize("n", [1, 2, 1024, 20_000])
def test_every_way_of_combining(dim, n, order):
    assert_pairs([drawn(n, *dims) for dims in [(dim, dim), (3, dim), (dim, 5)]])
    if n > 2 and dim < 2**20:
        layout = Layout.make(ModeTree.balanced(4), [dim, dim, 3, dim], 1)
        some = uniform(layout, n // 5)
        assert assert_same(layout, some[torch.randint(len(some), (n,))])[0] == FRAMED_ROOT
        assert_same(layout, uniform(layout, n))


def test_many_requests_at_once(order):
    """More than a launch takes, of all ways in turn."""
    dims = [40, 700, 3, 1200, 2**20, 97]
    assert_pairs([drawn(300, dims[i % 6], dims[i * i % 5]) for i in range(75)])


def test_no_samples():
    assert_pairs([drawn(0, 3, 4), drawn(0, 50_000, 50_000)])


def test_the_widest_cells_of_a_table_and_of_keys():
    """The last cells there can be: nothing overflows."""
    rows = [1, 31, 32, 33, 96, 97, 1024, 2**15, 2**16, 2**31 - 1]
    requests = []
    for left in rows:
        for right in rows:
            a = torch.tensor([left - 1, 0, left - 1, left - 1, left // 2, 0], dtype=torch.int32)
            b = torch.tensor([right - 1, 0, 0, right - 1, right // 2, 0], dtype=torch.int32)
            requests.append(Request(a, left, b, right))
    assert_pairs(requests)


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


def assert_grouped(ids, buckets):
    """Lists grouped together, against each by itself on the CPU; and their starts, when sorted."""
    made = module.call("plan_group", [x.to(ON) for x in ids], buckets)
    ascending = [x.sort().values for x in ids]
    starts = module.call("plan_starts", [x.to(ON) for x in ascending], buckets)
    assert len(made) == 2 * len(ids) and len(starts) == len(ids)
    for i, (x, count) in enumerate(zip(ids, buckets, strict=True)):
        start, order = native.group(x.numpy(), count)
        assert torch.equal(made[i].cpu(), torch.from_numpy(start))
        assert torch.equal(made[len(ids) + i].cpu(), torch.from_numpy(order))
        exact = native.starts(ascending[i].numpy(), count)
        assert torch.equal(starts[i].cpu(), torch.from_numpy(exact))


@given(st.integers(1, 70), st.integers(0, 1500), st.integers(0, 300), st.integers(0, 99))
def test_group_and_starts(lists, n, buckets, seed):
    torch.manual_seed(seed)
    counts = torch.randint(buckets + 1, (lists,)).tolist()
    sizes = [min(n, 300) if i else n for i in range(lists)]
    ids = [
        torch.randint(max(c, 1), (size if c else 0,), dtype=torch.int32)
        for c, size in zip(counts, sizes, strict=True)
    ]
    assert_grouped(ids, counts)


def test_groups_that_do_not_fit_one_sort():
    short = torch.randint(3, (50,), dtype=torch.int32)
    long = torch.randint(9, (2**21 + 7,), dtype=torch.int32)
    assert_grouped([short, long, long.flip(0), short], [3, 9, 11, 4])
    if ON == "cuda":  # more bits than a key has; the start takes 4 GB
        wide = torch.randint(2**30, (700,), dtype=torch.int32)
        made = module.call(
            "plan_group", [x.to(ON) for x in [wide, *[short] * 5]], [2**30, *[3] * 5]
        )
        for mine, x in zip(made[6:], [wide, *[short] * 5], strict=True):
            assert torch.equal(mine.cpu(), x.argsort(stable=True).int())


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
            sentence = f"index {index} of mode {mode} is out of range, its dimension is 5"
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

    monkeypatch.setattr(loops, "OnDevice", Watched)
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
        module.call("plan_pairs", [ids], [2], [ids[:3]], [2], 1, counts, 0)
    with pytest.raises(RuntimeError, match=r"plan_pairs: counts must be .* 2 entries from 1 on"):
        module.call("plan_pairs", [ids] * 2, [2] * 2, [ids] * 2, [2] * 2, 1, counts, 1)
    with pytest.raises(RuntimeError, match="plan_pairs: rows and limit must be below"):
        module.call("plan_pairs", [ids], [2**31], [ids], [2], 1, counts, 0)
    with pytest.raises(RuntimeError, match="plan_pairs: expected as many ids as rows"):
        module.call("plan_pairs", [ids], [2], [ids], [2, 2], 1, counts, 0)
    for op in ("plan_group", "plan_starts"):
        with pytest.raises(RuntimeError, match=f"{op}: expected contiguous ids"):
            module.call(op, [ids[::2]], [3])
        with pytest.raises(RuntimeError, match=f"{op}: expected as many lists"):
            module.call(op, [ids], [3, 3])
    indices = torch.zeros(2, 2, dtype=torch.int64, device=ON)
    with pytest.raises(RuntimeError, match=r"plan_columns: indices must be Long \[B, 3\]"):
        module.call("plan_columns", indices, [1, 2, 3], counts)
    with pytest.raises(RuntimeError, match="plan_columns: bad must be"):
        module.call("plan_columns", indices, [1, 1], counts[:1])
    with pytest.raises(RuntimeError, match="plan_columns: dims must be in"):
        module.call("plan_columns", indices, [0, 1], counts)
