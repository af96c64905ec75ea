"""The shared cases and tolerances: that they cover what they claim, and that they can fail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import htfkernels as hk
from htfkernels import testing


def test_cases_cover_what_they_claim():
    cases = testing.cases()
    names = [c.name for c in cases]
    assert len(set(names)) == len(names) and [str(c) for c in cases] == names
    layouts = [c.layout for c in cases]
    assert {c.batch for c in cases} >= {0, 1, 7, 65, 300}
    assert {r for x in layouts for r in x.ranks} >= {1, 7, 16, 17, 33, 64}
    dims = {d for x in layouts for d in x.mode_dims}
    assert min(dims) == 1 and max(dims) == 17
    children = {len(n.children) for x in layouts for n in x.tree.interior}
    assert children >= {1, 2, 3, 4, 7}
    assert {x.root for x in layouts} == {"linear", "sum"}
    assert {x.share_weights for x in layouts} == {True, False}
    assert {x.out_features for x in layouts} >= {1, 2, 10}
    assert any(len(set(x.mode_dims)) > 1 for x in layouts)
    assert any(len(x.groups) > x.tree.depth + 1 for x in layouts)
    assert sum(c.fits("full_tensor") for c in cases) > 20
    assert cases == testing.cases()
    with pytest.raises(AttributeError):
        cases[0].batch = 3


@given(st.integers(2, 60), st.integers(0, 10**9))
def test_random_trees(order, seed):
    tree = testing.random_tree(order, seed)
    assert tree.order == order
    assert all(1 <= len(n.children) <= 4 for n in tree.interior)
    assert tree == testing.random_tree(order, seed)


def test_random_trees_are_irregular():
    trees = [testing.random_tree(12, seed) for seed in range(50)]
    assert len(set(trees)) == 50
    assert {len(n.children) for t in trees for n in t.interior} == {1, 2, 3, 4}
    assert any(n.modes != tuple(sorted(n.modes)) for t in trees for n in t.interior)
    assert any({c.level for c in n.children} >= {0, 2} for t in trees for n in t.interior)


def test_inputs_are_reproducible(case):
    a, b = (testing.make_inputs(case, torch.float32, seed=3) for _ in range(2))
    other = testing.make_inputs(case, torch.float32, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.weights, b.weights, strict=True))
    assert torch.equal(a.indices, b.indices)
    assert not any(torch.equal(x, y) for x, y in zip(a.weights, other.weights, strict=True))
    rounded = testing.make_inputs(case, torch.bfloat16, seed=3)
    assert all(
        torch.equal(x.bfloat16(), y) or x.dtype == torch.float32
        for x, y in zip(a.weights, rounded.weights, strict=True)
    )


def test_sums_hardly_cancel(op, case):
    """Else an error relative to the condition scale would say nothing about the value."""
    if case.batch == 0:
        return
    function, arguments = testing.operation(op, case, testing.make_inputs(case, torch.float64))
    value, scale = testing.exact(function, arguments)
    assert float(scale.max() / value.abs().max()) < 20
    run = testing.gradients(function)
    for g, s in zip(*testing.exact(run, (torch.ones_like(value), *arguments)), strict=True):
        assert float(s.max() / g.abs().max()) < 20


SPOILED = {
    "one_entry_doubled": lambda w: torch.cat([2 * w.flatten()[:1], w.flatten()[1:]]).view_as(w),
    "last_row_dropped": lambda w: torch.cat([w[:-1], torch.zeros_like(w[-1:])]),
    "rows_reversed": lambda w: w.flip(0),
    "columns_reversed": lambda w: w.flip(1),
    "rounded_to_bfloat16": lambda w: w.bfloat16().float(),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
@pytest.mark.parametrize("case", [c for c in testing.cases() if c.batch], ids=str)
def test_a_wrong_weight_is_caught(case, spoil):
    """Whichever group has one node's weight wrong: the value is seen to be off."""
    inputs = testing.make_inputs(case, torch.float32)
    function, arguments = testing.operation("evaluate", case, inputs)
    expected, scale = testing.exact(function, arguments)
    for i in range(len(case.layout.groups)):
        wrong = arguments[i].clone()
        wrong[0] = spoil(wrong[0])
        renamed = case.name == "shared6_sum" and i > 0 and spoil is SPOILED["columns_reversed"]
        if torch.equal(wrong, arguments[i]) or renamed:  # a sum over components has no order
            continue
        given = [wrong if j == i else a for j, a in enumerate(arguments)]
        with hk.use_backend("reference"):
            actual = function(*given)
        with pytest.raises(AssertionError, match="is off by"):
            testing.assert_matches(actual, expected, torch.float32, "forward", scale)


