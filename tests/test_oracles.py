"""Outputs of the published code of Razin, Maman & Cohen (ICML 2022); see data/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import htfkernels as hk
from htfkernels import ModeTree, testing

np = pytest.importorskip("numpy")
DATA = Path(__file__).parent / "data"
HTF = sorted(p.stem for p in DATA.glob("htf_*.npz"))
F64 = torch.float64

# All of it to 1e-12: the table's float64 entries, which everything here is held against, are below.
assert all(testing.tolerance(F64, d) < 1e-12 for d in ("forward", "backward", "second"))


class Oracle:
    """One file: its tree, its arrays as tensors, and the model with its weights."""

    def __init__(self, name, device="cpu"):
        with np.load(DATA / f"{name}.npz") as file:
            self.meta = json.loads(str(file["meta"]))
            self.arrays = {
                k: torch.from_numpy(file[k]).to(device) for k in file.files if k != "meta"
            }
        self.tree = ModeTree.from_levels(self.meta["levels"])
        self.model = hk.HTF(
            self.tree, self.meta["mode_dims"], self.meta["widths"], dtype=F64, device=device
        )
        assert len(self.by_node("w")) == len(self.tree.nodes)
        with torch.no_grad():
            for node, weight in self.by_node("w").items():
                self.model.node_weight(node).copy_(weight)

    def __getitem__(self, key):
        return self.arrays[key]

    def by_node(self, prefix):
        """``prefix/LEVEL/MODES`` by node."""
        found = {}
        for key, value in self.arrays.items():
            if key.startswith(f"{prefix}/"):
                _, level, modes = key.split("/")
                found[self.tree.node(map(int, modes.split("-")), int(level))] = value
        return found


@pytest.fixture(params=HTF)
def oracle(request, target):
    for op in testing.OPS:
        target.require(op)
    return Oracle(request.param, target.device)


def test_every_file_is_there():
    assert len(HTF) == 5
    assert all((DATA / f"{n}.npz").exists() for n in ("cp_order3", "mf_depth3"))


def test_levels(oracle):
    levels = [[set(node) for node in level] for level in oracle.meta["levels"]]
    # In these trees every level is a partition: heights are the published code's levels.
    assert [[set(n.modes) for n in level] for level in oracle.tree.levels] == [
        sorted(level, key=min) for level in levels
    ]


def constructed(meta):
    """The tree by the constructor that the published code's options name."""
    order = len(meta["mode_dims"])
    return {
        "checkerboard": lambda: ModeTree.balanced(order, meta["pool_size"]),
        "half": lambda: ModeTree.halves(order),
        "checkerboard_sq": lambda: ModeTree.grid(4, 4),
    }[meta["pattern"]]()


def test_constructors(oracle):
    assert oracle.tree == constructed(oracle.meta)


def test_tensor(oracle):
    testing.assert_matches(oracle.model.full_tensor(), oracle["tensor"], F64, "forward")


def test_entries(oracle):
    tensor = oracle["tensor"]
    indices = torch.cartesian_prod(*(torch.arange(d) for d in tensor.shape))[:5000].to(
        tensor.device
    )
    expected = tensor[tuple(indices.unbind(1))]
    testing.assert_matches(oracle.model.at(indices), expected, F64, "forward")


def test_vectors_and_gradients(oracle):
    if "vectors" not in oracle.arrays:
        assert len(set(oracle.meta["mode_dims"])) > 1
        return
    x = oracle["vectors"].requires_grad_()
    out = oracle.model(x)
    testing.assert_matches(out, oracle["vectors_out"], F64, "forward")
    out.backward(oracle["cotangent"])
    testing.assert_matches(x.grad, oracle["grad_vectors"], F64, "backward")
    expected = oracle.by_node("g")
    assert set(expected) == set(oracle.tree.nodes)
    for node, gradient in expected.items():
        group, slot = oracle.model.layout.location[node.index]
        testing.assert_matches(oracle.model.weights[group].grad[slot], gradient, F64, "backward")


def test_functions_of_weights_by_node(oracle):
    weights = oracle.by_node("w")
    testing.assert_matches(hk.full_tensor(oracle.tree, weights), oracle["tensor"], F64, "forward")
    if "vectors" in oracle.arrays:
        out = hk.evaluate(oracle.tree, weights, oracle["vectors"])
        testing.assert_matches(out, oracle["vectors_out"], F64, "forward")
        sign, logabs = hk.slog_evaluate(oracle.tree, weights, oracle["vectors"])
        testing.assert_matches(sign * logabs.exp(), oracle["vectors_out"], F64, "backward")


