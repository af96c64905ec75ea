"""Convolutional arithmetic circuits: outputs, ranks, gradients, what they learn."""

from __future__ import annotations

import doctest
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import htfkernels as hk
from htflearn import RankRegularizer, load_checkpoint, save_checkpoint
from htflearn.locality import convac
from htflearn.locality.convac import ACTIVATIONS, PARTITIONS, ConvAC, far_first_tree
from htflearn.locality.gradient_change import input_gradient_change
from htflearn.locality.labelled import mean_std, read_labelled
from htflearn.locality.profile import locality_profile
from htflearn.locality.separation import separation_rank

F64 = torch.float64
FASHION = Path("/usr/share/datasets/fashion-mnist")


def small(classes: int = 2, shared: bool = False, **options: object) -> ConvAC:
    """4 x 4 windows of 2 x 2 pixels."""
    torch.manual_seed(0)
    return ConvAC((2, 8, 8), 2, 3, [4, 5], classes, shared, dtype=F64, **options)  # type: ignore


def images(count: int = 6, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(count, 2, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, torch.sin])
@pytest.mark.parametrize("shared", [True, False])
def test_outputs_window_by_window(activation: object, shared: bool) -> None:
    model, x = small(3, shared, activation=activation), images()
    kernel, bias = model.representation.weight, model.representation.bias
    apply = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    features = []
    for row, column in itertools.product(range(4), range(4)):
        window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        learned = apply(window.flatten(1) @ kernel.flatten(1).T + bias)  # type: ignore[operator]
        features.append(torch.cat([torch.ones(6, 1, dtype=F64), learned], 1))
    torch.testing.assert_close(model.represent(x), torch.stack(features, 1))
    # Pooling is a product over 2 x 2 neighbours.
    tree, m = model.htf.tree, {}
    for leaf, f in zip(tree.leaves, features, strict=True):
        m[leaf] = f @ model.htf.node_weight(leaf)
    for node in tree.interior:
        m[node] = torch.stack([m[c] for c in node.children]).prod(0) @ model.htf.node_weight(node)
    torch.testing.assert_close(model(x), m[tree.root])
    assert {tuple(n.modes) for n in tree.levels[1]} >= {(0, 1, 4, 5), (10, 11, 14, 15)}


def test_shapes() -> None:
    assert ConvAC((6, 9), 3, 2, 3, 1)(torch.randn(4, 1, 6, 9)).shape == (4,)
    assert ConvAC((6, 9), (2, 9), 2, 3, 5)(torch.randn(4, 1, 6, 9)).shape == (4, 5)
    tree = hk.ModeTree.flat(6)
    assert ConvAC((3, 6, 9), 3, 2, 3, 2, tree=tree).htf.tree == tree
    assert "grid=(4, 4)" in repr(small())