def test_assert_matches():
    expected = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    tolerance = testing.tolerance(torch.float32, "forward")
    testing.assert_matches(expected.float(), expected, torch.float32, "forward")
    testing.assert_matches([expected.float()], [expected], torch.float32, "forward")
    testing.assert_matches(expected + 3.9 * tolerance, expected, torch.float32, "forward")
    with pytest.raises(AssertionError, match=r"result 0: forward in torch.float32 is off by"):
        testing.assert_matches(expected + 4.1 * tolerance, expected, torch.float32, "forward")
    with pytest.raises(AssertionError, match=r"at \[2\]: expected 4.0, got 4.5; 1 of 3"):
        wrong = expected + torch.tensor([0, 0, 0.5])
        testing.assert_matches(wrong, expected, torch.float32, "forward")
    with pytest.raises(AssertionError, match="off by inf"):
        testing.assert_matches(expected * torch.nan, expected, torch.float32, "forward")
    with pytest.raises(AssertionError, match="off by inf"):
        testing.assert_matches(expected, expected * torch.nan, torch.float32, "forward")
    assert testing.error(expected[:1], expected, expected) == torch.inf
    with pytest.raises(AssertionError, match=r"expected the shape \[3\], got \[1\]"):
        testing.assert_matches(expected[:1], expected, torch.float32, "forward")
    with pytest.raises(ValueError):
        testing.assert_matches([expected], [expected, expected], torch.float32, "forward")
    with pytest.raises(KeyError):
        testing.assert_matches(expected, expected, torch.complex64, "forward")
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64)
    testing.assert_matches(infinite, infinite, torch.float32, "forward", torch.ones(2))
    with pytest.raises(AssertionError):
        testing.assert_matches(-infinite, infinite, torch.float32, "forward", torch.ones(2))
    empty = torch.empty(0, dtype=torch.float64)
    testing.assert_matches(empty, empty, torch.float32, "forward")
    zeros = torch.zeros(3, dtype=torch.float64)
    testing.assert_matches(zeros, zeros, torch.float32, "forward")
    with pytest.raises(AssertionError):
        testing.assert_matches(zeros + 1e-30, zeros, torch.float32, "forward")


def test_unknown_operation():
    case = testing.cases()[0]
    with pytest.raises(
        ValueError, match=r"expected one of evaluate, evaluate_at, full_tensor, .*, got 'x'"
    ):
        testing.operation("x", case, testing.make_inputs(case, torch.float32))


def test_tf32_has_tolerances_of_its_own():
    case = testing.small_cases()[0]
    nodes = len(case.tree.nodes)
    assert testing.tolerance(torch.float32, "forward", "tf32", nodes) == nodes * 2.0**-10
    for dtype, precision in ((torch.float32, "tf32x3"), (torch.float64, "tf32")):
        assert testing.tolerance(dtype, "forward", precision, nodes) < 2e-6


def test_tf32_operands_stay_within_their_tolerance(monkeypatch, small_case):
    """Products of operands that are cut off after 11 bits; in float64 otherwise."""
    real = torch.Tensor.__matmul__

    def cut(x):
        bits = x.float().view(torch.int32)
        return (bits & ~0x1FFF).view(torch.float32).double()

    inputs = testing.make_inputs(small_case, torch.float32)
    function, arguments = testing.operation("evaluate", small_case, inputs)
    exact, scale = testing.exact(function, arguments)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, w: real(cut(x), cut(w)))
    with hk.use_backend("reference"):
        error = testing.error(function(*(a.double() for a in arguments)), exact, scale)
    # Cut off, an operand may be off by twice as much as rounded.
    allowed = 2 * testing.tolerance(torch.float32, "forward", "tf32", len(small_case.tree.nodes))
    assert allowed / 100 < error <= allowed


def test_more_operations(small_case):
    inputs = testing.make_inputs(small_case, torch.float64)
    function, arguments = testing.operation("evaluate", small_case, inputs)
    exact, scale = testing.exact(function, arguments)
    slog, _ = testing.operation("slog", small_case, inputs)
    testing.assert_matches(slog(*arguments), exact, torch.float64, "backward", scale)
    at, weights = testing.operation("evaluate_at", small_case, inputs)
    planned, _ = testing.operation("evaluate_at_planned", small_case, inputs)
    testing.assert_matches(planned(*weights), at(*weights), torch.float64, "backward")
    spectra, _ = testing.operation("spectra", small_case, inputs)
    found = hk.spectra.matricization_spectra(
        small_case.tree, weights, small_case.tree.nodes, layout=small_case.layout
    )
    assert torch.equal(spectra(*weights), torch.cat([*found.values()]))


@pytest.mark.slow
def test_measure_the_tolerances(target):
    """Prints the largest error of each kind (run with -s): where the table's numbers come from."""
    worst = dict.fromkeys(testing.TOLERANCES, (0.0, ""))
    for seed in range(3):
        for case in testing.cases():
            for op in testing.OPS:
                for dtype in (torch.float64, torch.float32, torch.bfloat16):
                    if not case.fits(op):
                        continue
                    target.require(op, dtype)
                    inputs = testing.make_inputs(case, dtype, target.device, seed)
                    function, arguments = testing.operation(op, case, inputs)
                    ones = torch.ones_like(function(*arguments))
                    for direction, run, all_arguments in (
                        ("forward", function, arguments),
                        ("backward", testing.gradients(function), (ones, *arguments)),
                        ("second", testing.second(function), (ones, *arguments, *arguments)),
                    ):
                        exact = testing.exact(run, all_arguments)
                        found = testing.error(run(*all_arguments), *exact)
                        key = dtype, direction
                        worst[key] = max(worst[key], (found, f"{op}-{case}"))
    for (dtype, direction), (found, where) in worst.items():
        print(f"{target.backend} {dtype} {direction}: {found:.1e} ({where})")
    assert all(found <= testing.tolerance(*key) for key, (found, _) in worst.items())
