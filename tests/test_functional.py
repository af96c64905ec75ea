"""The engine as functions: the forms that weights may have, and refusals where they do not fit."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing

TREE = hk.ModeTree.from_nested(((0, 1), (2, (3,))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hk.HTF(TREE, [2, 3, 4, 5], [7, 6, 5], out_features=2, dtype=torch.float64)


@pytest.fixture
def vectors():
    return [torch.randn(3, d, dtype=torch.float64) for d in (2, 3, 4, 5)]


def forms(model):
    """The weights in every form that is taken."""
    nodes = list(model.tree.nodes)
    return {
        "mapping": {n: model.node_weight(n) for n in reversed(nodes)},
        "list": [model.node_weight(n) for n in nodes],
        "tuple": tuple(model.node_weight(n) for n in nodes),
        "folded": list(model.weights),
        "parameters": model.weights,
    }


@pytest.mark.parametrize("form", ["mapping", "list", "tuple", "folded", "parameters"])
def test_forms_of_weights(cpu_target, model, vectors, form):
    for op in testing.OPS:
        cpu_target.require(op)
    weights = forms(model)[form]
    layout = model.layout if form in ("folded", "parameters") else None
    indices = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])
    assert torch.equal(hk.evaluate(TREE, weights, vectors, layout=layout), model(vectors))
    assert torch.equal(hk.evaluate_at(TREE, weights, indices, layout=layout), model.at(indices))
    assert torch.equal(hk.full_tensor(TREE, weights, layout=layout), model.full_tensor())
    for a, b in zip(
        hk.slog_evaluate(TREE, weights, vectors, layout=layout), model.slog(vectors), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["mapping", "list", "folded"])
def test_gradients_reach_the_weights(cpu_target, model, vectors, form):
    cpu_target.require("evaluate")
    layout = model.layout if form == "folded" else None
    hk.evaluate(TREE, forms(model)[form], vectors, layout=layout).sum().backward()
    expected = torch.autograd.grad(model(vectors).sum(), list(model.parameters()))
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("form", ["mapping", "list"])
def test_no_weight_for_the_root_means_a_sum(cpu_target, form):
    cpu_target.require("evaluate", torch.float32)
    model = hk.HTF(TREE, 3, 4, root="sum")
    weights = [model.node_weight(n) for n in TREE.nodes[:-1]]
    given = dict(zip(TREE.nodes, weights, strict=False)) if form == "mapping" else weights
    x = torch.randn(5, 4, 3)
    assert torch.equal(hk.evaluate(TREE, given, x), model(x))


def test_nodes_of_an_equal_tree_will_do(cpu_target, model, vectors):
    cpu_target.require("evaluate")
    same = hk.ModeTree.from_nested((((3,), 2), (1, 0)))
    weights = {same.node(n.modes, n.level): model.node_weight(n) for n in TREE.nodes}
    assert torch.equal(hk.evaluate(TREE, weights, vectors), model(vectors))


def drop(weights, index):
    return {n: w for n, w in weights.items() if n.index != index}


def swap(weights, index, tensor):
    return {n: tensor if n.index == index else w for n, w in weights.items()}


BAD_WEIGHTS = {
    "missing": (lambda w: drop(w, 2), r"no weight for Node\(\{2\}, level=0\)"),
    "interior_missing": (lambda w: drop(w, 4), r"no weight for Node\(\{0,1\}, level=1\)"),
    "list_too_short": (lambda w: list(w.values())[:5], "a weight for each of 8 nodes .*got 5"),
    "list_too_long": (
        lambda w: [*w.values(), w[TREE.root]],
        "a weight for each of 8 nodes .*got 9",
    ),
    "no_weights": (lambda w: [], "a weight for each of 8 nodes .*got 0"),
    "empty_mapping": (lambda w: {}, "no weight for"),
    "one_dimension": (
        lambda w: swap(w, 1, torch.ones(3).double()),
        r"the weight of Node\(\{1\}, level=0\) must be \[R_in, R_out\], got \[3\]",
    ),
    "a_list_with_one_folded": (
        lambda w: [*list(w.values())[:-1], w[TREE.root][None]],
        r"the weight of Node\(\{0-3\}, level=3\) must be \[R_in, R_out\], got \[1, 5, 2\]",
    ),
    "siblings_differ": (
        lambda w: swap(w, 1, torch.ones(3, 6).double()),
        r"the weight of Node\(\{1\}, level=0\) must be \[3, 7\] to fit .*, got \[3, 6\]",
    ),
    "parent_does_not_fit": (
        lambda w: swap(w, 4, torch.ones(8, 5).double()),
        r"the weight of Node\(\{0,1\}, level=1\) must be \[7, 5\] to fit .*, got \[8, 5\]",
    ),
    "another_tree": (
        lambda w: {**drop(w, 0), hk.ModeTree.balanced(4).nodes[0]: w[TREE.nodes[0]]},
        r"Node\(\{0\}, level=0\) is a node of another tree",
    ),
    "folded_without_layout": (lambda w: [torch.ones(1, 2, 3)], r"folded weights.*need layout="),
    "two_dtypes": (
        lambda w: swap(w, 4, w[TREE.nodes[4]].float()),
        "weights are torch.float(32|64) on cpu and torch.float(32|64) on cpu",
    ),
    "integers": (
        lambda w: {n: v.long() for n, v in w.items()},
        "must be floating point, got torch.int64",
    ),
    "complex": (
        lambda w: {n: v.to(torch.complex128) for n, v in w.items()},
        "weights must be floating point, got torch.complex128",
    ),
    "empty_leaf": (
        lambda w: swap(w, 0, torch.ones(0, 7).double()),
        "mode_dims: expected positive.*got 0",
    ),
}
CALLS = {
    "evaluate": lambda weights, vectors: hk.evaluate(TREE, weights, vectors),
    "evaluate_at": lambda weights, vectors: hk.evaluate_at(
        TREE, weights, torch.zeros(3, 4, dtype=torch.int64)
    ),
    "full_tensor": lambda weights, vectors: hk.full_tensor(TREE, weights),
    "slog": lambda weights, vectors: hk.slog_evaluate(TREE, weights, vectors),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("spoil", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights(model, vectors, call, spoil, message):
    weights = spoil(forms(model)["mapping"])
    with pytest.raises(ValueError, match=message):
        call(weights, vectors)


@pytest.mark.parametrize("name", CALLS)
def test_errors_name_the_operation(model, vectors, name):
    with pytest.raises(ValueError, match=f"^{name}: no weight for"):
        CALLS[name](drop(forms(model)["mapping"], 2), vectors)


def test_a_layout_that_does_not_fit(model, vectors):
    folded = list(model.weights)
    other = hk.Layout.make(hk.ModeTree.halves(4), [2, 3, 4, 5], 5)
    with pytest.raises(ValueError, match="evaluate: the layout is of another tree"):
        hk.evaluate(TREE, folded, vectors, layout=other)
    wider = hk.Layout.make(TREE, [2, 3, 4, 5], 9, out_features=2)
    with pytest.raises(ValueError, match=r"evaluate: expected folded weights of the shapes .*got "):
        hk.evaluate(TREE, folded, vectors, layout=wider)
    with pytest.raises(ValueError, match="expected folded weights of the shapes"):
        hk.evaluate(TREE, folded[:-1], vectors, layout=model.layout)


def test_a_tree_is_needed(model, vectors):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        hk.evaluate("tree", forms(model)["mapping"], vectors)
