"""The registered operators: opcheck, and arguments that do not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import dispatch

pytestmark = pytest.mark.skipif(
    hk.backends()["cpp"] is not None, reason=f"cpp: {hk.backends()['cpp']}"
)
WITHOUT_TRACING = ("test_schema", "test_autograd_registration", "test_faketensor")
NAMES = [name + end for name in testing.OPS for end in ("", "_backward")]


def operator(name):
    from htfkernels.runtime.compiled import ops

    return getattr(ops, name).default


def arguments_of(name, case, dtype=torch.float64, requires_grad=False):
    """Arguments of a registered operator, as a dictionary."""
    inputs = testing.make_inputs(case, dtype)
    layout = case.layout
    entries = layout.num_entries // layout.out_features
    rows = entries if name.startswith("full_tensor") else case.batch
    out = {"weights": [w.requires_grad_(requires_grad) for w in inputs.weights]}
    if name.startswith("evaluate_at"):
        out["indices"] = inputs.indices
    elif name.startswith("evaluate"):
        x = inputs.vectors
        x = x.flatten(1) if isinstance(x, torch.Tensor) else torch.cat(x, dim=1)
        out["x"] = x.requires_grad_(requires_grad)
    out["program"] = layout.program
    if name.endswith("_backward"):
        count = len(inputs.weights) + (name == "evaluate_backward")
        several = () if layout.out_features == 1 else (layout.out_features,)
        grad = torch.rand(rows, *several, dtype=dtype)
        if not name.startswith("full_tensor"):
            program = out.pop("program")
            out |= {"kept": grad.new_empty(0), "program": program}
        return {"grad": grad, **out, "needs": [1] * count}
    if name == "full_tensor":
        out["entries"] = entries
    return {**out, "out_features": layout.out_features}


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, small_case):
    arguments = arguments_of(name, small_case, requires_grad=not name.endswith("_backward"))
    torch.library.opcheck(operator(name), tuple(arguments.values()))
    if not name.endswith("_backward"):
        arguments = arguments_of(name, small_case)
        torch.library.opcheck(operator(name), tuple(arguments.values()), test_utils=WITHOUT_TRACING)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_backward")])
def test_opcheck_with_a_mask(name, small_case):
    arguments = arguments_of(name, small_case)
    arguments["needs"] = [i % 2 for i in range(len(arguments["needs"]))]
    torch.library.opcheck(operator(name), tuple(arguments.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_dtypes(name, dtype):
    case = testing.small_cases()[0]
    arguments = arguments_of(name, case, dtype)
    # aot_dispatch compares gradients to float32's own tolerances, too tight for bfloat16.
    torch.library.opcheck(operator(name), tuple(arguments.values()), test_utils=WITHOUT_TRACING)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_an_empty_batch(name):
    case = next(c for c in testing.cases() if c.name == "empty_batch_outputs")
    torch.library.opcheck(operator(name), tuple(arguments_of(name, case).values()))


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_backward")])
def test_gradients_not_needed_are_empty(name, small_case):
    arguments = arguments_of(name, small_case)
    everything = operator(name)(*arguments.values())
    for i in range(len(everything)):
        arguments["needs"] = [int(j == i) for j in range(len(everything))]
        masked = operator(name)(*arguments.values())
        assert [t.numel() for t in masked] == [
            t.numel() if j == i else 0 for j, t in enumerate(everything)
        ]
        assert torch.equal(masked[i], everything[i])


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_backward")])
def test_differentiating_a_backward_operator_says_what_to_do(name):
    arguments = arguments_of(name, testing.small_cases()[0], requires_grad=True)
    grads = operator(name)(*arguments.values())
    with pytest.raises(RuntimeError, match="second derivative"):
        sum(g.sum() for g in grads).backward()


def views(tensor):
    """The same numbers with awkward strides."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan).to(tensor.dtype)
    wide[..., 1::2] = tensor
    yield wide[..., 1::2]
    yield tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    rows = torch.full((2 * tensor.shape[0], *tensor.shape[1:]), torch.nan).to(tensor.dtype)
    rows[::2] = tensor
    yield rows[::2]
    columns = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan).to(tensor.dtype)
    columns[..., 2:-1] = tensor
    yield columns[..., 2:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name, dtype):
    case = testing.Case("", hk.Layout.make(testing.random_tree(5, 4), [2, 3, 2, 3, 2], 7, 2), 65)
    arguments = arguments_of(name, case, dtype)
    expected = operator(name)(*arguments.values())
    tensors = [k for k in ("grad", "x", "weights") if k in arguments]
    for key in tensors:
        given = arguments[key]
        several = zip(*map(views, given), strict=True) if key == "weights" else views(given)
        for view in several:
            seen = {**arguments, key: list(view) if key == "weights" else view}
            actual = operator(name)(*seen.values())
            pairs = (
                [(actual, expected)]
                if isinstance(actual, torch.Tensor)
                else zip(actual, expected, strict=True)
            )
            assert all(torch.equal(a, e) for a, e in pairs), key
    if "indices" in arguments:
        for view in (
            arguments["indices"].t().contiguous().t(),
            arguments["indices"].repeat_interleave(2, 1)[:, ::2],
        ):
            actual = operator(name)(*{**arguments, "indices": view}.values())
            pairs = (
                [(actual, expected)]
                if isinstance(actual, torch.Tensor)
                else zip(actual, expected, strict=True)
            )
            assert all(torch.equal(a, e) for a, e in pairs)


