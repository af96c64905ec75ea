"""The Triton kernels of ``evaluate``: which are launched, and what they compute.

What is launched is looked at on any machine that has Triton. Kernels are run on a GPU, or in
Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import dispatch
from htfkernels.tree import ModeTree
from htfkernels.tree.layout import Layout

pytest.importorskip("triton")

from htfkernels.ops.evaluate import triton as backend
from htfkernels.triton import configs, launch, uniform
from htfkernels.triton.tables import Fused, Ragged, Tables, Uniform

DEVICE = "cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu"
runs = pytest.mark.skipif(
    DEVICE == "cpu" and not dispatch.interpreted(), reason="needs a GPU, or TRITON_INTERPRET=1"
)
CASES = {case.name: case for case in testing.cases()}


def launches(layout, batch=64, dtype=torch.float32, precision="tf32", needs=None, backward=True):
    """Names of the kernels, in the order of their launches, none of which is run."""
    names = []

    def recorder(kernel, grid, args, constants, config):
        function = kernel.fn
        names.append(f"{function.__module__.rpartition('.')[2]}.{function.__name__}")

    weights = [torch.empty(g.shape, dtype=dtype) for g in layout.groups]
    x = torch.empty(batch, layout.offsets[-1], dtype=dtype)
    program, outputs = layout.program, layout.out_features
    with launch.recorded(recorder):
        _, kept = backend.evaluate_keeping(weights, x, program, outputs, precision=precision)
        forward = list(names)
        names.clear()
        if not backward:
            return forward
        grad = torch.empty(batch, outputs, dtype=dtype)
        needs = [*(True for _ in weights), False] if needs is None else needs
        backend.evaluate_backward(grad, weights, x, kept, program, needs, precision=precision)
    return forward, list(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_grow_with_depth_and_not_with_nodes(dtype):
    counts = [
        sum(map(len, launches(Layout.make(ModeTree.balanced(2**depth), 16, 128), dtype=dtype)))
        for depth in (4, 6, 8)
    ]
    assert counts[1] - counts[0] == counts[2] - counts[1] <= 2 * 3
    assert counts[2] <= 3 * 9  # forward, backward and a sum for each level, that of the leaves too


def test_a_level_of_many_shapes_is_one_launch():
    tree = ModeTree.balanced(32)
    ranks = {node: 8 + node.index for node in tree.interior}
    layout = Layout.make(tree, list(range(2, 34)), ranks)
    forward, backward = launches(layout)
    # Of one or two shapes, launches of their own are as few.
    assert forward == ["ragged._forward"] * 4 + ["uniform._forward"] * 3
    # The gradients of all their weights are one launch more, and each of the groups is summed up.
    assert [n for n in backward if n != "reduce._reduce"][-1] == "ragged._weights"
    assert backward.count("ragged._weights") == 1
    assert backward.count("ragged._backward") <= tree.depth


def test_the_walked_top_is_one_launch():
    caterpillar = (0, 1)
    for mode in range(2, 40):
        caterpillar = (caterpillar, mode)
    layout = Layout.make(ModeTree.from_nested(caterpillar), 4, 16)
    forward, backward = launches(layout)
    assert len(forward) == 2  # the leaves, and all that is above them
    assert len([n for n in backward if n != "reduce._reduce"]) <= 3


def test_leaves_are_formed_in_their_parents_kernel_where_that_pays():
    layout = Layout.make(ModeTree.balanced(16), 16, 64)
    for dtype, precision, fused in (
        (torch.float32, "tf32", True),
        (torch.bfloat16, "ieee", True),
        (torch.float16, "ieee", True),
        (torch.float32, "ieee", False),
        (torch.float32, "tf32x3", False),
        (torch.float64, "ieee", False),
    ):
        forward, backward = launches(layout, dtype=dtype, precision=precision)
        assert ("fused._forward" in forward) == fused
        assert ("fused._backward" in backward) == fused


def test_only_what_is_asked_for_is_launched():
    layout = Layout.make(ModeTree.balanced(16), 16, 256)
    groups = len(layout.groups)
    nothing = [False] * (groups + 1)

    def wanted(*which):
        needs = list(nothing)
        for i in which:
            needs[i] = True
        return launches(layout, needs=needs)[1]

    assert wanted() == []
    assert [n for n in wanted(groups - 1) if n != "reduce._reduce"] == ["uniform._backward"]
    assert "fused._backward" not in wanted(2)
    assert wanted(1).count("fused._backward") == 1
    assert "fused._backward" not in wanted(groups)  # the vectors' take the leaves' messages stored


def test_the_tables_cover_every_node_once():
    for case in testing.cases():
        for fuse in (None, (torch.float32, "tf32")):
            tables = Tables(case.layout.program, torch.device("cpu"), fuse)
            seen = [n.index for launched in tables.launches for n in launched.nodes]
            for launched in tables.launches:
                if isinstance(launched, Fused):
                    seen += [c for n in launched.nodes for c in n.children]
            assert sorted(seen) == list(range(len(case.tree.nodes)))
            spans = sorted((tables.column[n], tables.nodes[n].cols) for n in tables.column)
            for (at, width), (following, _) in pairwise(spans):
                assert at + width == following
            assert sum(width for _, width in spans) == tables.width
            done = set()
            for launched in tables.launches:  # operands come before what they are operands of
                assert isinstance(launched, (Fused, Ragged, Uniform))
                if not isinstance(launched, Fused):
                    inside = {n.index for n in launched.nodes}
                    for node in launched.nodes:
                        assert all(c in done or c in inside for c in node.children)
                done |= {n.index for n in launched.nodes}


def test_more_than_kernels_number_in_32_bits():
    """Samples, in either pass, and a mode's dimension; nothing is launched."""
    layout = Layout.make(ModeTree.balanced(2), 1, 1)
    weights = [torch.empty(g.shape, device="meta") for g in layout.groups]
    most, more = (torch.empty(n, 2, device="meta") for n in (launch.MOST, launch.MOST + 1))

    def forward(x):
        return backend.evaluate_keeping(weights, x, layout.program, 1, precision="ieee")

    with launch.recorded(lambda *launched: None):
        forward(most)
        with pytest.raises(ValueError, match=r"evaluate: .* 2147418112 samples, got 2147418113"):
            forward(more)
        with pytest.raises(ValueError, match=r"evaluate: .* 2147418112 samples, got 2147418113"):
            backend.evaluate_backward(
                more[:, 0], weights, more, more[:0], layout.program, [1, 1, 0], precision="ieee"
            )
    layout = Layout.make(ModeTree.balanced(2), launch.MOST + 1, 1)
    with pytest.raises(ValueError, match="rows or columns of a weight, got 2147418113"):
        Tables(layout.program, torch.device("cpu"), None)


