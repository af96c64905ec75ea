"""Spectra of any set of modes against singular values of the dense matricizations."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import dense, module
from torch.utils._python_dispatch import TorchDispatchMode

import htfkernels as hk
from htfkernels import ModeTree, testing
from htfkernels.spectra import mode_sets
from htfkernels.spectra.mode_cores import svd_flops

F64 = torch.float64
METHODS = ["qr", "gram"]


def assert_spectrum(s, expected, method, dtype=F64):
    """What is not returned is zero. Squared singular values are what a Gram matrix holds to
    rounding."""
    s, expected = s.detach().double(), expected.detach()
    assert s.dim() == 1 and 0 < len(s) <= len(expected)
    assert bool((s[:-1] >= s[1:]).all()) and bool((s >= 0).all())
    padded = torch.nn.functional.pad(s, (0, len(expected) - len(s)))
    power = 2 if method == "gram" else 1
    testing.assert_matches(padded**power, expected**power, dtype, "backward")


def check(model, modes):
    expected = dense(model.full_tensor(), modes)
    found = {m: model.matricization_spectrum(modes, m) for m in METHODS}
    assert found["qr"].shape == found["gram"].shape
    for method, s in found.items():
        assert_spectrum(s, expected, method)


LAYOUTS = [
    hk.Layout.make(ModeTree.balanced(4), 3, [5, 4]),
    hk.Layout.make(ModeTree.balanced(4), [2, 5, 3, 4], [3, 2], out_features=1),
    hk.Layout.make(ModeTree.halves(6), 2, 3),
    hk.Layout.make(ModeTree.grid(2, 3), 2, [7, 3]),
    hk.Layout.make(ModeTree.flat(4), 3, 5, root="sum"),
    hk.Layout.make(ModeTree.flat(7), 2, 5),
    hk.Layout.make(ModeTree.chain(5), [6, 5], [4, 5, 4, 3], root="sum"),
    hk.Layout.make(ModeTree.from_nested((((0,), 1), ((2,),))), [3, 4, 2], 5),
    hk.Layout.make(ModeTree.from_nested((((0, 1), 2),)), [3, 4, 2], [5, 4, 3]),
    hk.Layout.make(ModeTree.balanced(4), 2, 12),
    hk.Layout.make(ModeTree.balanced(3), [1, 1, 4], 2),
    hk.Layout.make(ModeTree.balanced(5), 2, 3, share_weights=True),
    hk.Layout.make(ModeTree.balanced(4), 3, 4, out_features=3),
    hk.Layout.make(ModeTree.balanced(4), 2, 3, out_features=40),
]
SETS = [(0, 2), (2, 0), (0, 3), (1,), (0, 1), (1, 2, 3), (0, 1, 2, 3)]


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", SETS, ids=str)
def test_any_set_of_modes(modes):
    """In the tree or not."""
    for layout in LAYOUTS:
        if max(modes) < layout.tree.order:
            check(module(layout), modes)


@given(
    st.integers(2, 7),
    st.integers(0, 10**6),
    st.sampled_from([("linear", 1), ("linear", 3), ("sum", 1)]),
    st.data(),
)
def test_random_trees(order, seed, root, data):
    tree = testing.random_tree(order, seed)
    dims = [data.draw(st.integers(1, 4)) for _ in range(order)]
    ranks = {node: data.draw(st.integers(1, 6)) for node in tree.interior}
    modes = data.draw(st.sets(st.integers(0, order - 1), min_size=1))
    layout = hk.Layout.make(tree, dims, ranks, root=root[0], out_features=root[1])
    check(module(layout, seed=seed), sorted(modes))


@pytest.mark.parametrize("tree", [ModeTree.balanced(8), ModeTree.halves(8), ModeTree.grid(2, 4)])
def test_partitions(tree):
    """Even modes against odd ones, and left against right."""
    model = hk.HTF(tree, 2, 4, dtype=F64)
    for modes in (range(0, 8, 2), range(1, 8, 2), range(4), range(2, 6), [0, 3, 5, 6]):
        check(model, list(modes))


def test_nodes_of_the_tree_are_sets_too():
    model = module(LAYOUTS[0])
    for node, expected in model.matricization_spectra().items():
        assert_spectrum(model.matricization_spectrum(node.modes), expected, "qr")


def test_all_modes():
    """The norm; with several outputs they are the columns."""
    for layout in LAYOUTS:
        model = module(layout)
        tensor = model.full_tensor().detach()
        s = model.matricization_spectrum(range(layout.tree.order)).detach()
        assert len(s) <= layout.out_features
        testing.assert_matches(s.norm(), tensor.norm(), F64, "backward")


def test_a_set_of_modes_that_is_none():
    model = module(LAYOUTS[0])
    for modes in ((), (4,), (-1,), (0, 0), (0.0,), (True,)):
        with pytest.raises(ValueError, match=r"matricization_spectrum: .*mode"):
            model.matricization_spectrum(modes)
        with pytest.raises(ValueError, match=r"spectrum_cost: .*mode"):
            mode_sets.spectrum_cost(model.layout, modes)
    with pytest.raises(ValueError, match='method must be "auto", "qr" or "gram", got \'svd\''):
        model.matricization_spectrum([0], "svd")


def test_small_singular_values_survive_qr():
    """Nine orders of magnitude below the largest, in a set that is not in the tree."""
    tree = ModeTree.balanced(4)
    small = torch.tensor([1.0, 1e-9], dtype=F64)
    identity = torch.eye(2, dtype=F64)
    weights = {n: identity for n in tree.nodes}
    weights[tree.node([0])] = torch.diag(small)
    weights[tree.root] = torch.ones(2, 1, dtype=F64)
    s = mode_sets.matricization_spectrum(tree, weights, [0, 2])
    testing.assert_matches(s[:2], small, F64, "backward", small)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_precisions(dtype, method):
    """Computed in float64, then rounded."""
    model = module(LAYOUTS[0], dtype)
    exact = module(LAYOUTS[0])
    with torch.no_grad():
        for w, v in zip(exact.parameters(), model.parameters(), strict=True):
            w.copy_(v)
    s = model.matricization_spectrum([0, 2], method)
    assert s.dtype == dtype
    assert torch.equal(s, exact.matricization_spectrum([0, 2], method).to(dtype))


# -- scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_wildly_scaled_columns(method):
    """A column times 1e200, the row above by 1e-200: the same tensor."""
    for layout in LAYOUTS:
        model, modes = module(layout), [0, layout.tree.order - 1]
        expected = dense(model.full_tensor().detach(), modes)
        weights = {n: model.node_weight(n).detach().clone() for n in layout.tree.nodes}
        for node in layout.tree.interior:
            child = node.children[0]
            power = torch.arange(weights[node].shape[0]).remainder(3) - 1
            factor = 10.0 ** (power * (200 if child.is_leaf else 90)).double()
            weights[child] *= factor
            weights[node] /= factor[:, None]
        s = mode_sets.matricization_spectrum(layout.tree, weights, modes, method)
        assert_spectrum(s, expected, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [2.0**-250, 2.0**250], ids=["small", "large"])
def test_homogeneous(factor, method):
    model = module(LAYOUTS[0])
    before = model.matricization_spectrum([0, 2], method).detach()
    with torch.no_grad():
        model.weights[0].mul_(factor)  # all four leaves
    after = model.matricization_spectrum([0, 2], method).detach()
    assert torch.equal(after, before * factor**2 * factor**2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tree", [ModeTree.balanced(256), ModeTree.flat(256)], ids=repr)
def test_nothing_overflows_on_the_way(tree, method):
    """2^1280 above, 2^-1280 beside it."""
    model = hk.HTF(tree, 4, 4, dtype=F64, init_std=0.5)
    modes = range(25, 41)
    expected = model.matricization_spectrum(modes, method)
    assert bool(expected[0] > 0)
    with torch.no_grad():
        for leaf in tree.leaves:
            model.node_weight(leaf).mul_(2.0 ** (10 if leaf.index < 128 else -10))
    assert torch.equal(model.matricization_spectrum(modes, method), expected)


def test_values_that_are_too_large_are_infinite():
    model = hk.HTF(ModeTree.balanced(256), 8, 16, dtype=F64, init_std=16.0)
    for method in METHODS:
        s = model.matricization_spectrum(range(16), method)
        assert bool((s == torch.inf).all())


@pytest.mark.parametrize("method", METHODS)
def test_zero_tensors(method):
    for layout in LAYOUTS:
        model = module(layout, torch.float32)
        with torch.no_grad():
            model.weights[0].zero_()
        s = model.matricization_spectrum([0, layout.tree.order - 1], method)
        assert bool((s == 0).all())
        s.sum().backward()
        assert all(bool(w.grad.isfinite().all()) for w in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_zero_columns(method):
    """A dead component of a thousand modes: the other factors of its products are near 1 as well,
    or they would overflow, and zero times infinity is not zero."""
    tree = ModeTree.flat(1024)
    model = hk.HTF(tree, 64, 3, dtype=F64)
    with torch.no_grad():
        for leaf in tree.leaves:
            model.node_weight(leaf)[:, 2] = 0.99
        model.node_weight(tree.root)[2] = 0
        expected = model.matricization_spectrum(range(512), method)
        model.node_weight(tree.root)[2] = 1
        model.node_weight(tree.leaves[0])[:, 2] = 0
        s = model.matricization_spectrum(range(512), method)
    assert len(s) == 3
    assert_spectrum(s, expected, method)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_meet_zeros(method):
    """Their size does not matter, however large."""
    tree = ModeTree.flat(2)
    leaf = torch.tensor([[0, 3], [0, 4]], dtype=F64)
    for large in (1.0, 1e300):
        root = torch.tensor([[large], [1e-300]], dtype=F64)
        weights = dict(zip(tree.nodes, (leaf, leaf.clone(), root), strict=True))
        for w in weights.values():
            w.requires_grad_()
        s = mode_sets.matricization_spectrum(tree, weights, [0], method)
        assert_spectrum(s * 1e300, torch.tensor([25.0, 0.0], dtype=F64), method)
        grads = torch.autograd.grad(s[0], list(weights.values()))
        assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_dead_components(method):
    """A column of zeros, between a subtree of 2^-640 and a factor of 2^640."""
    tree = ModeTree.balanced(64)
    model = hk.HTF(tree, 2, 2, dtype=F64)
    node = tree.root.children[0]
    weights = {n: model.node_weight(n).detach().clone() for n in tree.nodes}
    weights[node][:, 0] = 0
    weights[node].requires_grad_()
    grads = []
    for power in (0, 20):
        for leaf in tree.leaves:
            weights[leaf] *= 2.0 ** (-power if leaf.index < 32 else power)
        s = mode_sets.matricization_spectrum(tree, weights, range(16), method)
        grads += torch.autograd.grad(s.square().sum(), weights[node])
    assert bool((grads[0][:, 0] != 0).all())
    testing.assert_matches(grads[1], grads[0], F64, "backward")


# -- cost -----------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Flops by the shapes that are multiplied, and the largest result."""

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.flops += 2 * result.numel() * args[0].shape[-1]
        elif name == "mul" and result.dim() > 2:
            self.flops += result.numel()
        elif name == "linalg_qr":
            m, n = args[0].shape
            self.flops += 2 * m * n * n - 2 * n**3 // 3
        elif name == "_linalg_svd":
            self.flops += svd_flops(*args[0].shape)
        elif name == "_linalg_eigh":
            self.flops += 4 * len(args[0]) ** 3 // 3
        return result


