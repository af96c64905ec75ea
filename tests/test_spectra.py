"""Matricization spectra against singular values of the dense matricizations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import dense, module

import htfkernels as hk
from htfkernels import ModeTree, testing
from htfkernels.spectra import matricizations as spectra

F64 = torch.float64


def check(model, method, dtype=F64, direction="backward"):
    tensor = model.full_tensor().detach().double()
    found = model.matricization_spectra(method=method)
    assert set(found) == {n for n in model.tree.nodes if not n.is_root}
    for node, s in found.items():
        expected = dense(tensor, sorted(node.modes))
        rows = math.prod(model.layout.mode_dims[m] for m in node.modes)
        assert s.dim() == 1 and len(s) <= min(rows, model.layout.shape(node)[1])
        assert s.dtype == model.weights[0].dtype
        assert bool((s[:-1] >= s[1:]).all()) and bool((s >= 0).all())
        padded = torch.zeros(max(len(s), len(expected)), dtype=F64)
        padded[: len(s)] = s.detach().double()
        full = torch.zeros_like(padded)
        full[: len(expected)] = expected
        if method == "gram":
            # Squared singular values are what a Gram matrix holds to rounding.
            padded, full = padded.square(), full.square()
        testing.assert_matches(padded, full, dtype, direction)


LAYOUTS = [
    hk.Layout.make(ModeTree.balanced(4), 3, [5, 4]),
    hk.Layout.make(ModeTree.balanced(4), [2, 5, 3, 4], [3, 2], out_features=1),
    hk.Layout.make(ModeTree.halves(6), 2, 3),
    hk.Layout.make(ModeTree.grid(2, 3), 2, [7, 3]),
    hk.Layout.make(ModeTree.flat(4), 3, 5, root="sum"),
    hk.Layout.make(ModeTree.chain(5), [6, 5], [4, 5, 4, 3], root="sum"),
    hk.Layout.make(ModeTree.from_nested((((0,), 1), ((2,),))), [3, 4, 2], 5),
    hk.Layout.make(ModeTree.balanced(4), 2, 12),
    hk.Layout.make(ModeTree.balanced(3), [1, 1, 4], 2),
    hk.Layout.make(ModeTree.balanced(5), 2, 3, share_weights=True),
    hk.Layout.make(ModeTree.balanced(4), 3, 4, out_features=3),
]


@pytest.mark.parametrize("method", ["qr", "gram", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_every_node(layout, method):
    check(module(layout), method)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_float32(layout):
    check(module(layout, torch.float32), "qr", torch.float32)


@given(
    st.integers(2, 7),
    st.integers(0, 10**6),
    st.sampled_from(["qr", "gram"]),
    st.sampled_from(["linear", "sum"]),
    st.data(),
)
def test_random_trees(order, seed, method, root, data):
    tree = testing.random_tree(order, seed)
    dims = [data.draw(st.integers(1, 4)) for _ in range(order)]
    ranks = {node: data.draw(st.integers(1, 6)) for node in tree.interior}
    check(module(hk.Layout.make(tree, dims, ranks, root=root), seed=seed), method)


@pytest.mark.parametrize("method", ["qr", "gram"])
def test_the_root(method):
    """With several outputs the root's matricization has them as columns."""
    model = module(LAYOUTS[-1])
    (s,) = model.matricization_spectra([model.tree.root], method).values()
    expected = torch.linalg.svdvals(model.full_tensor().reshape(-1, 3))
    testing.assert_matches(s.detach(), expected.detach(), F64, "backward")
    single = module(LAYOUTS[0])
    (s,) = single.matricization_spectra([single.tree.root], method).values()
    testing.assert_matches(
        s.detach(), single.full_tensor().norm().detach().reshape(1), F64, "backward"
    )


def test_only_the_nodes_asked_for():
    model = module(LAYOUTS[0])
    wanted = [model.tree.node([0, 1]), model.tree.node(3)]
    everything = model.matricization_spectra()
    found = model.matricization_spectra(wanted)
    assert list(found) == wanted
    assert all(torch.equal(found[n], everything[n]) for n in wanted)
    assert model.matricization_spectra([]) == {}


