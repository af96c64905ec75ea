"""HTF as an ordinary module."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import numpy
import pytest
import torch

import htfkernels as hk
from htfkernels import ModeTree, testing


def make(**options):
    torch.manual_seed(0)
    tree = ModeTree.from_nested(((0, 1), (2, (3,))))
    return hk.HTF(tree, [2, 3, 4, 5], [7, 6, 5], **options)


def vectors(batch=4, dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(batch, d, dtype=dtype) for d in (2, 3, 4, 5)]


@pytest.fixture
def model():
    return make()


def test_parameters_are_folded():
    model = hk.HTF(ModeTree.balanced(8), 3, [5, 4, 2], out_features=6)
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in model.parameters())
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes == [(8, 3, 5), (4, 5, 4), (2, 4, 2), (1, 2, 6)]
    assert [tuple(p.shape) for p in model.parameters()] == [g.shape for g in model.layout.groups]
    assert sum(p.numel() for p in model.parameters()) == model.layout.num_parameters
    assert list(model.state_dict()) == ["_extra_state", *(f"weights.{i}" for i in range(4))]


def test_shared_weights():
    model = hk.HTF(ModeTree.balanced(8), 3, [5, 4, 2], share_weights=True)
    assert [tuple(p.shape) for p in model.parameters()] == [
        (1, 3, 5),
        (1, 5, 4),
        (1, 4, 2),
        (1, 2, 1),
    ]
    separate = hk.HTF(ModeTree.balanced(8), 3, [5, 4, 2])
    with torch.no_grad():
        for p, shared in zip(separate.parameters(), model.parameters(), strict=True):
            p.copy_(shared.expand_as(p))
    x = torch.randn(7, 8, 3)
    torch.testing.assert_close(model(x), separate(x))
    torch.testing.assert_close(model.full_tensor(), separate.full_tensor())
    model(x).sum().backward()
    separate(x).sum().backward()
    for p, q in zip(model.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.sum(0, keepdim=True))


def test_sum_root_has_no_weight():
    model = hk.HTF(ModeTree.flat(3), 4, 6, root="sum")
    assert len(list(model.parameters())) == 1
    root = model.node_weight(model.tree.root)
    assert torch.equal(root, torch.ones(6, 1))
    linear = hk.HTF(ModeTree.flat(3), 4, 6)
    with torch.no_grad():
        linear.weights[0].copy_(model.weights[0])
        linear.weights[1].fill_(1)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(model(x), linear(x))
    torch.testing.assert_close(model.full_tensor(), linear.full_tensor())
    for a, b in zip(model.slog(x), linear.slog(x), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(model.double().node_weight(model.tree.root), torch.ones(6, 1).double())


def test_initial_weights():
    wide = hk.HTF(ModeTree.balanced(2), 400, 100)
    stds = [float(p.detach().std()) for p in wide.parameters()]
    assert stds[0] == pytest.approx(400**-0.5, rel=0.05)
    assert stds[1] == pytest.approx(100**-0.5, rel=0.3)
    assert all(
        float(p.detach().std()) < 2e-3
        for p in hk.HTF(ModeTree.flat(3), 9, 9, init_std=1e-3).parameters()
    )
    zeros = hk.HTF(ModeTree.flat(3), 9, 9, init_std=0.0)
    assert all(bool((p == 0).all()) for p in zeros.parameters())


@pytest.mark.parametrize("root", ["linear", "sum"])
def test_from_weights(root):
    """By node, in a list, or folded; the parameters are copies."""
    tree = ModeTree.from_nested(((0, 1), (2,), 3))
    ranks = dict(zip(tree.interior, (4, 3, 2), strict=True))
    model = hk.HTF(tree, [2, 3, 4, 5], ranks, root=root, share_weights=True, dtype=torch.float64)
    nodes = tree.nodes if root == "linear" else tree.nodes[:-1]
    by_node = {node: model.node_weight(node) for node in nodes}
    state = torch.get_rng_state()
    made = [
        hk.HTF.from_weights(tree, by_node),
        hk.HTF.from_weights(tree, list(by_node.values())),
        hk.HTF.from_weights(tree, model.weights, model.layout),
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.layout.share_weights for m in made] == [False, False, True]
    for other in made:
        assert other.layout.root == root and other.layout.ranks == model.layout.ranks
        assert torch.equal(other.full_tensor(), model.full_tensor())
        assert all(isinstance(w, torch.nn.Parameter) and w.is_leaf for w in other.weights)
        with torch.no_grad():
            other.weights[0].zero_()
    assert bool((model.weights[0] != 0).all())


def test_from_weights_that_do_not_fit():
    tree = ModeTree.flat(3)
    leaf, root = torch.randn(5, 2), torch.randn(2, 1)
    bad = [
        ([leaf, leaf, torch.randn(5, 3), root], "from_weights: the weight of .* must be"),
        ([leaf, leaf], "from_weights: expected a weight for each of 4 nodes"),
        ([leaf, leaf, leaf, root.double()], "from_weights: weights are torch.float32 on cpu and"),
    ]
    for weights, message in bad:
        with pytest.raises(ValueError, match=message):
            hk.HTF.from_weights(tree, weights)


def test_norm(model):
    with torch.no_grad():
        assert model.norm() == hk.norm(model)


def test_reset_parameters(model):
    before = [p.detach().clone() for p in model.parameters()]
    model.reset_parameters()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    drawn = []
    for _ in range(2):
        model.reset_parameters(torch.Generator().manual_seed(3))
        drawn.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtype(cpu_target, dtype):
    cpu_target.require("evaluate", dtype)
    model = make(dtype=dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    assert model(vectors(dtype=dtype)).dtype == dtype
    assert model.to(torch.float64)(vectors(dtype=torch.float64)).dtype == torch.float64


def test_device():
    model = make(device="meta")
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    model.reset_parameters()
    assert model(vectors()).shape == (4,)


# -- saving, copying, training --------------------------------------------------------------------


@pytest.mark.parametrize("root", ["linear", "sum"])
def test_state_dict_round_trip(cpu_target, root):
    cpu_target.require("evaluate", torch.float32)
    model, other = make(root=root), make(root=root)
    other.reset_parameters()
    assert not torch.equal(model(vectors()), other(vectors()))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert not other.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys
    assert torch.equal(model(vectors()), other(vectors()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        hk.HTF(model.tree, [2, 3, 4, 5], 9, root=root).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_independent(cpu_target, model, duplicate):
    cpu_target.require("evaluate", torch.float32)
    expected = model(vectors())
    twin = duplicate(model)
    assert twin.tree == model.tree and twin.layout == model.layout
    assert torch.equal(twin(vectors()), expected)
    with torch.no_grad():
        twin.node_weight(twin.tree.root).zero_()
    assert bool((twin(vectors()) == 0).all())
    assert torch.equal(model(vectors()), expected)
    twin(vectors()).sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "LBFGS"])
def test_an_optimizer_step_changes_the_output(cpu_target, model, optimizer):
    cpu_target.require("evaluate", torch.float32)
    x, y = vectors(), torch.zeros(4)
    step = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)

    def closure():
        step.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    before = closure().detach()
    step.step(closure)
    after = closure().detach()
    assert after < before
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_gradients_accumulate(cpu_target, model):
    cpu_target.require("evaluate", torch.float32)
    x = vectors()
    model(x).sum().backward()
    once = [p.grad.clone() for p in model.parameters()]
    model(x).sum().backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_frozen_weights(cpu_target, model):
    cpu_target.require("evaluate", torch.float32)
    model.weights[0].requires_grad_(False)
    model(vectors()).sum().backward()
    assert model.weights[0].grad is None
    assert all(p.grad is not None for p in list(model.weights)[1:])


def test_parametrized_weights(cpu_target, model):
    """torch.nn.utils.parametrize works as on any module."""
    cpu_target.require("evaluate", torch.float32)

    class Positive(torch.nn.Module):
        def forward(self, w):
            return w.abs()

    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.weights[1].abs_()
    torch.nn.utils.parametrize.register_parametrization(model.weights, "1", Positive())
    torch.testing.assert_close(model(vectors()), expected(vectors()))
    torch.testing.assert_close(model.full_tensor(), expected.full_tensor())
    model(vectors()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_and_containers(cpu_target):
    """Behind a layer, in a Sequential, with a hook: as any module."""
    cpu_target.require("evaluate", torch.float32)
    seen = []
    head = hk.HTF(ModeTree.balanced(4), 3, 5, out_features=2)
    net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Unflatten(1, (4, 3)), head)
    head.register_forward_hook(lambda *_: seen.append(1))
    out = net(torch.randn(7, 6))
    assert out.shape == (7, 2) and seen == [1]
    out.sum().backward()
    assert all(bool(p.grad.any()) for p in net.parameters())


# -- node_weight ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"out_features": 3}, {"root": "sum"}], ids=str)
def test_writing_into_a_node_weight_writes_the_model(cpu_target, options):
    cpu_target.require("full_tensor", torch.float32)
    model = make(**options)
    weights = {}
    with torch.no_grad():
        for node in model.tree.nodes:
            if node.is_root and "root" in options:
                continue
            weight = model.node_weight(node)
            assert tuple(weight.shape) == model.layout.shape(node)
            weights[node] = torch.randn_like(weight)
            weight.copy_(weights[node])
    assert torch.equal(model.full_tensor(), hk.full_tensor(model.tree, weights))


def test_shared_node_weights_are_one():
    model = hk.HTF(ModeTree.balanced(4), 3, 5, share_weights=True)
    first, second = (model.node_weight(model.tree.node(n)) for n in (0, 3))
    with torch.no_grad():
        first.fill_(7)
    assert bool((second == 7).all())


def test_node_weight_has_gradients(model):
    node = model.tree.node([0, 1])
    model.node_weight(node).sum().backward()
    group, slot = model.layout.location[node.index]
    assert bool((model.weights[group].grad[slot] == 1).all())


def test_node_weight_of_another_tree(model):
    with pytest.raises(ValueError, match=r"node_weight: Node.* is not a node of this model's tree"):
        model.node_weight(ModeTree.balanced(4).nodes[0])
    for wrong in (0, (0,), None):
        with pytest.raises(ValueError, match="node_weight"):
            model.node_weight(wrong)
    same = ModeTree.from_nested(model.tree.to_nested())
    assert torch.equal(model.node_weight(same.nodes[0]), model.node_weight(model.tree.nodes[0]))


# -- local components -----------------------------------------------------------------------------


def test_local_component_norms(case):
    """By the definition: the norm of the tensor product of C + 1 vectors, formed."""
    layout = case.layout
    model = hk.HTF(
        case.tree,
        layout.mode_dims,
        {node: layout.ranks[i] for i, node in enumerate(case.tree.interior)},
        layout.out_features,
        layout.root,
        layout.share_weights,
        dtype=torch.float64,
    )
    norms = model.local_component_norms()
    assert list(norms) == list(case.tree.interior)
    for node in case.tree.interior:
        rank = layout.shape(node)[0]
        assert norms[node].shape == (rank,)
        for r in {0, rank - 1}:
            component = model.node_weight(node)[r]
            if len(node.children) <= 4:
                for child in node.children:
                    column = model.node_weight(child)[:, r]
                    if component.numel() * column.numel() > 10**6:
                        break
                    component = torch.outer(component.flatten(), column)
                else:
                    testing.assert_matches(
                        norms[node][r], component.norm(), torch.float64, "backward"
                    )


def test_local_component_norms_have_gradients(model):
    sum(n.sum() for n in model.local_component_norms().values()).backward()
    assert all(bool(p.grad.any()) for p in model.parameters())


def test_repr(model):
    assert repr(model).startswith("HTF(\n  order=4, mode_dims=2..5, ranks=5..7, out_features=1")
    assert f"parameters={model.layout.num_parameters}" in repr(model)
    assert "share_weights=True" in repr(hk.HTF(ModeTree.flat(3), 2, 2, share_weights=True))


BAD_ARGUMENTS = {
    "tree": [(4, "tree: expected a ModeTree, got int"), (None, "got NoneType")],
    "mode_dims": [
        ("3333", "mode_dims must be an integer, got '3'"),
        (2.5, "mode_dims must be an integer, got 2.5"),
        (torch.tensor(2.5), "mode_dims must be an integer, got tensor"),
        ([3, 3, 3], "mode_dims: expected 4"),
        ({0: 3}, "mode_dims: expected an integer, or one for each mode, got a mapping"),
        (0, "mode_dims: expected positive"),
        (10**5000, "mode_dims must fit into 64 bits"),
        (2**62, "mode_dims: their sum must fit into 64 bits"),
    ],
    "ranks": [
        ([5, 5], "ranks: expected 3"),
        (None, "ranks must be an integer, got None"),
        ("4", "ranks must be an integer, got '4'"),
        ({}, "ranks: expected one for every interior node"),
        (2**63, "ranks must fit into 64 bits"),
    ],
    "out_features": [(1.5, "out_features must be an integer"), (0, "out_features: expected")],
    "root": [("Sum", 'root: expected "linear" or "sum"'), (["sum"], "root: expected")],
    "share_weights": [("no", "share_weights: expected True or False, got 'no'"), (None, "None")],
    "init_std": [
        (-1, "init_std: expected a finite number that is not negative, got -1"),
        (float("nan"), "init_std: expected .*, got nan"),
        (float("inf"), "init_std: expected .*, got inf"),
        (10**5000, "init_std: expected .*, got inf"),
        ("0.1", "init_std: expected .*, got '0.1'"),
        ([0.1], r"init_std: expected .*, got \[0.1\]"),
        (True, "init_std: expected .*, got True"),
        (1j, "init_std: expected .*, got 1j"),
    ],
    "dtype": [
        ("float32", "dtype: expected one of .*torch.float32.*, got 'float32'"),
        (torch.int64, "got torch.int64"),
        (torch.complex64, "got torch.complex64"),
        (torch.float8_e4m3fn, "got torch.float8_e4m3fn"),
    ],
}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        pytest.param(name, *case, id=f"{name}-{i}")
        for name, bad in BAD_ARGUMENTS.items()
        for i, case in enumerate(bad)
    ],
)
def test_bad_models(argument, value, message):
    good = {"tree": ModeTree.from_nested(((0, 1), (2, (3,)))), "mode_dims": 2, "ranks": 5}
    with pytest.raises(ValueError, match=message):
        hk.HTF(**{**good, argument: value})


def test_numbers_of_numpy_and_pytorch_will_do():
    tree = ModeTree.balanced(4)
    model = hk.HTF(tree, torch.tensor(3), numpy.int64(2), init_std=torch.tensor(0.0))
    assert model.layout == hk.HTF(tree, numpy.array([3, 3, 3, 3]), torch.tensor([2, 2])).layout
    assert model.init_std == 0.0 and not any(p.any() for p in model.parameters())


# -- the docstrings' examples ---------------------------------------------------------------------


PACKAGE = Path(hk.__file__).parent
EXAMPLES = [p for p in sorted(PACKAGE.rglob("*.py")) if ">>> " in p.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_examples_in_docstrings_run(path):
    import doctest
    import importlib

    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    loaded = importlib.import_module(".".join(parts))
    known = {
        "hk": hk,
        "torch": torch,
        "HTF": hk.HTF,
        "ModeTree": ModeTree,
        "model": hk.HTF(ModeTree.balanced(4), 3, 5),
        "layout": hk.Layout.make(ModeTree.balanced(4), 3, 5),
        "x": torch.randn(2, 4, 3),
    }
    result = doctest.testmod(loaded, extraglobs=known)
    assert result.failed == 0
