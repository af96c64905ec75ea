"""slog: sign and log-magnitude where the value itself has left the range."""

from __future__ import annotations

import math

import pytest
import torch
from models import of_one_vector

import htfkernels as hk
from htfkernels import ModeTree, testing


def caterpillar(order):
    return ModeTree.from_parents(
        order,
        [order, order, *range(order + 1, 2 * order - 1), *range(order + 1, 2 * order - 1), -1],
    )


def test_agrees_with_evaluate(case):
    layout = case.layout
    inputs = testing.make_inputs(case, torch.float64)
    function, arguments = testing.operation("evaluate", case, inputs)
    value, scale = testing.exact(function, arguments)
    sign, logabs = hk.slog_evaluate(case.tree, inputs.weights, inputs.vectors, layout=layout)
    assert sign.shape == logabs.shape == value.shape
    assert torch.equal(sign, value.sign())
    testing.assert_matches(sign * logabs.exp(), value, torch.float64, "backward", scale)


def test_gradients_agree_with_the_logarithm_of_evaluate(case):
    layout = case.layout
    inputs = testing.make_inputs(case, torch.float64)
    function, arguments = testing.operation("evaluate", case, inputs)
    count = len(inputs.weights)

    def logabs(*leaves):
        x = leaves[count] if isinstance(inputs.vectors, torch.Tensor) else leaves[count:]
        return hk.slog_evaluate(case.tree, leaves[:count], x, layout=layout)[1]

    ones = torch.ones_like(function(*arguments))
    actual = testing.gradients(logabs)(ones, *arguments)
    with hk.use_backend("reference"):
        expected = testing.gradients(lambda *a: function(*a).abs().log())(ones, *arguments)
    testing.assert_matches(actual, expected, torch.float64, "second")


def test_gradcheck(small_case):
    inputs = testing.make_inputs(small_case, torch.float64)
    _, arguments = testing.operation("evaluate", small_case, inputs)
    count, packed = len(inputs.weights), isinstance(inputs.vectors, torch.Tensor)

    def logabs(*leaves):
        x = leaves[count] if packed else leaves[count:]
        return hk.slog_evaluate(small_case.tree, leaves[:count], x, layout=small_case.layout)[1]

    assert torch.autograd.gradcheck(logabs, [a.requires_grad_() for a in arguments])
    assert torch.autograd.gradgradcheck(*of_one_vector(logabs, arguments), fast_mode=True)


def test_only_logabs_has_a_gradient():
    model = hk.HTF(ModeTree.balanced(4), 3, 2)
    sign, logabs = model.slog(torch.randn(5, 4, 3))
    assert not sign.requires_grad and logabs.requires_grad


TREES = [
    ("balanced", ModeTree.balanced, "linear"),
    ("balanced", ModeTree.balanced, "sum"),
    ("halves", ModeTree.halves, "linear"),
    ("flat", ModeTree.flat, "linear"),
    ("flat", ModeTree.flat, "sum"),
    ("caterpillar", caterpillar, "linear"),
]


@pytest.mark.parametrize(
    ("make", "root"),
    [
        # A caterpillar's 4095 levels are run one after the other: seconds each.
        pytest.param(m, r, id=f"{n}-{r}", marks=[pytest.mark.slow] * (n == "caterpillar"))
        for n, m, r in TREES
    ],
)
def test_four_thousand_modes(make, root):
    """Weights of 2^-10 and 2^10 in float32: the value is 10^-25000 or 10^25000."""
    tree = make(4096)
    layout = hk.Layout.make(tree, 2, 3, root=root)
    case = testing.Case("", layout, 2)
    inputs = testing.make_inputs(case, torch.float32, spread=0.01)

    def run(dtype, size):
        leaves = [(size * w).to(dtype).requires_grad_() for w in inputs.weights]
        vectors = inputs.vectors.to(dtype).requires_grad_()
        sign, logabs = hk.slog_evaluate(tree, leaves, vectors, layout=layout)
        grads = torch.autograd.grad(logabs.sum(), [*leaves, vectors])
        return sign, logabs, grads

    # In float64, with weights near 1, nothing leaves the range: the plain value will do.
    expected_sign, plain, plain_grads = run(torch.float64, 1)
    with hk.use_backend("reference"):
        weights = [w.double() for w in inputs.weights]
        value = hk.evaluate(tree, weights, inputs.vectors.double(), layout=layout)
    testing.assert_matches(plain, value.abs().log(), torch.float32, "forward", value.new_ones(2))
    assert torch.equal(expected_sign, value.sign())
    nodes = len(tree.nodes) - (root == "sum")
    for size in (2.0**-10, 2.0**10):
        sign, logabs, grads = run(torch.float32, size)
        assert torch.equal(sign.double(), value.sign())
        expected = value.abs().log() + nodes * math.log(size)
        testing.assert_matches(logabs, expected, torch.float32, "forward")
        given = [g / size for g in plain_grads[:-1]] + [plain_grads[-1]]
        # Roundings add up as the square root of their number; the table is for 64 modes.
        scale = [torch.full_like(g, g.abs().max().item() * math.sqrt(4096 / 64)) for g in given]
        testing.assert_matches(grads, given, torch.float32, "backward", scale)


