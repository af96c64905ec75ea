"""Mode trees: constructors, canonical form, round trips, errors."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import htfkernels as hk
from htfkernels import ModeTree, testing

CONSTRUCTED = {
    "balanced4": ModeTree.balanced(4),
    "balanced11_arity3": ModeTree.balanced(11, 3),
    "halves7": ModeTree.halves(7),
    "grid3x5": ModeTree.grid(3, 5),
    "flat5": ModeTree.flat(5),
    "chain6": ModeTree.chain(6),
    "one_child_root": ModeTree.from_nested((((0, 1), 2),)),
    "random9": testing.random_tree(9, 0),
}
every_tree = pytest.mark.parametrize("tree", CONSTRUCTED.values(), ids=CONSTRUCTED.keys())


def level_sets(tree):
    return [[set(node.modes) for node in level] for level in tree.levels]


def sets(levels):
    return [[set(node) for node in level] for level in levels]


# -- the constructors against their levels, written out -------------------------------------------

L4 = [[0], [1], [2], [3]]
WRITTEN_OUT = {
    "balanced(2)": (ModeTree.balanced(2), [[[0], [1]], [[0, 1]]]),
    "balanced(4)": (ModeTree.balanced(4), [L4, [[0, 1], [2, 3]], [[0, 1, 2, 3]]]),
    "balanced(5)": (
        ModeTree.balanced(5),
        [[*L4, [4]], [[0, 1], [2, 3], [4]], [[0, 1, 2, 3], [4]], [[0, 1, 2, 3, 4]]],
    ),
    "balanced(7, 3)": (
        ModeTree.balanced(7, 3),
        [
            [[m] for m in range(7)],
            [[0, 1, 2], [3, 4, 5], [6]],
            [[0, 1, 2, 3, 4, 5, 6]],
        ],
    ),
    "halves(2)": (ModeTree.halves(2), [[[0], [1]], [[0, 1]]]),
    "halves(4)": (ModeTree.halves(4), [L4, [[0, 2], [1, 3]], [[0, 2, 1, 3]]]),
    "halves(8)": (
        ModeTree.halves(8),
        [
            [[m] for m in range(8)],
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            [[0, 4, 2, 6], [1, 5, 3, 7]],
            [list(range(8))],
        ],
    ),
    "halves(5)": (
        ModeTree.halves(5),
        [[[m] for m in range(5)], [[0, 2], [1, 3], [4]], [[0, 2, 1, 3], [4]], [[0, 2, 1, 3, 4]]],
    ),
    "grid(4, 4)": (
        ModeTree.grid(4, 4),
        [
            [[m] for m in range(16)],
            [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
            [list(range(16))],
        ],
    ),
    "grid(2, 3)": (
        ModeTree.grid(2, 3),
        [[[m] for m in range(6)], [[0, 1, 3, 4], [2, 5]], [list(range(6))]],
    ),
    "grid(2, 4, (1, 2))": (
        ModeTree.grid(1, 4, (1, 2)),
        [L4, [[0, 1], [2, 3]], [[0, 1, 2, 3]]],
    ),
    "grid(4, 2, (4, 1)), then across": (
        ModeTree.grid(4, 2, (4, 2)),
        [[[m] for m in range(8)], [list(range(8))]],
    ),
    "flat(3)": (ModeTree.flat(3), [[[0], [1], [2]], [[0, 1, 2]]]),
    "chain(2)": (ModeTree.chain(2), [[[0], [1]], [[0, 1]]]),
}


@pytest.mark.parametrize(("tree", "levels"), WRITTEN_OUT.values(), ids=WRITTEN_OUT.keys())
def test_levels_written_out(tree, levels):
    assert level_sets(tree) == sets(levels)
    assert tree == ModeTree.from_levels(levels)


def test_chain():
    """Leaf 0, then one-child nodes over it; leaf 1 under the root."""
    tree = ModeTree.chain(5)
    assert tree.to_nested() == ((((0,),),), 1)
    assert [node.modes for node in tree.interior] == [(0,), (0,), (0,), (0, 1)]
    assert [node.level for node in tree.interior] == [1, 2, 3, 4]
    assert tree.depth == 4


def test_levels_are_heights():
    """A leaf that is merged late stays at level 0."""
    tree = ModeTree.from_nested((((0, 1), 2), 3))
    assert level_sets(tree) == sets([L4, [[0, 1]], [[0, 1, 2]], [[0, 1, 2, 3]]])


@every_tree
def test_relations(tree):
    assert len(tree.leaves) == tree.order
    assert tree.nodes == tree.leaves + tree.interior
    assert [leaf.modes for leaf in tree.leaves] == [(m,) for m in range(tree.order)]
    assert tree.root is tree.nodes[-1]
    assert tree.root.parent is None and tree.root.is_root
    assert set(tree.root.modes) == set(range(tree.order))
    assert tree.levels[0] == tree.leaves
    assert tree.levels[-1] == (tree.root,)
    assert [n for level in tree.levels for n in level] == list(tree.nodes)
    assert tree.depth == len(tree.levels) - 1
    for i, node in enumerate(tree.nodes):
        assert node.index == i and node.tree is tree
        assert node.is_leaf == (i < tree.order) == (not node.children)
        assert node.is_leaf or node.level == 1 + max(c.level for c in node.children)
        assert node.is_leaf or node.modes == sum((c.modes for c in node.children), ())
        assert all(c.parent == node and c.index < i for c in node.children)
        assert [min(c.modes) for c in node.children] == sorted(min(c.modes) for c in node.children)
        assert tree.node(node.modes, node.level) == node
        assert tree.node(reversed(node.modes), level=node.level) == node
        assert tree.node(node.modes).level == min(
            n.level for n in tree.nodes if set(n.modes) == set(node.modes)
        )


def test_node():
    tree = ModeTree.chain(4)
    assert tree.node(0) is tree.nodes[0]
    assert tree.node([0], level=2) is tree.nodes[3]
    absent = (([], None), ([7], None), ([0, 7], None), ([0], 3), ([0, 1], 1), (-1, None))
    for modes, level in absent:
        with pytest.raises(KeyError, match="no node over the modes"):
            tree.node(modes, level)
    with pytest.raises(KeyError, match=r"\{1,2\}"):
        ModeTree.balanced(4).node([1, 2])


# -- canonical form, equality, immutability -------------------------------------------------------


def test_the_order_of_writing_does_not_matter():
    a = ModeTree.from_nested(((3, (2, 4)), (1, 0)))
    b = ModeTree.from_nested(((0, 1), ((4, 2), 3)))
    c = ModeTree.from_parents(5, [6, 6, 5, 7, 5, 7, 8, 8, -1])
    assert a == b == c
    assert hash(a) == hash(b) == hash(c)
    assert {a: 1}[c] == 1
    assert a.node([2, 4]) == b.node([4, 2]) and hash(a.node([2, 4])) == hash(b.node([4, 2]))


def test_different_trees_differ():
    trees = [*CONSTRUCTED.values(), ModeTree.balanced(5), ModeTree.halves(5), ModeTree.flat(4)]
    assert len(set(trees)) == len(trees)
    assert ModeTree.flat(2) == ModeTree.chain(2) == ModeTree.balanced(2) == ModeTree.halves(2)
    assert ModeTree.flat(2) != "flat" and ModeTree.flat(2) is not None
    assert ModeTree.balanced(4).nodes[0] != ModeTree.halves(4).nodes[0]
    assert ModeTree.balanced(4).nodes[0] != 0


@every_tree
def test_immutable(tree):
    for name in ("order", "parents", "something"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(tree, name, 3)
    for name in ("index", "tree", "something"):
        with pytest.raises(AttributeError):
            setattr(tree.root, name, 3)
    assert isinstance(tree.parents, tuple) and isinstance(tree.nodes, tuple)


@every_tree
def test_round_trips(tree):
    assert ModeTree.from_nested(tree.to_nested()) == tree
    assert ModeTree.from_json(tree.to_json()) == tree
    assert ModeTree.from_parents(tree.order, tree.parents) == tree
    assert ModeTree.from_parents(tree.order, tree.parents).parents == tree.parents
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again, node = pickle.loads(pickle.dumps((tree, tree.root), protocol))
        assert again == tree and node == tree.root and hash(node) == hash(tree.root)
    assert copy.deepcopy(tree) == tree and copy.copy(tree) == tree
    assert json.loads(tree.to_json()) == {"order": tree.order, "parents": list(tree.parents)}


@st.composite
def shapes(draw):
    """An order and a seed, for a random tree."""
    return draw(st.integers(2, 40)), draw(st.integers(0, 10**6))


@given(shapes())
def test_constructors_agree_on_random_trees(shape):
    order, seed = shape
    tree = testing.random_tree(order, seed)
    draw = random.Random(seed)

    def shuffled(nested):
        if isinstance(nested, int):
            return nested
        parts = [shuffled(n) for n in nested]
        draw.shuffle(parts)
        return draw.choice((tuple, list))(parts)

    assert ModeTree.from_nested(shuffled(tree.to_nested())) == tree
    interior = list(range(order, len(tree.parents)))
    draw.shuffle(interior)
    to = {**{m: m for m in range(order)}, -1: -1}
    to.update({old: order + new for new, old in enumerate(interior)})
    parents = [0] * len(tree.parents)
    for old, parent in enumerate(tree.parents):
        parents[to[old]] = to[parent]
    assert ModeTree.from_parents(order, parents) == tree
    assert hash(ModeTree.from_parents(order, parents)) == hash(tree)


@st.composite
def partitions(draw):
    """Ever coarser partitions of the modes, in random order."""
    order = draw(st.integers(2, 20))
    level = [[m] for m in draw(st.permutations(range(order)))]
    levels = [level]
    while len(level) > 1 or len(levels) < 2:
        merged, rest = [], list(level)
        while rest:
            size = draw(st.integers(1, min(4, len(rest))))
            merged.append([mode for node in rest[:size] for mode in node])
            rest = rest[size:]
        if len(merged) == len(level) > 1:  # something has to happen at some point
            merged = [[*merged[0], *merged[1]], *merged[2:]]
        level = draw(st.permutations(merged))
        levels.append(level)
    return levels


@given(partitions())
def test_from_levels_of_random_partitions(levels):
    tree = ModeTree.from_levels(levels)
    assert level_sets(tree) == [sorted(map(set, level), key=min) for level in levels]
    nested = {frozenset(n): n[0] for n in levels[0]}
    for above in levels[1:]:
        nested = {
            frozenset(n): tuple(v for k, v in nested.items() if k <= frozenset(n)) for n in above
        }
    assert ModeTree.from_nested(next(iter(nested.values()))) == tree


# -- printing -------------------------------------------------------------------------------------


def test_printing():
    tree = ModeTree.from_nested(((0, 1), ((2,), 3)))
    assert str(tree) == "\n".join(
        [
            "{0-3}",
            "├─ {0,1}",
            "│  ├─ {0}",
            "│  └─ {1}",
            "└─ {2,3}",
            "   ├─ {2}",
            "   │  └─ {2}",
            "   └─ {3}",
        ]
    )
    assert repr(tree) == "ModeTree(order=4, nodes=8, depth=3)"
    assert repr(tree.node([0, 1])) == "Node({0,1}, level=1)"
    assert tree.draw(label=lambda n: n.level).splitlines()[0] == "{0-3}  3"


def test_printing_is_cut():
    drawing = ModeTree.balanced(64).draw(max_lines=10).splitlines()
    assert len(drawing) == 11
    assert drawing[-1] == "... 117 more of 127 nodes"
    assert len(str(ModeTree.flat(4096))) < 10_000
    evens = ModeTree.from_nested((tuple(range(0, 40, 2)), tuple(range(1, 40, 2))))
    assert len(repr(evens.node(range(0, 40, 2)))) < 80


# -- size -----------------------------------------------------------------------------------------


def caterpillar(order):
    """Node k merges mode k + 1 with all the modes before: a tree of depth order - 1."""
    interior = [*range(order + 1, 2 * order - 1), -1]
    return ModeTree.from_parents(order, [order, order, *range(order + 1, 2 * order - 1), *interior])


FOUR_THOUSAND = pytest.mark.parametrize(
    ("make", "depth"),
    [(ModeTree.balanced, 12), (ModeTree.halves, 12), (ModeTree.flat, 1), (caterpillar, 4095)],
    ids=["balanced", "halves", "flat", "caterpillar"],
)


@FOUR_THOUSAND
def test_four_thousand_modes(make, depth):
    tree = make(4096)
    assert tree.order == 4096 and tree.depth == depth
    assert pickle.loads(pickle.dumps(tree)) == tree == ModeTree.from_json(tree.to_json())
    assert ModeTree.from_nested(tree.to_nested()) == tree
    assert len(str(tree)) < 20_000 and repr(tree.root).endswith(f", level={depth})")


@functools.cache
def four_thousand_modes(make, device):
    """Value and gradients as functions, with their arguments and exact results."""
    case = testing.Case("", hk.Layout.make(make(4096), 2, 3), 2)
    inputs = testing.make_inputs(case, torch.float64, device, spread=0.01)
    function, arguments = testing.operation("evaluate", case, inputs)
    run = testing.gradients(function)
    given = (torch.ones(2, dtype=torch.float64, device=device), *arguments)
    return [(f, a, *testing.exact(f, a)) for f, a in ((function, arguments), (run, given))]


@FOUR_THOUSAND
def test_values_and_gradients_of_four_thousand_modes(target, make, depth):
    target.require("evaluate", torch.float64)
    # Float32's tolerance for float64 results: there are a hundred times as many roundings on the
    # way as in the cases that the table is made for.
    for function, arguments, expected, scale in four_thousand_modes(make, target.device):
        found = function(*arguments)
        direction = "forward" if isinstance(found, torch.Tensor) else "backward"
        if direction == "forward":
            assert bool((scale < 2 * expected).all())
        testing.assert_matches(found, expected, torch.float32, direction, scale)


# -- bad trees ------------------------------------------------------------------------------------

BAD_LEVELS = {
    "mode_twice": ([[[0], [1]], [[0, 1, 1]]], "mode 1 appears twice in level 1"),
    "mode_twice_in_two_nodes": (
        [[[0], [1], [2]], [[0, 1], [1, 2]], [[0, 1, 2]]],
        "mode 1 appears twice in level 1",
    ),
    "mode_twice_in_leaves": ([[[0], [0]], [[0]]], "mode 0 appears twice in level 0"),
    "mode_missing": ([[[0], [1], [2]], [[0, 1]]], "mode 2 is missing from level 1"),
    "mode_missing_between": (
        [[[0], [1], [2]], [[0, 1]], [[0, 1, 2]]],
        "mode 2 is missing from level 1",
    ),
    "mode_too_large": ([[[0], [2]], [[0, 2]]], r"level 0 names mode 2, but level 0 has 2 modes"),
    "mode_unknown": ([[[0], [1]], [[0, 1, 2]]], r"level 1 names mode 2.*\(0..1\)"),
    "mode_negative": ([[[0], [-1]], [[0, -1]]], "names mode -1"),
    "empty_node": ([[[0], [1]], [[0, 1], []]], r"level 1 has an empty node \(position 1\)"),
    "empty_leaf": ([[[0], []], [[0]]], "level 0 has an empty node"),
    "does_not_refine": (
        [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]], [[0, 1, 2, 3]]],
        r"level 2 does not refine level 1: it splits the node \(2, 3\)",
    ),
    "splits_again": (
        [[[0], [1]], [[0, 1]], [[0], [1]]],
        "level 2 does not refine level 1",
    ),
    "first_level_merged": (
        [[[0, 1], [2]], [[0, 1, 2]]],
        r"level 0 must list single modes, got the node \(0, 1\)",
    ),
    "two_roots": ([[[0], [1]], [[0], [1]]], "the last level must be one node.*got 2"),
    "one_level": ([[[0]]], "at least two levels.*got 1"),
    "no_level": ([], "at least two levels.*got 0"),
    "one_mode": ([[[0]], [[0]]], "at least 2 modes, got order 1"),
    "not_an_integer": ([[[0], [1.5]], [[0, 1.5]]], "a mode must be an integer, got 1.5"),
    "a_bool": ([[[False], [True]], [[0, 1]]], "a mode must be an integer, got False"),
}


@pytest.mark.parametrize(("levels", "message"), BAD_LEVELS.values(), ids=BAD_LEVELS.keys())
def test_bad_levels(levels, message):
    with pytest.raises(ValueError, match=message):
        ModeTree.from_levels(levels)


BAD_NESTED = {
    "mode_twice": (((0, 1), (1, 2)), "mode 1 appears twice"),
    "mode_missing": (((0, 1), 3), r"mode 2 is missing \(the modes are \{0,1,3\}\)"),
    "mode_zero_missing": ((1, 2), "mode 0 is missing"),
    "negative": ((0, -1), "mode"),
    "empty_node": ((0, (), 1), "a node is empty"),
    "empty": ((), "a node is empty"),
    "one_mode": ((0,), "at least 2 modes, got order 1"),
    "an_integer": (0, "expected a nested tuple of modes, got int"),
    "a_string": ("01", "expected a nested tuple of modes, got str"),
    "not_an_integer": ((0, "1"), "a mode must be an integer, got '1'"),
    "a_float": ((0, 1.0), "a mode must be an integer, got 1.0"),
}


@pytest.mark.parametrize(("nested", "message"), BAD_NESTED.values(), ids=BAD_NESTED.keys())
def test_bad_nested(nested, message):
    with pytest.raises(ValueError, match=message):
        ModeTree.from_nested(nested)


BAD_PARENTS = {
    "no_root": (2, [2, 2], "needs a root above its leaves, got 2 nodes"),
    "two_roots": (2, [2, 3, -1, -1], r"one root, got 2 nodes without a parent: \[2, 3\]"),
    "leaf_above": (3, [1, 3, 3, -1], "node 0 has the leaf 1 as its parent"),
    "own_parent": (2, [2, 2, 2], "node 2 has the parent 2"),
    "unknown_parent": (2, [2, 7, -1], "node 1 has the parent 7"),
    "negative_parent": (2, [2, -2, -1], "node 1 has the parent -2"),
    "empty_node": (2, [2, 2, -1, 2], "node 3 is empty"),
    "cycle": (2, [2, 2, -1, 4, 3], "cycle"),
    "order_one": (1, [1, -1], "at least 2 modes, got order 1"),
    "order_negative": (-3, [], "at least 2 modes, got order -3"),
    "not_an_integer": (2, [2, 2.0, -1], "a parent must be an integer, got 2.0"),
    "order_not_an_integer": ("2", [2, 2, -1], "order must be an integer, got '2'"),
}


@pytest.mark.parametrize(
    ("order", "parents", "message"), BAD_PARENTS.values(), ids=BAD_PARENTS.keys()
)
def test_bad_parents(order, parents, message):
    with pytest.raises(ValueError, match=message):
        ModeTree.from_parents(order, parents)


BAD_JSON = {
    "no_json": "{",
    "a_list": "[1, 2]",
    "no_parents": '{"order": 2}',
    "no_order": '{"parents": [2, 2, -1]}',
    "no_tree": '{"order": 2, "parents": [2, 2]}',
    "parents_no_list": '{"order": 2, "parents": 3}',
    "parents_null": '{"order": 2, "parents": null}',
    "order_text": '{"order": "2", "parents": [2, 2, -1]}',
    "nested": "[" * 100_000,
    "order_nested": '{"order": ' + "[" * 900 + "]" * 900 + ', "parents": [2, 2, -1]}',
    "digits": '{"order": ' + "9" * 5000 + ', "parents": [2, 2, -1]}',
    "parents_long": '{"order": 2, "parents": "' + "2" * 10_000 + '"}',
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json(text):
    with pytest.raises(ValueError) as raised:
        ModeTree.from_json(text)
    assert len(str(raised.value)) < 200


BAD_CALLS = {
    "balanced(1)": (lambda: ModeTree.balanced(1), "at least 2 modes, got order 1"),
    "balanced(0)": (lambda: ModeTree.balanced(0), "at least 2 modes, got order 0"),
    "balanced(4, 1)": (lambda: ModeTree.balanced(4, 1), "arity must be at least 2, got 1"),
    "balanced(2.0)": (lambda: ModeTree.balanced(2.0), "order must be an integer, got 2.0"),
    "balanced(4, 2.5)": (lambda: ModeTree.balanced(4, 2.5), "arity"),
    "halves(1)": (lambda: ModeTree.halves(1), "at least 2 modes, got order 1"),
    "halves(True)": (lambda: ModeTree.halves(True), "order must be an integer, got True"),
    "flat(1)": (lambda: ModeTree.flat(1), "at least 2 modes, got order 1"),
    "flat(-1)": (lambda: ModeTree.flat(-1), "at least 2 modes, got order -1"),
    "flat(None)": (lambda: ModeTree.flat(None), "order must be an integer, got None"),
    "chain(1)": (lambda: ModeTree.chain(1), "depth must be at least 2, got 1"),
    "chain(3.0)": (lambda: ModeTree.chain(3.0), "depth must be an integer, got 3.0"),
    "grid(1, 1)": (lambda: ModeTree.grid(1, 1), "at least two cells, got 1 x 1"),
    "grid(0, 4)": (lambda: ModeTree.grid(0, 4), "at least two cells, got 0 x 4"),
    "grid(4, 4, (1, 1))": (lambda: ModeTree.grid(4, 4, (1, 1)), "never merges"),
    "grid(4, 4, (1, 2))": (lambda: ModeTree.grid(4, 4, (1, 2)), "never merges a 4 x 4 grid"),
    "grid(4, 4, (0, 2))": (lambda: ModeTree.grid(4, 4, (0, 2)), "never merges"),
    "grid(4, 4, (2.5, 2))": (
        lambda: ModeTree.grid(4, 4, (2.5, 2)),
        "window side must be an integer",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    assert ModeTree.balanced(numpy.int64(4)) == ModeTree.balanced(4)
    assert ModeTree.from_nested(((numpy.int32(0), 1), 2)) == ModeTree.from_nested(((0, 1), 2))
    tree = ModeTree.balanced(4)
    assert tree.node(numpy.array([0, 1])) == tree.node([0, 1])
    assert tree.node(numpy.int64(3)) == tree.node(3)


@pytest.mark.parametrize("mode", [1.5, float("inf"), "1", None])
def test_a_mode_that_is_not_an_integer(mode):
    with pytest.raises(ValueError, match="node: modes must be an integer, got"):
        ModeTree.balanced(4).node([0, mode])
