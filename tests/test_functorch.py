"""torch.func transforms of operations and module, against loops and reverse-mode autograd."""

from __future__ import annotations

import pytest
import torch
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import htfkernels as hk
from htfkernels import testing


def matches(actual, expected, direction="backward"):
    testing.assert_matches(actual, expected, torch.float64, direction)


@pytest.fixture
def call(target, op, small_case):
    """The operation on a small case: a function of its arguments, and those."""
    target.require(op)
    inputs = testing.make_inputs(small_case, torch.float64, target.device)
    return testing.operation(op, small_case, inputs)


def every(arguments):
    return tuple(range(len(arguments)))


def test_grad(call):
    function, arguments = call
    actual = grad(lambda *a: function(*a).square().sum(), argnums=every(arguments))(*arguments)
    leaves = [a.clone().requires_grad_() for a in arguments]
    with hk.use_backend("reference"):
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    matches(actual, expected)


def test_grad_of_one_argument(call):
    function, arguments = call
    leaves = [a.clone().requires_grad_() for a in arguments]
    with hk.use_backend("reference"):
        expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    for i in every(arguments):
        actual = grad(lambda *a: function(*a).sum(), argnums=i)(*arguments)
        matches(actual, expected[i])


def test_vjp(call):
    function, arguments = call
    out, pull = vjp(function, *arguments)
    ones = torch.ones_like(out)
    leaves = [a.clone().requires_grad_() for a in arguments]
    with hk.use_backend("reference"):
        matches(pull(ones), torch.autograd.grad(function(*leaves), leaves, ones))


def test_jvp(call):
    function, arguments = call
    tangents = tuple(a.flip(-1) + 1 for a in arguments)
    out, along = jvp(function, arguments, tangents)
    with hk.use_backend("reference"):
        expected, along_expected = torch.autograd.functional.jvp(function, arguments, tangents)
    matches(out, expected, "forward")
    matches(along, along_expected)


def test_jvp_of_one_argument(call):
    function, arguments = call
    for i in every(arguments):

        def one(a, i=i):
            return function(*arguments[:i], a, *arguments[i + 1 :])

        tangent = arguments[i].flip(-1) + 1
        _, along = jvp(one, (arguments[i],), (tangent,))
        with hk.use_backend("reference"):
            matches(along, torch.autograd.functional.jvp(one, arguments[i], tangent)[1])


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians(call, jacobian):
    function, arguments = call
    actual = jacobian(function, argnums=every(arguments))(*arguments)
    with hk.use_backend("reference"):
        matches(actual, torch.autograd.functional.jacobian(function, arguments))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobian_of_one_argument(call, jacobian):
    function, arguments = call
    last = len(arguments) - 1
    actual = jacobian(function, argnums=last)(*arguments)
    with hk.use_backend("reference"):
        matches(actual, torch.autograd.functional.jacobian(function, arguments)[last])


def test_hessian(call):
    function, arguments = call
    last = len(arguments) - 1

    def scalar(*chosen):
        return function(chosen[0], *arguments[1:last], *chosen[1:]).square().sum()

    chosen = (arguments[0], arguments[last]) if last else (arguments[0],)
    argnums = tuple(range(len(chosen)))
    actual = hessian(scalar, argnums=argnums)(*chosen)
    reverse_twice = jacrev(jacrev(scalar, argnums=argnums), argnums=argnums)(*chosen)
    with hk.use_backend("reference"):
        expected = torch.autograd.functional.hessian(scalar, chosen)
    for got in (actual, reverse_twice):
        for row, expected_row in zip(got, expected, strict=True):
            matches(row, expected_row, "second")


def test_forward_mode_without_torch_func(call):
    """torch.autograd.forward_ad's dual numbers: the right tangent or an error, never a lost one."""
    import torch.autograd.forward_ad as forward_ad

    function, arguments = call
    tangents = tuple(a.flip(-1) + 1 for a in arguments)
    with hk.use_backend("reference"):
        expected = torch.autograd.functional.jvp(function, arguments, tangents)[1]
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(a.clone().requires_grad_(requires_grad), t)
                for a, t in zip(arguments, tangents, strict=True)
            ]
            try:
                out = forward_ad.unpack_dual(function(*duals)).tangent
            except (RuntimeError, NotImplementedError) as error:
                assert "forward" in str(error).lower()
                continue
            assert out is not None
            matches(out, expected)


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_over_each_argument(call, in_dim):
    function, arguments = call
    for i in every(arguments):
        stacked = torch.stack([arguments[i], arguments[i] + 1, arguments[i] * 2], dim=in_dim)
        dims = tuple(in_dim if j == i else None for j in every(arguments))
        given = [stacked if j == i else a for j, a in enumerate(arguments)]
        actual = vmap(function, in_dims=dims)(*given)
        each = [
            function(*arguments[:i], stacked.select(in_dim, v), *arguments[i + 1 :])
            for v in range(3)
        ]
        matches(actual, torch.stack(each), "forward")


