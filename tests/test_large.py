"""Sizes at which the C++ walk splits its work: tall tiles, windows of far-apart rows, parts of the
batch, subtrees. The shared cases are too small for any of it."""

from __future__ import annotations

import random

import pytest
import torch

import htfkernels as hk
from htfkernels import testing


def irregular():
    tree, draw = testing.random_tree(60, 1), random.Random(1)
    dims = [draw.randint(3, 17) for _ in range(60)]
    return hk.Layout.make(tree, dims, {node: draw.randint(7, 41) for node in tree.interior})


def layouts():
    balanced, make = hk.ModeTree.balanced, hk.Layout.make
    return {
        "one row, subtrees": (make(balanced(128), 8, 64), 1),
        "few rows, subtrees": (make(balanced(100), 5, 40, out_features=3), 7),
        "few rows, irregular": (irregular(), 13),
        "shared weights": (make(balanced(64), 8, 32, share_weights=True), 9),
        "tall tiles, windows": (make(balanced(128), 8, 40), 203),
        "parts of the batch": (make(balanced(16), 8, 16), 1001),
        "parts, sum root": (make(hk.ModeTree.halves(8), 4, 12, root="sum"), 1027),
        "irregular": (irregular(), 300),
        "few rows, flat": (make(hk.ModeTree.flat(400), 9, 160, root="sum"), 11),
        "flat": (make(hk.ModeTree.flat(40), 9, 100, root="sum"), 300),
        "chain": (make(hk.ModeTree.chain(12), 40, 40, root="sum"), 300),
    }


CASES = layouts()


def inputs(layout, batch, dtype):
    """Numbers near 1 / rows: products of any length stay near 1."""
    generator = torch.Generator().manual_seed(0)

    def near(*shape, rows):
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        return ((1 + 0.3 * normal) / rows).to(dtype)

    weights = [near(*g.shape, rows=g.rows if g.level else 1) for g in layout.groups]
    vectors = [near(batch, d, rows=d) for d in layout.mode_dims]
    columns = [torch.randint(d, (batch,), generator=generator) for d in layout.mode_dims]
    return weights, vectors, torch.stack(columns, 1)


def functions(layout, indices):
    count = len(layout.groups)

    def on_vectors(*arguments):
        weights, vectors = arguments[:count], arguments[count:]
        return hk.evaluate(layout.tree, list(weights), list(vectors), layout=layout)

    def at_indices(*weights):
        return hk.evaluate_at(layout.tree, list(weights), indices, layout=layout)

    return on_vectors, at_indices


@pytest.mark.parametrize("name", CASES)
def test_kept_or_computed_again(name):
    """What the forward pass keeps, and which gradients are asked for, changes no bit."""
    reason = hk.runtime.dispatch.why_not(
        "cpp", hk.runtime.dispatch.Spec("evaluate", torch.float32, "cpu")
    )
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    layout, batch = CASES[name]
    weights, vectors, indices = inputs(layout, batch, torch.float32)
    ops, x = torch.ops.htfkernels, torch.cat(vectors, 1)
    for kind, data, extra in (("evaluate", x, 1), ("evaluate_at", indices, 0)):
        keeping, backward = getattr(ops, f"{kind}_keeping"), getattr(ops, f"{kind}_backward")
        out, kept = keeping(weights, data, layout.program, layout.out_features)
        assert kept.numel() > 0 or layout.tree.depth == 1
        count = len(weights) + extra
        once = backward(out, weights, data, kept, layout.program, [1] * count)
        again = backward(out, weights, data, kept[:0], layout.program, [1] * count)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        for i in {0, len(weights) - 1, count - 1}:
            needs = [int(j == i) for j in range(count)]
            alone = backward(out, weights, data, kept, layout.program, needs)
            assert torch.equal(alone[i], once[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_bits(threads, name, dtype):
    """Against float64, and the same on any number of threads."""
    reason = hk.runtime.dispatch.why_not("cpp", hk.runtime.dispatch.Spec("evaluate", dtype, "cpu"))
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    layout, batch = CASES[name]
    weights, vectors, indices = inputs(layout, batch, dtype)
    on_vectors, at_indices = functions(layout, indices)
    for function, arguments in ((on_vectors, (*weights, *vectors)), (at_indices, weights)):
        run = testing.gradients(function)
        expected, scale = testing.exact(function, arguments)
        given = (torch.ones_like(expected).to(dtype), *arguments)
        gradients, gradient_scale = testing.exact(run, given)
        first = None
        for count in (1, 2, 3):
            threads(count)
            with hk.use_backend("cpp"), torch.no_grad():
                alone = function(*arguments)
            with hk.use_backend("cpp"):
                found = (function(*arguments), *run(*given))
            assert torch.equal(alone, found[0])
            if first is None:
                first = found
                testing.assert_matches(found[0], expected, dtype, "forward", scale)
                testing.assert_matches(found[1:], gradients, dtype, "backward", gradient_scale)
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