@pytest.mark.parametrize("window", [14, 7, 4, 2, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_numbers_stay_in_range(window: int, shared: bool) -> None:
    """Products of up to 784 windows, in float32."""
    torch.manual_seed(0)
    model = ConvAC((28, 28), window, 8, 16, 10, shared)
    outputs = model(torch.randn(64, 1, 28, 28))
    outputs.square().mean().backward()
    spread = float(outputs.detach().std(0).mean())
    assert 0.01 < spread < 10 and float(outputs.detach().abs().max()) < 100
    for p in model.parameters():
        assert p.grad is not None and 1e-6 < float(p.grad.norm()) < 1e4


def test_partitions() -> None:
    model = small()
    assert model.partition("left/right") == (0, 1, 4, 5, 8, 9, 12, 13)
    assert model.partition("top/bottom") == tuple(range(8))
    assert model.partition("even/odd") == tuple(range(0, 16, 2))
    assert model.partition("checkerboard") == (0, 2, 5, 7, 8, 10, 13, 15)
    assert model.partition([3, 1]) == (1, 3)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 6:] = True
    assert model.partition(mask) == (7, 11)
    mask[5, 0] = True
    with pytest.raises(ValueError, match="cuts through a window"):
        model.partition(mask)
    with pytest.raises(ValueError, match=r"a mask must be bool \[8, 8\], got torch.bool \[4, 8\]"):
        model.partition(mask[4:])
    with pytest.raises(ValueError, match="expected one of left/right, top/bottom, even/odd"):
        model.partition("left")
    for modes in ([], range(16), [16]):
        with pytest.raises(ValueError, match=r"some but not all of the modes 0..15, got \["):
            model.partition(modes)


def unfolded(model: ConvAC, modes: tuple[int, ...], output: int) -> Tensor:
    """The matricization itself: a 2 x 3 grid has few entries."""
    whole = model.htf.full_tensor().detach()[..., output]
    rest = [n for n in range(whole.dim()) if n not in modes]
    return whole.permute(*modes, *rest).reshape(3 ** len(modes), -1)


def test_matricizations_against_the_tensor() -> None:
    torch.manual_seed(0)
    model = ConvAC((4, 6), 2, 3, [4, 5], 2, shared=False, dtype=F64)
    x = torch.randn(40, 1, 4, 6, dtype=F64)
    roots = [torch.linalg.cholesky(r.T @ r / 40).T for r in model.represent(x).detach().unbind(1)]
    for region in (*PARTITIONS, [2], [0, 4]):
        modes = model.partition(region)
        found = model.matricization_ranks(region)
        for k in range(2):
            exact = torch.linalg.svdvals(unfolded(model, modes, k))
            count = min(len(exact), found.singular_values.shape[1])
            torch.testing.assert_close(found.singular_values[k, :count], exact[:count])
            assert int(found.numerical_rank[k]) == int(
                torch.linalg.matrix_rank(unfolded(model, modes, k))
            )
            spectrum = model.matricization_spectrum(region, k)
            torch.testing.assert_close(spectrum.detach(), found.singular_values[k])
    modes = model.partition("even/odd")
    rest = [n for n in range(6) if n not in modes]
    left, right = roots[modes[0]], roots[rest[0]]
    for n in modes[1:]:
        left = torch.kron(left, roots[n])
    for n in rest[1:]:
        right = torch.kron(right, roots[n])
    exact = torch.linalg.svdvals(left @ unfolded(model, modes, 1) @ right.T)
    found = model.matricization_ranks("even/odd", images=x)
    count = found.singular_values.shape[1]
    torch.testing.assert_close(found.singular_values[1], exact[:count])


def test_singular_values_of_the_function_do_not_depend_on_the_basis() -> None:
    """With the images' Gram matrices; without them they do."""
    torch.manual_seed(0)
    model = ConvAC((4, 6), 2, 3, [4, 5], 1, shared=False, activation="none", dtype=F64)
    x = torch.randn(40, 1, 4, 6, dtype=F64)
    outputs = model(x)
    before = [model.matricization_spectrum("left/right", images=i).detach() for i in (x, None)]
    with torch.no_grad():
        model.representation.weight *= 2
        model.representation.bias *= 2  # type: ignore[operator]
        for leaf in model.htf.tree.leaves:
            model.htf.node_weight(leaf)[1:] /= 2
    torch.testing.assert_close(model(x), outputs)
    after = [model.matricization_spectrum("left/right", images=i).detach() for i in (x, None)]
    torch.testing.assert_close(after[0], before[0])
    assert float((after[1] - before[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("tree", ["grid", "far first"])
def test_ranks_are_separation_ranks_of_the_outputs(tree: str) -> None:
    """The network at m^2 images has the rank that the factors have."""
    torch.manual_seed(0)
    grids = {"grid": None, "far first": far_first_tree(4, 4)}
    model = ConvAC((2, 8, 8), 2, 3, [2, 3], 2, False, tree=grids[tree], dtype=F64)
    with torch.no_grad():  # far from the initial rank one, so that no singular value is tiny
        for weight in model.htf.weights:
            weight.normal_()
    half = torch.arange(8).expand(8, 8) < 4
    even = torch.arange(8).expand(8, 8) // 2 % 2 == 0
    ranks = {}
    for name, mask in {"left/right": half, "even/odd": even}.items():
        exact = model.matricization_ranks(name)
        measured = separation_rank(model, images(24), mask, rtol=1e-11)
        ranks[name] = measured.numerical_rank.tolist()
        assert ranks[name] == exact.numerical_rank.tolist()
    # What lies in both regions at the lowest nodes, 2^4, against the root's three components.
    near, far = ("even/odd", "left/right") if tree == "grid" else ("left/right", "even/odd")
    assert ranks == {near: [16, 16], far: [3, 3]}


def test_a_costly_partition_says_so() -> None:
    model = ConvAC((28, 28), 2, 8, 16, 10)
    few = model.matricization_ranks([0, 1, 14, 15], images=torch.randn(9, 1, 28, 28))
    assert few.singular_values.shape == (10, 16)
    with pytest.raises(ValueError, match=r"flops and .* by \"qr\".*max_cost"):
        model.matricization_ranks("even/odd")
    with pytest.raises(ValueError, match="max_cost"):
        model.matricization_spectrum("even/odd")


def test_methods_and_derivatives_of_spectra() -> None:
    model = small()
    exact = model.matricization_ranks("left/right")
    gram = model.matricization_ranks("left/right", method="gram")
    torch.testing.assert_close(exact.singular_values, gram.singular_values, rtol=0, atol=1e-6)
    hk.effective_rank(model.matricization_spectrum("even/odd", 1)).backward()
    assert all(float(w.grad.norm()) > 0 for w in model.htf.weights)
    with pytest.raises(ValueError, match=r"output must be in 0..1, got 2"):
        model.matricization_spectrum("left/right", 2)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_second_derivatives(backend: str) -> None:
    """The regularizer of input gradients, differentiated, against differences."""
    model, x, y = small(), images(), torch.tensor([0, 1, 1, 0, 1, 0])
    far, near = (0, 0, 2, 2), (4, 6, 8, 8)

    def penalty() -> Tensor:
        return input_gradient_change(model, x, y, far, near)

    with hk.use_backend(backend):
        value = penalty()
        value.backward()
        found = [p.grad.clone() for p in model.parameters()]
        random = torch.Generator().manual_seed(0)
        step = 1e-6
        for p, gradient in zip(model.parameters(), found, strict=True):
            direction = torch.randn(p.shape, dtype=F64, generator=random)
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    p += sign * step * direction
                sides.append(float(penalty().detach()))
                with torch.no_grad():
                    p -= sign * step * direction
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    assert 0 < float(value.detach()) < 1


def test_backends_agree() -> None:
    found = {}
    for backend in ("reference", "cpp"):
        model = small(shared=True)
        with hk.use_backend(backend):
            change = input_gradient_change(
                model, images(), torch.tensor([0, 1, 1, 0, 1, 0]), (0, 0, 2, 2), (4, 6, 8, 8)
            )
            (change + model(images()).square().mean()).backward()
            profile = locality_profile(model, images(), patch=2).matrix
        found[backend] = [profile, *(p.grad for p in model.parameters())]
    for a, b in zip(found["reference"], found["cpp"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_rank_regularizer() -> None:
    model = small()
    regularize = RankRegularizer("renyi2", "raise", 0.1)
    assert torch.equal(regularize(model), regularize(model.htf))
    regularize(model).backward()
    assert all(float(w.grad.norm()) > 0 for w in model.htf.weights)
    assert model.representation.weight.grad is None
    with pytest.raises(TypeError, match="got a Linear"):
        regularize(nn.Linear(2, 2))


def test_checkpoints(tmp_path: Path) -> None:
    model, other = small(), small()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    save_checkpoint(tmp_path, model, state={"iteration": 3})
    assert load_checkpoint(tmp_path, other) == {"iteration": 3}
    assert torch.equal(model(images()), other(images()))
    third = small(activation="tanh")
    third.load_state_dict(model.state_dict())
    assert set(model.state_dict()) == set(third.state_dict())


def test_far_first_trees() -> None:
    tree = far_first_tree(4, 4)
    assert [n.modes for n in tree.levels[1]] == [
        (0, 2, 8, 10),
        (1, 3, 9, 11),
        (4, 6, 12, 14),
        (5, 7, 13, 15),
    ]
    assert far_first_tree(1, 8) == hk.ModeTree.halves(8)
    for rows, columns in ((7, 7), (3, 5), (1, 2), (6, 1)):
        assert far_first_tree(rows, columns).order == rows * columns
    with pytest.raises(ValueError, match="expected two cells or more, got 1 x 1"):
        far_first_tree(1, 1)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"fill the image of 28 x 28 pixels, got the window \(5"):
        ConvAC((1, 28, 28), 5, 8, 8, 10)
    with pytest.raises(ValueError, match=r"fill the image of 28 x 28 .* \(7, 0\)"):
        ConvAC((1, 28, 28), (7, 0), 8, 8, 10)
    with pytest.raises(ValueError, match="two windows or more"):
        ConvAC((1, 28, 28), 28, 8, 8, 10)
    with pytest.raises(ValueError, match=r"image must be \(C, H, W\) or \(H, W\), got \(28,\)"):
        ConvAC((28,), 7, 8, 8, 10)
    with pytest.raises(ValueError, match=r"channels must be at least 2, .* got 1"):
        ConvAC((1, 28, 28), 7, 1, 8, 10)
    with pytest.raises(ValueError, match=r"activation must be one of tanh, relu, .* got 'gelu'"):
        ConvAC((1, 28, 28), 7, 8, 8, 10, activation="gelu")
    with pytest.raises(ValueError, match="the tree has 4 modes, the image 4 x 4 windows"):
        ConvAC((1, 28, 28), 7, 8, 8, 10, tree=hk.ModeTree.flat(4))
    with pytest.raises(ValueError, match=r"images must be \[B, 2, 8, 8\], got \[3, 1, 8, 8\]"):
        small()(torch.randn(3, 1, 8, 8, dtype=F64))


@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_learns_fashion_mnist() -> None:
    """In a few seconds well above the 10% of chance; 88% in half a minute."""
    torch.manual_seed(0)
    train, test = (read_labelled(FASHION, split) for split in ("train", "test"))
    mean, std = mean_std(train.images)
    x, z = ((torch.from_numpy(d.images[:20000]).float() - mean) / std for d in (train, test))
    y, t = (torch.from_numpy(d.labels[:20000]) for d in (train, test))
    model = ConvAC((28, 28), 7, 8, [8, 24], 10, shared=False)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for rows in torch.randint(20000, (500, 128)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        assert float((model(z).argmax(1) == t).float().mean()) > 0.75


def test_examples() -> None:
    done = doctest.testmod(convac, extraglobs={"torch": torch})
    assert done.attempted > 0 and done.failed == 0
