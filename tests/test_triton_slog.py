"""slog's Triton kernels against the reference; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import htfkernels as hk
from htfkernels import ModeTree, testing
from htfkernels.runtime import dispatch
from htfkernels.runtime.dispatch import Spec

ON = "cpu" if dispatch.interpreted() else "cuda"
REASON = dispatch.why_not("triton", Spec("slog", torch.float32, ON))
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if ON == "cuda":
    pytestmark.append(pytest.mark.gpu)

# Of those that the kernels can run: the interpreter takes seconds for large ones.
NAMES = {
    "balanced4", "balanced16_rank16", "balanced7_arity3", "grid3x5", "flat3_sum", "chain5_sum",
    "chain4_linear", "one_of_each", "order2_wide", "one_child_nodes", "one_child_nodes_sum",
    "one_child_root", "primes", "rank1", "outputs10", "shared8", "shared6_sum", "shared_mixed",
    "empty_batch", "empty_batch_outputs", "random6", "random7_outputs",
}  # fmt: skip
CASES = [c for c in testing.cases() if c.name in NAMES] + testing.small_cases()


def split(arguments, case):
    """Folded weights, and vectors as ``slog_evaluate`` takes them."""
    count = len(case.layout.groups)
    vectors = arguments[count:]
    return arguments[:count], vectors[0] if len(vectors) == 1 else vectors


def slog(case, *arguments):
    weights, vectors = split(arguments, case)
    return hk.slog_evaluate(case.tree, weights, vectors, layout=case.layout)


def logabs(case):
    return lambda *arguments: slog(case, *arguments)[1]


def arguments_of(case, dtype, device=ON):
    inputs = testing.make_inputs(case, dtype, device)
    return testing.operation("evaluate", case, inputs)[1]


def both(case, arguments, backend="triton"):
    """Sign, log-magnitude, and the gradients of the latter for a cotangent that differs by row."""
    leaves = [a.detach().requires_grad_() for a in arguments]
    with hk.use_backend(backend):
        sign, log = slog(case, *leaves)
    cotangent = torch.linspace(0.5, 1.5, log.numel(), dtype=log.dtype, device=log.device)
    return sign, log.detach(), torch.autograd.grad(log, leaves, cotangent.view_as(log))


def exactly(case, arguments):
    """The same in float64, on the reference."""
    return both(case, [a.double() for a in arguments], "reference")


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that run, in order."""
    from htfkernels.triton import ragged, reduce, scaled

    names = []

    def counting(launch):
        return lambda kernel, *args: names.append(kernel.fn.__name__) or launch(kernel, *args)

    for module in (ragged, reduce, scaled):
        monkeypatch.setattr(module, "launch", counting(module.launch))
    return names


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, launches):
    arguments = arguments_of(case, torch.float64)
    sign, log, grads = both(case, arguments)
    assert "_forward" in launches
    expected_sign, expected, expected_grads = both(case, arguments, "reference")
    assert torch.equal(sign, expected_sign) and sign.shape == log.shape
    testing.assert_matches(log, expected, torch.float64, "second")
    testing.assert_matches(grads, expected_grads, torch.float64, "second")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["balanced16_rank16", "random6", "shared_mixed"])
def test_other_dtypes(name, dtype):
    case = next(c for c in CASES if c.name == name)
    arguments = arguments_of(case, dtype)
    sign, log, grads = both(case, arguments)
    expected_sign, expected, expected_grads = exactly(case, arguments)
    table = torch.bfloat16 if dtype == torch.float16 else dtype
    assert log.dtype == dtype and all(g.dtype == dtype for g in grads)
    assert torch.equal(sign.double(), expected_sign)
    testing.assert_matches(log, expected, table, "second")
    testing.assert_matches(grads, expected_grads, table, "second")


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_precisions_of_float32(precision):
    case = next(c for c in CASES if c.name == "primes")
    arguments = arguments_of(case, torch.float32)
    with hk.use_precision(precision):
        sign, log, grads = both(case, arguments)
    expected_sign, expected, expected_grads = exactly(case, arguments)
    assert torch.equal(sign.double(), expected_sign)
    testing.assert_matches(log, expected, torch.bfloat16, "forward")
    testing.assert_matches(grads, expected_grads, torch.bfloat16, "backward")