COUNTED = [
    (hk.Layout.make(ModeTree.balanced(8), 3, 4), (0, 2, 4, 6)),
    (hk.Layout.make(ModeTree.balanced(8), 3, 8), (0, 5)),
    (hk.Layout.make(ModeTree.halves(16), 2, 6), tuple(range(3, 9))),
    (hk.Layout.make(ModeTree.flat(6), [2, 3, 4, 5, 6, 7], 5, out_features=3), (1, 2, 5)),
    (hk.Layout.make(ModeTree.balanced(6), 4, [5, 6, 3], out_features=2), (0, 1, 4)),
    (hk.Layout.make(ModeTree.from_nested((((0, 3),), (1, (2, 4), 5))), 3, 4), (0, 1, 4)),
    (hk.Layout.make(ModeTree.balanced(128), 4, 8), tuple(range(16, 32))),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layout", "modes"), COUNTED)
def test_cost_is_what_the_run_does(layout, modes, method):
    work = getattr(mode_sets.spectrum_cost(layout, modes), method)
    model = module(layout)
    with torch.no_grad(), Counter() as counter:
        model.matricization_spectrum(modes, method)
    assert 8 * counter.largest == work.bytes
    # Products of two matrices entry by entry look like scaling, which is not counted.
    few = 0.01 * work.flops if method == "gram" else 0
    assert work.flops - few <= counter.flops <= work.flops


def test_cost_reads_well():
    cost = mode_sets.spectrum_cost(hk.Layout.make(ModeTree.balanced(64), 16, 32), [5, 20, 50])
    assert str(cost) == (
        'rows {5,20,50} of 64 modes: 1.5e+14 flops and 16 GiB by "qr", '
        '1.3e+11 flops and 512 MiB by "gram"'
    )
    assert cost.gram.within(mode_sets.LIMIT) and not cost.qr.within(mode_sets.LIMIT)
    assert str(mode_sets.Work(1, 100)) == "1.0e+0 flops and 100 bytes"


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("tree", [ModeTree.balanced(64), ModeTree.balanced(1024)], ids=repr)
def test_what_is_not_affordable(tree, method):
    """Every other mode: the rank grows with the number of modes."""
    weights = {n: torch.zeros(16 if n.is_leaf else 32, 1 if n.is_root else 32) for n in tree.nodes}
    sentence = (
        r"^matricization_spectrum: rows \{0,2,4,6,8,10,12,14,\.\.\. \d+ modes\} of \d+ modes: "
        r'[\d.]+e\+\d+ flops and [\d.]+e\+\d+ TiB by "qr", '
        r'[\d.]+e\+\d+ flops and [\d.]+e\+\d+ TiB by "gram", '
        r"more than 5.0e\+11 flops and 1 GiB; max_cost=\(flops, bytes\) raises the limit$"
    )
    with pytest.raises(ValueError, match=sentence):
        mode_sets.matricization_spectrum(tree, weights, range(0, tree.order, 2), method)


def test_the_first_affordable_method(caplog):
    caplog.set_level(logging.INFO, "htfkernels")
    model = hk.HTF(ModeTree.balanced(16), 4, 8, dtype=F64)
    modes, cost = [1, 6, 12], mode_sets.spectrum_cost(model.layout, [1, 6, 12])
    assert cost.gram.flops < cost.qr.flops and cost.gram.bytes < cost.qr.bytes
    found = {m: model.matricization_spectrum(modes, m) for m in METHODS}
    for limit, method in [
        (None, "qr"),
        (math.inf, "qr"),
        (cost.qr, "qr"),
        (cost.gram, "gram"),
        ((cost.qr.flops, cost.gram.bytes), "gram"),
        ((cost.gram.flops, cost.qr.bytes), "gram"),
        (10**9, "qr"),
    ]:
        caplog.clear()
        s = model.matricization_spectrum(modes, max_cost=limit)
        assert torch.equal(s, found[method])
        assert caplog.messages == [f'matricization_spectrum: "{method}" for {cost}']
    for method, limit in [("auto", (cost.gram.flops, 8)), ("qr", cost.gram), ("gram", 10)]:
        with pytest.raises(ValueError, match="raises the limit"):
            model.matricization_spectrum(modes, method, limit)


# -- gradients ------------------------------------------------------------------------------------

SMOOTH = {"squares": lambda s: s.square().sum(), "cubes": lambda s: s.pow(3).sum()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("function", SMOOTH.values(), ids=SMOOTH)
def test_gradients(function, method):
    """Against those of the dense matricization."""
    for layout in LAYOUTS:
        for modes in ([0], [0, layout.tree.order - 1], [1]):
            model = module(layout)
            parameters = list(model.parameters())
            value = function(dense(model.full_tensor(), modes))
            expected = torch.autograd.grad(value, parameters)
            found = torch.autograd.grad(
                function(model.matricization_spectrum(modes, method)), parameters
            )
            testing.assert_matches(found, expected, F64, "second")


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    """Of each singular value, where they are well apart."""
    tree = ModeTree.from_nested(((0, (1,)), 2, 3))
    model = hk.HTF(tree, 2, 3, dtype=F64)
    weights = [model.node_weight(n).detach().clone().requires_grad_() for n in tree.nodes]

    def spectrum(*weights):
        by_node = dict(zip(tree.nodes, weights, strict=True))
        return mode_sets.matricization_spectrum(tree, by_node, [0, 2], method)

    s = spectrum(*weights)
    assert len(s) == 4 and bool((s[:-1] > 1.2 * s[1:]).all())
    assert torch.autograd.gradcheck(spectrum, weights, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_where_there_are_none(method):
    """Singular values that coincide, or vanish: of a subgradient, finite."""
    tree = ModeTree.balanced(4)
    identity = torch.eye(3, dtype=F64)
    low = torch.outer(torch.arange(3.0), torch.ones(3)).double()
    for leaf, top in [
        (identity, torch.ones(3, 1)),
        (low, torch.ones(3, 1)),
        (low, torch.zeros(3, 1)),
    ]:
        weights = {n: (leaf if n.is_leaf else identity).clone() for n in tree.nodes}
        weights[tree.root] = top.double()
        for w in weights.values():
            w.requires_grad_()
        for modes in ([0], [0, 2], [0, 1]):
            s = mode_sets.matricization_spectrum(tree, weights, modes, method)
            for g in torch.autograd.grad(s.sum(), list(weights.values())):
                assert bool(g.isfinite().all()) and float(g.abs().max()) < 100


def test_gradients_by_weights_of_any_precision():
    model = module(LAYOUTS[0], torch.float32)
    model.matricization_spectrum([0, 2]).square().sum().backward()
    expected = module(LAYOUTS[0]).float().double()
    with torch.no_grad():
        for v, w in zip(expected.parameters(), model.parameters(), strict=True):
            v.copy_(w)
    expected.full_tensor().square().sum().backward()
    found = [w.grad for w in model.parameters()]
    assert all(g.dtype == torch.float32 for g in found)
    testing.assert_matches(
        found, [w.grad for w in expected.parameters()], torch.float32, "backward"
    )


@pytest.mark.parametrize("method", METHODS)
def test_there_is_no_second_derivative(method):
    model = module(LAYOUTS[0])
    parameters = list(model.parameters())
    loss = model.matricization_spectrum([0, 2], method).square().sum()
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        torch.autograd.grad(grads[0].sum(), parameters)


@pytest.mark.parametrize("method", METHODS)
def test_transforms(method):
    tree = ModeTree.balanced(4)
    model = hk.HTF(tree, 3, 4, dtype=F64)
    fixed = {n: model.node_weight(n).detach() for n in tree.nodes}

    def norm(w):
        by_node = {**fixed, tree.leaves[0]: w}
        return mode_sets.matricization_spectrum(tree, by_node, [0, 2], method).square().sum()

    batch = torch.randn(3, *fixed[tree.leaves[0]].shape, dtype=F64)
    each = []
    for w in batch:
        w = w.clone().requires_grad_()
        each.append(torch.autograd.grad(norm(w), w)[0])
    testing.assert_matches(torch.func.grad(norm)(batch[0]), each[0], F64, "second")
    testing.assert_matches(
        torch.func.vmap(torch.func.grad(norm))(batch), torch.stack(each), F64, "second"
    )
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        torch.func.jacrev(torch.func.grad(norm))(batch[0])
