"""Arithmetic of models in factored form against the dense tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import of_one_vector

import htfkernels as hk
from htfkernels import ModeTree, testing

F64 = torch.float64


def module(layout, dtype=F64, seed=0):
    """A model of ``testing.make_inputs``' weights, whose sums cancel little."""
    inputs = testing.make_inputs(testing.Case("", layout, 0), dtype, seed=seed)
    return hk.HTF.from_weights(layout.tree, inputs.weights, layout)


def like(layout, ranks):
    """The same layout with other ranks."""
    ranks = {node: ranks[i % len(ranks)] for i, node in enumerate(layout.tree.interior)}
    same = layout.out_features, layout.root, layout.share_weights
    return hk.Layout.make(layout.tree, layout.mode_dims, ranks, *same)


def dense(model):
    with hk.use_backend("reference"):
        return model.full_tensor()


def magnitudes(model):
    """The model of the weights' magnitudes: its entries are the condition scales of the model's."""
    return hk.HTF.from_weights(model.tree, [w.abs() for w in model.weights], model.layout)


def absolute(model):
    return dense(magnitudes(model)).detach()


CASES = [c for c in testing.cases() if c.fits("full_tensor")]


@pytest.fixture(params=CASES, ids=str)
def pair(request):
    """Two models of one tree, of different ranks."""
    layout = request.param.layout
    return module(layout), module(like(layout, (2, 5, 3)), seed=1)


# -- values ---------------------------------------------------------------------------------------


def check_values(a, b):
    t, u = dense(a).detach(), dense(b).detach()
    p, q = absolute(a), absolute(b)
    with torch.no_grad():
        found = hk.inner(a, b), hk.norm(a), a.norm(), hk.distance(a, b)
        logs = hk.slog_inner(a, b)[1], hk.log_norm(a), hk.log_distance(a, b)
        sign, _ = hk.slog_inner(a, b)
    expected = (t * u).sum(), t.norm(), t.norm(), (t - u).norm()
    scale = (p * q).sum(), p.norm(), p.norm(), p.norm() + q.norm()
    testing.assert_matches(found, expected, F64, "backward", scale)
    assert sign == found[0].sign()
    relative = [s / e.abs() for s, e in zip(scale, expected, strict=True)]
    logarithms = [e.abs().log() for e in expected]
    # A relative error is an absolute one of the logarithm.
    slack = [r + log.abs() for r, log in zip(relative, logarithms, strict=True)]
    order = (0, 1, 3)
    testing.assert_matches(
        logs, [logarithms[i] for i in order], F64, "backward", [slack[i] for i in order]
    )


def test_values(pair):
    check_values(*pair)