@pytest.mark.parametrize("vectors", [1e-30, 1e-41, 1e30, 1e38], ids=lambda s: f"x{s:g}")
@pytest.mark.parametrize("weights", [1e-30, 1e30], ids=lambda s: f"w{s:g}")
def test_entries_near_the_end_of_the_range(weights, vectors):
    """One product of two of them would leave float32; and the smallest vectors are subnormal."""
    layout = hk.Layout.make(ModeTree.balanced(5), 3, 4, share_weights=True)
    case = testing.Case("", layout, 7)
    *own, x = arguments_of(case, torch.float32)
    arguments = [*(w * weights for w in own), x * vectors]
    sign, log, grads = both(case, arguments)
    expected_sign, expected, expected_grads = exactly(case, arguments)
    assert torch.equal(sign.double(), expected_sign)
    testing.assert_matches(log, expected, torch.float32, "forward")
    by_weights, by_x = grads[:-1], grads[-1]
    if weights < 1:
        testing.assert_matches(by_weights, expected_grads[:-1], torch.float32, "backward")
    if vectors in (1e-30, 1e30):  # others' gradients are out of the range or subnormal
        testing.assert_matches(by_x, expected_grads[-1], torch.float32, "backward")
    # Gradients times what they belong to are of moderate size.
    for w, g, e in zip(own, by_weights, expected_grads, strict=False):
        product = w.double() * weights * g.double()
        testing.assert_matches(product, w.double() * weights * e, torch.float32, "second")


def test_half_precision_of_vectors_at_both_ends():
    """Vectors of 1e-6 and 6e4 beside others in one batch, in float16."""
    case = testing.Case("", hk.Layout.make(ModeTree.balanced(6), 4, 8), 9)
    *weights, x = arguments_of(case, torch.float64)
    x = x * torch.tensor([1e-5, 1.0, 3e4], dtype=x.dtype, device=ON).repeat(3)[:, None, None]
    arguments = [a.half() for a in (*weights, x)]
    sign, log, grads = both(case, arguments)
    exact = exactly(case, arguments)
    assert torch.equal(sign.double(), exact[0])
    testing.assert_matches(log, exact[1], torch.bfloat16, "forward")
    testing.assert_matches(grads[:-1], exact[2][:-1], torch.bfloat16, "backward")


@pytest.mark.parametrize("size", [1e-7, 1e7], ids=lambda s: f"{s:g}")
def test_an_order_whose_value_leaves_float32(size):
    case = testing.Case("", hk.Layout.make(ModeTree.balanced(64), 2, 3), 2)
    inputs = testing.make_inputs(case, torch.float32, ON, spread=0.01)
    arguments = [*(w * size for w in inputs.weights), inputs.vectors]
    sign, log, grads = both(case, arguments)
    exact = exactly(case, arguments)
    assert exact[1].abs().min() > 1000
    assert torch.equal(sign.double(), exact[0])
    testing.assert_matches(log, exact[1], torch.float32, "forward")
    scale = [torch.full_like(g, g.abs().max()) for g in exact[2]]
    testing.assert_matches(grads, exact[2], torch.float32, "backward", scale)


def test_zero_rows_and_zero_weights():
    case = testing.Case("", hk.Layout.make(ModeTree.balanced(4), 3, 5), 5)
    *weights, x = arguments_of(case, torch.float64)
    x[1, 2] = 0
    x[3] = 0
    x[4, 0, 1:] = 0
    weights[0][0, 1] = 0
    actual, expected = both(case, [*weights, x]), both(case, [*weights, x], "reference")
    assert torch.equal(actual[0], expected[0]) and actual[0].tolist() == [1, 0, 1, 0, 1]
    assert torch.equal(actual[1] == -math.inf, actual[0] == 0)
    testing.assert_matches(
        actual[1], expected[1], torch.float64, "second", torch.ones_like(x[:, 0, 0])
    )
    testing.assert_matches(actual[2], expected[2], torch.float64, "second")


def test_nan_stays_in_its_row():
    case = testing.Case("", hk.Layout.make(ModeTree.balanced(4), 3, 5), 5)
    *weights, x = arguments_of(case, torch.float32)
    with hk.use_backend("triton"):
        clean = slog(case, *weights, x)[1]
        x[2, 1, 0] = math.nan
        found = slog(case, *weights, x)[1]
    assert bool(found[2].isnan())
    keep = [0, 1, 3, 4]
    assert torch.equal(found[keep], clean[keep])


def test_the_same_bits_every_time():
    case = next(c for c in CASES if c.name == "random6")
    arguments = arguments_of(case, torch.float32)
    first, again = both(case, arguments), both(case, arguments)
    for a, b in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True):
        assert torch.equal(a, b)


