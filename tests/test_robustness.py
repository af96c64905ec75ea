"""What must not matter: strides, NaN in other rows, old memory, the number of threads."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch

import htfkernels as hk
from htfkernels import testing


def strided(tensor):
    """The same numbers, every second of a larger tensor."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    wide = wide.to(tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def transposed(tensor):
    """The same numbers, the last two dimensions swapped in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def batch_last(tensor):
    """The same numbers, the first dimension last in memory."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def offset(tensor):
    """The same numbers, not at the start of their memory nor on a vector's boundary."""
    flat = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    flat[3:] = tensor.reshape(-1)
    return flat[3:].view(tensor.shape)


LAYOUTS = [strided, transposed, batch_last, offset]


def irregular_case(batch=7):
    layout = hk.Layout.make(testing.random_tree(6, 4), 3, 5, out_features=2)
    return testing.Case("irregular", layout, batch)


@pytest.mark.parametrize("view", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_arguments_do_not_matter(target, op, view):
    target.require(op)
    case = irregular_case()
    inputs = testing.make_inputs(case, torch.float64, target.device)
    function, arguments = testing.operation(op, case, inputs)
    viewed = [view(a) for a in arguments]
    indices = inputs.indices.t().contiguous().t()
    seen = testing.Inputs(inputs.weights, inputs.vectors, indices)
    same, _ = testing.operation(op, case, seen)
    assert not all(v.is_contiguous() for v in viewed) or view is offset
    expected, scale = testing.exact(function, arguments)
    testing.assert_matches(same(*viewed), expected, torch.float64, "forward", scale)
    grad = torch.ones_like(expected)
    run = testing.gradients(function)
    expected, scale = testing.exact(run, (grad, *arguments))
    testing.assert_matches(run(grad, *viewed), expected, torch.float64, "backward", scale)


def test_expanded_arguments(target):
    """One vector for the batch, one weight for all nodes of a group, one number for a vector."""
    target.require("evaluate")
    case = irregular_case()
    inputs = testing.make_inputs(case, torch.float64, target.device)
    weights = [w[:1].expand_as(w) for w in inputs.weights]
    for vectors in (
        inputs.vectors[:1].expand(7, -1, -1),
        inputs.vectors[:, :, :1].expand(-1, -1, 3),
    ):
        given = [*weights, vectors]
        function, _ = testing.operation("evaluate", case, inputs)
        expected, scale = testing.exact(function, [g.contiguous() for g in given])
        testing.assert_matches(function(*given), expected, torch.float64, "forward", scale)


@pytest.mark.parametrize("view", [*LAYOUTS, "expanded"], ids=lambda f: getattr(f, "__name__", f))
def test_strides_of_the_gradient_do_not_matter(target, op, view):
    target.require(op)
    case = irregular_case()
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, torch.float64, target.device)
    )
    run = testing.gradients(function)
    grad = torch.rand(function(*arguments).shape, dtype=torch.float64, device=target.device)
    viewed = torch.ones_like(grad[:1]).expand_as(grad) if view == "expanded" else view(grad)
    given = (viewed.contiguous(), *arguments)
    expected, scale = testing.exact(run, given)
    testing.assert_matches(run(viewed, *arguments), expected, torch.float64, "backward", scale)


@functools.cache
def product_spreads_nan(dtype):
    """Whether PyTorch's own product takes a NaN to other rows, as oneDNN's bfloat16 with AMX does
    where an odd number of terms is summed."""
    x = torch.ones(65, 17, dtype=dtype)
    x[::2] = torch.nan
    return bool((x @ torch.ones(17, 16, dtype=dtype))[1::2].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in testing.cases() if c.batch >= 65], ids=str)
def test_nan_stays_in_its_row(target, case, dtype):
    """Rows are computed together; what is in one never reaches another, nor its gradient."""
    target.require("evaluate", dtype)
    if (target.backend, target.device) == ("reference", "cpu") and product_spreads_nan(dtype):
        pytest.skip(f"PyTorch's product of {dtype} matrices takes a NaN to other rows here")
    inputs = testing.make_inputs(case, dtype, target.device)
    packed = isinstance(inputs.vectors, torch.Tensor)
    clean = inputs.vectors if packed else torch.cat(inputs.vectors, dim=1)
    bad_rows = [0, 31, case.batch - 1]
    poisoned = clean.clone()
    poisoned[bad_rows] = torch.nan
    good = torch.ones(case.batch, dtype=torch.bool, device=target.device)
    good[bad_rows] = False

    def run(x):
        x = x.detach().requires_grad_()
        vectors = x if packed else x.split(case.layout.mode_dims, dim=1)
        out = hk.evaluate(case.tree, inputs.weights, vectors, layout=case.layout)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    for a, b in zip(run(clean), run(poisoned), strict=True):
        assert torch.equal(a[good], b[good])
        assert not a.isnan().any()
    assert run(poisoned)[0][bad_rows].isnan().all()


def test_nan_in_a_leaf_stays_in_its_entries(target):
    """A row of a leaf's weight concerns only the entries with that index."""
    target.require("evaluate_at")
    target.require("full_tensor")
    case = irregular_case(batch=65)
    inputs = testing.make_inputs(case, torch.float64, target.device)
    clean = [w.clone() for w in inputs.weights]
    group, slot = case.layout.location[2]
    poisoned = [w.clone() for w in clean]
    poisoned[group][slot, 1] = torch.nan
    kept = inputs.indices[:, 2] != 1
    assert kept.any() and not kept.all()
    at = [
        hk.evaluate_at(case.tree, w, inputs.indices, layout=case.layout) for w in (clean, poisoned)
    ]
    assert torch.equal(at[0][kept], at[1][kept])
    assert at[1][~kept].isnan().all()
    full = [hk.full_tensor(case.tree, w, layout=case.layout) for w in (clean, poisoned)]
    for index in (0, 2):
        assert torch.equal(full[0].select(2, index), full[1].select(2, index))
    assert full[1].select(2, 1).isnan().all()


