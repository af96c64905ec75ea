"""Very long modes, many outputs, weights that are not finite or not real, damaged programs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from models import dense, module

import htfkernels as hk
from htfkernels import ModeTree, testing

F64 = torch.float64
OPS = torch.ops.htfkernels

_MEASURE = """
import resource, sys, torch, htfkernels as hk
model = hk.HTF(hk.ModeTree.from_nested((0, (1, 2))), [10**6, 2000, 24], [5, 5])
indices = torch.stack([torch.randint(d, (64,)) for d in model.layout.mode_dims], 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.at(indices).sum().backward()
for method in ("qr", "gram"):
    spectra = model.matricization_spectra(method=method)
    model.principal_frames(method=method)
    model.hierarchical_rank(method=method)
sum(s.sum() for s in spectra.values()).backward()
sum(model.renyi2_ranks().values()).backward()
model.stable_ranks()
with torch.no_grad():
    model.norm()
sys.exit((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 > 500)
"""


def test_a_long_mode_takes_memory_in_proportion():
    """A million indices: 19 MiB of weights; a matrix with a row and a column for each, 4 TiB."""
    run = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("method", ["qr", "gram"])
def test_long_modes(backend, method):
    """The same singular values as those of the small matrix that a long leaf shrinks to."""
    model = module(hk.Layout.make(ModeTree.from_nested((0, (1, 2))), [50_000, 7, 3], [3, 4]))
    small = module(hk.Layout.make(model.tree, [4, 7, 3], [3, 4]))
    with torch.no_grad():
        for node in model.tree.nodes[1:]:
            small.node_weight(node).copy_(model.node_weight(node))
        leaf = model.node_weight(model.tree.nodes[0])
        small.node_weight(small.tree.nodes[0]).copy_(torch.linalg.qr(leaf).R)
    with hk.use_backend(backend):
        found, expected = (m.matricization_spectra(method=method) for m in (model, small))
    for node, s in found.items():
        testing.assert_matches(s.detach(), expected[node].detach(), F64, "second")


@pytest.mark.parametrize("method", ["qr", "gram"])
@pytest.mark.parametrize("share", [False, True])
def test_more_outputs_than_the_root_has_ranks(method, share):
    tree = ModeTree.balanced(4)
    model = module(hk.Layout.make(tree, [9, 3, 9, 3], [4, 3], 9, share_weights=share))
    tensor = model.full_tensor().detach()
    frames = model.principal_frames([tree.root], method)[tree.root]
    left = tensor.reshape(-1, 9) @ frames.left
    whole = (left * frames.values) @ frames.right.T
    testing.assert_matches(whole, tensor.reshape(-1, 9), F64, "second")
    ranks = model.renyi2_ranks(tree.nodes)
    for node, s in model.matricization_spectra(tree.nodes, method).items():
        expected = dense(tensor, sorted(node.modes))
        testing.assert_matches(s.detach(), expected[: len(s)], F64, "second")
        rank = hk.renyi2_rank(expected)
        testing.assert_matches(ranks[node].detach(), rank, F64, "second")
    testing.assert_matches(model.norm().detach(), tensor.norm(), F64, "second")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(backend, bad):
    """NaN or an error, never a number."""
    for seed in range(6):
        tree = testing.random_tree(4, seed)
        model = module(hk.Layout.make(tree, [2, 5, 3, 4], 3), seed=seed)
        with torch.no_grad():
            model.weights[seed % len(model.weights)].view(-1)[seed] = bad
        with hk.use_backend(backend):
            for method in ("qr", "gram"):
                found = model.matricization_spectra(method=method)
                values = [*found.values(), *found.measure(hk.effective_rank).values()]
                assert all(bool(s.isnan().all()) for s in values)
                sum(s.sum() for s in found.values()).backward()
                with pytest.raises(ValueError, match="infinite or not a number"):
                    model.hierarchical_rank(method=method)
                with pytest.raises(ValueError, match="infinite or not a number"):
                    model.principal_frames(method=method)
                with pytest.raises(torch.linalg.LinAlgError, match="infinite or not a number"):
                    model.matricization_spectrum([0, 2], method)
            for ranks in (model.renyi2_ranks(), model.stable_ranks()):
                assert all(bool(r.isnan()) for r in ranks.values())
            for number in (model.norm(), hk.inner(model, model), hk.distance(model, model)):
                assert not number.isfinite()


def test_complex_weights():
    model = hk.HTF(ModeTree.balanced(4), 3, 2).to(torch.complex64)
    calls = {
        "matricization_spectra": lambda: model.matricization_spectra(),
        "principal_frames": lambda: model.principal_frames(),
        "matricization_spectrum": lambda: model.matricization_spectrum([0]),
        "renyi2_ranks": lambda: model.renyi2_ranks(),
        "stable_ranks": lambda: model.stable_ranks(),
        "norm": lambda: model.norm(),
        "inner": lambda: hk.inner(model, model),
        "distance": lambda: hk.distance(model, model),
        "add": lambda: hk.add(model, model),
        "scale": lambda: hk.scale(model, 2.0),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: weights must be floating point"):
            call()


@pytest.mark.parametrize("nodes", [[None], [0], ["a"], "abc", 3])
def test_nodes_that_are_none(nodes):
    model = hk.HTF(ModeTree.balanced(4), 3, 2)
    for name in ("matricization_spectra", "principal_frames", "renyi2_ranks", "stable_ranks"):
        with pytest.raises(ValueError, match=f"{name}: nodes must be "):
            getattr(model, name)(nodes)


def test_other_arguments_that_are_none():
    model = hk.HTF(ModeTree.balanced(4), 3, 2)
    with pytest.raises(ValueError, match="max_cost must be"):
        model.matricization_spectrum([0], max_cost=float("nan"))
    with pytest.raises(ValueError, match="modes must be a sequence of integers, got nan"):
        model.matricization_spectrum(float("nan"))
    with pytest.raises(ValueError, match="method must be"):
        model.matricization_spectrum([0], method=["qr"])
    with pytest.raises(ValueError, match="rtol must be a number of at least 0"):
        model.hierarchical_rank(rtol="small")


def test_programs_whose_fields_are_damaged():
    """Each field in turn; what was accepted before read and wrote memory of others."""
    case = testing.small_cases()[0]
    weights, program = testing.make_inputs(case, F64).weights, case.layout.program
    nodes = [n.index for n in case.tree.nodes]
    for field in range(len(program)):
        for value in (-(2**63), -1, 10**6, 2**62):
            damaged = program.clone()
            damaged[field] = value
            if torch.equal(damaged, program):
                continue
            with pytest.raises(
                RuntimeError, match=r"program is|expected .* folded weights|must be"
            ):
                OPS.spectral_factors(weights, damaged, nodes, 0, 0)
            with pytest.raises(
                RuntimeError, match=r"program is|expected .* folded weights|must be"
            ):
                OPS.trace_ranks(weights, damaged, nodes, 0)


def test_weights_of_another_tree():
    halves, balanced = (hk.HTF(t, 3, 2) for t in (ModeTree.halves(4), ModeTree.balanced(4)))
    state = halves.state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"of the mode tree \(\(0, 2\), \(1, 3\)\)"):
            balanced.load_state_dict(state, strict=strict)
    other = hk.HTF(ModeTree.halves(4), 3, 2)
    cast = {k: v.half() for k, v in state.items()}
    assert not other.load_state_dict(cast).missing_keys
    del state["_extra_state"]  # as earlier versions saved it
    assert not balanced.load_state_dict(state).missing_keys
    with pytest.raises(ValueError, match="set_extra_state: _extra_state must be the layout"):
        balanced.set_extra_state(torch.zeros(3, dtype=torch.uint8))