def test_launches_grow_with_depth(launches):
    counts = {}
    for order in (4, 8, 16, 32):
        case = testing.Case("", hk.Layout.make(ModeTree.balanced(order), 2, 3), 2)
        launches.clear()
        both(case, arguments_of(case, torch.float32))
        depth = case.tree.depth
        assert launches.count("_forward") == depth + 1
        assert launches.count("_backward") == depth + 1
        assert launches.count("_weights") == 1
        counts[order] = len(launches)
    assert counts[32] - counts[16] == counts[16] - counts[8] == counts[8] - counts[4]


def test_gradients_that_are_asked_for():
    layout = next(c.layout for c in CASES if c.name == "primes")
    case = testing.Case("", layout, 7)
    arguments = arguments_of(case, torch.float64)
    every = testing.gradients(logabs(case))
    with hk.use_backend("reference"):
        ones = torch.ones_like(logabs(case)(*arguments))
        expected = every(ones, *arguments)
    for wanted in range(len(arguments)):
        leaves = [a.clone().requires_grad_(i == wanted) for i, a in enumerate(arguments)]
        with hk.use_backend("triton"):
            grad = torch.autograd.grad(logabs(case)(*leaves), leaves[wanted], ones)
        testing.assert_matches(grad, [expected[wanted]], torch.float64, "second")


def test_second_derivatives_and_transforms():
    case = testing.small_cases()[0]
    arguments = arguments_of(case, torch.float64)
    directions = [torch.randn_like(a) for a in arguments]
    found = {}
    for backend in ("triton", "reference"):
        with hk.use_backend(backend):
            run = logabs(case)
            ones = torch.ones_like(run(*arguments))
            tangent = torch.func.jvp(run, tuple(arguments), tuple(directions))[1]
            pulled = torch.func.vjp(run, *arguments)[1](ones)
            stacked = torch.stack([arguments[-1], 2 * arguments[-1]])
            mapped = torch.func.vmap(functools.partial(run, *arguments[:-1]))(stacked)
            second = testing.second(run)(ones, *directions, *arguments)
            found[backend] = [tangent, *pulled, mapped, *second]
    testing.assert_matches(found["triton"], found["reference"], torch.float64, "second")


def test_only_logabs_has_a_gradient():
    case = testing.small_cases()[0]
    leaves = [a.requires_grad_() for a in arguments_of(case, torch.float32)]
    with hk.use_backend("triton"):
        sign, log = slog(case, *leaves)
    assert not sign.requires_grad and log.requires_grad


@pytest.mark.parametrize(
    ("tree", "rank", "sentence"),
    [
        (ModeTree.flat(5), 3, "triton's slog multiplies up to 4 messages, and a node has 5"),
        (ModeTree.flat(2), 513, "triton's slog takes up to 512 columns, and a node has 513"),
    ],
    ids=["operands", "columns"],
)
def test_the_reference_runs_what_the_kernels_cannot(tree, rank, sentence, launches, caplog):
    case = testing.Case("", hk.Layout.make(tree, 2, rank), 2)
    arguments = arguments_of(case, torch.float64)
    with caplog.at_level("INFO", "htfkernels"):
        actual = both(case, arguments)
    assert not launches and sentence in caplog.text
    expected = both(case, arguments, "reference")
    assert torch.equal(actual[1], expected[1])


def test_more_samples_than_kernels_number_in_32_bits():
    from htfkernels.ops.slog import triton
    from htfkernels.triton import launch

    layout = hk.Layout.make(ModeTree.balanced(2), 1, 1)
    weights = [torch.empty(g.shape, device="meta") for g in layout.groups]
    x = torch.empty(launch.MOST + 1, 2, device="meta")
    grad = torch.empty(len(x), 1, 2, device="meta")
    with launch.recorded(lambda *launched: None):
        with pytest.raises(ValueError, match=r"slog: .* 2147418112 samples, got 2147418113"):
            triton.slog(weights, x, layout.program, 1, precision="ieee")
        with pytest.raises(ValueError, match=r"slog: .* 2147418112 samples, got 2147418113"):
            triton.slog_backward(grad, weights, x, (), layout.program, [1, 1, 0], precision="ieee")


def test_autocast_leaves_the_logarithm_exact():
    case = next(c for c in CASES if c.name == "balanced4")
    arguments = arguments_of(case, torch.float32)
    with hk.use_backend("triton"), torch.autocast(ON, torch.bfloat16):
        found = slog(case, *arguments)
    with hk.use_backend("triton"):
        expected = slog(case, *arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
