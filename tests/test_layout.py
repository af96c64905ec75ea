"""Layouts: dimensions, folding, and the program that the compiled operators read."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import htfkernels as hk
from htfkernels import ModeTree, testing
from htfkernels.tree.layout import Layout
from htfkernels.tree.program import FIELDS, HEADER, VERSION


def test_ranks_in_three_ways():
    tree = ModeTree.balanced(5)
    one = Layout.make(tree, 2, 3)
    assert one.ranks == (3,) * len(tree.interior)
    by_level = Layout.make(tree, 2, [4, 3, 2])
    by_node = Layout.make(tree, 2, {n: {1: 4, 2: 3, 3: 2}[n.level] for n in tree.interior})
    assert by_level == by_node
    assert by_level.ranks == (4, 4, 4, 3, 3, 2)
    assert Layout.make(tree, [2] * 5, [4, 3, 2]) == by_level
    numpy = pytest.importorskip("numpy")
    assert Layout.make(tree, numpy.int64(2), numpy.array([4, 3, 2])) == by_level
    assert Layout.make(tree, numpy.full(5, 2), numpy.int64(3)) == one


def test_shapes():
    tree = ModeTree.from_nested(((0, 1), (2,), 3))
    layout = Layout.make(tree, [2, 3, 4, 5], [7, 6], out_features=2)
    shapes = {node.modes: layout.shape(node) for node in tree.interior}
    assert shapes == {(0, 1): (7, 6), (2,): (7, 6), (0, 1, 2, 3): (6, 2)}
    assert [layout.shape(leaf) for leaf in tree.leaves] == [(2, 7), (3, 7), (4, 7), (5, 6)]
    assert layout.offsets == (0, 2, 5, 9, 14)
    assert layout.num_entries == 2 * 3 * 4 * 5 * 2
    assert layout.num_parameters == 2 * 7 + 3 * 7 + 4 * 7 + 5 * 6 + 2 * 7 * 6 + 6 * 2
    assert layout.flops(10) == 20 * layout.num_parameters


def test_folding(case):
    """Every node's weight has one place, its shape, and nothing else is stored."""
    layout, tree = case.layout, case.tree
    nodes = [i for g in layout.groups for i in g.nodes]
    summed = layout.root == "sum"
    assert sorted(nodes) == [n.index for n in tree.nodes if not (summed and n.is_root)]
    assert set(layout.location) == set(nodes)
    for index, (g, slot) in layout.location.items():
        group = layout.groups[g]
        assert group.shape == (group.count, *layout.shape(tree.nodes[index]))
        assert tree.nodes[index].level == group.level
        assert slot == (0 if layout.share_weights else group.nodes.index(index))
        assert group.count == (1 if layout.share_weights else len(group.nodes))
    assert [g.level for g in layout.groups] == sorted(g.level for g in layout.groups)
    assert len({(g.level, g.rows, g.cols) for g in layout.groups}) == len(layout.groups)
    if not layout.share_weights:
        expected = sum(r * c for r, c in map(layout.shape, tree.nodes)) - summed * layout.ranks[-1]
        assert layout.num_parameters == expected


def test_value_semantics():
    tree = ModeTree.balanced(4)
    layout = Layout.make(tree, 3, 5)
    same = Layout.make(ModeTree.from_nested(((1, 0), (3, 2))), [3] * 4, [5, 5])
    assert layout == same and hash(layout) == hash(same)
    different = [
        Layout.make(tree, 3, 4),
        Layout.make(tree, 2, 5),
        Layout.make(tree, 3, 5, out_features=2),
        Layout.make(tree, 3, 5, root="sum"),
        Layout.make(tree, 3, 5, share_weights=True),
        Layout.make(ModeTree.halves(4), 3, 5),
    ]
    assert len({layout, *different}) == 7
    assert pickle.loads(pickle.dumps(layout)) == layout
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.ranks = (1, 1, 1)


def test_a_pickled_layout_brings_no_hash_along():
    """Hashes of strings differ between processes, and equal layouts must hash equally in each."""
    layout = hk.Layout.make(ModeTree.balanced(4), 3, 5)
    hash(layout), layout.program, layout.groups
    pickled = pickle.dumps(layout)
    assert b"_hash" not in pickled and len(pickled) < 1000
    assert hash(pickle.loads(pickled)) == hash(layout)