@pytest.fixture
def poisoned_memory():
    """PyTorch fills new memory with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
def test_new_memory_is_not_read(target, op, case):
    target.require(op, torch.float32)
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, torch.float32, target.device)
    )
    expected, scale = testing.exact(function, arguments)
    testing.assert_matches(function(*arguments), expected, torch.float32, "forward", scale)
    run, given = testing.gradients(function), (torch.ones_like(expected).float(), *arguments)
    expected, scale = testing.exact(run, given)
    testing.assert_matches(run(*given), expected, torch.float32, "backward", scale)


def test_same_bits_twice(target, op, case):
    target.require(op, torch.float32)
    function, arguments = testing.operation(
        op, case, testing.make_inputs(case, torch.float32, target.device)
    )
    run = testing.gradients(function)
    outs = [function(*arguments) for _ in range(2)]
    assert torch.equal(*outs)
    first, again = (run(torch.ones_like(outs[0]), *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads(threads, op, case, dtype):
    """The C++ kernels promise it; PyTorch's matrix products, which the reference uses, do not."""
    reason = hk.runtime.dispatch.why_not("cpp", hk.runtime.dispatch.Spec(op, dtype, "cpu"))
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    function, arguments = testing.operation(op, case, testing.make_inputs(case, dtype))
    run = testing.gradients(function)
    results = []
    for count in (1, 2, 3):
        threads(count)
        with hk.use_backend("cpp"):
            out = function(*arguments)
            results.append((out, *run(torch.ones_like(out), *arguments)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def cpp():
    reason = hk.backends()["cpp"]
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    with hk.use_backend("cpp"):
        yield


@pytest.mark.parametrize("op", ["evaluate", "evaluate_at"])
def test_bfloat16_weights_may_lie_anywhere(cpp, op):
    """Kernels read them two at a time; not every place in memory allows that."""
    layout = hk.Layout.make(testing.random_tree(6, 4), 6, [5, 6], out_features=2)
    case = testing.Case("irregular", layout, 70)
    function, arguments = testing.operation(op, case, testing.make_inputs(case, torch.bfloat16))
    run = testing.gradients(function)
    out = function(*arguments)
    expected = (out, *run(torch.ones_like(out), *arguments))
    for view in LAYOUTS:
        viewed = [view(a) for a in arguments]
        out = function(*viewed)
        results = (out, *run(torch.ones_like(out), *viewed))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dim", [4096, 4097])
def test_bfloat16_of_many_terms(cpp, dim):
    """Beyond 4096 terms, products with bfloat16 are computed in float32."""
    case = testing.Case("wide", hk.Layout.make(hk.ModeTree.flat(2), dim, 3), 9)
    inputs = testing.make_inputs(case, torch.bfloat16)
    function, arguments = testing.operation("evaluate", case, inputs)
    expected, scale = testing.exact(function, arguments)
    out = function(*arguments)
    testing.assert_matches(out, expected, torch.bfloat16, "forward", scale)
    run, given = testing.gradients(function), (torch.ones_like(out), *arguments)
    expected, scale = testing.exact(run, given)
    testing.assert_matches(run(*given), expected, torch.bfloat16, "backward", scale)


_EVERY_CASE = """
import os, sys, traceback, torch, htfkernels as hk
from htfkernels import testing

def calls(dtype):
    for case in testing.cases():
        for op in testing.OPS:
            if not case.fits(op):
                continue
            function, arguments = testing.operation(op, case, testing.make_inputs(case, dtype))
            run = testing.gradients(function)
            value = testing.exact(function, arguments)
            given = (torch.ones_like(value[0]).to(dtype), *arguments)
            yield function, arguments, run, given, value, testing.exact(run, given)

def check(dtype):
    for function, arguments, run, given, (value, size), (gradients, sizes) in expected[dtype]:
        with hk.use_backend("cpp"):
            out, grads = function(*arguments), run(*given)
        testing.assert_matches(out, value, dtype, "forward", size)
        testing.assert_matches(grads, gradients, dtype, "backward", sizes)

expected = {dtype: list(calls(dtype)) for dtype in (torch.float32, torch.bfloat16)}
failed = []
for instructions, dtype in (
    ("generic", torch.float32),
    ("avx2", torch.float32),
    ("avx512", torch.float32),
    ("avx512", torch.bfloat16),
    ("avx512bf16", torch.bfloat16),
):
    child = os.fork()  # the choice of instructions is made once in a process
    if child == 0:
        os.environ["HTF_CPU"] = instructions
        try:
            check(dtype)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(f"{instructions} {dtype}")
sys.exit(", ".join(failed) or 0)
"""


def test_every_instruction_set_on_dirty_memory():
    """Each set of C++ kernels, in a process whose allocator hands out memory full of rubbish."""
    reason = hk.backends()["cpp"]
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    # Threads, those of autograd for GPUs too, would not survive the forks.
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, "MALLOC_PERTURB_": "1", **alone}
    run = subprocess.run(
        [sys.executable, "-c", _EVERY_CASE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
