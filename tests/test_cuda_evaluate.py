"""The whole-tree kernels of ``evaluate`` against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.cuda.whole_tree import geometry as tree_geometry
from htfkernels.cuda.whole_tree import run as tree_run
from htfkernels.cuda.whole_tree import tree
from htfkernels.cuda.whole_tree.geometry import Machine
from htfkernels.ops.evaluate import cuda
from htfkernels.runtime import cuda_module as module
from htfkernels.tree import ModeTree
from htfkernels.tree.layout import Layout

ON = module.device_type()
REASON = module.why_not(ON)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

CASES = {c.name: c for c in testing.cases()}
T, make = ModeTree, Layout.make
CUTS = tree.Tree.cuts.func
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
HOW = [(F32, "ieee"), (F32, "tf32"), (F32, "tf32x3"), (BF16, "ieee"), (F64, "ieee")]
IDS = ["ieee", "tf32", "tf32x3", "bfloat16", "float64"]
each = pytest.mark.parametrize(("dtype", "precision"), HOW, ids=IDS)

# A flat tree of more children than a step's registers hold, one over long vectors, odd widths.
MORE = [
    testing.Case("nine_children", make(T.flat(9), 3, 20, 2), 21),
    testing.Case("long_vectors", make(T.balanced(4), [130, 65, 64, 3], [33, 16]), 18),
    testing.Case("long_even_vectors", make(T.balanced(2), 160, 48, 4), 35),
]
SOME = [
    *(CASES[n] for n in (
        "balanced7_arity3", "flat3_sum", "chain4_linear", "one_child_nodes_sum", "one_of_each",
        "outputs10", "shared8", "shared_mixed", "empty_batch", "batch1", "random7_outputs",
    )),
    *MORE,
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_plans_of_other_tests():
    tree_run._evaluations.clear()


@pytest.fixture
def choose(monkeypatch):
    """Makes plans choose among some cuts and tiles, for some number of multiprocessors."""
    real = tree_run._machine

    def choose(cut=None, rows=None, processors=None):
        tree_run._evaluations.clear()
        if cut is not None:
            cuts = property(lambda t: CUTS(t)[cut : cut + 1] or CUTS(t)[-1:])
            monkeypatch.setattr(tree.Tree, "cuts", cuts)
        if rows is not None:
            chosen = {
                how: (max(t for t in tiles if t <= max(rows, tiles[0])),)
                for how, tiles in tree_geometry.TILES.items()
            }
            monkeypatch.setattr(tree_geometry, "TILES", chosen)
        if processors is not None:
            monkeypatch.setattr(
                tree_run, "_machine", lambda device: Machine(processors, real(device).shared_bytes)
            )

    return choose


def check(case, dtype, precision, op="evaluate"):
    inputs = testing.make_inputs(case, dtype, ON)
    function, arguments = testing.operation(op, case, inputs)
    outputs = (case.batch,) if case.layout.out_features == 1 else (case.batch, -1)
    cotangent = 1 + 0.5 * torch.randn(case.batch * case.layout.out_features)
    cotangent = cotangent.view(outputs).to(ON, dtype) if case.batch else None
    if cotangent is None:
        cotangent = function(*arguments).new_zeros(function(*arguments).shape)
    gradients = testing.gradients(function)
    with hk.use_backend("cuda"), hk.use_precision(precision):
        value = function(*arguments)
        found = gradients(cotangent, *arguments)
    for actual, (exact, scale), direction in (
        (value, testing.exact(function, arguments), "forward"),
        (found, testing.exact(gradients, (cotangent, *arguments)), "backward"),
    ):
        allowed = testing.tolerance(dtype, direction, precision, len(case.tree.nodes))
        testing.assert_matches(actual, exact, dtype, direction, scale, allowed)
    return [value, *found]


@each
@pytest.mark.parametrize("case", SOME, ids=str)
def test_values_and_gradients(case, dtype, precision):
    check(case, dtype, precision)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_shared_case(name):
    check(CASES[name], F32, "ieee" if CASES[name].batch < 100 else "tf32x3")


@each
@pytest.mark.parametrize("rows", [1, 16, 32])
def test_every_tile(dtype, precision, rows, choose):
    choose(rows=rows)
    check(
        testing.Case("tiles", make(T.balanced(3), [20, 7, 66], [33, 20], 3), 37), dtype, precision
    )


@each
def test_splits_of_many_tiles(dtype, precision, choose):
    """Few blocks: a split has several tiles, and adds to the gradients of those before."""
    for processors in (1, 3):
        choose(rows=16, processors=processors)
        check(
            testing.Case("splits", make(T.balanced(4), [3, 4, 5, 6], 7, 2), 100), dtype, precision
        )


@pytest.mark.parametrize("cut", range(8))
def test_every_cut(cut, choose):
    choose(cut=cut)
    for case in (CASES["random7_outputs"], CASES["random6"], CASES["shared_mixed"]):
        check(case, F64, "ieee")


def test_the_cut_changes_nothing(choose):
    """Messages are the same numbers, whoever computes them."""
    case = CASES["halves8"]
    function, arguments = testing.operation("evaluate", case, testing.make_inputs(case, F32, ON))
    values = []
    for cut in (0, 2, 100):
        choose(cut=cut, rows=16)
        with hk.use_backend("cuda"):
            values.append(function(*arguments))
    assert all(torch.equal(values[0], v) for v in values)


def test_a_caterpillar_in_one_task_and_in_forty(choose):
    case = testing.Case("caterpillar40", CASES["caterpillar40"].layout, 3)
    for cut in (0, 20, 1000):
        choose(cut=cut)
        check(case, F32, "ieee")


@each
@pytest.mark.parametrize("rows", [1, 32])
def test_leaves_by_index(dtype, precision, rows, choose):
    choose(rows=rows, processors=8)
    for case in (CASES["random6"], CASES["shared_mixed"], CASES["chain5_sum"], *MORE[:2]):
        check(case, dtype, precision, "evaluate_at")


@pytest.mark.parametrize("cut", range(0, 8, 2))
def test_every_cut_of_leaves_by_index(cut, choose):
    choose(cut=cut)
    for case in (CASES["random7_outputs"], CASES["empty_batch"], CASES["dims_1_to_17"]):
        check(case, F64, "ieee", "evaluate_at")


@pytest.mark.skipif(not module.emulated(), reason="there are two orders only in an emulation")
@each
@pytest.mark.parametrize("op", ["evaluate", "evaluate_at"])
@pytest.mark.parametrize("rows", [1, 16, 32])
def test_the_order_of_threads_changes_nothing(dtype, precision, rows, op, choose):
    from htfkernels import _C_emulated

    choose(rows=rows, processors=4)
    for case in (CASES["random7_outputs"], CASES["shared_mixed"], MORE[1]):
        torch.manual_seed(0)
        forward = check(case, dtype, precision, op)
        _C_emulated.set_backward(True)
        try:
            torch.manual_seed(0)
            backward = check(case, dtype, precision, op)
        finally:
            _C_emulated.set_backward(False)
        assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


def raw(layout, batch, dtype, seed=0):
    """Folded weights, packed vectors, and a cotangent."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64).to(ON, dtype)

    weights = [draw(*g.shape) for g in layout.groups]
    return weights, draw(batch, layout.offsets[-1]), draw(batch, layout.out_features)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_only_what_is_needed(dtype):
    layout = make(T.from_nested(((0, 1, 2), (3,), 4)), [3, 4, 3, 5, 4], 6, share_weights=True)
    weights, x, grad = raw(layout, 9, dtype)
    program, groups = layout.program, len(layout.groups)
    _, kept = cuda.evaluate_keeping(weights, x, program, 1, precision="ieee")

    def gradients(needs, kept):
        return cuda.evaluate_backward(
            grad[:, 0], weights, x, kept, program, needs, precision="ieee"
        )

    every = gradients([1] * (groups + 1), kept)
    for needs in (
        [0] * groups + [1],
        [0] * (groups + 1),
        *([int(g == n) for g in range(groups)] + [0] for n in range(groups)),
    ):
        for g, (found, wanted) in enumerate(zip(gradients(needs, kept), every, strict=True)):
            assert torch.equal(found, wanted if needs[g] else found.new_empty(0))
    again = gradients([1] * (groups + 1), x.new_empty(0))
    assert all(torch.equal(a, b) for a, b in zip(again, every, strict=True))


