"""The CUDA kernels of the spectra, on a GPU or emulated: values, accuracy, derivatives, shapes."""

from __future__ import annotations

import math
import re

import pytest
import torch
from models import dense, module
from test_spectra_accuracy import LAYOUTS, SPECTRA, allowed, error, planted

import htfkernels as hk
from htfkernels import ModeTree, testing
from htfkernels.cuda import spectra as tasks
from htfkernels.ops.spectra import cuda as ops
from htfkernels.runtime import cuda_module as cuda
from htfkernels.runtime import dispatch
from htfkernels.spectra.matricizations import ACCURACY, matricization_spectra

ON = cuda.device_type()
REASON = cuda.why_not(ON)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

F64 = torch.float64
METHODS = ("qr", "gram")
emulated_only = pytest.mark.skipif(
    not cuda.emulated(), reason="there are two orders only in an emulation"
)


def spectra_of(model, nodes=None, method="qr"):
    model = model.to(ON)
    with hk.use_backend("cuda"):
        return model.matricization_spectra(model.tree.nodes if nodes is None else nodes, method)


def reference_of(model, nodes=None, method="qr"):
    with hk.use_backend("reference"):
        return model.cpu().matricization_spectra(
            model.tree.nodes if nodes is None else nodes, method
        )


def assert_same(found, expected, method, dtype=F64):
    """Relative to each node's largest value, whatever its scale."""
    assert list(found) == list(expected)
    assert found.method == method and found.accuracy == ACCURACY[method]
    for node, s in found.relative.items():
        right = expected.relative[node].detach().double()
        assert s.shape == right.shape
        assert bool((s[:-1] >= s[1:]).all()) and bool((s >= 0).all())
        by = 2.0 ** (found.log2_scale[node] - expected.log2_scale[node])
        s = s.detach().cpu().double() * by
        assert error(s, right) <= allowed(method, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_every_node(case, method):
    model = module(case.layout)
    assert_same(spectra_of(model, method=method), reference_of(model), method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    """Computed in float64 all the same; the results alone are rounded."""
    layout = hk.Layout.make(ModeTree.balanced(4), 3, [5, 4])
    model = module(layout).to(dtype)
    exact = module(layout, F64)
    with torch.no_grad():
        for w, v in zip(exact.parameters(), model.parameters(), strict=True):
            w.copy_(v)
    found = spectra_of(model, method="gram")
    assert all(s.dtype == dtype for s in found.values())
    assert_same(found, reference_of(exact, method="gram"), "gram", dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra(name, method):
    expected = SPECTRA[name]
    model = planted(expected)
    found = spectra_of(model, model.tree.root.children, method)
    for s in found.values():
        assert len(s) == len(expected)
        assert error(s.cpu(), expected) <= allowed(method, F64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", [1e-3, 1e-9, 0.0])
def test_nearly_dependent_factors(noise, method):
    for tree, dim, rank in ((ModeTree.flat(3), 12, 6), (ModeTree.balanced(4), 7, 5)):
        model = hk.HTF(tree, dim, rank, dtype=F64)
        with torch.no_grad():
            for node in tree.nodes:
                rows, cols = (weight := model.node_weight(node)).shape
                low = torch.randn(rows, 2, dtype=F64) @ torch.randn(2, cols, dtype=F64)
                weight.copy_(low + noise * torch.randn(rows, cols, dtype=F64))
            tensor = model.full_tensor()
        for node, s in spectra_of(model, tree.nodes[:-1], method).items():
            exact = dense(tensor, node.modes)
            size = min(len(s), len(exact))
            assert error(s.cpu()[:size], exact[:size]) <= allowed(method, F64)


@pytest.mark.parametrize("method", METHODS)
def test_columns_may_differ_by_any_factor(method):
    """Powers of two moved between neighbours leave the tensor as it is."""
    for tree in (ModeTree.balanced(6), ModeTree.flat(5), ModeTree.from_nested((((0,), 1), (2, 3)))):
        model = hk.HTF(tree, 5, 7, dtype=F64)
        before = reference_of(model)
        with torch.no_grad():
            for node in tree.nodes[:-1]:
                powers = torch.randint(-400, 400, (model.node_weight(node).shape[1],))
                if node == node.parent.children[0]:
                    model.node_weight(node).mul_(2.0 ** powers.double())
                    model.node_weight(node.parent).mul_(2.0 ** -powers.double()[:, None])
        for node, s in spectra_of(model, method=method).items():
            assert error(s.detach().cpu(), before[node].detach()) <= allowed(method, F64)


@pytest.mark.parametrize("std", [1.0, 1e-4])
def test_values_out_of_range(std):
    tree = ModeTree.balanced(256)
    model = hk.HTF(tree, 3, 6, init_std=std, dtype=F64)
    found = spectra_of(model, method="gram")
    first, second = tree.root.children
    if std < 1:
        assert found[first][0] == 0
    assert abs(found.log2_scale[first]) > 500
    assert found.log2_scale[first] == found.log2_scale[second]
    norms = [
        s.detach().cpu().square().sum().log2() / 2 + found.log2_scale[n]
        for n, s in found.relative.items()
    ]
    assert float(max(norms) - min(norms)) <= 8 * allowed("gram", F64)
    ranks = found.numerical_ranks()
    assert ranks == reference_of(model, method="gram").numerical_ranks()


@pytest.mark.parametrize("method", METHODS)
def test_zero_tensors(method):
    for layout in LAYOUTS:
        model = module(layout)
        with torch.no_grad():
            model.weights[0].zero_()
        for s in spectra_of(model, method=method).values():
            assert bool((s == 0).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("dim", [3, 9])
def test_what_is_no_number_ends(dim, what, method):
    """And shows: it is in every matricization."""
    model = module(hk.Layout.make(ModeTree.balanced(4), dim, [5, 4]))
    with torch.no_grad():
        model.weights[0].view(-1)[3] = what
    found = spectra_of(model, method=method)
    assert len(found) == len(model.tree.nodes)
    assert not any(bool(s.isfinite().all()) for s in found.values())


def test_some_nodes():
    model = module(LAYOUTS[1])
    assert spectra_of(model, []) == {}
    everything = spectra_of(model)
    for node in model.tree.nodes:
        (s,) = spectra_of(model, [node, node]).values()
        assert error(s.cpu(), everything[node].detach().cpu()) <= ACCURACY["qr"]


def test_nothing_is_read_before_it_is_asked_for():
    found = spectra_of(module(LAYOUTS[0]))
    assert "log2_scale" not in vars(found)
    assert all(isinstance(k, int) for k in found.log2_scale.values())


def test_weights_in_pieces():
    """Not contiguous, and as one tensor for each node."""
    layout = LAYOUTS[0]
    weights = [torch.randn(g.count, g.cols, g.rows, dtype=F64).mT for g in layout.groups]
    expected = matricization_spectra(layout.tree, weights, method="qr", layout=layout)
    with hk.use_backend("cuda"):
        given = [w.to(ON) for w in weights]
        found = matricization_spectra(layout.tree, given, method="qr", layout=layout)
    assert_same(found, expected, "qr")


# -- derivatives and singular vectors -------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_gradients(layout, method):
    measures = [hk.effective_rank, hk.nuclear_norm, lambda s: s.square().sum()]

    def grads(spectra, model):
        found = spectra(model, method=method).values()
        total = sum(w * m(s) for s in found for w, m in enumerate(measures, 1))
        return [g.cpu() for g in torch.autograd.grad(total, list(model.parameters()))]

    expected = grads(reference_of, module(layout))
    scale = max(float(g.abs().max()) for g in expected)
    for g, e in zip(grads(spectra_of, module(layout)), expected, strict=True):
        assert float((g - e).abs().max()) / scale <= ACCURACY["qr"] * 100


@pytest.mark.parametrize("name", ["coinciding", "zeros", "none", "steep"])
def test_gradients_are_finite(name):
    model = planted(SPECTRA[name])
    found = spectra_of(model, model.tree.nodes[:-1])
    total = sum(hk.effective_rank(s) + hk.nuclear_norm(s) for s in found.values())
    for g in torch.autograd.grad(total, list(model.parameters())):
        assert bool(g.isfinite().all())


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=range(3))
def test_principal_frames(layout):
    model = module(layout).to(ON)
    with hk.use_backend("cuda"):
        found = model.principal_frames()
    with hk.use_backend("reference"):
        expected = model.cpu().principal_frames()
    for node, (values, left, right) in found.items():
        exact, u, v = expected[node]
        assert error(values.cpu(), exact) <= ACCURACY["qr"]
        # Of single vectors the signs are free.
        sign = torch.sign((left.cpu() * u).sum(0))
        for a, b in ((left.cpu() * sign, u), (right.cpu() * sign, v)):
            condition = float(exact[0] / exact[-1]) ** 2
            assert float((a - b).abs().max() / b.abs().max()) <= ACCURACY["qr"] * condition


SHAPES = [(1, 1, 1), (9, 5, 5), (3, 8, 3), (3, 3, 7), (5, 17, 16), (2, 40, 64), (1, 128, 120)]


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 4)], ids=str)
def test_svd(shape):
    """Vectors of small singular values as orthonormal as those of large ones."""
    plain = torch.randn(shape, dtype=F64)
    deficient = plain.clone()
    deficient[:, :, ::2] = 0
    steep = plain * torch.logspace(0, -12, shape[2], dtype=F64)
    lost, same = torch.zeros_like(plain), torch.ones_like(plain)
    chosen = (plain, steep, 1e200 * plain, lost, deficient, same)
    for matrices in chosen if shape[1] < 100 else chosen[:1]:
        u, s, v = (t.cpu() for t in ops.svd(matrices.to(ON)))
        k = min(shape[1:])
        assert [t.shape[1:] for t in (u, s, v)] == [(shape[1], k), (k,), (shape[2], k)]
        assert bool((s[:, :-1] >= s[:, 1:]).all())
        if not len(matrices):
            continue
        exact = torch.linalg.svdvals(matrices)
        assert bool(((s - exact).abs() <= ACCURACY["qr"] / 10 * exact[:, :1]).all())
        whole = (u * s[:, None] @ v.mT - matrices).abs().amax((1, 2))
        assert bool((whole <= ACCURACY["qr"] * s[:, 0]).all())
        known = s > s[:, :1] * 1e-15
        for vectors in (u * known[:, None], v * known[:, None]):
            off = vectors.mT @ vectors - torch.diag_embed(known.to(F64))
            assert float(off.abs().max()) <= ACCURACY["qr"]


def test_svd_of_graded_columns():
    """Small singular values keep their digits where the columns have them."""
    q = torch.linalg.qr(torch.randn(20, 12, dtype=F64)).Q
    sizes = torch.logspace(0, -60, 12, dtype=F64)
    _, s, _ = ops.svd((q * sizes)[None].to(ON))
    assert float((s[0].cpu() / sizes - 1).abs().max()) <= ACCURACY["qr"]


@pytest.mark.parametrize("lowest", [-4, -15, -100])
@pytest.mark.parametrize("size", [33, 64])
def test_svd_of_steep_matrices(size, lowest):
    """Rotations alone would need more sweeps than there are."""
    q, r = (torch.linalg.qr(torch.randn(size, size, dtype=F64)).Q for _ in range(2))
    sizes = torch.logspace(0, lowest, size, dtype=F64)
    matrix = (q * sizes) @ r
    u, s, v = (t[0].cpu() for t in ops.svd(matrix[None].to(ON)))
    eye = torch.eye(size, dtype=F64)
    assert float((s - torch.linalg.svdvals(matrix)).abs().max()) <= ACCURACY["qr"] / 10
    for x in (u, v):
        assert float((x.T @ x - eye).abs().max()) <= ACCURACY["qr"] / 10
    assert float((u * s @ v.T - matrix).abs().max()) <= ACCURACY["qr"] / 10


@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_svd_of_what_is_no_number_ends(what):
    matrices = torch.randn(2, 7, 5, dtype=F64)
    matrices[1, 2, 3] = what
    u, s, v = (t.cpu() for t in ops.svd(matrices.to(ON)))
    exact = torch.linalg.svdvals(matrices[0])
    assert error(s[0], exact) <= ACCURACY["qr"] and not bool(s[1].isfinite().all())
    assert bool(u[0].isfinite().all()) and bool(v[0].isfinite().all())


# -- triangles by themselves ----------------------------------------------------------------------

TALL = [(1, 1), (5, 1), (1, 128), (300, 128), (128, 128), (127, 65), (129, 17), (40, 64), (700, 8)]


def frame_of(weight):
    """Of a leaf, as the kernels have it: its factor, in the weight's scale."""
    layout = hk.Layout.make(ModeTree.balanced(2), [weight.shape[0], 1], weight.shape[1])
    columns = weight.shape[1]
    weights = [torch.ones(g.shape, dtype=F64) for g in layout.groups]
    group, slot = layout.location[0]
    weights[group][slot] = weight
    given = [w.to(ON) for w in weights]
    ((frame, _, exponents, _),) = ops.factors(layout, given, [0], False)
    assert frame.shape == (min(weight.shape[0], columns), columns)
    return frame.cpu(), exponents.cpu()


@pytest.mark.parametrize("shape", TALL, ids=str)
def test_triangles(shape):
    rows, columns = shape
    plain = torch.randn(shape, dtype=F64)
    deficient = plain.clone()
    deficient[:, columns // 2 :] = deficient[:, : columns - columns // 2]
    deficient[:, 0] = 0
    near = 1 + 1e-9 * plain
    for weight in (plain, deficient, near) if columns < 100 else (plain,):
        frame, exponents = frame_of(weight)
        if rows >= columns:
            assert bool((frame.tril(-1) == 0).all())
        assert bool((frame.abs() <= 1).all())
        exact, found = torch.linalg.svdvals(weight), frame * 2.0**exponents
        s = torch.linalg.svdvals(found)
        # The dimension's share of QR's bound, and what svdvals itself is off.
        assert error(s, exact) <= ACCURACY["qr"] / 10
        gram = weight.T @ weight
        norms = weight.norm(dim=0)
        off = (found.T @ found - gram).abs() / (norms[:, None] * norms).clamp_min(1e-300)
        assert float(off.max()) <= ACCURACY["qr"] / 10


def test_triangles_of_any_scale():
    sizes = 10.0 ** torch.linspace(-290, 290, 9, dtype=F64)
    unit = torch.randn(30, 9, dtype=F64)
    frame, exponents = frame_of(unit * sizes)
    same, _ = frame_of(unit)
    most = frame.abs().amax(0)
    assert bool((most >= 0.5).all() and (most < 1).all())
    scaled = torch.linalg.svdvals(frame / frame.norm(dim=0))
    assert error(scaled, torch.linalg.svdvals(same / same.norm(dim=0))) <= ACCURACY["qr"] / 10
    assert int(exponents[0]) < -900 and int(exponents[-1]) > 900


def launches(layout, gram=False):
    nodes = tuple(n.index for n in layout.tree.nodes)
    steps = tasks.program(layout, nodes, gram, torch.device(ON))
    return [steps.launches[i : i + 7] for i in range(0, len(steps.launches), 7)]


SPLIT = hk.Layout.make(ModeTree.balanced(2), [1500, 900], 24)


def test_several_blocks_for_a_matrix():
    assert max(launch[3] for launch in launches(SPLIT)) > 2
    assert max(launch[3] for launch in launches(WIDER[0], gram=True)) > 2  # of columns alone
    model = module(SPLIT)
    for method in METHODS:
        assert_same(spectra_of(model, method=method), reference_of(model), method)


WIDE = hk.Layout.make(ModeTree.balanced(4), 100, [100, 70])


@pytest.mark.parametrize("method", METHODS)
def test_wide_nodes(method):
    node = WIDE.tree.root.children[0]
    model = module(WIDE)
    assert_same(spectra_of(model, [node], method), reference_of(model, [node]), method)


WIDER = [
    hk.Layout.make(ModeTree.balanced(4), 5, [200, 150]),
    hk.Layout.make(ModeTree.balanced(4), 3, 140, 2),
    hk.Layout.make(ModeTree.from_nested((((0, 1),), (2,), 3)), 3, [160, 170, 190], root="sum"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", WIDER, ids=range(len(WIDER)))
def test_more_columns_than_are_decomposed(layout, method):
    """As in the completion of a small tensor with many components: factors have few rows."""
    model = module(layout)
    assert_same(spectra_of(model, method=method), reference_of(model), method)


@emulated_only
@pytest.mark.parametrize("gram", [False, True], ids=("qr", "gram"))
def test_the_order_of_threads_changes_nothing(gram):
    from htfkernels import _C_emulated

    chosen = [c.layout for c in testing.cases() if c.name in ("random9", "balanced7_arity3")]
    for layout in (*chosen, SPLIT, WIDER[0], WIDE):
        weights = [w.detach() for w in module(layout).weights]
        nodes = [n.index for n in layout.tree.nodes]
        nodes = nodes[-3:-2] if layout is WIDE else nodes

        def run(weights=weights, nodes=nodes, layout=layout):
            values, powers, _, kept = ops.singular_values(layout, weights, nodes, gram)
            u, s, v = ops.svd(weights[0][:, :40, :40])
            return [values, powers, *(t for f in ops.factors(layout, weights, nodes, gram, kept)
                                      for t in f), u, s, v]  # fmt: skip

        forward = run()
        _C_emulated.set_backward(True)
        try:
            backward = run()
        finally:
            _C_emulated.set_backward(False)
        assert all(torch.equal(f, b) for f, b in zip(forward, backward, strict=True))


# -- what is left to others -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (hk.Layout.make(ModeTree.balanced(4), 150, [130, 4]), "columns up to 128, .* has 130"),
        (hk.Layout.make(ModeTree.flat(2), 140, 150), "rows up to 128, .* has 140"),
        (hk.Layout.make(ModeTree.flat(2), 3, 3000), "columns up to 2048, .* has 3000"),
    ],
    ids=["triangle", "rows", "columns"],
)
def test_wider_matrices_are_left_to_others(layout, reason):
    spec = dispatch.Spec("spectra", F64, ON, layout)
    assert re.search(reason, dispatch.why_not("cuda", spec))
    model = module(layout).to(ON)
    with hk.use_backend("cuda"), pytest.raises(RuntimeError, match=reason):
        model.matricization_spectra()
    assert len(model.matricization_spectra()) == len(layout.tree.nodes) - 1


def test_bad_arguments():
    def flat(count, dtype=F64):
        return torch.zeros(count, dtype=dtype, device=ON)

    table = torch.zeros(1, 16, dtype=torch.int64, device=ON)
    with pytest.raises(RuntimeError, match=r"weights must be flat float64, got Float \[3\]"):
        cuda.call("spectra_factors", flat(3, torch.float32), table, [], [0, 0])
    with pytest.raises(
        RuntimeError, match=r"table must be int64 \[tasks, 16\], got Long \[1, 15\]"
    ):
        cuda.call("spectra_factors", flat(3), table[:, :15], [], [0, 0])
    for launch in ([0, 0, 2, 1, 4, 4, 4], [0, 0, 1, 1, 129, 4, 129], [3, 0, 1, 1, 4, 4, 4]):
        with pytest.raises(RuntimeError, match="launch 0 does not fit the table"):
            cuda.call("spectra_factors", flat(3), table, launch, [0, 0])
    with pytest.raises(RuntimeError, match="launches 7 for each launch"):
        cuda.call("spectra_factors", flat(3), table, [0], [0, 0])
    with pytest.raises(RuntimeError, match="must be what spectra_factors returned"):
        cuda.call("spectra_values", flat(3), flat(3), table, [], [0, 0])
    with pytest.raises(RuntimeError, match="launch 0 does not fit the table"):
        cuda.call("spectra_values", flat(3), flat(3, torch.int64), table, [0, 1, 5, 4, 4], [0, 0])
    with pytest.raises(RuntimeError, match=r"p and q at most 128, got Double \[1, 129, 2\]"):
        cuda.call("spectra_svd", torch.zeros(1, 129, 2, dtype=F64, device=ON))


def test_modes_beyond_32_bits_are_left_to_others():
    most = 2**31 - 2**16
    assert tasks.why_not(hk.Layout.make(ModeTree.flat(2), most, 4), F64) is None
    reason = tasks.why_not(hk.Layout.make(ModeTree.flat(2), most + 1, 4), F64)
    assert f"rows up to {most}, and this layout has {most + 1}" in reason


def test_devices_with_less_shared_memory_take_narrower_matrices(monkeypatch):
    from htfkernels.cuda import spectra, spectra_tasks

    wide = hk.Layout.make(hk.ModeTree.balanced(4), 128, 100)
    narrow = hk.Layout.make(hk.ModeTree.balanced(4), 64, 64)
    assert spectra.why_not(wide, torch.float64) is None
    monkeypatch.setattr(spectra_tasks, "shared_bytes", lambda: 99 * 1024)
    spectra._why_not.cache_clear()
    assert "up to 64, and this layout has 100" in str(spectra.why_not(wide, torch.float64))
    assert spectra.why_not(narrow, torch.float64) is None
    spectra._why_not.cache_clear()
