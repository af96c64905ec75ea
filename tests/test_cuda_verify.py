"""The CUDA kernels under the check, on a GPU or emulated (there on tiny cases): what is right
passes, an error that is put in is found, and `auto` takes the next backend."""

from __future__ import annotations

import warnings

import pytest
import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.cuda.whole_tree import run as tree_run
from htfkernels.ops.completion_step import cuda as train
from htfkernels.runtime import cuda_module as module
from htfkernels.runtime import verdicts
from htfkernels.runtime.dispatch import Spec, choose
from htfkernels.runtime.operations import families
from htfkernels.verify import checks
from htfkernels.verify import run as verify
from htflearn import CompletionStep, GroupRMSprop

ON = module.device_type()
REASON = module.why_not(ON)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

CUDA = [f for f in families() if f.backend == "cuda"]
CASES = {c.name: c for c in (*testing.cases(), *testing.small_cases())}
F32 = torch.float32


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Emulated kernels are slow."""
    if ON == "cpu":
        some = {str(f): ("small_shared",) for f in CUDA}
        monkeypatch.setattr(checks, "CASES", {**some, "cuda training step": ("balanced4",)})
        monkeypatch.setattr(checks, "_LONG_MODES", (40,))


@pytest.fixture
def checked(monkeypatch):
    """Names of the kernels that are checked, in order."""
    found, real = [], verify.check

    def check(family, math, place):
        found.append(f"{family.name} {math}")
        return real(family, math, place)

    monkeypatch.setattr(verify, "check", check)
    return found


def check(family, math):
    return verify.check(family, math, verdicts.places(ON)[0])


@pytest.mark.parametrize(("family", "math"), [(f, m) for f in CUDA for m in f.maths], ids=str)
def test_the_kernels_pass(family, math):
    verdict = check(family, math)
    assert verdict.failure is None, verdict.failure
    assert verdict.error <= verdict.allowed and verdict.cases >= 1


OPERATORS = {
    "tree": ("tree_forward", "tree_backward"),
    "planned": ("evaluate_at_planned", "evaluate_at_planned_backward"),
    "index plan": ("plan_starts", "plan_group"),
    "spectra": ("spectra_factors", "spectra_values", "spectra_svd"),
    "training step": ("completion_step_",),
    "group rmsprop": ("group_rmsprop_",),
}


@pytest.mark.parametrize(
    ("name", "operator"), [(name, op) for name, ops in OPERATORS.items() for op in ops]
)
def test_no_wrong_number_of_any_operator_passes(name, operator, monkeypatch):
    real = module._operator

    def off(name):
        if name != operator:
            return real(name)

        def run(*args):
            found = real(name)(*args)
            written = args[0] if name.endswith("_") else found  # in place
            for tensor in [written] if isinstance(written, torch.Tensor) else written:
                if tensor.is_floating_point():
                    tensor *= 1.05
                else:
                    tensor.copy_(tensor.flip(-1).contiguous())
            return found

        return run

    monkeypatch.setattr(module, "_operator", off)
    (family,) = (f for f in CUDA if f.name == name)
    verdict = check(family, family.maths[0])
    assert "the error is" in str(verdict.failure) and verdict.error > verdict.allowed


def spoiled(change):
    """A function whose result is changed: a tensor, or the first of several."""

    def wrap(function):
        def run(*args, **kwargs):
            found = function(*args, **kwargs)
            if isinstance(found, torch.Tensor):
                return change(found)
            return type(found)([change(found[0]), *found[1:]])

        return run

    return wrap


def off(tensor):
    return tensor * 1.01


def nan(tensor):
    return torch.full_like(tensor, torch.nan)


def raises(tensor):
    raise RuntimeError("CUDA error: invalid configuration argument\nand some advice")


ERRORS = {"wrong": off, "nan": nan, "raises": raises}


@pytest.mark.parametrize("kind", ERRORS)
def test_auto_takes_the_next_backend(kind, verifying, checked, monkeypatch):
    case = CASES["small_shared"]
    wrong = spoiled(ERRORS[kind])
    monkeypatch.setattr(tree_run, "forward", wrong(lambda *a, real=tree_run.forward: [*real(*a)]))
    inputs = testing.make_inputs(case, F32, ON)
    function, arguments = testing.operation("evaluate", case, inputs)
    exact, scale = testing.exact(function, arguments)
    with pytest.warns(RuntimeWarning, match=r"cuda tree \(ieee\) fail on .*: evaluate on") as told:
        value = function(*arguments)
    assert len(told) == 1
    testing.assert_matches(value, exact, F32, "forward", scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        testing.assert_matches(function(*arguments), exact, F32, "forward", scale)
    mine = [name for name in checked if name.startswith("tree")]
    assert mine == ["tree ieee"]
    assert len(list(verifying.glob("*.json"))) >= (kind != "raises")
    # By name they run, right or wrong.
    with hk.use_backend("cuda"):
        if kind == "raises":
            with pytest.raises(RuntimeError, match="invalid configuration"):
                function(*arguments)
        else:
            assert testing.error(function(*arguments), exact, scale) > 1e-3
    # Others are not concerned.
    assert choose(Spec("spectra", torch.float64, ON), "auto")[0] == "cuda"


def test_a_right_family_is_taken_and_remembered(verifying, checked):
    case = CASES["small_shared"]
    plan = hk.runtime.plan.make_plan("evaluate_at_planned", case.layout, F32, ON, "auto")
    assert plan.backend == "cuda" and checked == ["planned ieee"]
    verdicts.forget()
    hk.runtime.plan.make_plan.cache_clear()
    plan = hk.runtime.plan.make_plan("evaluate_at_planned", case.layout, F32, ON, "auto")
    assert plan.backend == "cuda" and checked == ["planned ieee"]
    assert choose(Spec("evaluate_at_planned", F32, ON), "cuda") == ("cuda", "asked for")


def test_index_plans(verifying, checked, monkeypatch):
    from htfkernels.ops.index_plan import cuda as loops
    from htfkernels.schedule import index_plan

    indices = testing.make_inputs(CASES["halves8"], F32, ON).indices
    monkeypatch.setattr(index_plan, "WORTH_LAUNCHES", 100)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    assert index_plan._loops(indices) is loops.OnDevice
    assert index_plan._loops(indices[:9]) is index_plan.OnCpu and checked == ["index plan int64"]
    verdicts.forget()
    for path in verifying.iterdir():
        path.unlink()
    real = loops.OnDevice.column
    monkeypatch.setattr(loops.OnDevice, "column", lambda self, m: real(self, 0))
    with pytest.warns(RuntimeWarning, match=r"index plan \(int64\) fail on"):
        assert index_plan._loops(indices) is index_plan.OnCpu
    with hk.use_backend("cuda"):
        assert index_plan._loops(indices) is loops.OnDevice


class Optimized:
    def __init__(self, monkeypatch):
        self.calls = 0
        from htflearn import optim

        real = optim.group_rmsprop_

        def counting(*arguments):
            self.calls += 1
            return real(*arguments)

        monkeypatch.setattr(optim, "group_rmsprop_", counting)
        self.parameter = torch.nn.Parameter(torch.ones(3, device=ON))
        self.optimizer = GroupRMSprop([self.parameter], capturable=True)

    def step(self):
        self.parameter.grad = torch.ones_like(self.parameter)
        self.optimizer.step()


def test_the_optimizer(verifying, checked, monkeypatch):
    run = Optimized(monkeypatch)
    run.step()
    run.step()
    assert run.calls == 2 and checked == ["group rmsprop ieee"]


def test_the_optimizer_goes_without_kernels_that_fail(verifying, checked, monkeypatch):
    run = Optimized(monkeypatch)
    monkeypatch.setattr(checks, "group_rmsprop_", lambda *a: None)
    with pytest.warns(RuntimeWarning, match=r"group rmsprop \(ieee\) fail on"):
        run.step()
    run.step()
    assert run.calls == 0 and checked == ["group rmsprop ieee"]
    with hk.use_backend("cuda"):
        run.step()
    assert run.calls == 1


@pytest.fixture
def problem():
    model = hk.HTF(hk.ModeTree.balanced(4), 3, 4, device=ON)
    indices = torch.randint(3, (20, 4), device=ON)
    optimizer = GroupRMSprop(model.parameters(), capturable=True)
    return model, indices, torch.ones(20, device=ON), optimizer


def test_training_steps(verifying, checked, problem):
    step = CompletionStep(*problem)
    assert step.why_not is None and checked[0] == "training step ieee"
    with hk.use_precision("tf32"):
        step()
    assert "training step tf32" in checked
    before = len(checked)
    step()
    assert len(checked) == before


def test_training_steps_without_kernels_that_fail(verifying, checked, problem, monkeypatch):
    real = train.completion_step_

    def only_exact(*arguments, precision):
        loss = real(*arguments, precision="ieee")
        return loss if precision == "ieee" else loss + 1

    monkeypatch.setattr(checks, "completion_step_", only_exact)
    step = CompletionStep(*problem)
    assert step.why_not is None
    with hk.use_precision("tf32"):
        with pytest.warns(RuntimeWarning, match=r"training step \(tf32\) fail on .* the loss"):
            step()
        assert CompletionStep(*problem).why_not is not None
    with hk.use_backend("cuda"), hk.use_precision("tf32"):
        assert CompletionStep(*problem).why_not is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_the_check_runs_while_a_graph_is_traced(verifying, checked):
    """Where PyTorch says of every thread that it compiles."""
    case = CASES["small_shared"]
    inputs = testing.make_inputs(case, F32, ON)
    function, arguments = testing.operation("evaluate", case, inputs)
    exact, scale = testing.exact(function, arguments)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    testing.assert_matches(compiled(*arguments), exact, F32, "forward", scale)
    assert checked == ["tree ieee"]
    assert verdicts.failure("cuda", "evaluate", F32, "ieee", ON) is None