def test_non_contiguous_and_unaligned_arguments():
    layout = make(T.balanced(4), 4, [8, 4])
    weights, x, grad = raw(layout, 10, F32)
    plain = cuda.evaluate_keeping(weights, x, layout.program, 1, precision="ieee")
    moved = x.new_empty(10 * 16 + 1)[1:].view(10, 16).copy_(x)
    shifted = [w.new_empty(w.numel() + 1)[1:].view(w.shape).copy_(w) for w in weights]
    turned = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights]
    for other_x, others in (
        (moved, shifted),
        (x.t().contiguous().t(), turned),
    ):
        found = cuda.evaluate_keeping(others, other_x, layout.program, 1, precision="ieee")
        assert torch.equal(found[0], plain[0])
        pair = [
            cuda.evaluate_backward(g, w, y, k, layout.program, [1] * (len(w) + 1), precision="ieee")
            for g, w, y, k in (
                (grad[:, 0], others, other_x, found[1]),
                (grad[:, 0].contiguous(), weights, x, plain[1]),
            )
        ]
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_counters_are_zero_again():
    layout = make(T.balanced(8), 3, 4)
    weights, x, _ = raw(layout, 70, F32)
    made = tree_run.evaluation(layout.program, x, x, "ieee")
    plan = made.forward(70, True)
    assert len(plan.geometry.cut.above) > 0
    counters = torch.zeros(plan.counters, dtype=torch.int32, device=ON)
    for _ in range(2):
        module.call("tree_forward", weights, x, plan.table, counters, plan.sizes)
        assert not counters.any()