def test_local_component_norms(oracle):
    norms = oracle.model.local_component_norms()
    expected = oracle.by_node("lc")
    if "vectors" in oracle.arrays:  # the file without vectors is the one without norms
        assert set(expected) == set(norms)
    for node, values in expected.items():
        testing.assert_matches(norms[node], values, F64, "forward")


@pytest.mark.parametrize("method", ["qr", "gram"])
def test_spectra(oracle, method):
    found = oracle.model.matricization_spectra(method=method)
    compared = set()
    for key, expected in oracle.arrays.items():
        if not key.startswith("sv/"):
            continue
        modes = [int(m) for m in key.removeprefix("sv/").split("-")]
        try:
            node = oracle.tree.node(modes)
        except KeyError:
            continue  # a set of modes that is no node: the test below
        s = found[node].detach()
        padded = torch.zeros_like(expected)
        padded[: len(s)] = s
        if method == "gram":  # what a Gram matrix holds to rounding are the squares
            padded, expected = padded.square(), expected.square()
        testing.assert_matches(padded, expected, F64, "backward")
        compared.add(frozenset(modes))
    assert compared == {frozenset(n.modes) for n in oracle.tree.nodes} - {
        frozenset(range(oracle.tree.order))
    }


def test_spectra_of_any_modes(oracle):
    for key, expected in oracle.arrays.items():
        if key.startswith("sv/"):
            modes = [int(m) for m in key.removeprefix("sv/").split("-")]
            s = oracle.model.matricization_spectrum(modes).detach()
            padded = torch.zeros_like(expected)
            padded[: len(s)] = s
            testing.assert_matches(padded, expected, F64, "backward")


# -- matrix and CP factorizations -----------------------------------------------------------------


def test_cp(target):
    """The file is float32: computed in float64 from its factors, held against its own rounding."""
    for op in ("full_tensor", "evaluate_at"):
        target.require(op)
    with np.load(DATA / "cp_order3.npz") as file:
        factors = [torch.from_numpy(file[f"factor/{n}"]).to(target.device, F64) for n in range(3)]
        tensor = torch.from_numpy(file["tensor"]).to(target.device, F64)
        norms = torch.from_numpy(file["component_norms"]).to(target.device, F64)
    tree = ModeTree.flat(3)
    model = hk.HTF(tree, [len(f) for f in factors], 6, root="sum", dtype=F64, device=target.device)
    with torch.no_grad():
        for leaf, factor in zip(tree.leaves, factors, strict=True):
            model.node_weight(leaf).copy_(factor)
    scale = torch.einsum("ar,br,cr->abc", *(f.abs() for f in factors))
    testing.assert_matches(model.full_tensor(), tensor, torch.float32, "forward", scale)
    # In float64 itself: against the sum over components, written out.
    exact = torch.einsum("ar,br,cr->abc", *factors)
    testing.assert_matches(model.full_tensor(), exact, F64, "forward", scale)
    indices = torch.cartesian_prod(*(torch.arange(len(f)) for f in factors)).to(target.device)
    testing.assert_matches(model.at(indices).reshape(exact.shape), exact, F64, "forward", scale)
    found = model.local_component_norms()[tree.root]
    testing.assert_matches(found, norms, torch.float32, "forward", norms)


def test_mf(target):
    for op in ("full_tensor", "evaluate_at"):
        target.require(op)
    with np.load(DATA / "mf_depth3.npz") as file:
        layers = [torch.from_numpy(file[f"layer/{n}"]).to(target.device) for n in range(3)]
        matrix = torch.from_numpy(file["matrix"]).to(target.device)
        values = torch.from_numpy(file["singular_values"]).to(target.device)
    tree = ModeTree.chain(3)
    model = hk.HTF(tree, matrix.shape, [9, 8], root="sum", dtype=F64, device=target.device)
    with torch.no_grad():
        model.node_weight(tree.nodes[0]).copy_(layers[0])
        model.node_weight(tree.node(0, level=1)).copy_(layers[1])
        model.node_weight(tree.nodes[1]).copy_(layers[2].T)
    testing.assert_matches(model.full_tensor(), matrix, F64, "forward")
    indices = torch.cartesian_prod(*map(torch.arange, matrix.shape)).to(target.device)
    testing.assert_matches(model.at(indices).reshape(matrix.shape), matrix, F64, "forward")
    for method, power in (("qr", 1), ("gram", 2)):
        found = model.matricization_spectra(method=method)
        for node in (tree.nodes[0], tree.nodes[1], tree.node(0, level=1)):
            s = found[node].detach()[: len(values)]
            testing.assert_matches(s**power, values**power, F64, "backward")
