"""What the whole-tree kernels are told: cuts, tables, shared memory, times. Runs no kernel."""

from __future__ import annotations

import pytest
import torch

from htfkernels import testing
from htfkernels.cuda.whole_tree import geometry as tree_geometry
from htfkernels.cuda.whole_tree import tables as tree_tables
from htfkernels.cuda.whole_tree import tree
from htfkernels.cuda.whole_tree.geometry import Machine
from htfkernels.ops.evaluate import reference
from htfkernels.runtime import operations
from htfkernels.tree import ModeTree
from htfkernels.tree.layout import Layout

CASES = [c for c in testing.cases() if c.batch]
T = ModeTree
F64 = torch.float64


def parts(table):
    """Each task's steps, as (fields by name, list)."""
    numbers = table.tolist()
    first = numbers[0]
    for at in range(0, first, 3):
        begin, size, steps = numbers[at : at + 3]
        own = numbers[begin : begin + size]
        found = []
        for s in range(steps):
            step = tree_tables._Record(*own[s * tree.FIELDS : (s + 1) * tree.FIELDS])
            found.append((step, own[step.list_at : step.list_at + step.children]))
        yield found


def weight(weights, step):
    rows = weights[step.group].flatten(0, 1)
    return rows[step.weight : step.weight + step.rows]


def product(factors):
    return torch.stack(list(factors)).prod(0)


def forward(cut, weights, x):
    """A forward table, as the kernel goes through it: blocks one after the other, the last to
    arrive going on."""
    columns = tree_tables.messages(cut)[1]
    messages = [torch.full((x.shape[0],), torch.nan, dtype=F64) for _ in range(columns)]
    arrived = [0] * len(cut.above)
    result = None
    for steps in parts(tree_tables.forward_table(cut)):
        slots = [None] * cut.sizes[False][0]
        for step, listed in steps:
            if step.children:
                arrived[step.arrival] += 1
                if arrived[step.arrival] < step.children:
                    break
                arrived[step.arrival] = 0
                at = [torch.stack(messages[c : c + step.rows], 1) for c in listed]
                slots[0] = product(at)
            operand = x[:, step.vectors : step.vectors + step.rows]
            operand = operand if step.vectors >= 0 else slots[step.source]
            if step.group < 0:
                message = operand.sum(1, keepdim=True)
            else:
                message = operand @ weight(weights, step)
            if step.target >= 0:
                before = 1 if step.kind else slots[step.target]
                slots[step.target] = before * message
            elif step.message >= 0:
                messages[step.message : step.message + step.cols] = message.unbind(1)
            else:
                result = message
    assert not any(arrived)
    return result, messages


def backward(cut, weights, x, grad, messages, needs, gradients, direct):
    """A backward table, as the kernel goes through it."""
    size = gradients.total if direct else gradients.numbers
    found, grad_x = torch.full((size,), torch.nan, dtype=F64), torch.full_like(x, torch.nan)
    table = tree_tables.backward_table(cut, needs, gradients, direct)
    for steps in parts(table):
        slots = [None] * cut.sizes[True][0]
        for n, (step, listed) in enumerate(steps):
            leaf = step.vectors >= 0
            if leaf:
                operand = x[:, step.vectors : step.vectors + step.rows]
            elif step.kind == tree_tables.PATH:
                others = [torch.stack(messages[c : c + step.rows], 1) for c in listed]
                operand = product(others)
            else:
                operand = product(slots[c] for c in listed)
            if step.kind == tree_tables.UP:
                slots[step.target] = operand @ weight(weights, step)
                continue
            if step.flags & tree_tables.LOAD_GRADIENT:
                assert all(s.kind == tree_tables.UP for s, _ in steps[:n])
                slots[step.source] = grad
            g = slots[step.source]
            if step.flags & tree_tables.WEIGHT_GRADIENT:
                at = step.partial
                assert found[at : at + step.rows * step.cols].isnan().all()
                found[at : at + step.rows * step.cols] = (operand.T @ g).flatten()
            if not step.flags & tree_tables.OPERAND_GRADIENT:
                continue
            w = weight(weights, step) if step.group >= 0 else grad.new_ones(step.rows, 1)
            down = g @ w.T
            if leaf:
                grad_x[:, step.vectors : step.vectors + step.rows] = down
            elif step.kind == tree_tables.PATH:
                rest = [m for i, m in enumerate(others) if i != step.on_path]
                slots[step.source] = down * product(rest) if rest else down
            else:
                for i, to in enumerate(down * _others([slots[c] for c in listed])):
                    slots[listed[i]] = to
    return found, grad_x