BAD = {
    "tree": (lambda: Layout.make("tree", 3, 5), "tree: expected a ModeTree, got str"),
    "no_dims": (lambda: Layout.make(T, [], 5), r"mode_dims: expected 4 \(one per mode\), got 0"),
    "dims_count": (lambda: Layout.make(T, [3, 3], 5), r"mode_dims: expected 4.*got 2"),
    "dim_zero": (lambda: Layout.make(T, [3, 0, 3, 3], 5), "mode_dims: expected positive.*got 0"),
    "dim_negative": (lambda: Layout.make(T, -2, 5), "mode_dims: expected positive.*got -2"),
    "dim_float": (lambda: Layout.make(T, [3, 2.5, 3, 3], 5), "mode_dims"),
    "dims_bool": (lambda: Layout.make(T, True, 5), "mode_dims"),
    "ranks_count": (lambda: Layout.make(T, 3, [5, 5, 5]), r"ranks: expected 2 \(one per.*got 3"),
    "rank_zero": (lambda: Layout.make(T, 3, [5, 0]), "ranks: expected positive.*got 0"),
    "rank_negative": (lambda: Layout.make(T, 3, -1), "ranks: expected positive.*got -1"),
    "rank_float": (lambda: Layout.make(T, 3, [5, 2.5]), "ranks"),
    "rank_bool": (lambda: Layout.make(T, 3, True), "ranks.*got (a bool|True)"),
    "rank_missing": (lambda: Layout.make(T, 3, {T.root: 5}), r"ranks: .*no rank for Node\(\{0,1\}"),
    "rank_of_a_leaf": (
        lambda: Layout.make(T, 3, dict.fromkeys(T.nodes, 5)),
        r"ranks: .*Node\(\{0\}, level=0\) is not an interior node",
    ),
    "outputs_zero": (
        lambda: Layout.make(T, 3, 5, out_features=0),
        "out_features: .*at least 1.*got 0",
    ),
    "outputs_of_a_sum": (
        lambda: Layout.make(T, 3, 5, out_features=2, root="sum"),
        "out_features: expected 1 with root='sum', got 2",
    ),
    "root": (
        lambda: Layout.make(T, 3, 5, root="max"),
        'root: expected "linear" or "sum", got \'max\'',
    ),
    "share_weights": (
        lambda: Layout.make(T, 3, 5, share_weights=torch.eye(3).to_sparse()),
        r"share_weights: expected True or False, got a tensor \[3, 3\] \(torch.sparse_coo\)",
    ),
}
T = ModeTree.balanced(4)


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_layouts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the program ----------------------------------------------------------------------------------


def run_program(layout, weights, vectors):
    """What a compiled walk does with a program: one row of vectors, one buffer for each product."""
    flat = layout.program.tolist()
    header = dict(zip(HEADER, flat, strict=False))
    body = flat[len(HEADER) :]
    assert header["version"] == VERSION and header["groups"] == len(weights)
    assert header["steps"] * len(FIELDS) == len(body)
    assert header["order"] == layout.tree.order and header["x_width"] == len(vectors)
    buffers = [None] * header["buffers"]
    pending = [0] * header["buffers"]  # children that a buffer still waits for
    steps = [
        dict(zip(FIELDS, body[i : i + len(FIELDS)], strict=True))
        for i in range(0, len(body), len(FIELDS))
    ]
    for number, step in enumerate(steps):
        if step["mode"] >= 0:
            assert step["buffer"] == -1 and step["children"] == 0
            product = vectors[step["offset"] : step["offset"] + step["rows"]]
        else:
            assert pending[step["buffer"]] == 0, "a product is read before it is complete"
            product, buffers[step["buffer"]] = buffers[step["buffer"]], None
        if step["group"] < 0:
            message = product.sum(-1, keepdim=True)
        else:
            weight = weights[step["group"]][step["slot"]]
            assert tuple(weight.shape) == (step["rows"], step["cols"])
            message = product @ weight
        if step["parent"] < 0:
            assert number == len(steps) - 1 and len(message) == header["out_features"]
            assert all(b is None for b in buffers)
            return message
        parent = steps[step["parent"]]
        assert step["parent"] > number
        if step["first"]:
            assert buffers[parent["buffer"]] is None, "a product is overwritten"
            buffers[parent["buffer"]], pending[parent["buffer"]] = message, parent["children"]
        else:
            buffers[parent["buffer"]] = buffers[parent["buffer"]] * message
        pending[parent["buffer"]] -= 1


def packed_row(case, inputs):
    vectors = inputs.vectors
    x = vectors.flatten(1) if isinstance(vectors, torch.Tensor) else torch.cat(vectors, dim=1)
    return x[0]


def check_program(case):
    inputs = testing.make_inputs(case, torch.float64)
    function, arguments = testing.operation("evaluate", case, inputs)
    expected, scale = testing.exact(function, arguments)
    actual = run_program(case.layout, inputs.weights, packed_row(case, inputs))
    actual = actual if case.layout.out_features > 1 else actual.squeeze(-1)
    testing.assert_matches(actual, expected[0], torch.float64, "forward", scale[0])


@pytest.mark.parametrize("case", [c for c in testing.cases() if c.batch], ids=str)
def test_program_is_the_tree(case):
    check_program(case)


@given(st.integers(2, 30), st.integers(0, 10**6), st.sampled_from(["linear", "sum"]), st.booleans())
def test_program_of_random_trees(order, seed, root, share):
    layout = Layout.make(testing.random_tree(order, seed), 2, 3, root=root, share_weights=share)
    check_program(testing.Case("", layout, 1))


def buffers_of(tree):
    return int(Layout.make(tree, 2, 2).program[HEADER.index("buffers")])


def test_a_walk_holds_few_products():
    """About log2 of the order, whatever the shape; one for a caterpillar and a chain."""
    assert [buffers_of(ModeTree.balanced(2**k)) for k in (1, 2, 6, 10)] == [1, 2, 6, 10]
    assert buffers_of(ModeTree.flat(1000)) == 1
    deep = (0, 1)
    for mode in range(2, 100):
        deep = (deep, mode) if mode % 2 else (mode, deep)
    assert buffers_of(ModeTree.from_nested(deep)) == 2
    assert buffers_of(ModeTree.chain(50)) <= 2
    for seed in range(20):
        assert buffers_of(testing.random_tree(64, seed)) <= 7


def test_program_is_built_once():
    layout = Layout.make(ModeTree.balanced(8), 2, 2)
    assert layout.program is layout.program
    assert layout.program.dtype == torch.int64 and layout.program.is_contiguous()
    assert hk.HTF(ModeTree.balanced(8), 2, 2).layout.program.equal(layout.program)
