"""The compiled operators of the spectra: opcheck, arguments that do not fit, threads, instruction
sets, and the trace ranks on both backends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from models import module

import htfkernels as hk
from htfkernels import ModeTree, testing
from htfkernels.runtime.dispatch import Spec, why_not
from htfkernels.spectra.matricizations import ACCURACY

F64 = torch.float64
OPS = torch.ops.htfkernels

pytestmark = pytest.mark.skipif(
    why_not("cpp", Spec("spectra", F64, "cpu")) is not None, reason="needs the compiled module"
)


def arguments(case, dtype=F64, requires_grad=False):
    """Of the operators: weights, program, nodes."""
    weights = testing.make_inputs(case, dtype).weights
    nodes = [n.index for n in case.tree.nodes]
    return [w.requires_grad_(requires_grad) for w in weights], case.layout.program, nodes


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(small_case, dtype):
    # Sizes of results depend on the program's numbers, which aot_dispatch does not know.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    weights, program, nodes = arguments(small_case, dtype)
    for gram in (0, 1):
        found = OPS.spectral_factors(weights, program, nodes, gram, gram)
        torch.library.opcheck(
            OPS.spectral_factors.default, (weights, program, nodes, gram, gram), test_utils=utils
        )
        torch.library.opcheck(OPS.factor_values.default, (*found[:3], nodes), test_utils=utils)
    for stable in (0, 1):
        ranks, *kept = OPS.trace_ranks(weights, program, nodes, stable)
        torch.library.opcheck(
            OPS.trace_ranks.default, (weights, program, nodes, stable), test_utils=utils
        )
        torch.library.opcheck(
            OPS.trace_ranks_backward.default,
            (torch.ones_like(ranks), weights, program, nodes, *kept, stable),
            test_utils=utils,
        )


def test_called_directly_they_have_no_gradient_and_say_so(small_case):
    weights, program, nodes = arguments(small_case, requires_grad=True)
    for result in (
        OPS.trace_ranks(weights, program, nodes, 0)[0],
        OPS.spectral_factors(weights, program, nodes, 0, 1)[0],
    ):
        with pytest.raises(RuntimeError, match="no derivative of its own"):
            result.sum().backward()


def test_bad_arguments():
    case = testing.small_cases()[0]
    weights, program, nodes = arguments(case)
    count = len(nodes)
    for wanted in ([count], [-1]):
        message = f"wanted must be .*nodes, 0 to {count - 1}, got {wanted[0]}"
        with pytest.raises(RuntimeError, match=message):
            OPS.spectral_factors(weights, program, wanted, 0, 0)
        with pytest.raises(RuntimeError, match=message):
            OPS.trace_ranks(weights, program, wanted, 0)
    with pytest.raises(RuntimeError, match="must be distinct nodes"):
        OPS.trace_ranks(weights, program, [0, 0], 0)
    with pytest.raises(RuntimeError, match=r"expected \d+ folded weights, got 1"):
        OPS.spectral_factors(weights[:1], program, [0], 0, 0)
    frames, environments, table, _ = OPS.spectral_factors(weights, program, [0], 0, 1)
    with pytest.raises(RuntimeError, match="node 1 has no environment in this table"):
        OPS.factor_values(frames, environments, table, [1])
    with pytest.raises(RuntimeError, match="frames must be what spectral_factors returned"):
        OPS.factor_values(frames.float(), environments, table, [0])
    broken = table.clone()
    broken[0, 0] = 10**12
    with pytest.raises(RuntimeError, match="node 0 has no environment"):
        OPS.factor_values(frames, environments, broken, [0])
    ranks, numbers, exponents = OPS.trace_ranks(weights, program, [0], 0)
    with pytest.raises(RuntimeError, match=r"grad must be float64 \[1\]"):
        OPS.trace_ranks_backward(ranks.float(), weights, program, [0], numbers, exponents, 0)
    with pytest.raises(RuntimeError, match="are of another call"):
        OPS.trace_ranks_backward(ranks, weights, program, [0], numbers[1:], exponents, 0)


SHAPES = [(1, 1, 1), (9, 5, 5), (8, 3, 7), (3, 7, 3), (17, 32, 32), (2, 40, 64), (0, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_svd(shape):
    """Vectors of small singular values as orthonormal as those of large ones."""
    torch.manual_seed(0)
    plain = torch.randn(shape, dtype=F64)
    k = min(shape[1:])
    q = torch.linalg.qr(plain).Q if shape[1] >= shape[2] else torch.linalg.qr(plain.mT).Q.mT
    steep = plain * torch.logspace(0, -12, shape[2], dtype=F64)
    huge, lost = 1e200 * plain, torch.zeros_like(plain)
    deficient = plain.clone()
    deficient[:, :, ::2] = 0
    for matrices in (plain, q, steep, huge, lost, deficient):
        u, s, v = OPS.small_svd(matrices)
        assert [t.shape for t in (u, s, v)] == [
            (shape[0], shape[1], k),
            (shape[0], k),
            (shape[0], shape[2], k),
        ]
        assert bool((s[:, :-1] >= s[:, 1:]).all())
        if not len(matrices):
            continue
        testing.assert_matches(s, torch.linalg.svdvals(matrices), F64, "second")
        whole = (u * s[:, None] @ v.mT - matrices).abs().amax((1, 2))
        assert bool((whole <= ACCURACY["qr"] * s[:, 0]).all())
        known = s > s[:, :1] * 1e-15
        for vectors in (u * known[:, None], v * known[:, None]):
            gram = vectors.mT @ vectors
            off = gram - torch.diag_embed(known.to(F64))
            assert float(off.abs().max()) <= ACCURACY["qr"]
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(OPS.small_svd.default, (matrices,), test_utils=utils)


def test_small_svd_of_what_is_none():
    with pytest.raises(RuntimeError, match=r"must be a float64 CPU tensor \[F, p, q\], got Float"):
        OPS.small_svd(torch.ones(1, 2, 2))


# Larger than work that is worth a second thread, and wider than a strip, a block, a register.
LARGE = [
    hk.Layout.make(ModeTree.balanced(16), 16, 40),
    hk.Layout.make(ModeTree.balanced(4), 8, 100),
    hk.Layout.make(ModeTree.flat(6), 20, 70),
    hk.Layout.make(testing.random_tree(12, 3), 9, 33, 2),
    hk.Layout.make(ModeTree.balanced(4), 150, 130),
]


def results(layout):
    weights = [torch.randn(g.shape, dtype=F64) / g.rows**0.5 for g in layout.groups]
    nodes = [n.index for n in layout.tree.nodes]
    for gram in (0, 1):
        frames, environments, table, exponents = OPS.spectral_factors(
            weights, layout.program, nodes, gram, 0
        )
        yield from OPS.factor_values(frames, environments, table, nodes)
        yield exponents
    for stable in (0, 1):
        ranks, *kept = OPS.trace_ranks(weights, layout.program, nodes, stable)
        yield ranks
        yield from OPS.trace_ranks_backward(
            torch.ones_like(ranks), weights, layout.program, nodes, *kept, stable
        )


@pytest.mark.parametrize("layout", LARGE, ids=range(len(LARGE)))
def test_the_same_bits_for_any_number_of_threads(layout, threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(0)
        found.append(list(results(layout)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", LARGE, ids=range(len(LARGE)))
def test_large_ones(layout):
    """Both methods against each other and against the reference, both trace ranks against them."""
    tree = layout.tree
    model = module(layout)
    with torch.no_grad():
        qr, gram = (model.matricization_spectra(tree.nodes, m) for m in ("qr", "gram"))
        with hk.use_backend("reference"):
            expected = model.matricization_spectra(tree.nodes, "qr")
        for node, s in expected.items():
            for found in (qr, gram):
                worst = (found[node] - s).abs().max() / s.max()
                assert float(worst) <= found.accuracy
        for ranks, measure in (
            (model.renyi2_ranks(tree.nodes), hk.renyi2_rank),
            (model.stable_ranks(tree.nodes), hk.stable_rank),
        ):
            exact = torch.stack([measure(s) for s in expected.values()])
            testing.assert_matches(torch.stack([*ranks.values()]), exact, F64, "second")


@pytest.mark.parametrize("stable", [0, 1], ids=["renyi2", "stable"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_trace_ranks_of_all_cases(case, dtype, stable):
    """Values and gradients of the C++ against the recursion in PyTorch, some nodes or all."""
    weights = [w.requires_grad_() for w in testing.make_inputs(case, dtype).weights]
    tree = case.tree
    if len(tree.nodes) > 60:
        return
    model = module(case.layout, dtype)
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    exact = [p.detach().double() for p in model.parameters()]
    parameters = list(model.parameters())
    for nodes in (None, tree.nodes[:1], [tree.root], tree.nodes[1::3]):
        run = model.stable_ranks if stable else model.renyi2_ranks
        ranks = torch.stack([*run(nodes).values()])
        cotangent = torch.linspace(1, 2, len(ranks), dtype=dtype)
        grads = torch.autograd.grad(ranks, parameters, cotangent)
        double = model.double()
        with torch.no_grad():
            for p, w in zip(double.parameters(), exact, strict=True):
                p.copy_(w)
        with hk.use_backend("reference"):
            run = double.stable_ranks if stable else double.renyi2_ranks
            expected = torch.stack([*run(nodes).values()])
            derivatives = torch.autograd.grad(
                expected, list(double.parameters()), cotangent.double()
            )
        testing.assert_matches(ranks.detach(), expected.detach(), dtype, "backward")
        # Derivatives cancel, down to 0 where a rank is 1: relative to rank over weight.
        for g, e, w in zip(grads, derivatives, exact, strict=True):
            scale = torch.full_like(e, float(expected.detach().sum() / w.abs().mean()))
            testing.assert_matches(g, e, dtype, "backward", scale)
        model = double.to(dtype)
        parameters = list(model.parameters())


def test_torch_func_and_compile():
    model = hk.HTF(ModeTree.balanced(4), 3, [5, 4], dtype=F64)
    names = [n for n, _ in model.named_parameters()]
    weights = tuple(p.detach() for p in model.parameters())

    class Measure(torch.nn.Module):
        def __init__(self, measure):
            super().__init__()
            self.model, self.measure = model, measure

        def forward(self):
            return self.measure(self.model)

    for measure in (
        lambda m: sum(m.renyi2_ranks().values()),
        lambda m: sum(m.stable_ranks().values()),
        lambda m: sum(hk.effective_rank(s) for s in m.matricization_spectra().values()),
    ):
        value = measure(model)
        expected = torch.autograd.grad(value, list(model.parameters()))

        def run(*given, measure=measure):
            named = {f"model.{n}": w for n, w in zip(names, given, strict=True)}
            return torch.func.functional_call(Measure(measure), named, ())

        found = torch.func.grad(run, argnums=tuple(range(len(weights))))(*weights)
        testing.assert_matches(found, expected, F64, "second")
        compiled = torch.compile(Measure(measure), backend="aot_eager")
        again = torch.autograd.grad(compiled(), list(model.parameters()))
        testing.assert_matches(again, expected, F64, "second")


_EVERY_SET = """
import os, sys, traceback
import torch
sys.path.insert(0, sys.argv[1])
import htfkernels as hk
from test_spectra_ops import LARGE, test_large_ones
from test_spectra_accuracy import METHODS, SPECTRA, error, planted

