"""Conversion from and to other libraries, held against their own dense tensors.

Each library is optional: its tests are skipped where it is missing (``htfkernels[convert]``).
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import htfkernels as hk
from htfkernels import ModeTree, convert, testing

F64 = torch.float64


def module(layout, seed=0):
    inputs = testing.make_inputs(testing.Case("", layout, 0), F64, seed=seed)
    return hk.HTF.from_weights(layout.tree, inputs.weights, layout)


def dense(model):
    with hk.use_backend("reference"):
        return model.full_tensor().detach()


def assert_same(array, model):
    expected = dense(model)
    found = torch.as_tensor(np.asarray(array)).reshape(expected.shape)
    testing.assert_matches(found, expected, F64, "backward")


def assert_equal_models(a, b):
    """The same weights, bit by bit; a "sum" and shared weights come back written out."""
    assert a.tree == b.tree and a.layout.ranks == b.layout.ranks
    assert all(torch.equal(a.node_weight(v), b.node_weight(v)) for v in a.tree.nodes)


make, T = hk.Layout.make, ModeTree
BINARY = [
    make(T.balanced(4), 3, [5, 4]),
    make(T.halves(4), [2, 5, 3, 4], [3, 2]),
    make(T.from_nested((((0, 3), 1), (2, 4))), 2, 3, root="sum"),
    make(T.balanced(8), 2, 3, share_weights=True),
    make(T.flat(2), [3, 4], 1),
]
OTHER = [
    make(T.balanced(4), 3, [5, 4], out_features=2),
    make(T.balanced(5), 2, 3),
    make(T.flat(4), [3, 1, 2, 4], 5),
    make(T.chain(5), [6, 5], [4, 5, 4, 3], root="sum"),
    make(T.from_nested((((0,), 1), ((2,),))), [3, 4, 2], 5),
    *[make(testing.random_tree(n, n), 2, 3, 1 + n % 2) for n in range(3, 9)],
]
FLAT = [make(T.flat(n), [2, 3, 4, 5][:n], 3, root=r) for n in (2, 3, 4) for r in ("linear", "sum")]


# -- tensap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", BINARY + OTHER, ids=range(len(BINARY + OTHER)))
def test_to_tensap_and_back(layout):
    pytest.importorskip("tensap")
    model = module(layout)
    tensor = convert.to_tensap(model)
    assert_same(tensor.numpy(), model)
    assert_equal_models(convert.from_tensap(tensor), model)
    assert convert.from_tensap(tensor, torch.float32).weights[0].dtype == torch.float32


@pytest.mark.parametrize("layout", BINARY + OTHER[1:3], ids=range(len(BINARY) + 2))
def test_tensap_finds_the_same_singular_values(layout):
    pytest.importorskip("tensap")
    model = module(layout)
    tensor = convert.to_tensap(model)
    found = tensor.singular_values()
    count = len(model.tree.nodes)
    for node, expected in model.matricization_spectra().items():
        s = torch.from_numpy(found[count - 1 - node.index].astype(np.float64))
        padded = torch.zeros(max(len(s), len(expected)), dtype=F64)
        padded[: len(expected)] = expected.detach()
        # tensap's come from Gram matrices, which hold their squares to rounding.
        testing.assert_matches(s.square(), padded[: len(s)].square(), F64, "backward")


@pytest.mark.parametrize("inactive", [False, True])
@pytest.mark.parametrize("kind", ["balanced", "linear", "trivial", "random"])
def test_any_tensap_tensor(kind, inactive):
    """Of full transfer tensors, and with a leaf that has none."""
    tensap = pytest.importorskip("tensap")
    np.random.seed(0)  # noqa: NPY002 tensap draws from it
    options = {"random": (5, 3), "trivial": (3,)}.get(kind, (5,))
    tree = getattr(tensap.DimensionTree, kind)(*options)
    active = np.full(tree.nb_nodes, True)
    active[tree.dim2ind[1] - 1] = not inactive
    tensor = tensap.TreeBasedTensor.randn(tree, "random", "random", active)
    model = convert.from_tensap(tensor)
    assert_same(tensor.numpy(), model)
    assert_equal_models(convert.from_tensap(convert.to_tensap(model)), model)


def test_sums_in_tensap_keep_their_ranks():
    """Of the tuples of columns, only those on the diagonal are used."""
    pytest.importorskip("tensap")
    a, b = module(BINARY[0]), module(make(T.balanced(4), 3, [2, 3]), seed=1)
    model = convert.from_tensap(convert.to_tensap(a) + convert.to_tensap(b))
    assert model.layout.ranks == hk.add(a, b).layout.ranks
    testing.assert_matches(dense(model), dense(a) + dense(b), F64, "backward")


def test_tensap_tensors_that_do_not_fit():
    pytest.importorskip("tensap")
    with pytest.raises(
        ValueError, match=r"from_tensap: expected a tensap.TreeBasedTensor, got lis"
    ):
        convert.from_tensap([])
    tensor = convert.to_tensap(module(BINARY[0]))
    tensor.tree.dim2ind[1] = 2  # an interior node
    with pytest.raises(ValueError, match="node 2 has the dimension 1 and children"):
        convert.from_tensap(tensor)
    with pytest.raises(ValueError, match=r"to_tensap: the core of .* would have 3\^40 x 1 entries"):
        convert.to_tensap(hk.HTF(T.flat(40), 2, 3))


# -- hiepy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", BINARY, ids=range(len(BINARY)))
def test_to_hiepy_and_back(layout):
    pytest.importorskip("hiepy")
    model = module(layout)
    tensor = convert.to_hiepy(model)
    assert_same(tensor.full(), model)
    assert_equal_models(convert.from_hiepy(tensor), model)
    with torch.no_grad():
        assert convert.to_hiepy(model.float()).dtype == torch.float32


def test_any_hiepy_tensor():
    hiepy = pytest.importorskip("hiepy")
    for x in (hiepy.randn((3, 4, 2, 5), rank=3, dtype=F64), hiepy.hilbert((3, 4, 5), dtype=F64)):
        for tensor in (x, x + x, x * x):
            assert_same(tensor.full(), convert.from_hiepy(tensor))


def test_hiepy_tensors_that_do_not_fit():
    pytest.importorskip("hiepy")
    for layout, message in ((OTHER[0], "one output, got 2"), (OTHER[2], "has 4 children")):
        with pytest.raises(ValueError, match=f"to_hiepy: expected a .*{message}"):
            convert.to_hiepy(module(layout))
    with pytest.raises(ValueError, match=r"from_hiepy: expected a hiepy.HTTensor, got dict"):
        convert.from_hiepy({})


# -- tensorly and pyttb ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
@pytest.mark.parametrize("layout", FLAT, ids=range(len(FLAT)))
def test_to_tensorly_and_back(layout, backend):
    tensorly = pytest.importorskip("tensorly")
    model = module(layout)
    with tensorly.backend_context(backend, local_threadsafe=True):
        cp = convert.to_tensorly(model)
        assert_same(cp.to_tensor(), model)
        assert_equal_models(convert.from_tensorly(cp), model)
        bare = (None, cp.factors)
        testing.assert_matches(
            dense(convert.from_tensorly(bare)),
            torch.as_tensor(np.asarray(tensorly.cp_to_tensor(bare))),
            F64,
            "backward",
        )


@pytest.mark.parametrize("layout", FLAT, ids=range(len(FLAT)))
def test_to_pyttb_and_back(layout):
    pytest.importorskip("pyttb")
    model = module(layout)
    tensor = convert.to_pyttb(model)
    assert_same(tensor.full().data, model)
    assert_equal_models(convert.from_pyttb(tensor), model)


def test_cp_tensors_that_do_not_fit():
    ones = np.ones
    for weights, factors in (
        (ones(2), [ones((3, 2)), ones((3, 4))]),
        (ones(3), [ones((3, 2)), ones((4, 2))]),
        (ones(2), [ones(2), ones((4, 2))]),
        (ones(2), []),
    ):
        with pytest.raises(ValueError, match=r"from_tensorly: expected .*factors \[D_n, R\], got"):
            convert.from_tensorly((weights, factors))
        with pytest.raises(ValueError, match="from_pyttb: expected "):
            convert.from_pyttb(SimpleNamespace(weights=weights, factor_matrices=factors))
    with pytest.raises(ValueError, match=r"from_tensorly: expected a CPTensor or .*, got int"):
        convert.from_tensorly(3)
    with pytest.raises(ValueError, match=r"from_pyttb: expected a pyttb.ktensor, got int"):
        convert.from_pyttb(3)


@pytest.mark.parametrize(
    ("name", "to"), [("tensorly", convert.to_tensorly), ("pyttb", convert.to_pyttb)]
)
def test_models_that_are_no_cp_tensors(name, to):
    pytest.importorskip(name)
    with pytest.raises(ValueError, match=r"expected a flat tree .*, got 3 interior nodes"):
        to(module(BINARY[0]))
    with pytest.raises(ValueError, match="expected a model with one output, got 2"):
        to(module(make(T.flat(3), 2, 3, 2)))


# -- without any of them --------------------------------------------------------------------------


def test_tensorly_tensors_need_no_tensorly():
    factors = [torch.randn(d, 2, dtype=F64) for d in (3, 4, 5)]
    weights = torch.randn(2, dtype=F64)
    for found in (
        convert.from_tensorly((weights, factors)),
        convert.from_tensorly((weights.numpy(), [f.numpy() for f in factors])),
        convert.from_pyttb(SimpleNamespace(weights=weights, factor_matrices=factors)),
    ):
        expected = torch.einsum("r,ar,br,cr->abc", weights, *factors)
        testing.assert_matches(dense(found), expected, F64, "backward")
        with torch.no_grad():
            found.weights[0].zero_()
    assert bool((factors[0] != 0).all())


@pytest.mark.parametrize("zeros", ["none", "some", "all", "all but the diagonal"])
def test_transfer_tensors(zeros):
    """Straight from cores: leaves ``[D, k]``, transfer tensors ``[k_1, k_2, K]``."""
    shapes = {"a": (3, 2), "b": (4, 2), "c": (2, 5), "ab": (2, 2, 3), "abc": (3, 5, 2)}
    cores = {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}
    if zeros == "some":
        cores["ab"][1, 0] = 0
        cores["abc"][:, 2:4] = 0
    elif zeros == "all":
        cores["abc"].zero_()
    elif zeros == "all but the diagonal":
        cores["ab"][0, 1] = cores["ab"][1, 0] = 0
    stub = SimpleNamespace(
        U={(n,): cores[name] for n, name in enumerate("abc")},
        B={(0, 1): cores["ab"], (0, 1, 2): cores["abc"]},
        dtree=SimpleNamespace(
            children={(0, 1, 2): ((0, 1), (2,)), (0, 1): ((0,), (1,))}, get_root=lambda: (0, 1, 2)
        ),
    )
    model = convert.from_hiepy(stub)
    expected = torch.einsum("ai,bj,ck,ijx,xky->abcy", *cores.values())
    testing.assert_matches(dense(model), expected, F64, "backward")
    ranks = {
        "none": (4, 15), "some": (3, 9), "all": (4, 1), "all but the diagonal": (2, 15),
    }  # fmt: skip
    assert model.layout.ranks == ranks[zeros]


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("tensap", convert.to_tensap),
        ("hiepy", convert.to_hiepy),
        ("tensorly", convert.to_tensorly),
        ("pyttb", convert.to_pyttb),
    ],
)
def test_a_missing_library_is_named(name, to, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'{name}.*: pip install "htfkernels\[convert\]"'):
        to(hk.HTF(T.flat(2), 3, 2))


def test_examples_in_docstrings_run():
    import doctest

    names = {"torch": torch, "ModeTree": ModeTree}
    assert doctest.testmod(convert, extraglobs=names).failed == 0