def test_parts_of_a_batch_end_below_32_bits():
    """A kernel adds a part's length to its begin before it looks where the batch ends."""
    for rows in (launch.MOST, launch.MOST - 1, 2**30 + 1):
        for programs in (1, 3, 100, 263):
            for step in (16, 64, 128):
                count, each = configs.splits(torch.device("cpu"), programs, rows, step)
                assert rows <= count * each < 2**31 - step


def test_a_batch_is_split_without_gaps():
    device = torch.device("cpu")
    for programs in (1, 3, 100, 10_000):
        for rows in (0, 1, 31, 512, 100_000):
            for step in (16, 64):
                count, per_split = configs.splits(device, programs, rows, step)
                assert per_split % step == 0
                assert count >= 1
                assert (count - 1) * per_split < max(rows, 1) <= max(1, count * per_split)


def _check(case, dtype, precision="ieee"):
    inputs = testing.make_inputs(case, dtype, DEVICE)
    function, arguments = testing.operation("evaluate", case, inputs)
    expected, scale = testing.exact(function, arguments)
    with hk.use_backend("triton"), hk.use_precision(precision):
        value = function(*arguments)
        cotangent = torch.ones_like(value)
        run = testing.gradients(function)
        wanted, by = testing.exact(run, (cotangent, *arguments))
        found = run(cotangent, *arguments)
        again = run(cotangent, *arguments)
        count = len(case.layout.groups)
        leaves = [a.detach().requires_grad_(i < count) for i, a in enumerate(arguments)]
        weights = torch.autograd.grad(function(*leaves), leaves[:count], cotangent)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for actual, exact, bound, direction in (
        (value, expected, scale, "forward"),
        (found, wanted, by, "backward"),
        (weights, wanted[:count], by[:count], "backward"),
    ):
        allowed = testing.tolerance(dtype, direction, precision, len(case.tree.nodes))
        testing.assert_matches(actual, exact, dtype, direction, bound, allowed)


