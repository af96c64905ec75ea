"""Spectra that are known beforehand: how far off each method is, at every shape and scale."""

from __future__ import annotations

import math

import pytest
import torch
from models import dense, matricization, module
from torch.autograd import gradcheck

import htfkernels as hk
from htfkernels import ModeTree, testing
from htfkernels.spectra import matricizations as spectra

F64 = torch.float64
METHODS = ("qr", "gram")
DTYPES = (F64, torch.float32)
BACKENDS = ("cpp", "reference")


def orthonormal(rows, cols):
    return torch.linalg.qr(torch.randn(rows, cols, dtype=F64)).Q


def planted(values, order=4, dim=None, dtype=F64):
    """A balanced tree whose root's children have just these singular values.

    Leaves with orthonormal columns have a Khatri-Rao product with such columns, and so have frames
    if the interior weights are orthogonal.
    """
    rank = len(values)
    model = hk.HTF(ModeTree.balanced(order), dim or rank, rank, dtype=dtype)
    with torch.no_grad():
        for node in model.tree.nodes:
            weight = model.node_weight(node)
            weight.copy_(values[:, None] if node.is_root else orthonormal(*weight.shape))
    return model


SPECTRA = {
    "decaying": torch.logspace(0, -15, 16, dtype=F64),
    "steep": torch.logspace(0, -290, 16, dtype=F64),
    "coinciding": torch.tensor([2.0, 2, 2, 2, 1, 1, 1, 1e-3, 1e-3, 1e-3, 1e-9, 1e-9], dtype=F64),
    "zeros": torch.tensor([3.0, 1, 1e-2, 0, 0, 0, 0, 0], dtype=F64),
    "one": torch.tensor([1.0, 0, 0, 0, 0], dtype=F64),
    "flat": torch.ones(33, dtype=F64),
    "none": torch.zeros(7, dtype=F64),
}


def error(s, expected):
    """The largest error relative to the largest singular value."""
    top = float(expected.max())
    return float((s.detach().double() - expected).abs().max()) / (top or 1.0)