@pytest.mark.parametrize("method", ["qr", "gram"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_planted_rank(method, rank):
    """A node of low rank bounds the rank of its matricization; singular values past it are zero to
    rounding."""
    tree = ModeTree.balanced(4)
    pair = tree.node([0, 1])
    model = hk.HTF(tree, 4, [6, 6], dtype=F64)
    with torch.no_grad():
        weight = model.node_weight(pair)
        weight.copy_(torch.randn(6, rank, dtype=F64) @ torch.randn(rank, 6, dtype=F64))
    s = model.matricization_spectra([pair], method)[pair].detach()
    assert int(hk.numerical_rank(dense(model.full_tensor().detach(), [0, 1]))) == rank
    # A Gram matrix holds the squares to rounding, so it is the squares that vanish.
    assert int(hk.numerical_rank(s if method == "qr" else s.square())) == rank
    assert len(s) > rank


def test_small_singular_values_survive_qr():
    """Nine orders of magnitude below the largest: lost by Gram matrices, kept by QR."""
    expected = torch.tensor([1.0, 1e-9], dtype=F64)
    weights = [torch.diag(expected), torch.eye(2, dtype=F64), torch.ones(2, 1, dtype=F64)]
    tree = ModeTree.flat(2)
    leaf = tree.nodes[0]
    by_node = dict(zip(tree.nodes, weights, strict=True))
    s = spectra.matricization_spectra(tree, by_node, [leaf], "qr")[leaf]
    testing.assert_matches(s, expected, F64, "backward", expected)


@pytest.mark.parametrize("method", ["qr", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_zero_tensors(method, dtype):
    for layout in LAYOUTS:
        model = module(layout, dtype)
        with torch.no_grad():
            model.weights[0].zero_()
        for s in model.matricization_spectra(method=method).values():
            assert bool((s == 0).all())
            assert hk.effective_rank(s) == 0 and hk.numerical_rank(s) == 0


@pytest.mark.parametrize("method", ["qr", "gram"])
def test_scale(method):
    """Spectra are homogeneous, far below and above 1."""
    model = module(LAYOUTS[0])
    before = model.matricization_spectra(method=method)
    for factor in (1e-30, 1e30) if method == "gram" else (1e-60, 1e60):  # Gram matrices square
        with torch.no_grad():
            model.weights[0].mul_(factor)
        for node, s in model.matricization_spectra(method=method).items():
            actual, expected = s.detach() / factor**4, before[node].detach()
            power = 2 if method == "gram" else 1
            testing.assert_matches(actual**power, expected**power, F64, "second")
        with torch.no_grad():
            model.weights[0].div_(factor)


def test_large_trees_need_no_tensor():
    """2^300 entries; frames of 300 modes."""
    model = hk.HTF(ModeTree.balanced(300), 2, 4, dtype=F64)
    found = model.matricization_spectra()
    assert len(found) == len(model.tree.nodes) - 1
    root = model.tree.root
    first, second = (found[c] for c in root.children)
    # The root's children have the same matricization, transposed.
    testing.assert_matches(first.detach(), second.detach(), F64, "backward")
    norm = model.matricization_spectra([root])[root]
    testing.assert_matches(first.norm().detach().reshape(1), norm.detach(), F64, "backward")


@pytest.mark.parametrize("method", ["qr", "gram"])
def test_bfloat16(method):
    model = module(LAYOUTS[0]).to(torch.bfloat16)
    exact = module(LAYOUTS[0])
    with torch.no_grad():
        for w, v in zip(exact.parameters(), model.parameters(), strict=True):
            w.copy_(v)
    for node, s in model.matricization_spectra(method=method).items():
        testing.assert_matches(
            s.detach(),
            exact.matricization_spectra([node])[node].detach(),
            torch.bfloat16,
            "forward",
        )


def test_bad_arguments():
    model = module(LAYOUTS[0])
    with pytest.raises(ValueError, match='method must be "auto", "qr" or "gram", got \'svd\''):
        model.matricization_spectra(method="svd")
    with pytest.raises(ValueError, match="is a node of another tree"):
        model.matricization_spectra([ModeTree.halves(4).nodes[0]])