@runs
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize(
    "name", ["balanced8_rank64", "halves8", "grid4x4", "chain4_linear", "shared8", "random9"]
)
def test_float32_in_each_precision(name, precision):
    _check(CASES[name], torch.float32, precision)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["balanced4", "balanced8_rank64", "grid3x5", "primes", "shared8"])
def test_half_precision(name, dtype):
    _check(CASES[name], dtype)


@runs
@pytest.mark.parametrize(
    "layout",
    [
        Layout.make(ModeTree.balanced(4), 5, [20, 300]),
        Layout.make(ModeTree.balanced(4), 5, [300, 20]),
        Layout.make(ModeTree.balanced(4), 130, [16, 32]),
        Layout.make(ModeTree.balanced(9, 9), 3, 20, 2),
        Layout.make(ModeTree.from_nested(((0, 1, 2, 3, 4, 5), (6, 7))), 2, [7, 5]),
    ],
    ids=["wide above", "wide below", "long vectors", "nine operands", "six and two"],
)
def test_shapes_that_take_the_other_kernels(layout):
    case = testing.Case("", layout, 33)
    _check(case, torch.float64)
    _check(case, torch.float32, "tf32")


@runs
def test_wide_above_and_below():
    """In TF32 alone: in the interpreter, float64's small tiles take a minute."""
    _check(testing.Case("", Layout.make(ModeTree.balanced(4), 5, 300), 33), torch.float32, "tf32")


@runs
def test_the_messages_are_computed_again_where_none_are_kept():
    case = CASES["balanced16_rank16"]
    inputs = testing.make_inputs(case, torch.float64, DEVICE)
    program = case.layout.program
    x, weights = inputs.vectors.flatten(1), inputs.weights
    value, kept = backend.evaluate_keeping(weights, x, program, 1, precision="ieee")
    grad = torch.ones_like(value).expand(len(x))
    needs = [True] * (len(weights) + 1)
    with_kept, without = (
        backend.evaluate_backward(grad, weights, x, k, program, needs, precision="ieee")
        for k in (kept, kept.new_empty(0))
    )
    assert all(torch.equal(a, b) for a, b in zip(with_kept, without, strict=True))


@runs
def test_offsets_beyond_32_bits():
    """An operand more than 2^31 numbers into its buffer. The memory between is never touched."""
    layout = Layout.make(ModeTree.balanced(2), 8, 16)
    root = Tables(layout.program, torch.device(DEVICE), None).launches[-1]
    rows, far = 16, 2**31 // 16 + 3
    source = torch.empty(far * rows + rows * 16, dtype=torch.float16, device=DEVICE)
    blocks = torch.randn(2, rows, 16, device=DEVICE).half()
    columns = [0, far]
    for block, column in zip(blocks, columns, strict=True):
        source[column * rows : column * rows + rows * 16] = block.flatten()
    launched = Uniform(root.nodes, 0, [[0, 0, *columns]], torch.tensor([[0, 0, *columns]]))
    launched.table = launched.table.to(DEVICE)
    weight = torch.randn(1, 16, 1, device=DEVICE).half()
    result = torch.empty(rows, 1, dtype=torch.float16, device=DEVICE)
    uniform.forward(launched, source, 16, rows, weight, result, rows, "ieee")
    expected = (blocks[0].double() * blocks[1].double()) @ weight[0].double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=1e-2)