def allowed(method, dtype):
    return max(spectra.ACCURACY[method], torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra(name, method, dtype, backend):
    expected = SPECTRA[name]
    model = planted(expected, dtype=dtype)
    with hk.use_backend(backend):
        found = model.matricization_spectra(model.tree.root.children, method)
    assert found.method == method and found.accuracy == spectra.ACCURACY[method]
    # In float32 the weights are rounded.
    slack = 20 * torch.finfo(dtype).eps if dtype != F64 else 0.0
    for s in found.values():
        assert len(s) == len(expected)
        assert error(s, expected) <= allowed(method, dtype) + slack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", [1e-3, 1e-6, 1e-9, 1e-12, 0.0])
def test_nearly_dependent_factors(noise, method, backend):
    """Weights of rank 2 and a little more, where Gram matrices are singular to rounding."""
    for tree, dim, rank in (
        (ModeTree.balanced(4), 7, 5),
        (ModeTree.flat(3), 12, 6),
        (ModeTree.from_nested((((0, 1), 2), 3)), 6, 5),
    ):
        model = hk.HTF(tree, dim, rank, dtype=F64)
        with torch.no_grad():
            for node in tree.nodes:
                weight = model.node_weight(node)
                rows, cols = weight.shape
                low = torch.randn(rows, 2, dtype=F64) @ torch.randn(2, cols, dtype=F64)
                weight.copy_(low + noise * torch.randn(rows, cols, dtype=F64))
            tensor = model.full_tensor()
            with hk.use_backend(backend):
                found = model.matricization_spectra(method=method)
        for node, s in found.items():
            exact = dense(tensor, node.modes)
            size = min(len(s), len(exact))
            assert error(s[:size], exact[:size]) <= allowed(method, F64)
            assert float(exact[size:].sum()) <= allowed(method, F64) * float(exact[0])


@pytest.mark.slow
def test_accuracy_table():
    """Errors by method and dtype over planted and dense spectra (`-m slow -s` prints them)."""
    rows = []
    for name, expected in SPECTRA.items():
        for order in (4, 16, 64):
            for dtype in DTYPES:
                model = planted(expected, order, dtype=dtype)
                exact = model.double() if dtype != F64 else model
                nodes = model.tree.root.children
                truth = exact.matricization_spectra(nodes, "qr")[nodes[0]].detach()
                model = model.to(dtype)
                for method in METHODS:
                    s = model.matricization_spectra(nodes, method)[nodes[0]]
                    worst = error(s, expected if dtype == F64 else truth)
                    rows.append(f"{name:10} order {order:3} {dtype} {method:4} {worst:.1e}")
                    assert worst <= allowed(method, dtype)
    print("\n" + "\n".join(rows))


@pytest.mark.parametrize("method", METHODS)
def test_planted_hierarchical_rank(method):
    """A tree built with given local ranks shows exactly these."""
    tree = ModeTree.from_nested(((0, 1, 2), (3, (4, 5))))
    local = {(0, 1, 2): 4, (4, 5): 5, (3, 4, 5): 3, tuple(range(6)): 2}
    ranks = {node: local[tuple(sorted(node.modes))] for node in tree.interior}
    small = hk.HTF(tree, 6, ranks, dtype=F64)
    # The columns of a node's frame are the local components of its parent.
    expected = tuple(1 if n.is_root else ranks[n.parent] for n in tree.nodes)
    assert small.hierarchical_rank(method=method) == expected
    wide = hk.HTF(tree, 6, 20, dtype=F64)  # the same tensor with ranks to spare
    with torch.no_grad():
        for node in tree.nodes:
            weight = wide.node_weight(node).zero_()
            weight[: small.node_weight(node).shape[0], : small.node_weight(node).shape[1]] = (
                small.node_weight(node)
            )
    assert wide.hierarchical_rank(method=method) == expected


def test_zero_tensor_has_rank_zero():
    model = planted(SPECTRA["none"])
    assert set(model.hierarchical_rank()) == {0}
    assert all(float(r.detach()) == 0 for r in model.renyi2_ranks().values())
    assert all(float(r.detach()) == 0 for r in model.stable_ranks().values())
    assert all(len(f.values) == 0 for f in model.principal_frames().values())


# -- scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_columns_may_differ_by_any_factor(method, backend):
    """Powers of two moved between neighbours leave the tensor as it is; each number stays in
    float64's range, but no two columns of a factor are comparable."""
    torch.manual_seed(1)
    for tree in (ModeTree.balanced(6), ModeTree.flat(5), ModeTree.from_nested((((0,), 1), (2, 3)))):
        model = hk.HTF(tree, 5, 7, dtype=F64)
        before = model.matricization_spectra(tree.nodes, method="qr")
        with torch.no_grad():
            for node in tree.nodes:
                if node.is_root:
                    continue
                powers = torch.randint(-400, 400, (model.node_weight(node).shape[1],))
                if node == node.parent.children[0]:
                    model.node_weight(node).mul_(2.0 ** powers.double())
                    model.node_weight(node.parent).mul_(2.0 ** -powers.double()[:, None])
        with hk.use_backend(backend):
            after = model.matricization_spectra(tree.nodes, method)
        for node, s in before.items():
            assert error(after[node], s.detach()) <= allowed(method, F64)
        ranks = model.renyi2_ranks()
        for node, rank in ranks.items():
            exact = hk.renyi2_rank(before[node].detach())
            testing.assert_matches(rank.detach(), exact, F64, "second")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("std", [1e4, 1e-8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_out_of_range(dtype, std, method):
    """Order 128: the values overflow or underflow, their ratios do not."""
    tree = ModeTree.balanced(128)
    model = hk.HTF(tree, 3, 8, init_std=std, dtype=dtype)
    found = model.matricization_spectra(method=method)
    first, second = tree.root.children
    end = math.inf if std > 1 else 0.0
    assert found[first][0] == end
    assert bool((found.relative[first] > 0).all())
    assert abs(found.log2_scale[first]) > 1000
    assert found.log2_scale[first] == found.log2_scale[second]
    wide = {n: s.detach().double() for n, s in found.relative.items()}
    assert error(wide[first], wide[second]) <= allowed(method, dtype)
    # The sum of squares of every matricization is that of the tensor.
    logs = torch.stack([s.square().sum().log2() / 2 + found.log2_scale[n] for n, s in wide.items()])
    assert float(logs.max() - logs.min()) <= 8 * allowed(method, dtype)
    assert all(r >= 1 for r in found.numerical_ranks().values())
    for ranks, measure in (
        (model.renyi2_ranks(), hk.renyi2_rank),
        (model.stable_ranks(), hk.stable_rank),
    ):
        exact = torch.stack([measure(s) for s in wide.values()])
        testing.assert_matches(torch.stack([*ranks.values()]).detach(), exact, dtype, "second")
    total = sum(hk.effective_rank(s) for s in found.relative.values())
    for g in torch.autograd.grad(total, list(model.parameters())):
        assert bool(g.isfinite().all())


# -- derivatives ----------------------------------------------------------------------------------

LAYOUTS = [
    hk.Layout.make(ModeTree.balanced(4), 3, [5, 4]),
    hk.Layout.make(ModeTree.from_nested((((0,), 2), 1, (3, 4))), [2, 3, 1, 2, 3], 3, 2),
    hk.Layout.make(ModeTree.flat(5), 2, 4, root="sum"),
    hk.Layout.make(ModeTree.chain(4), [4, 3], [3, 4, 2], root="sum"),
    hk.Layout.make(ModeTree.balanced(6), 2, 3, share_weights=True),
    hk.Layout.make(ModeTree.halves(8), 2, 4),
]


def function(layout, of_model):
    """A function of the folded weights from one of a model."""

    model = module(layout, seed=1)

    def run(*weights):
        return torch.func.functional_call(
            _Call(model, of_model), {f"model.weights.{i}": w for i, w in enumerate(weights)}, ()
        )

    return run


class _Call(torch.nn.Module):
    def __init__(self, model, of_model):
        super().__init__()
        self.model, self.of_model = model, of_model

    def forward(self):
        return self.of_model(self.model)


def weights_of(layout):
    return [torch.randn(g.shape, dtype=F64, requires_grad=True) for g in layout.groups]


def smooth(s):
    """Symmetric and smooth in the singular values, where they coincide and where they vanish."""
    return s.square().sum(), s.pow(4).sum()


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_gradcheck(layout):
    def measured(model):
        found = model.matricization_spectra(model.tree.nodes)
        return torch.stack([x for s in found.values() for x in smooth(s)])

    def ranks(model):
        return torch.stack([*model.renyi2_ranks().values(), *model.stable_ranks().values()])

    weights = weights_of(layout)
    assert gradcheck(function(layout, measured), weights, fast_mode=True)
    assert gradcheck(function(layout, ranks), weights, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_gradients_against_the_dense_tensor(layout):
    """Every measure of every matricization, by the SVD of PyTorch."""
    measures = [hk.effective_rank, hk.nuclear_norm, hk.entanglement_entropy, hk.stable_rank]

    def unfolded(model):
        tensor = model.full_tensor()
        for node in model.tree.nodes:
            if not node.is_root:
                yield dense(tensor, node.modes)

    def total(spectra):
        return sum(w * m(s) for s in spectra for w, m in enumerate(measures, 1))

    weights = weights_of(layout)
    slow = function(layout, lambda m: total(unfolded(m)))(*weights)
    expected = torch.autograd.grad(slow, weights)
    scale = max(float(g.abs().max()) for g in expected)
    for method in METHODS:
        fast = function(
            layout, lambda m, k=method: total(m.matricization_spectra(None, k).values())
        )
        value = fast(*weights)
        testing.assert_matches(value.detach(), slow.detach(), F64, "second")
        for g, e in zip(torch.autograd.grad(value, weights), expected, strict=True):
            # Cancelling contributions of nodes and singular values: relative to the whole.
            worst = float((g - e).abs().max()) / scale
            assert worst <= spectra.ACCURACY["qr"] * 100


@pytest.mark.parametrize("name", ["coinciding", "zeros", "one", "flat", "none", "steep"])
def test_gradients_are_finite(name):
    model = planted(SPECTRA[name])
    parameters = list(model.parameters())
    found = model.matricization_spectra()
    for measure in (
        hk.effective_rank,
        hk.renyi2_rank,
        hk.stable_rank,
        hk.entanglement_entropy,
        hk.nuclear_norm,
        lambda s: hk.schatten_norm(s, 3),
    ):
        total = sum(measure(s) for s in found.values())
        for g in torch.autograd.grad(total, parameters, retain_graph=True):
            assert bool(g.isfinite().all())
    for ranks in (model.renyi2_ranks(), model.stable_ranks()):
        for g in torch.autograd.grad(sum(ranks.values()), parameters):
            assert bool(g.isfinite().all())


def test_second_derivatives():
    """Those of the Rényi ranks are there; the others say that they are not."""
    layout = LAYOUTS[0]
    weights = weights_of(layout)
    renyi = function(layout, lambda m: torch.stack([*m.renyi2_ranks().values()]))
    assert torch.autograd.gradgradcheck(renyi, weights, fast_mode=True)
    for of_model in (
        lambda m: sum(m.stable_ranks().values()),
        lambda m: sum(s.sum() for s in m.matricization_spectra().values()),
    ):
        value = function(layout, of_model)(*weights)
        grads = torch.autograd.grad(value, weights, create_graph=True)
        with pytest.raises(RuntimeError, match="have no second derivatives"):
            torch.autograd.grad(grads[0].sum(), weights)


def test_a_step_down_the_gradient_lowers_the_rank():
    model = hk.HTF(ModeTree.balanced(8), 4, 6, dtype=F64)
    for measure in (
        lambda: sum(hk.effective_rank(s) for s in model.matricization_spectra().values()),
        lambda: sum(model.renyi2_ranks().values()),
        lambda: sum(model.stable_ranks().values()),
    ):
        before = measure()
        model.zero_grad()
        before.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad / p.grad.norm()
        assert measure() < before


# -- principal frames -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [*LAYOUTS, None], ids=range(len(LAYOUTS) + 1))
def test_principal_frames(layout, backend):
    """They put the matricization together again, with orthonormal columns."""
    if layout is None:
        model = planted(SPECTRA["zeros"])
    else:
        model = module(layout)
    tensor = model.full_tensor().detach()
    with hk.use_backend(backend):
        frames = model.principal_frames()
    for node, (values, left, right) in frames.items():
        matrix = matricization(tensor, node.modes)
        u = message(model, node) @ left
        eye = torch.eye(len(values), dtype=F64)
        assert float((u.T @ u - eye).abs().max()) <= spectra.ACCURACY["qr"] * condition(values)
        # M^T U = V diag(values)
        v = matrix.T @ u / values
        assert float((v.T @ v - eye).abs().max()) <= spectra.ACCURACY["qr"] * condition(values) ** 2
        whole = (u * values) @ v.T - matrix
        assert float(whole.abs().max()) <= spectra.ACCURACY["qr"] * float(values[0])
        assert right.shape == left.shape


def condition(values):
    return float(values[0] / values[-1])


def message(model, node):
    """The node's frame: its message for every index tuple of its modes."""
    weight = model.node_weight(node).detach()
    if node.is_leaf:
        return weight
    product = None
    for child in node.children:
        frame = message(model, child)
        product = frame if product is None else (product[:, None] * frame[None]).flatten(0, 1)
    return product @ weight
