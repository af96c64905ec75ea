"""evaluate_at: entries of the end tensor, repeated indices, arguments that do not fit."""

from __future__ import annotations

import itertools

import pytest
import torch

import htfkernels as hk
from htfkernels import testing


@pytest.mark.parametrize("case", testing.small_cases(), ids=str)
def test_every_entry(target, case):
    """All index tuples at once: the end tensor in C order."""
    target.require("evaluate_at")
    target.require("full_tensor")
    layout = case.layout
    inputs = testing.make_inputs(case, torch.float64, target.device)
    tuples = torch.tensor(
        list(itertools.product(*map(range, layout.mode_dims))), device=target.device
    )
    entries = hk.evaluate_at(case.tree, inputs.weights, tuples, layout=layout)
    tensor = hk.full_tensor(case.tree, inputs.weights, layout=layout)
    testing.assert_matches(entries, tensor.reshape(entries.shape), torch.float64, "forward")


def test_repeated_indices_add_their_gradients(target):
    target.require("evaluate_at")
    case = testing.small_cases()[0]
    inputs = testing.make_inputs(case, torch.float64, target.device)
    one = inputs.indices[:1]

    def gradient(indices):
        leaves = [w.clone().requires_grad_() for w in inputs.weights]
        out = hk.evaluate_at(case.tree, leaves, indices, layout=case.layout)
        return torch.autograd.grad(out.sum(), leaves)

    many = gradient(one.expand(65, -1))
    testing.assert_matches(many, [65 * g for g in gradient(one)], torch.float64, "backward")


def test_rows_that_are_not_asked_for_get_zero_gradients(target):
    target.require("evaluate_at")
    model = hk.HTF(hk.ModeTree.balanced(4), 5, 3, dtype=torch.float64, device=target.device)
    indices = torch.tensor([[0, 1, 2, 3], [4, 1, 2, 3]], device=target.device)
    model.at(indices).sum().backward()
    gradient = model.weights[0].grad
    for leaf, used in enumerate(([0, 4], [1], [2], [3])):
        touched = (gradient[leaf] != 0).any(dim=1).nonzero().flatten().tolist()
        assert touched == used


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hk.HTF(hk.ModeTree.balanced(4), [3, 4, 3, 2], 5)


def at(value, mode, rows=7, row=3):
    indices = torch.zeros(rows, 4, dtype=torch.int64)
    indices[row, mode] = value
    return indices


BAD_INDICES = {
    "int32": (
        lambda: at(0, 0).int(),
        ValueError,
        r"indices must be int64 \[B, 4\], got torch.int32 \[7, 4\]",
    ),
    "float": (lambda: at(0, 0).float(), ValueError, "indices must be int64.*got torch.float32"),
    "bool": (lambda: at(0, 0).bool(), ValueError, "indices must be int64.*got torch.bool"),
    "order": (lambda: at(0, 0)[:, :3], ValueError, r"int64 \[B, 4\], got torch.int64 \[7, 3\]"),
    "one_dimension": (lambda: at(0, 0)[0], ValueError, r"int64 \[B, 4\], got torch.int64 \[4\]"),
    "three_dimensions": (lambda: at(0, 0)[None], ValueError, r"got torch.int64 \[1, 7, 4\]"),
    "too_large": (
        lambda: at(4, 1),
        IndexError,
        "index 4 of mode 1 is out of range, its dimension is 4",
    ),
    "too_large_in_the_last": (
        lambda: at(2, 3, row=6),
        IndexError,
        "index 2 of mode 3 .*dimension is 2",
    ),
    "negative": (lambda: at(-1, 0), IndexError, "index -1 of mode 0 is out of range"),
    "huge": (lambda: at(2**62, 2), IndexError, f"index {2**62} of mode 2"),
}


@pytest.mark.parametrize(
    ("indices", "kind", "message"), BAD_INDICES.values(), ids=BAD_INDICES.keys()
)
def test_bad_indices(cpu_target, model, indices, kind, message):
    cpu_target.require("evaluate_at", torch.float32)
    with pytest.raises(kind, match=message) as caught:
        model.at(indices())
    assert str(caught.value).startswith("evaluate_at: ")


def test_bad_indices_under_transforms(cpu_target, model):
    """Where values cannot be looked at beforehand the kernel itself refuses them."""
    cpu_target.require("evaluate_at", torch.float32)
    # PyTorch's own indexing, which the reference uses, counts negative indices from the end.
    for value in (4, -1) if cpu_target.backend == "cpp" else (4,):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            torch.func.vmap(model.at)(at(value, 0)[None])


def test_empty_batch(cpu_target, model):
    cpu_target.require("evaluate_at", torch.float32)
    out = model.at(torch.zeros(0, 4, dtype=torch.int64))
    assert out.shape == (0,)
    out.sum().backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters())