@pytest.mark.parametrize("size", [1e-30, 1e30], ids=lambda s: f"{s:g}")
def test_entries_near_the_end_of_the_range(size):
    """Even one product of two such numbers would leave float32."""
    model = hk.HTF(ModeTree.balanced(8), 3, 4)
    x = torch.randn(7, 8, 3)
    sign, logabs = model.double().slog(x.double())
    logabs = logabs + (len(model.tree.nodes) + 8) * math.log(size)
    with torch.no_grad():
        for w in model.float().parameters():
            w.mul_(size)
    far_sign, far = model.slog(x * size)
    assert torch.equal(far_sign.double(), sign)
    testing.assert_matches(far, logabs, torch.float32, "forward")


def test_messages_of_different_size():
    """A row whose vectors are tiny beside one whose vectors are huge, in one batch."""
    model = hk.HTF(ModeTree.balanced(8), 3, 4)
    x = torch.randn(1, 8, 3)
    sign, logabs = model.slog(x)
    factors = torch.tensor([1e-20, 1.0, 1e20])
    signs, logs = model.slog(x * factors[:, None, None])
    assert torch.equal(signs, sign.expand(3))
    expected = logabs.double() + 8 * factors.double().log()
    testing.assert_matches(logs, expected, torch.float32, "forward")


def test_components_of_different_size_in_a_wide_product():
    """A component that falls behind among the first children and comes back among the last."""
    order = 400
    tree = ModeTree.flat(order)
    weights = [torch.ones(1, 2) for _ in range(order)] + [torch.ones(2, 1)]
    for n in range(order):
        weights[n][0, 1] = 1e-3 if n < order // 2 else 1e3
    x = torch.ones(1, order, 1)
    sign, logabs = hk.slog_evaluate(tree, weights, x)
    assert sign.item() == 1.0
    _, expected = hk.slog_evaluate(tree, [w.double() for w in weights], x.double())
    assert abs(expected.item() - math.log(2.0)) < 1e-3  # 1e-3 is not a float32
    testing.assert_matches(logabs, expected, torch.float32, "second")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros(dtype):
    model = hk.HTF(ModeTree.balanced(4), 3, 5, dtype=dtype)
    x = torch.randn(5, 4, 3, dtype=dtype)
    x[1, 2] = 0
    x[3] = 0
    sign, logabs = model.slog(x)
    zero = torch.tensor([False, True, False, True, False])
    assert torch.equal(sign == 0, zero)
    assert torch.equal(logabs == -torch.inf, zero)
    assert not logabs.isnan().any()
    testing.assert_matches(
        (sign * logabs.exp()).detach(), model(x).detach().double(), dtype, "second"
    )


def test_zero_weights():
    for root in ("linear", "sum"):
        model = hk.HTF(ModeTree.balanced(5), 3, 4, root=root)
        with torch.no_grad():
            model.weights[0].zero_()
        sign, logabs = model.slog(torch.randn(3, 5, 3))
        assert bool((sign == 0).all()) and bool((logabs == -torch.inf).all())


def test_a_zero_row_leaves_the_gradients_of_others_alone():
    model = hk.HTF(ModeTree.balanced(4), 3, 5, dtype=torch.float64)
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    x[1] = 0
    x.requires_grad_()
    model.slog(x)[1][[0, 2]].sum().backward()
    assert bool(x.grad[[0, 2]].isfinite().all()) and bool((x.grad[1] == 0).all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("order", [2, 5, 9])
def test_a_zero_factor_has_its_gradient(order):
    """One zero among the factors of a component: the only gradient it has is the zero's own."""
    tree = ModeTree.flat(order)
    model = hk.HTF(tree, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        model.node_weight(tree.leaves[1])[:, 0] = 0
    x = torch.randn(5, order, 3, dtype=torch.float64)
    actual = torch.autograd.grad(model.slog(x)[1].sum(), list(model.parameters()))
    with hk.use_backend("reference"):
        value = model(x)
    expected = torch.autograd.grad(value.abs().log().sum(), list(model.parameters()))
    testing.assert_matches(actual, expected, torch.float64, "second")


def test_cancellation_gives_an_exact_zero():
    weights = [torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[1.0], [-1.0]])]
    sign, logabs = hk.slog_evaluate(ModeTree.flat(2), weights, torch.ones(1, 2, 1))
    assert sign.item() == 0 and logabs.item() == -math.inf


def test_empty_batch():
    sign, logabs = hk.HTF(ModeTree.balanced(4), 3, 5).slog(torch.randn(0, 4, 3))
    assert sign.shape == logabs.shape == (0,)


def test_nan_stays_in_its_row():
    model = hk.HTF(ModeTree.balanced(4), 3, 5)
    x = torch.randn(5, 4, 3)
    clean = model.slog(x)[1]
    x[2, 1, 0] = torch.nan
    logabs = model.slog(x)[1]
    keep = [0, 1, 3, 4]
    assert torch.equal(logabs[keep], clean[keep]) and logabs[2].isnan()


def test_large_exponents_keep_their_precision():
    """2^24 and more: past what float32 counts one by one."""
    tree = ModeTree.flat(64)
    weights = [torch.full((1, 1), 2.0**100)] * 64 + [torch.ones(1, 1)]
    _, logabs = hk.slog_evaluate(tree, weights, torch.ones(1, 64, 1))
    testing.assert_matches(
        logabs, torch.tensor([6400 * math.log(2)]).double(), torch.float32, "forward"
    )


def test_other_errors_name_slog():
    model = hk.HTF(ModeTree.balanced(4), 3, 5)
    with pytest.raises(ValueError, match=r"slog: vectors must be \[B, 4, 3\], got \[2, 4, 4\]"):
        model.slog(torch.randn(2, 4, 4))
    with pytest.raises(ValueError, match=r"slog: vectors are torch.float64"):
        model.slog(torch.randn(2, 4, 3, dtype=torch.float64))
