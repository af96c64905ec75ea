"""full_tensor: the end tensor against einsum, its modes' order, its limits."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing

T = hk.ModeTree
EINSUMS = {
    "cp": (T.flat(3), "ar,br,cr,ro->abco"),
    "matrix": (T.chain(4), "ar,bt,rs,st,to->abo"),
    "pairs": (T.balanced(4), "ar,br,cs,ds,rt,st,to->abcdo"),
    "halves": (T.halves(4), "ar,bs,cr,ds,rt,st,to->abcdo"),
    "one_late": (T.from_nested(((0, 2), 1)), "ar,bt,cr,rt,to->abco"),
    "crossed": (T.from_nested(((0, 3), (1, 4), 2)), "ar,bs,ct,dr,es,rt,st,to->abcdeo"),
    "one_child_root": (T.from_nested(((0, 1),)), "ar,br,rs,so->abo"),
}


@pytest.mark.parametrize(("tree", "equation"), EINSUMS.values(), ids=EINSUMS.keys())
def test_einsum(target, tree, equation):
    """The weights in the order of ``tree.nodes``; modes in natural order, outputs last."""
    target.require("full_tensor")
    ranks = {node: 2 + i for i, node in enumerate(tree.interior)}
    # Siblings share the parent's rank, but every mode has a dimension of its own.
    layout = hk.Layout.make(tree, [2, 3, 4, 2, 3][: tree.order], ranks, out_features=2)
    weights = [
        torch.randn(layout.shape(node), dtype=torch.float64, device=target.device)
        for node in tree.nodes
    ]
    expected = torch.einsum(equation, *weights)
    testing.assert_matches(hk.full_tensor(tree, weights), expected, torch.float64, "forward")


def test_sum_root(target):
    target.require("full_tensor")
    factors = [torch.randn(d, 4, dtype=torch.float64, device=target.device) for d in (2, 3, 5)]
    expected = torch.einsum("ar,br,cr->abc", *factors)
    testing.assert_matches(
        hk.full_tensor(hk.ModeTree.flat(3), factors), expected, torch.float64, "forward"
    )


def test_one_output_has_no_dimension_of_its_own(cpu_target):
    cpu_target.require("full_tensor", torch.float32)
    shapes = [
        hk.HTF(T.balanced(3), [2, 3, 4], 2, out_features=o).full_tensor().shape for o in (1, 2)
    ]
    assert [tuple(s) for s in shapes] == [(2, 3, 4), (2, 3, 4, 2)]


def test_too_large_to_form(cpu_target):
    """2^40 entries: refused before any memory is asked for."""
    cpu_target.require("full_tensor", torch.float32)
    with pytest.raises(ValueError, match=r"full_tensor: the tensor has .* entries.*evaluate_at"):
        hk.HTF(T.balanced(40), 2, 2).full_tensor()
    with pytest.raises(ValueError, match="full_tensor: the tensor has"):
        hk.HTF(T.balanced(1024), 10, 2).full_tensor()


def test_modes_of_dimension_one(target):
    target.require("full_tensor")
    case = testing.Case("", hk.Layout.make(T.balanced(20), 1, 3), 1)
    function, arguments = testing.operation(
        "full_tensor", case, testing.make_inputs(case, torch.float64, target.device)
    )
    tensor = function(*arguments)
    assert tensor.shape == (1,) * 20
    ones = torch.ones(1, 20, 1, dtype=torch.float64, device=target.device)
    expected, scale = testing.exact(
        lambda x, *w: hk.evaluate(case.tree, w, x, layout=case.layout), (ones, *arguments)
    )
    testing.assert_matches(tensor.reshape(1), expected, torch.float64, "forward", scale)


@pytest.mark.parametrize("seed", range(8))
def test_larger_than_a_block(target, seed):
    """Sizes around the blocks that kernels work in, on irregular trees."""
    target.require("full_tensor", torch.float32)
    dims = [
        (67, 65),
        (130, 9, 5),
        (3, 200, 7),
        (16, 16, 17),
        (1, 1000),
        (1000, 1),
        (7, 7, 7, 7),
        (2, 3, 515),
    ]
    layout = hk.Layout.make(
        testing.random_tree(len(dims[seed]), seed), dims[seed], [35, 5, 17][seed % 3]
    )
    case = testing.Case("", layout, 1)
    inputs = testing.make_inputs(case, torch.float32, target.device)
    function, arguments = testing.operation("full_tensor", case, inputs)
    expected, scale = testing.exact(function, arguments)
    testing.assert_matches(function(*arguments), expected, torch.float32, "forward", scale)
    run, given = testing.gradients(function), (torch.ones_like(expected).float(), *arguments)
    expected, scale = testing.exact(run, given)
    testing.assert_matches(run(*given), expected, torch.float32, "backward", scale)
