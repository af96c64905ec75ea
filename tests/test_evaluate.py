"""evaluate: its definition, and arguments that do not fit."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels import testing


def by_definition(case, inputs):
    """``m_n = x_n W_n``; ``p_v`` the product of the children's messages; ``m_v = p_v W_v``: one
    node after the other, each sum written out in Python."""
    layout, vectors = case.layout, inputs.vectors
    columns = list(vectors.unbind(1)) if isinstance(vectors, torch.Tensor) else list(vectors)

    def message(node, b):
        if node.is_leaf:
            p = columns[node.index][b].tolist()
        else:
            p = [1.0] * layout.shape(node)[0]
            for child in node.children:
                p = [a * m for a, m in zip(p, message(child, b), strict=True)]
        if node.is_root and layout.root == "sum":
            return [sum(p)]
        group, slot = layout.location[node.index]
        rows = inputs.weights[group][slot].tolist()
        return [
            sum(a * row[j] for a, row in zip(p, rows, strict=True)) for j in range(len(rows[0]))
        ]

    out = torch.tensor([message(case.tree.root, b) for b in range(case.batch)], dtype=torch.float64)
    out = out.reshape(case.batch, layout.out_features)
    return out.squeeze(1) if layout.out_features == 1 else out


SOME = [c for c in testing.cases() if c.batch <= 7] + testing.small_cases()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_definition(target, case):
    target.require("evaluate")
    inputs = testing.make_inputs(case, torch.float64, target.device)
    function, arguments = testing.operation("evaluate", case, inputs)
    _, scale = testing.exact(function, arguments)
    testing.assert_matches(
        function(*arguments), by_definition(case, inputs), torch.float64, "forward", scale
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hk.HTF(hk.ModeTree.balanced(4), 3, 5)


@pytest.fixture
def unequal():
    return hk.HTF(hk.ModeTree.balanced(4), [2, 3, 4, 5], 5)


def test_vectors_in_one_tensor_or_several(cpu_target, model):
    cpu_target.require("evaluate", torch.float32)
    x = torch.randn(7, 4, 3)
    expected = model(x)
    assert torch.equal(model(list(x.unbind(1))), expected)
    assert torch.equal(model(x.unbind(1)), expected)
    assert torch.equal(model(tuple(v.clone() for v in x.unbind(1))), expected)


BAD_VECTORS = {
    "two_dimensions": (
        lambda: torch.randn(7, 12),
        r"evaluate: vectors must be \[B, 4, 3\], got \[7, 12\]",
    ),
    "four_dimensions": (
        lambda: torch.randn(1, 7, 4, 3),
        r"must be \[B, 4, 3\], got \[1, 7, 4, 3\]",
    ),
    "order": (lambda: torch.randn(7, 5, 3), r"must be \[B, 4, 3\], got \[7, 5, 3\]"),
    "dimension": (lambda: torch.randn(7, 4, 2), r"must be \[B, 4, 3\], got \[7, 4, 2\]"),
    "swapped": (lambda: torch.randn(7, 3, 4), r"must be \[B, 4, 3\], got \[7, 3, 4\]"),
    "too_few_tensors": (lambda: [torch.randn(7, 3)] * 3, "expected 4 tensors of vectors.*got 3"),
    "no_tensors": (lambda: [], "expected 4 tensors of vectors, one per mode, got 0"),
    "one_of_another_batch": (
        lambda: [torch.randn(7, 3)] * 3 + [torch.randn(6, 3)],
        r"the vectors of mode 3 must be \[7, 3\], got \[6, 3\]",
    ),
    "one_of_another_dimension": (
        lambda: [torch.randn(7, 3), torch.randn(7, 2)] + [torch.randn(7, 3)] * 2,
        r"the vectors of mode 1 must be \[7, 3\], got \[7, 2\]",
    ),
    "one_dimension": (
        lambda: [torch.randn(3)] * 4,
        r"the vectors of mode 0 must be \[B, 3\], got \[3\]",
    ),
    "numbers": (lambda: [torch.tensor(1.0)] * 4, "the vectors of mode 0 must be"),
    "float64": (
        lambda: torch.randn(7, 4, 3, dtype=torch.float64),
        "evaluate: vectors are torch.float64 on cpu, the weights torch.float32 on cpu",
    ),
    "one_float64": (
        lambda: [torch.randn(7, 3)] * 3 + [torch.randn(7, 3, dtype=torch.float64)],
        "vectors.*torch.float64",
    ),
    "integers": (lambda: torch.ones(7, 4, 3, dtype=torch.int64), "vectors are torch.int64"),
    "complex": (lambda: torch.ones(7, 4, 3, dtype=torch.complex64), "vectors are torch.complex64"),
}


@pytest.mark.parametrize(("vectors", "message"), BAD_VECTORS.values(), ids=BAD_VECTORS.keys())
def test_bad_vectors(model, vectors, message):
    with pytest.raises(ValueError, match=message):
        model(vectors())


def test_unequal_dimensions_need_several_tensors(unequal):
    with pytest.raises(ValueError, match=r"4 tensors \[B, D_n\] \(the mode dimensions differ\)"):
        unequal(torch.randn(7, 4, 3))
    with pytest.raises(ValueError, match=r"the vectors of mode 3 must be \[7, 5\], got \[7, 4\]"):
        unequal([torch.randn(7, d) for d in (2, 3, 4, 4)])


def test_empty_batch(cpu_target, model):
    cpu_target.require("evaluate", torch.float32)
    x = torch.randn(0, 4, 3, requires_grad=True)
    out = model(x)
    assert out.shape == (0,)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


def test_infinities_go_through(cpu_target, model):
    """No row is changed by another's overflow, and overflow is infinite, not wrong."""
    cpu_target.require("evaluate", torch.float32)
    x = torch.rand(3, 4, 3) + 1
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    x[1] = 1e30
    out = model(x)
    assert out[1] == torch.inf
    assert torch.equal(out[[0, 2]], model(x[[0, 2]])) and bool(out[[0, 2]].isfinite().all())
