"""Trackers against dense computations."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import htfkernels as hk
import htflearn
from htflearn import matrix_factorization, tensor_factorization
from htflearn.trackers import (
    ComponentNorms,
    LocalComponentNorms,
    ReconstructionError,
    SingularValues,
    Spectra,
    Unbalancedness,
    node_label,
    unbalancedness,
)


def htf() -> hk.HTF:
    tree = hk.ModeTree.from_nested(((0, 1), (2, (3,), 4)))
    model = hk.HTF(tree, (3, 4, 2, 3, 2), 4, dtype=torch.float64)
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model


def test_labels_are_short_and_distinct() -> None:
    labels = [node_label(node) for node in htf().tree.nodes]
    assert labels[:3] == ["{0}", "{1}", "{2}"]
    assert "{0,1}" in labels and "{2-4}" in labels and "{0-4}" in labels
    for tree in (htf().tree, hk.ModeTree.chain(5), hk.ModeTree.halves(7)):
        names = [node_label(node) for node in tree.nodes]
        assert len(set(names)) == len(names)


def test_singular_values() -> None:
    model = matrix_factorization(6, 5, init_std=1.0, dtype=torch.float64)
    measured = SingularValues(top=3).measure(model, None)
    exact = torch.linalg.svdvals(model.full_tensor().detach())
    torch.testing.assert_close(torch.tensor(measured["values"]).double(), exact[:3])
    p = exact / exact.sum()
    assert measured["effective_rank"] == pytest.approx(float((-p * p.log()).sum().exp()))
    with pytest.raises(ValueError, match="order 3"):
        SingularValues().measure(tensor_factorization((3, 3, 3), 2), None)


def test_component_norms_are_those_of_the_outer_products() -> None:
    model = tensor_factorization((3, 4, 5), 6, init_std=1.0, dtype=torch.float64)
    factors = [model.node_weight(leaf).detach() for leaf in model.tree.leaves]
    outer = torch.einsum("ar,br,cr->rabc", *factors)
    exact = outer.flatten(1).norm(dim=1).sort(descending=True).values
    measured = ComponentNorms(top=4).measure(model, None)["norms"]
    torch.testing.assert_close(torch.tensor(measured).double(), exact[:4])


def component(model: hk.HTF, node: hk.Node, r: int) -> list[Tensor]:
    vectors = [model.node_weight(child)[:, r] for child in node.children]
    return [*vectors, model.node_weight(node)[r]]


def test_local_component_norms() -> None:
    model = htf()
    measured = LocalComponentNorms(top=99).measure(model, None)
    assert list(measured) == [node_label(node) for node in model.tree.interior]
    for node in model.tree.interior:
        exact = [
            torch.stack([v.norm() for v in component(model, node, r)]).prod().item()
            for r in range(4)
        ]
        assert measured[node_label(node)] == pytest.approx(sorted(exact, reverse=True))
    some = LocalComponentNorms(nodes=[model.tree.root], top=2).measure(model, None)
    assert {name: len(values) for name, values in some.items()} == {"{0-4}": 2}


def test_unsorted_norms_keep_their_components() -> None:
    """Entry r is component r, before and after another one has become the largest."""
    model, cp = htf(), tensor_factorization((3, 4, 5), 6, init_std=1.0, dtype=torch.float64)
    trackers = (LocalComponentNorms(sort=False), LocalComponentNorms([model.tree.root], sort=False))
    for scale in (1.0, 100.0):
        with torch.no_grad():
            model.node_weight(model.tree.root)[1] *= scale
            cp.node_weight(cp.tree.leaves[0])[:, 4] *= scale
        norms = model.local_component_norms()
        every, one = (tracker.measure(model, None) for tracker in trackers)
        assert list(every) == [node_label(node) for node in model.tree.interior]
        assert all(every[node_label(node)] == norms[node].tolist() for node in norms)
        assert one == {"{0-4}": norms[model.tree.root].tolist()}
        assert (max(range(4), key=one["{0-4}"].__getitem__) == 1) or scale == 1.0
        measured = ComponentNorms(sort=False).measure(cp, None)["norms"]
        assert measured == cp.local_component_norms()[cp.tree.root].tolist()
    assert len(ComponentNorms().measure(tensor_factorization((2, 2), 12), None)["norms"]) == 10
    for tracker in (ComponentNorms, LocalComponentNorms):
        with pytest.raises(ValueError, match=f"{tracker.__name__}: top .*sort=False.* top=3"):
            tracker(top=3, sort=False)


def test_trackers_are_exported_and_listed() -> None:
    from htflearn import trackers

    for name in trackers.__all__:
        assert getattr(htflearn, name) is getattr(trackers, name) and name in htflearn.__all__
        if name[0].isupper():
            assert name in str(htflearn.__doc__)


def test_spectra_and_ranks() -> None:
    model = htf()
    full = model.full_tensor().detach()
    node = model.tree.node((0, 1))
    measured = Spectra([node], top=99).measure(model, None)["{0,1}"]
    exact = torch.linalg.svdvals(full.reshape(12, -1))
    torch.testing.assert_close(torch.tensor(measured["singular_values"]).double(), exact[:4])
    p = exact[:4] / exact[:4].sum()
    assert measured["effective_rank"] == pytest.approx(float((-p * p.log()).sum().exp()))
    assert measured["numerical_rank"] == int((exact > 0.01 * exact[0]).sum())
    assert Spectra([node], tolerance=0.9999).measure(model, None)["{0,1}"]["numerical_rank"] == 1
    assert len(Spectra().measure(model, None)) == len(model.tree.nodes) - 1


def test_reconstruction_error() -> None:
    model = htf()
    target = torch.randn(3, 4, 2, 3, 2, dtype=torch.float64)
    exact = ((model.full_tensor() - target).norm() / target.norm()).item()
    assert ReconstructionError(target).measure(model, None)["relative"] == pytest.approx(exact)


def test_unbalancedness() -> None:
    model = htf()
    exact = max(
        abs((a.square().sum() - b.square().sum()).item())
        for node in model.tree.interior
        for r in range(4)
        for a in component(model, node, r)
        for b in component(model, node, r)
    )
    assert Unbalancedness().measure(model, None)["max"] == pytest.approx(exact)


def test_unbalancedness_of_a_fixed_root_is_of_the_columns() -> None:
    model = tensor_factorization((2, 2, 2), 1, dtype=torch.float64)
    with torch.no_grad():
        for leaf, value in zip(model.tree.leaves, (2.0, 2.0, 3.0), strict=True):
            model.node_weight(leaf).fill_(value)
    assert unbalancedness(model).item() == pytest.approx(18 - 8)


def test_gradient_flow_keeps_the_unbalancedness() -> None:
    """A step of gradient descent changes the conserved differences in second order only."""
    model, changes = htf(), []
    before = unbalancedness(model).item()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for lr in (1e-3, 5e-4):
        model.load_state_dict(state)
        grads = torch.autograd.grad(model.full_tensor().square().sum(), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= lr * g
        changes.append(abs(unbalancedness(model).item() - before))
    assert changes[0] / changes[1] == pytest.approx(4.0, rel=0.05)


def test_measurements_fit_into_json() -> None:
    model = htf()
    for tracker in (LocalComponentNorms(), Spectra(), Unbalancedness()):
        measured = tracker.measure(model, None)
        assert json.loads(json.dumps(measured)) == measured
