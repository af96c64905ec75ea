"""The engine as functions: the forms that weights may have, and refusals where they do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from models import module

import htfkernels as hk
from htfkernels import functional, testing

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
    "none": (lambda w: None, r"weights must be \{node: .* list of tensors, got NoneType"),
    "a_number": (lambda w: 3, "weights must be .*, got int"),
    "the_model": (lambda w: hk.HTF(TREE, 2, 2), "weights must be .*, got HTF"),
    "a_scalar": (lambda w: torch.tensor(1.0), r"weights must be .*, got \[\]"),
    "nested_lists": (lambda w: [[[1.0]]] * 8, "weights must be .*, got list of list"),
    "arrays": (lambda w: [v.detach().numpy() for v in w.values()], "got list of ndarray"),
    "names": (
        lambda w: {str(n): v for n, v in w.items()},
        r"weights are a mapping from nodes, and 'Node\(\{0-3\}, level=3\)' is not a node",
    ),
    "numbers": (lambda w: dict(enumerate(w.values())), "from nodes, and 0 is not a node"),
    "a_list_for_a_weight": (
        lambda w: swap(w, 4, [[1.0]]),
        r"the weight of Node\(\{0,1\}, level=1\) must be \[R_in, R_out\], got list",
    ),
    "sparse": (
        lambda w: swap(w, 1, w[TREE.nodes[1]].detach().to_sparse()),
        r"the weight of Node\(\{1\}, .* must be \[R_in, R_out\], got \[3, 7\] \(torch.sparse_coo\)",
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


@pytest.mark.parametrize("tree", ["tree", None, 4, TREE.nodes[0]], ids=str)
def test_a_tree_is_needed(model, vectors, tree):
    sentence = f"^evaluate: tree must be a ModeTree, got {type(tree).__name__}$"
    with pytest.raises(ValueError, match=sentence):
        hk.evaluate(tree, forms(model)["mapping"], vectors)


def test_a_layout_is_needed_with_folded_weights(model):
    with pytest.raises(ValueError, match="full_tensor: layout must be a Layout, got HTF"):
        hk.full_tensor(TREE, model.weights, layout=model)


ones = torch.ones
BAD_VECTORS = {
    "none": (None, r"vectors must be a tensor or 4 tensors \[B, D_n\], got NoneType"),
    "a_number": (1.5, "vectors must be .*, got float"),
    "a_word": ("abcd", "vectors must be .*, got str of str"),
    "lists": ([[0.5] * 3] * 4, "vectors must be .*, got list of list"),
    "one_is_none": ([ones(2, 3), ones(2, 3), None, ones(2, 3)], "got list of NoneType"),
    "an_array": (ones(2, 4, 3).numpy(), "vectors must be .*, got ndarray of ndarray"),
    "a_mapping": ({0: ones(2, 3)}, "vectors must be .*, got dict of int"),
    "two_dimensions": (ones(2, 12), r"vectors must be .*, got \[2, 12\]"),
    "another_order": (ones(2, 3, 3), r"vectors must be .*, got \[2, 3, 3\]"),
    "another_dimension": (ones(2, 4, 2), r"vectors must be .*, got \[2, 4, 2\]"),
    "sparse": (ones(2, 4, 3).to_sparse(), r"got \[2, 4, 3\] \(torch.sparse_coo\)"),
    "nested": (torch.nested.nested_tensor([ones(4, 3), ones(2, 3)]), "got nested tensor"),
    "too_few": ([ones(2, 3)] * 3, "expected 4 tensors of vectors, one per mode, got 3"),
    "none_at_all": ([], "expected 4 tensors of vectors, one per mode, got 0"),
    "vectors_of_a_sample": ([ones(3)] * 4, r"of mode 0 must be \[B, 3\], got \[3\]"),
    "batches_differ": ([*[ones(2, 3)] * 3, ones(1, 3)], r"mode 3 must be \[2, 3\], got \[1, 3\]"),
    "one_is_sparse": (
        [ones(2, 3), *[ones(2, 3).to_sparse()] * 3],
        r"of mode 1 must be \[2, 3\], got \[2, 3\] \(torch.sparse_coo\)",
    ),
    "integers": (ones(2, 4, 3).long(), "vectors are torch.int64 on cpu, the weights torch.float32"),
    "complex": (ones(2, 4, 3) * 1j, "vectors are torch.complex64 on cpu, the weights"),
    "meta": (ones(2, 4, 3, device="meta"), "vectors are torch.float32 on meta, the weights"),
}


@pytest.mark.parametrize("op", ["evaluate", "slog"])
@pytest.mark.parametrize(("given", "message"), BAD_VECTORS.values(), ids=BAD_VECTORS.keys())
def test_bad_vectors(op, given, message):
    model = hk.HTF(TREE, 3, 4)
    with pytest.raises(ValueError, match=f"^{op}: .*{message}"):
        (model if op == "evaluate" else model.slog)(given)


def test_vectors_of_modes_that_differ(model):
    with pytest.raises(
        ValueError, match=r"must be 4 tensors \[B, D_n\] \(the mode dimensions diff"
    ):
        model(torch.ones(2, 4, 3))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.repeat(2, 1, 1),
        lambda w: w[:1].expand(9, -1, -1),
        lambda w: w[:-1],
        lambda w: w[:, :2],
        lambda w: w[0],
    ],
    ids=["too_many", "too_many_in_one_memory", "too_few", "a_row_less", "two_dimensions"],
)
def test_parameters_of_other_shapes_than_the_layout(cpu_target, spoil):
    cpu_target.require("evaluate", torch.float32)
    model = hk.HTF(TREE, 3, 4)
    model.weights[0] = torch.nn.Parameter(spoil(model.weights[0].detach()))
    calls = {
        "evaluate": lambda: model(torch.ones(2, 4, 3)),
        "slog": lambda: model.slog(torch.ones(2, 4, 3)),
        "evaluate_at": lambda: model.at(torch.zeros(2, 4, dtype=torch.int64)),
        "evaluate_at_planned": lambda: model.at(model.index_plan([[0] * 4] * 9)),
        "full_tensor": model.full_tensor,
    }
    for name, call in calls.items():
        sentence = rf"^{name}: expected folded weights of the shapes \[\(4, 3, 4\), .*, got \["
        with pytest.raises(ValueError, match=sentence):
            call()


def test_what_stands_where_weights_should_be():
    with pytest.raises(ValueError, match=r"^norm: weights must be tensors, got list$"):
        functional.check_same("norm", [[1.0]])


# -- without numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", testing.small_cases(), ids=str)
def test_shapes_on_the_meta_device(case):
    """The same shapes and dtypes, and nothing is computed."""
    model, layout = module(case.layout), case.layout
    meta = copy.deepcopy(model).to("meta")
    vectors = [torch.ones(5, d, dtype=torch.float64) for d in layout.mode_dims]
    indices = torch.zeros(5, layout.tree.order, dtype=torch.int32)
    calls = [
        lambda m, device: m([v.to(device) for v in vectors]),
        lambda m, device: m.at(indices.to(device)),
        lambda m, device: m.slog([v.to(device) for v in vectors])[1],
        lambda m, device: m.full_tensor(),
    ]
    for call in calls:
        real, shape = call(model, "cpu"), call(meta, "meta")
        assert shape.is_meta and (shape.shape, shape.dtype) == (real.shape, real.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calls[0](meta, "meta").sum().backward()
    assert all(p.grad.shape == p.shape for p in meta.parameters())


def test_meta_is_not_mixed_with_other_devices():
    meta, model = hk.HTF(TREE, 3, 4, device="meta"), hk.HTF(TREE, 3, 4)
    indices = torch.zeros(5, 4, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"vectors are torch.float32 on cpu, the weights .* on meta"
    ):
        meta(torch.ones(5, 4, 3))
    with pytest.raises(ValueError, match="evaluate_at: indices are on cpu, the weights on meta"):
        meta.at(indices)
    with pytest.raises(ValueError, match="evaluate_at: indices are on meta, the weights on cpu"):
        model.at(indices.to("meta"))
    with hk.use_backend("cpp"), pytest.raises(RuntimeError, match="these are on meta"):
        meta(torch.ones(5, 4, 3, device="meta"))