# -- arguments that do not fit --------------------------------------------------------------------

BAD = {
    "too few weights": ("weights", lambda v: v[:-1]),
    "too many weights": ("weights", lambda v: [*v, v[-1]]),
    "no weights": ("weights", lambda v: []),
    "a weight of two dimensions": ("weights", lambda v: [v[0][0], *v[1:]]),
    "a weight with a row too many": (
        "weights",
        lambda v: [torch.cat([v[0], v[0][:, :1]], 1), *v[1:]],
    ),
    "a weight with a column too few": ("weights", lambda v: [v[0][..., :-1], *v[1:]]),
    "a group with a node too few": ("weights", lambda v: [v[0][:-1], *v[1:]]),
    "weights of two dtypes": ("weights", lambda v: [v[0].float(), *v[1:]]),
    "integer weights": ("weights", lambda v: [w.long() for w in v]),
    "half weights": ("weights", lambda v: [w.half() for w in v]),
    "x of another dtype": ("x", lambda v: v.float()),
    "x of one dimension": ("x", lambda v: v[0]),
    "x of three dimensions": ("x", lambda v: v[None]),
    "x too narrow": ("x", lambda v: v[:, :-1]),
    "x too wide": ("x", lambda v: torch.cat([v, v], 1)),
    "int32 indices": ("indices", lambda v: v.int()),
    "indices too narrow": ("indices", lambda v: v[:, :-1]),
    "indices of one dimension": ("indices", lambda v: v[0]),
    "an index too large": ("indices", lambda v: v + 1000),
    "a negative index": ("indices", lambda v: v - 1),
    "an index in the last row": ("indices", lambda v: torch.cat([v, v[:1] + 1000])),
    "a float program": ("program", lambda v: v.double()),
    "a program cut short": ("program", lambda v: v[:-1]),
    "an empty program": ("program", lambda v: v[:0]),
    "a program of another version": ("program", lambda v: torch.cat([v[:1] + 1, v[1:]])),
    "wrong entries": ("entries", lambda v: v + 1),
    "negative entries": ("entries", lambda v: -1),
    "wrong out_features": ("out_features", lambda v: v + 1),
    "grad with a row too few": ("grad", lambda v: v[:-1]),
    "grad with a column too many": ("grad", lambda v: torch.stack([v, v], 1)),
    "grad of two dimensions": ("grad", lambda v: v[:, None]),
    "grad of no dimension": ("grad", lambda v: v.sum()),
    "grad of another dtype": ("grad", lambda v: v.float()),
    "needs too short": ("needs", lambda v: v[:-1]),
    "needs too long": ("needs", lambda v: [*v, 1]),
}


def bad_calls():
    case = testing.small_cases()[0]
    for name in NAMES:
        for what, (argument, spoil) in BAD.items():
            if argument in arguments_of(name, case):
                yield pytest.param(name, argument, spoil, id=f"{name}-{what.replace(' ', '_')}")


@pytest.mark.parametrize(("name", "argument", "spoil"), list(bad_calls()))
def test_bad_arguments_are_named(name, argument, spoil):
    arguments = arguments_of(name, testing.small_cases()[0])
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
        operator(name)(*arguments.values())
    message = str(caught.value).splitlines()[0]
    # The end tensor's entries and the indices are checked under the names the caller knows them by.
    words = {"indices": "ind", "needs": "needs", "grad": "grad"}.get(argument, argument)
    assert message.startswith(f"{name}: "), message
    assert words in message, message


_SPOIL_PROGRAMS = """
import torch, htfkernels
from htfkernels import testing
from htfkernels.tree.program import FIELDS, HEADER
from htfkernels.runtime.compiled import ops
case = testing.small_cases()[0]
inputs = testing.make_inputs(case, torch.float64)
weights, x = list(inputs.weights), torch.cat(inputs.vectors, dim=1)
program, outputs = case.layout.program, case.layout.out_features
for at in range(len(program)):
    in_step = at - len(HEADER)
    field = FIELDS[in_step % len(FIELDS)] if in_step >= 0 else HEADER[at]
    if field in ("node", "sum_root", "first", "children"):  # names, or counts without addresses
        continue
    for value in (-7, 10**9):
        spoiled = program.clone()
        spoiled[at] = value
        print("spoiled", field, "of", in_step // len(FIELDS), value, flush=True)
        try:
            ops.evaluate(weights, x, spoiled, outputs)
        except RuntimeError as error:
            assert str(error).startswith("evaluate: "), error
        else:
            raise AssertionError("not refused")
"""


def test_broken_programs_are_refused():
    """A program is made by a layout; one that was tampered with must not lead the kernels out of
    their memory. In a process of its own, since that may end it."""
    run = subprocess.run([sys.executable, "-c", _SPOIL_PROGRAMS], capture_output=True, text=True)
    last = run.stdout.strip().rpartition("\n")[2]
    assert run.returncode == 0, f"{last}\n{run.stderr}"


def test_operators_have_no_kernel_for_the_gpu_yet():
    """The dispatcher says so itself; nothing falls back in silence."""
    for op in testing.OPS:
        assert dispatch.why_not("cpp", dispatch.Spec(op, torch.float32, "cuda")) is not None