def test_vmap_over_all_arguments_at_once(call):
    function, arguments = call
    stacked = [torch.stack([a, a + 1]) for a in arguments]
    actual = vmap(function)(*stacked)
    each = [function(*(s[v] for s in stacked)) for v in range(2)]
    matches(actual, torch.stack(each), "forward")


def test_vmap_of_grad(call):
    """Gradients of every argument, for several weights at once."""
    function, arguments = call
    stacked = [torch.stack([a, a + 1]) for a in arguments]
    one = grad(lambda *a: function(*a).square().sum(), argnums=every(arguments))
    each = [one(*(s[v] for s in stacked)) for v in range(2)]
    matches(vmap(one)(*stacked), [torch.stack(g) for g in zip(*each, strict=True)])


def test_autograd_through_vmap(call):
    function, arguments = call
    stacked = [torch.stack([a, a + 1]).requires_grad_() for a in arguments]
    actual = torch.autograd.grad(vmap(function)(*stacked).square().sum(), stacked)
    total = sum(function(*(s[v] for s in stacked)).square().sum() for v in range(2))
    matches(actual, torch.autograd.grad(total, stacked))


def test_vmap_in_vmap(call):
    function, arguments = call
    first = arguments[0]
    grid = torch.stack([torch.stack([first * i + j for j in range(2)]) for i in (1, 2, 3)])

    def one(a):
        return function(a, *arguments[1:])

    expected = torch.stack([torch.stack([one(entry) for entry in row]) for row in grid])
    matches(vmap(vmap(one))(grid), expected, "forward")
    matches(vmap(vmap(one), in_dims=1, out_dims=1)(grid), expected, "forward")


# -- over vectors and indices, and through the module ---------------------------------------------


@pytest.fixture
def model(target):
    torch.manual_seed(0)
    return hk.HTF(
        testing.random_tree(5, 1), 3, 4, out_features=2, dtype=torch.float64, device=target.device
    )


def test_vmap_over_vectors(target, model):
    target.require("evaluate")
    x = torch.randn(6, 4, 5, 3, dtype=torch.float64, device=target.device)
    matches(vmap(model)(x), model(x.flatten(0, 1)).unflatten(0, (6, 4)), "forward")
    matches(
        vmap(model, in_dims=1)(x),
        model(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (4, 6)),
        "forward",
    )
    matches(
        vmap(model, in_dims=1, out_dims=1)(x),
        model(x.flatten(0, 1)).unflatten(0, (6, 4)),
        "forward",
    )
    several = [v.contiguous() for v in x.unbind(2)]
    matches(vmap(lambda *v: model(v))(*several), vmap(model)(x), "forward")


def test_vmap_over_indices(target, model):
    target.require("evaluate_at")
    indices = torch.randint(3, (6, 4, 5), device=target.device)
    expected = model.at(indices.flatten(0, 1)).unflatten(0, (6, 4))
    matches(vmap(model.at)(indices), expected, "forward")
    matches(vmap(model.at, in_dims=1, out_dims=1)(indices), expected, "forward")


def test_gradients_of_each_sample(target, model):
    """The usual recipe: vmap over samples of the gradient by the parameters."""
    target.require("evaluate")
    target.require("evaluate_at")
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.randn(4, 5, 3, dtype=torch.float64, device=target.device)
    indices = torch.randint(3, (4, 5), device=target.device)

    def loss(p, sample):
        return functional_call(model, p, (sample[None],)).square().sum()

    def loss_at(p, index):
        return (
            hk.evaluate_at(model.tree, list(p.values()), index[None], layout=model.layout)
            .square()
            .sum()
        )

    for function, data in ((loss, x), (loss_at, indices)):
        actual = vmap(grad(function), in_dims=(None, 0))(parameters, data)
        for b in range(4):
            leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
            expected = torch.autograd.grad(function(leaves, data[b]), leaves.values())
            matches([g[b] for g in actual.values()], expected)


def test_ensemble_of_models(target, model):
    """vmap over weights, by functional_call on stacked parameters."""
    target.require("evaluate")
    models = [model] + [
        hk.HTF(model.tree, 3, 4, out_features=2, dtype=torch.float64, device=target.device)
        for _ in range(2)
    ]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(7, 5, 3, dtype=torch.float64, device=target.device)

    def one(p, b, data):
        return functional_call(model, (p, b), (data,))

    expected = torch.stack([m(x) for m in models])
    matches(vmap(one, in_dims=(0, 0, None))(parameters, buffers, x), expected, "forward")
    each = torch.stack([x, x + 1, 2 * x])
    expected = torch.stack([m(data) for m, data in zip(models, each, strict=True)])
    matches(vmap(one)(parameters, buffers, each), expected, "forward")


def test_input_jacobian_of_the_module(target, model):
    target.require("evaluate")
    x = torch.randn(5, 3, dtype=torch.float64, device=target.device)
    expected = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
    for jacobian in (jacrev, jacfwd):
        matches(jacobian(lambda v: model(v[None])[0])(x), expected)
        matches(vmap(jacobian(lambda v: model(v[None])[0]))(x[None])[0], expected)


def test_checkpointing(target, model):
    target.require("evaluate")
    x = torch.randn(7, 5, 3, dtype=torch.float64, device=target.device)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    actual = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