def test_shared_memory_is_what_was_planned():
    for (dtype, math), tiles in tree_geometry.TILES.items():
        for rows in tiles:
            for widths in ((16, 64), (48, 16), (64, 64)):
                for backward in (False, True):
                    sizes = [math, rows, *widths, 1, 96, 5, 1]
                    like = torch.empty(0, dtype=dtype, device=ON)
                    found = module.call("tree_shared_bytes", like, not backward, sizes)
                    planned = tree_geometry.shared_bytes(dtype, math, rows, widths, 5, 96, backward)
                    assert found == planned


def test_bad_arguments():
    layout = make(T.balanced(4), 3, 4)
    weights, x, _ = raw(layout, 5, F32)
    made = tree_run.evaluation(layout.program, x, x, "ieee").forward(5, False)
    counters = torch.zeros(made.counters, dtype=torch.int32, device=ON)

    def run(weights=weights, x=x, table=made.table, sizes=made.sizes):
        return module.call("tree_forward", weights, x, table, counters, sizes)

    with pytest.raises(RuntimeError, match=r"tree_forward: x must be contiguous \[B, sum of D_n\]"):
        run(x=x.double())
    with pytest.raises(
        RuntimeError, match=r"weights must be contiguous .*, got Double \[4, 3, 4\]"
    ):
        run(weights=[weights[1], weights[0].double()])
    with pytest.raises(RuntimeError, match="the table must be int32"):
        run(table=made.table.long())
    with pytest.raises(RuntimeError, match="tree_forward: expected 9 sizes, got 3"):
        run(sizes=made.sizes[:3])
    with pytest.raises(RuntimeError, match="tiles of 8 rows are not compiled"):
        run(sizes=[0, 8, *made.sizes[2:]])
    with hk.use_backend("cuda"), pytest.raises(RuntimeError, match="at most 64, and this one has"):
        hk.HTF(T.balanced(2), 3, 65, device=ON)(torch.randn(1, 2, 3, device=ON))


@pytest.mark.skipif(ON == "cpu", reason="graphs are a GPU's")
def test_a_graph_captures_both_passes():
    layout = make(T.balanced(8), 5, 16)
    weights, x, grad = raw(layout, 33, F32)
    program, needs = layout.program, [1] * (len(weights) + 1)

    def both():
        result, kept = cuda.evaluate_keeping(weights, x, program, 1, precision="ieee")
        args = (grad[:, 0], weights, x, kept, program, needs)
        return [result, *cuda.evaluate_backward(*args, precision="ieee")]

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, both(), strict=True))


def test_spare_counters_are_given_once():
    spare = tree_run.Spare(torch.device(ON), 10)
    first, second = spare.take(4), spare.take(5)
    first += 1
    assert first.numel() == 4 and second.tolist() == [0] * 5 and spare.left == 1
    assert spare.take(11).tolist() == [0] * 11 and spare.left == 1
    assert spare.take(2).tolist() == [0, 0] and spare.left == 0
