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
    "float": (lambda: at(0, 0).float(), ValueError, r"got torch.float32 \[7, 4\]"),
    "bool": (lambda: at(0, 0).bool(), ValueError, r"got torch.bool \[7, 4\]"),
    "complex": (lambda: at(0, 0) * 1j, ValueError, r"got torch.complex64 \[7, 4\]"),
    "sparse": (
        lambda: at(0, 0).to_sparse(),
        ValueError,
        r"got torch.int64 \[7, 4\] \(torch.sparse_coo\)",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([at(0, 0)[0], at(0, 0)[1]]),
        ValueError,
        "got torch.int64 nested tensor",
    ),
    "none": (lambda: None, ValueError, r"indices must be integers \[B, 4\], got NoneType"),
    "a_number": (lambda: 3, ValueError, "got int"),
    "a_word": (lambda: "0123", ValueError, "got str"),
    "a_mapping": (lambda: {0: 1}, ValueError, "got dict"),
    "a_model": (lambda: hk.HTF(hk.ModeTree.flat(4), 2, 2), ValueError, "got HTF"),
    "floats_in_lists": (lambda: [[0.0] * 4], ValueError, r"got list of float64 \[1, 4\]"),
    "bools_in_lists": (lambda: [[True] * 4], ValueError, r"got list of bool \[1, 4\]"),
    "none_in_lists": (lambda: [[None] * 4], ValueError, r"got list of object \[1, 4\]"),
    "words_in_lists": (lambda: [["0"] * 4], ValueError, r"got list of <U1 \[1, 4\]"),
    "no_rectangle": (lambda: [[0] * 4, [0]], ValueError, "got a list that does not form an array"),
    "one_list": (lambda: (0, 1, 2, 1), ValueError, r"got tuple of int64 \[4\]"),
    "no_list": (lambda: [], ValueError, r"got list of float64 \[0\]"),
    "array_of_floats": (lambda: at(0, 0).numpy() / 2, ValueError, "got ndarray of float64"),
    "array_of_bools": (lambda: at(0, 0).numpy() > 2, ValueError, "got ndarray of bool"),
    "array_of_objects": (
        lambda: at(0, 0).numpy().astype(object),
        ValueError,
        "got ndarray of object",
    ),
    "order": (lambda: at(0, 0)[:, :3], ValueError, r"integers \[B, 4\], got torch.int64 \[7, 3\]"),
    "one_dimension": (lambda: at(0, 0)[0], ValueError, r"integers \[B, 4\], got torch.int64 \[4\]"),
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
    "too_large_int8": (lambda: at(127, 3).to(torch.int8), IndexError, "index 127 of mode 3"),
    "negative_in_lists": (lambda: at(-1, 2).tolist(), IndexError, "index -1 of mode 2"),
    "too_large_in_an_array": (lambda: at(9, 2).numpy(), IndexError, "index 9 of mode 2"),
}


@pytest.mark.parametrize(
    ("indices", "kind", "message"), BAD_INDICES.values(), ids=BAD_INDICES.keys()
)
def test_bad_indices(cpu_target, model, indices, kind, message):
    cpu_target.require("evaluate_at", torch.float32)
    with pytest.raises(kind, match=message) as caught:
        model.at(indices())
    assert str(caught.value).startswith("evaluate_at: ")


@pytest.mark.parametrize(
    "form",
    [
        torch.Tensor.int,
        torch.Tensor.short,
        torch.Tensor.byte,
        lambda t: t.to(torch.uint64),
        torch.Tensor.tolist,
        lambda t: tuple(map(tuple, t.tolist())),
        torch.Tensor.numpy,
        lambda t: t.numpy().astype("uint8"),
    ],
    ids=["int32", "int16", "uint8", "uint64", "list", "tuple", "array", "array_of_uint8"],
)
def test_other_forms_of_indices(cpu_target, model, form):
    """Converted: the same bits."""
    cpu_target.require("evaluate_at", torch.float32)
    indices = torch.stack([torch.randint(d, (9,)) for d in model.layout.mode_dims], dim=1)
    given = form(indices)
    weights = {n: model.node_weight(n) for n in model.tree.nodes}
    expected = model.at(indices)
    assert torch.equal(model.at(given), expected)
    assert torch.equal(hk.evaluate_at(model.tree, weights, given), expected)
    some = (model.at(i).square().sum() for i in (given, indices))
    first, second = (torch.autograd.grad(value, list(model.parameters())) for value in some)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