@given(st.integers(2, 7), st.integers(0, 10**6), st.integers(1, 3), st.data())
def test_random_trees(order, seed, outputs, data):
    tree = testing.random_tree(order, seed)
    dims = [data.draw(st.integers(1, 4)) for _ in range(order)]
    ranks = [{v: data.draw(st.integers(1, 6)) for v in tree.interior} for _ in range(2)]
    a, b = (hk.Layout.make(tree, dims, r, outputs) for r in ranks)
    if data.draw(st.booleans()):
        a, b = module(a, seed=seed), module(b, seed=seed + 1)
    else:  # of random signs: everything cancels
        a, b = (hk.HTF(tree, dims, r, outputs, dtype=F64) for r in ranks)
    check_values(a, b)
    check_sum(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_are_computed_in_float64(dtype):
    layout = hk.Layout.make(ModeTree.balanced(5), [2, 5, 3, 4, 2], 4)
    a, b = module(layout, dtype), module(layout, dtype, seed=1)
    for function in (hk.inner, hk.distance, hk.log_distance, lambda x, _: hk.norm(x)):
        found, expected = function(a, b), function(a.double(), b.double())
        a, b = a.to(dtype), b.to(dtype)
        assert found.dtype == dtype
        # One rounding, of the result.
        assert torch.equal(found, expected.to(dtype))


def test_autocast_changes_nothing():
    layout = hk.Layout.make(ModeTree.balanced(4), 3, 4)
    a, b = module(layout, torch.float32), module(layout, torch.float32, seed=1)
    plain = hk.inner(a, b), hk.distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert (hk.inner(a, b), hk.distance(a, b)) == plain


def test_sharing_and_kinds_of_root_may_differ():
    tree = ModeTree.balanced(6)
    made = [
        module(hk.Layout.make(tree, 3, 4, 1, root, share), seed=i)
        for i, (root, share) in enumerate(
            [("linear", False), ("sum", False), ("linear", True), ("sum", True)]
        )
    ]
    for a in made:
        for b in made:
            if a is not b:
                check_values(a, b)
            check_sum(a, b)


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_zero_tensors(factor):
    layout = hk.Layout.make(ModeTree.balanced(4), 3, 4)
    a, b = module(layout), module(layout, seed=1)
    with torch.no_grad():
        a.weights[0].zero_()
        b.weights[-1].mul_(factor)
    assert hk.norm(a) == 0 and hk.log_norm(a) == -math.inf and hk.inner(a, b) == 0
    sign, logabs = hk.slog_inner(a, b)
    assert sign == 0 and logabs == -math.inf
    testing.assert_matches(hk.distance(a, b).detach(), hk.norm(b).detach(), F64, "forward")
    for scalar in (hk.norm(a), hk.distance(a, a), hk.log_norm(a), logabs, hk.distance(a, b)):
        a.zero_grad()
        scalar.backward()
        assert all(bool(p.grad.isfinite().all()) for p in a.parameters())


# -- how near two models may be -------------------------------------------------------------------


@pytest.mark.parametrize("relative", [1e-3, 1e-8, 1e-12, 1e-15])
def test_distance_of_near_models(relative):
    """``T_b = T_a + T_c`` exactly, so that the distance is the norm of ``T_c``: right to rounding
    of the tensors' norms, where ``sqrt(|a|^2 + |b|^2 - 2 <a, b>)`` is off by its square root."""
    tree = ModeTree.balanced(8)
    for seed in range(5):
        a, c = (module(hk.Layout.make(tree, 4, r), seed=seed + i) for i, r in enumerate((5, 3)))
        with torch.no_grad():
            c = hk.scale(c, float(relative * hk.norm(a) / hk.norm(c)))
            b = hk.add(a, c)
            found, expected, size = hk.distance(a, b), hk.norm(c), hk.norm(a) + hk.norm(b)
        testing.assert_matches(found, expected, F64, "backward", size)


def test_distance_of_one_tensor_from_itself():
    layout = hk.Layout.make(ModeTree.balanced(8), 4, [5, 4, 3])
    a = module(layout)
    b = hk.HTF.from_weights(a.tree, a.weights, layout)
    with torch.no_grad():  # the same tensor: other components, in another order and size
        leaf, up = b.node_weight(b.tree.leaves[0]), b.node_weight(b.tree.leaves[0].parent)
        sibling = b.node_weight(b.tree.leaves[1])
        order = torch.randperm(5)
        up.copy_(up[order] * 3)
        leaf.copy_(leaf[:, order] / 300)
        sibling.copy_(sibling[:, order] * 100)
    for other in (a, b):
        found = hk.distance(a, other)
        testing.assert_matches(
            found.detach(), torch.zeros((), dtype=F64), F64, "backward", a.norm().detach()
        )
        a.zero_grad()
        found.backward()
        assert all(bool((p.grad == 0).all()) for p in a.parameters())


def test_norm_keeps_its_digits_where_components_cancel():
    """Two components that all but cancel; a Gram matrix would lose them."""
    tree, gap = ModeTree.flat(3), 2.0**-40
    leaf = torch.tensor([[1.0, 1.0], [0.0, gap]], dtype=F64)
    rest = torch.ones(1, 2, dtype=F64)
    root = torch.tensor([[1.0], [-1.0]], dtype=F64)
    model = hk.HTF.from_weights(tree, [leaf, rest, rest, root])
    found = hk.norm(model).detach()
    testing.assert_matches(found, torch.tensor(gap, dtype=F64), F64, "backward", found.new_ones(()))
    naive = hk.inner(model, model).sqrt()
    assert abs(found - gap) < abs(naive - gap) or found == gap


# -- gradients ------------------------------------------------------------------------------------


def logarithms(a, b):
    return hk.slog_inner(a, b)[1], hk.log_norm(a), hk.log_distance(a, b)


def scalars(a, b):
    return [hk.inner(a, b), hk.norm(a), hk.distance(a, b), *logarithms(a, b)]


def by_weights(scalar, *models):
    leaves = [p for m in models for p in m.parameters()]
    return torch.autograd.grad(
        scalar, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def check_gradients(a, b):
    """All are gradients of polynomials, divided by a value; so are their condition scales."""

    def polynomials(x, y, sign):
        t, u = dense(x), dense(y)
        return (t * u).sum(), t.square().sum() / 2, (t + sign * u).square().sum() / 2

    true = polynomials(a, b, -1)
    inner, norm, distance = true[0].abs(), (2 * true[1]).sqrt(), (2 * true[2]).sqrt()
    p, q = magnitudes(a), magnitudes(b)
    expected = [by_weights(f, a, b) for f in true] * 2
    scales = [by_weights(f, p, q) for f in polynomials(p, q, 1)] * 2
    divisors = [1.0, norm, distance, true[0], norm**2, distance**2]
    sizes = [1.0, norm, distance, inner, norm**2, distance**2]
    for f, e, s, d, size in zip(scalars(a, b), expected, scales, divisors, sizes, strict=True):
        testing.assert_matches(
            by_weights(f, a, b), [g / d for g in e], F64, "backward", [g / size for g in s]
        )


def test_gradients(pair):
    check_gradients(*pair)


def test_gradcheck(small_case):
    layout = small_case.layout
    a, b = module(layout), module(like(layout, (2, 1)), seed=1)
    count = len(layout.groups)

    class View(hk.HTF):  # a model whose weights are what it is given
        def __init__(self, layout, weights):
            torch.nn.Module.__init__(self)
            self.layout, self.weights = layout, list(weights)

        def _folded(self):
            return self.weights

    def run(*weights):
        x, y = View(a.layout, weights[:count]), View(b.layout, weights[count:])
        return torch.stack(scalars(x, y))

    function, vector = of_one_vector(run, [w for m in (a, b) for w in m.weights])
    assert torch.autograd.gradcheck(function, vector, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, vector, fast_mode=True)


def test_zero_weights_have_their_gradients():
    """Zeros of a block-diagonal weight are weights as well; so are those of a wide node's leaf."""
    wide = hk.Layout.make(ModeTree.flat(6), 3, 4)
    a = module(wide)
    with torch.no_grad():
        a.node_weight(a.tree.leaves[1])[:, 0] = 0
        a.node_weight(a.tree.leaves[2])[1] = 0
    tall = module(hk.Layout.make(ModeTree.balanced(4), 3, 2))
    check_gradients(a, module(wide, seed=1))
    check_gradients(hk.add(tall, tall), tall)


@pytest.mark.parametrize("relative", [1e-3, 1e-6, 1e-9])
def test_gradient_of_the_distance_of_near_models(relative):
    """By the weight that differs, the gradient is that of the norm of the difference; off by
    rounding of the norms over the distance."""
    layout = hk.Layout.make(ModeTree.balanced(8), 4, 5)
    a = module(layout)
    step = torch.randn(a.weights[-1].shape, dtype=F64)
    weights = [w.detach() for w in a.weights]
    b, c = (
        hk.HTF.from_weights(a.tree, [*weights[:-1], last], layout)
        for last in (weights[-1] + relative * step, relative * step)
    )
    by_root = by_weights(hk.distance(a, b), b)[-1]
    expected = by_weights(hk.norm(c), c)[-1]
    scale = torch.full_like(
        expected, float((expected.abs().max() * hk.norm(a) / hk.norm(c)).detach())
    )
    testing.assert_matches(by_root, expected, F64, "second", scale)


# -- far out of range -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ModeTree.balanced, ModeTree.halves, ModeTree.flat])
def test_five_hundred_modes(make):
    """Weights of 1e-3 and 1e3: norms of 10^-3000 and 10^3000, where the same with weights of 1
    stays in range. Some columns are zero; they have gradients as well."""
    tree = make(512)
    near = []
    for rank in (2, 3):
        case = testing.Case("", hk.Layout.make(tree, 2, rank), 0)
        weights = testing.make_inputs(case, F64, seed=rank, spread=0.01).weights
        for w in weights[:-1]:
            w[-1, :, 0] = 0
        near.append(hk.HTF.from_weights(tree, weights, case.layout))
    nodes = len(tree.nodes)
    expected = logarithms(*near)
    gradients = [by_weights(e, *near) for e in expected]
    for size in (1e-3, 1e3):
        far = [hk.HTF.from_weights(tree, [size * w for w in m.weights], m.layout) for m in near]
        found, log = logarithms(*far), math.log(size)
        moved = [e.detach() + f * nodes * log for e, f in zip(expected, (2, 1, 1), strict=True)]
        scale = [torch.full_like(e, nodes * abs(log)) for e in moved]
        testing.assert_matches(found, moved, F64, "forward", scale)
        for of_near, f in zip(gradients, found, strict=True):
            grads = [g / size for g in of_near]
            # Roundings add up as the square root of their number; the table is for 64 modes.
            scale = [torch.full_like(g, float(g.abs().max()) * math.sqrt(512 / 64)) for g in grads]
            assert all(bool((g[-1, 1:, 0] != 0).all()) for g in grads[: len(near[0].weights) - 1])
            testing.assert_matches(by_weights(f, *far), grads, F64, "second", scale)


@pytest.mark.parametrize("make", [ModeTree.balanced, ModeTree.flat])
def test_a_thousand_modes_of_rank_one(make):
    """Outer products of vectors: the inner product is the product of theirs."""
    tree = make(1024)
    a, b = (hk.HTF(tree, 3, 1, dtype=F64) for _ in range(2))
    leaves = [m.weights[0].detach().squeeze(-1) for m in (a, b)]
    above = [torch.cat([w.detach().flatten() for w in list(m.weights)[1:]]) for m in (a, b)]
    factors = torch.cat([(leaves[0] * leaves[1]).sum(1), *above])
    sign, logabs = hk.slog_inner(a, b)
    assert sign == factors.sign().prod()
    expected = factors.abs().log()
    testing.assert_matches(
        logabs.detach(), expected.sum(), F64, "backward", expected.abs().sum() * 10
    )
    factors = torch.cat([leaves[0].norm(dim=1), above[0]]).abs().log()
    testing.assert_matches(
        hk.log_norm(a).detach(), factors.sum(), F64, "backward", factors.abs().sum()
    )


def test_components_of_different_size_in_a_wide_product():
    """A component that falls behind among the first children and comes back among the last."""
    order = 400
    tree = ModeTree.flat(order)
    weights = [torch.ones(1, 2, dtype=F64) for _ in range(order)] + [torch.ones(2, 1, dtype=F64)]
    for n in range(order):
        weights[n][0, 1] = 2.0**-10 if n < order // 2 else 2.0**10
    model = hk.HTF.from_weights(tree, weights)
    plain = hk.HTF.from_weights(tree, [torch.ones_like(w) for w in weights])
    two = torch.tensor(2.0, dtype=F64)
    found = hk.norm(model).detach(), hk.inner(model, plain).detach(), hk.norm(plain).detach()
    testing.assert_matches(found, [two, 2 * two, two], F64, "forward")


def test_columns_of_different_size():
    """A column that is tiny in one leaf and huge in its sibling, and weights at both ends."""
    a = module(hk.Layout.make(ModeTree.balanced(4), 3, 4))
    b = module(hk.Layout.make(ModeTree.balanced(4), 3, 4), seed=1)
    before = [s.detach() for s in scalars(a, b)]
    with torch.no_grad():
        a.node_weight(a.tree.leaves[0])[:, 0] *= 2.0**-1000
        a.node_weight(a.tree.leaves[1])[:, 0] *= 2.0**1000
        a.node_weight(a.tree.leaves[2]).mul_(2.0**600)
        a.node_weight(a.tree.leaves[3]).mul_(2.0**-600)
        b.node_weight(b.tree.leaves[2]).mul_(2.0**600)
        b.node_weight(b.tree.leaves[3]).mul_(2.0**-600)
    after = [s.detach() for s in scalars(a, b)]
    testing.assert_matches(after, before, F64, "second")


def test_values_out_of_range():
    huge = hk.HTF(ModeTree.balanced(64), 4, 3, init_std=1e30, dtype=F64)
    assert hk.norm(huge) == math.inf and hk.log_norm(huge).isfinite()
    tiny = hk.HTF(ModeTree.balanced(64), 4, 3, init_std=1e-30, dtype=F64)
    assert hk.norm(tiny) == 0 and hk.log_norm(tiny).isfinite()
    assert hk.inner(huge, tiny).isfinite()


@pytest.mark.gpu
def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layout = hk.Layout.make(ModeTree.balanced(8), 4, [5, 4, 3])
    a, b = module(layout), module(like(layout, (2, 5, 3)), seed=1)
    expected = scalars(a, b)
    grads = [by_weights(e, a, b) for e in expected]
    for found, e, g in zip(scalars(a.cuda(), b.cuda()), expected, grads, strict=True):
        testing.assert_matches(found, e, F64, "second")
        testing.assert_matches(by_weights(found, a, b), g, F64, "second")
    assert hk.add(a, hk.scale(b, 2.0)).weights[0].is_cuda


# -- models ---------------------------------------------------------------------------------------


def check_sum(a, b):
    s = hk.add(a, b)
    assert s.layout.ranks == tuple(
        x + y for x, y in zip(a.layout.ranks, b.layout.ranks, strict=True)
    )
    assert s.layout.root == ("sum" if a.layout.root == b.layout.root == "sum" else "linear")
    expected, scale = dense(a) + dense(b), absolute(a) + absolute(b)
    testing.assert_matches(dense(s).detach(), expected.detach(), F64, "backward", scale)
    return s


def test_add(pair):
    check_sum(*pair)


def test_add_shares_weights_where_both_do():
    tree = ModeTree.balanced(8)
    shared, plain = (module(hk.Layout.make(tree, 3, [2, 4, 3], 1, "linear", s)) for s in (1, 0))
    both = check_sum(shared, shared)
    assert both.layout.share_weights and both.weights[0].shape == (1, 3, 4)
    assert not check_sum(shared, plain).layout.share_weights
    # Leaves of the shapes 3 x 1 and 3 x 2 in one, of 3 x 2 and 3 x 1 in the other: their sums have
    # one shape, but are two weights.
    tree = ModeTree.balanced(4)
    ranks = [dict(zip(tree.interior, r, strict=True)) for r in ((1, 2, 3), (2, 1, 3))]
    a, b = (
        module(hk.Layout.make(tree, 3, r, share_weights=True), seed=r[tree.root]) for r in ranks
    )
    assert not check_sum(a, b).layout.share_weights
    assert check_sum(a, a).layout.share_weights


@pytest.mark.parametrize("factor", [-1.0, 0.5, 0.0, torch.tensor(3.0)], ids=str)
def test_scale(pair, factor):
    for model in pair:
        scaled = hk.scale(model, factor)
        assert scaled.layout.ranks == model.layout.ranks
        assert scaled.layout.share_weights == model.layout.share_weights
        both = model.layout.root == "sum" and model.layout.share_weights
        assert scaled.layout.root == ("linear" if both else model.layout.root)
        expected = float(factor) * dense(model)
        testing.assert_matches(dense(scaled), expected, F64, "backward", absolute(model) * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_models_are_ones_own(dtype):
    """Their parameters are copies, of the same dtype, and no random numbers are drawn."""
    a = hk.HTF(ModeTree.balanced(4), 3, 2, dtype=dtype)
    state, before = torch.get_rng_state(), [w.detach().clone() for w in a.weights]
    for made in (hk.add(a, a), hk.scale(a, 2.0)):
        assert all(isinstance(w, torch.nn.Parameter) and w.is_leaf for w in made.weights)
        assert all(w.dtype == dtype and w.requires_grad for w in made.weights)
        with torch.no_grad():
            for w in made.weights:
                w.zero_()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, v) for w, v in zip(a.weights, before, strict=True))


# -- bad arguments --------------------------------------------------------------------------------

PAIRS = [hk.inner, hk.slog_inner, hk.distance, hk.log_distance, hk.add]


@pytest.mark.parametrize("function", PAIRS, ids=lambda f: f.__name__)
def test_models_that_do_not_fit(function):
    balanced = ModeTree.balanced(4)

    def make(tree=balanced, dims=3, outputs=1, dtype=F64):
        return hk.HTF(tree, dims, 2, outputs, dtype=dtype)

    name = function.__name__
    bad = [
        (make(ModeTree.halves(4)), f"{name}: the models' trees differ"),
        (make(dims=[3, 3, 2, 3]), f"{name}: mode 2 has the dimension 3 in a and 2 in b"),
        (make(outputs=2), f"{name}: a has 1 outputs .out_features. and b 2"),
        (make(dtype=torch.float32), f"{name}: a is torch.float64 on cpu and b torch.float32 on"),
        (torch.zeros(3, 3, 3, 3), f"{name}: b must be an HTF, got Tensor"),
    ]
    for other, message in bad:
        with pytest.raises(ValueError, match=message):
            function(make(), other)
    with pytest.raises(ValueError, match=f"{name}: a must be an HTF, got list"):
        function([], make())


def test_other_bad_arguments():
    model = hk.HTF(ModeTree.balanced(4), 3, 2)
    for factor in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scale: factor must be finite"):
            hk.scale(model, factor)
    for function in (hk.norm, hk.log_norm, lambda x: hk.scale(x, 2.0)):
        with pytest.raises(ValueError, match="a must be an HTF, got int"):
            function(3)