def _others(factors):
    kept = range(len(factors))
    ones = torch.ones_like(factors[0])
    return torch.stack([product([ones, *(factors[i] for i in kept if i != n)]) for n in kept])


def given(case):
    """Weights, vectors in a row, the cotangent, and the reference's result and gradients."""
    layout = case.layout
    inputs = testing.make_inputs(case, F64)
    vectors = inputs.vectors
    x = vectors.flatten(1) if isinstance(vectors, torch.Tensor) else torch.cat(vectors, 1)
    leaves = [t.requires_grad_() for t in (*inputs.weights, x.detach())]
    result = reference.evaluate(layout, leaves[:-1], leaves[-1])
    grad = torch.randn_like(result)
    wanted = torch.autograd.grad(result, leaves, grad)
    return [t.detach() for t in leaves], grad, result.detach(), wanted


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_cut_computes_the_tree(case):
    (*weights, x), grad, result, wanted = given(case)
    made = tree.Tree(case.layout.program)
    for cut in made.cuts:
        found, messages = forward(cut, weights, x)
        torch.testing.assert_close(found, result)
        for needs in ([1] * len(wanted), [0] * len(weights) + [1], [1] + [0] * len(weights)):
            gradients = tree_tables.Gradients(made, needs)
            direct = not gradients.shared
            args = (cut, weights, x, grad, messages, needs, gradients)
            parts_of, grad_x = backward(*args, direct)
            for g, (at, shape) in gradients.places.items():
                if direct:
                    one = parts_of[at : at + wanted[g].numel()].view(shape)
                else:
                    row = gradients.sums[list(gradients.places).index(g)].tolist()
                    assert row[0] == at
                    every = parts_of[row[2] : row[2] + row[1] * row[3]]
                    one = every.view(row[3], -1).sum(0).view(shape)
                torch.testing.assert_close(one, wanted[g])
            assert [g in gradients.places for g in range(len(weights))] == [
                bool(n) for n in needs[:-1]
            ]
            if needs[-1]:
                torch.testing.assert_close(grad_x, wanted[-1])


def test_no_gradient_means_no_steps():
    made = tree.Tree(Layout.make(T.balanced(8), 3, 4).program)
    needs = [0] * (made.groups + 1)
    gradients = tree_tables.Gradients(made, needs)
    table = tree_tables.backward_table(made.cuts[2], needs, gradients, True)
    assert [len(steps) for steps in parts(table)] == [0] * len(made.cuts[2].roots)
    assert gradients.total == 0


def test_owners_of_a_binary_tree_are_different_tasks():
    made = tree.Tree(Layout.make(T.balanced(16), 3, 4).program)
    cut = made.cuts[-1]
    assert len(cut.roots) == 16
    gradients = tree_tables.Gradients(made, [1] * (made.groups + 1))
    owned = [
        sum(s.kind == tree_tables.PATH and s.flags & 1 for s, _ in steps)
        for steps in parts(
            tree_tables.backward_table(cut, [1] * (made.groups + 1), gradients, True)
        )
    ]
    assert sum(owned) == 15 and max(owned) == 1


@pytest.mark.parametrize("backward", [False, True])
def test_parts_of_a_table_are_as_long_as_planned(backward):
    for case in CASES:
        made = tree.Tree(case.layout.program)
        needs = [1] * (made.groups + 1)
        gradients = tree_tables.Gradients(made, needs)
        for cut in made.cuts:
            if backward:
                table = tree_tables.backward_table(cut, needs, gradients, True)
            else:
                table = tree_tables.forward_table(cut)
            longest = max(table[1 : 3 * len(cut.roots) : 3].tolist())
            planned = cut.sizes[backward][1]
            assert longest <= planned < longest + 32 + tree.FIELDS, (case, cut.roots)