torch.set_num_threads(1)
failed = []
for instructions in ("generic", "avx2", "avx512"):
    child = os.fork()  # the choice of instructions is made once in a process
    if child == 0:
        os.environ["HTF_CPU"] = instructions
        try:
            # 117 and 1343: rounding once kept iterations from converging, or underflowed.
            for seed in (0, 117, 1343):
                torch.manual_seed(seed)
                for name in SPECTRA:
                    model = planted(SPECTRA[name])
                    for method in METHODS:
                        found = model.matricization_spectra(model.tree.root.children, method)
                        for s in found.values():
                            assert error(s, SPECTRA[name]) <= found.accuracy
            torch.manual_seed(0)
            for layout in LARGE[:4]:
                test_large_ones(layout)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(instructions)
sys.exit(", ".join(failed) or 0)
"""


def test_every_instruction_set():
    environment = {**os.environ, "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _EVERY_SET, os.path.dirname(__file__)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad):
    """An error or NaN, never a rank."""
    model = hk.HTF(ModeTree.balanced(4), 3, [5, 4], dtype=F64)
    with torch.no_grad():
        model.weights[1][0, 2, 1] = bad
        for method in ("qr", "gram"):
            for s in model.matricization_spectra(method=method).values():
                assert bool(s.isnan().all())
        for ranks in (model.renyi2_ranks(), model.stable_ranks()):
            assert all(bool(r.isnan()) for r in ranks.values())