def test_a_batch_of_one_is_spread_over_subtrees_and_a_large_one_over_tiles():
    layout = Layout.make(T.balanced(64), 64, 64)
    how = (torch.float32, tree.MATH["tf32"], Machine())
    made = tree.tree_of(layout)
    one, many = (tree_geometry.geometry(made, batch, *how) for batch in (1, 4096))
    assert len(one.cut.roots) >= 8 and one.tiles == 1
    assert len(many.cut.roots) <= 2 and many.tiles >= 128
    few = tree_geometry.geometry(made, 1, torch.float32, 0, Machine())
    assert few.rows == 4  # where tensor cores do not ask for 16


def test_blocks_fit_into_the_shared_memory_there_is():
    layout = Layout.make(T.balanced(64), 64, 64)
    made = tree.tree_of(layout)
    for shared in (99 * 1024, 163 * 1024, 227 * 1024):
        for dtype, math in tree_geometry.TILES:
            machine = Machine(100, shared)
            for batch in (1, 100, 5000):
                both = tree_geometry.geometries(made, batch, dtype, math, machine)
                found = (tree_geometry.geometry(made, batch, dtype, math, machine), *both)
                assert all(g.shared_bytes <= shared for g in found)
                assert both[0].cut is both[1].cut
                assert 1 <= both[1].splits <= both[1].tiles
    with pytest.raises(RuntimeError, match="no subtree of this tree of 127 nodes fits into 1000"):
        tree_geometry.geometry(made, 1, torch.float32, 0, Machine(132, 1000))


@pytest.mark.parametrize(
    ("dtype", "math", "rows"), [(torch.float32, 0, 16), (F64, 0, 16), (torch.float32, 1, 32)]
)
def test_splits_are_on_the_device_together(monkeypatch, dtype, math, rows):
    """Blocks that wait for others to end would double the time."""
    monkeypatch.setattr(tree_geometry, "TILES", {(dtype, math): (rows,)})
    made = tree.tree_of(Layout.make(T.balanced(64), 8, 16))
    for batch in (256, 1000, 5000):
        found = tree_geometry.geometries(made, batch, dtype, math, Machine())[1]
        alone = rows == 32 or dtype == F64 or 2 * (found.shared_bytes + 1024) > 228 * 1024
        assert len(found.cut.roots) * found.splits <= 132 * (1 if alone else 2)


def test_seconds():
    layout = Layout.make(T.balanced(32), 16, 64)

    def time(rows, precision="tf32", backward=False, processors=132):
        return tree_geometry.seconds(layout, rows, torch.float32, precision, processors, backward)

    assert 4e-6 < time(1) < 3e-5
    assert time(1) <= time(4096) < time(4096, "ieee") < time(4096, "ieee", True)
    assert time(4096) < time(4096, processors=66)


@pytest.mark.parametrize(
    ("layout", "dtype", "sentence"),
    [
        (Layout.make(T.balanced(4), 3, 65), F64, "at most 64, and this one has 65"),
        (Layout.make(T.balanced(4), 3, 8, 100), F64, "at most 64, and this one has 100"),
        (Layout.make(T.balanced(4), 3, 8), torch.float16, "not in torch.float16"),
        (Layout.make(T.flat(2100), 3, 8), F64, "at most 2048 nodes, and this one has 2101"),
        (Layout.make(T.flat(401), range(1, 402), 8), F64, "at most 400 groups"),
        (Layout.make(T.flat(3), 2**28, 8), F64, r"fewer than 2\^31 weights"),
        (Layout.make(T.balanced(4), 300, 64), F64, None),
    ],
)
def test_limits(layout, dtype, sentence):
    reason = operations.why_not("cuda", "evaluate", layout, dtype)
    if sentence is None:
        assert reason is None
    else:
        with pytest.raises(ValueError, match=sentence):
            raise ValueError(reason)


def test_entries_of_long_modes_are_left_to_others():
    layout = Layout.make(T.balanced(4), [3, 300, 3, 3], 8)
    reason = operations.why_not("cuda", "evaluate_at", layout, F64)
    assert reason is not None and reason.endswith("at most 256, and this one has 300")
    assert (
        operations.why_not("cuda", "evaluate_at", Layout.make(T.balanced(4), 256, 8), F64) is None
    )


def test_dtypes_without_a_layout():
    assert operations.why_not("cuda", "evaluate", None, torch.bfloat16) is None
