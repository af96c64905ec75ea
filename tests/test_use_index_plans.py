"""Index plans that nobody asked for: where entries at plain indices get one, and where not."""

from __future__ import annotations

import threading

import numpy
import pytest
import torch
from models import At
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import dispatch
from htfkernels.schedule import index_build, index_cost
from htfkernels.schedule import index_cache as module

pytest.importorskip("htfkernels._plan")
if dispatch.why_not("cpp", dispatch.Spec("evaluate_at", torch.float64, "cpu")):
    pytest.skip("made for the backend cpp alone", allow_module_level=True)


@pytest.fixture(autouse=True)
def the_fastest_backend():
    with hk.use_backend("auto"):
        yield


@pytest.fixture
def model():
    return hk.HTF(hk.ModeTree.balanced(4), 2, 128, dtype=torch.float64)


def many(model, samples=300):
    return torch.randint(model.layout.mode_dims[0], (samples, model.tree.order))


def planned(indices):
    """Whether a plan is kept for this tensor."""
    return bool(module._plans.get(indices))


def run(call, model):
    """Value and gradients."""
    value = call()
    return value.detach(), *torch.autograd.grad(value.square().sum(), list(model.parameters()))


def same_bits(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_the_same_call_gives_the_same_bits(model):
    """The first, the second, of a copy; and those of a plan that was asked for."""
    indices = many(model)
    first = run(lambda: model.at(indices), model)
    assert planned(indices)
    assert same_bits(first, run(lambda: model.at(indices), model))
    assert same_bits(first, run(lambda: model.at(indices.clone()), model))
    assert same_bits(first, run(lambda: model.at(model.index_plan(indices)), model))
    weights = {n: model.node_weight(n) for n in model.tree.nodes}
    called = run(lambda: hk.evaluate_at(model.tree, weights, indices), model)
    assert same_bits(first, called)
    again = run(lambda: checkpoint(model.at, indices, use_reentrant=False), model)
    assert same_bits(first, again)


def test_with_and_without_agree_to_rounding(model):
    indices = many(model)
    first = run(lambda: model.at(indices), model)
    other = indices.clone()
    with hk.use_index_plans(False):
        each = run(lambda: model.at(other), model)
    assert not planned(other)
    assert not same_bits(first, each)
    testing.assert_matches(first[0], each[0], torch.float64, "forward")
    testing.assert_matches(first[1:], each[1:], torch.float64, "backward")


def test_where_nothing_is_gained_there_is_no_plan(model):
    few = many(model, 20)
    model.at(few)
    assert not planned(few)
    apart = hk.HTF(hk.ModeTree.balanced(4), 5000, 8)
    indices = many(apart)
    apart.at(indices)
    assert not planned(indices)


def test_a_step_may_gain_what_a_call_does_not():
    model = hk.HTF(hk.ModeTree.balanced(4), 3, 64)
    assert 1 < index_cost.passes_to_pay(model.layout, 512) < index_cost.STEP
    indices = many(model, 512)
    with torch.no_grad():
        model.at(indices)
    assert not planned(indices)
    model.at(indices)
    assert planned(indices)


def test_the_switch(model, monkeypatch):
    inside, outside = many(model), many(model)
    with hk.use_index_plans(False), hk.use_index_plans(True):
        model.at(inside)
    assert planned(inside)
    monkeypatch.setenv("HTF_INDEX_PLANS", "0")
    model.at(outside)
    assert not planned(outside)
    assert model.at(model.index_plan(outside)).shape == (300,)
    with hk.use_index_plans(True):
        model.at(outside)
    assert planned(outside)
    monkeypatch.setenv("HTF_INDEX_PLANS", "yes")
    with pytest.raises(ValueError, match="HTF_INDEX_PLANS: expected 0 or 1, got 'yes'"):
        model.at(outside)
    with pytest.raises(ValueError, match="use_index_plans: expected True or False, got 'auto'"):
        hk.use_index_plans("auto").__enter__()


def test_the_switch_is_of_its_thread(model):
    indices = many(model)
    with hk.use_index_plans(False):
        thread = threading.Thread(target=model.at, args=(indices,))
        thread.start()
        thread.join()
    assert planned(indices)


def test_other_backends_compute_as_they_are_asked_to(model):
    indices = many(model)
    with hk.use_backend("reference"):
        model.at(indices)
    assert not planned(indices)
    with hk.use_backend("cpp"):
        model.at(indices)
    assert planned(indices)


def test_autocast(model):
    model, indices = model.float(), many(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.at(indices)
    assert planned(indices) and out.dtype == torch.bfloat16
    assert torch.equal(out, model.bfloat16().at(indices))


@pytest.mark.parametrize("form", ["int32", "list", "array"])
def test_other_forms_of_indices(model, form):
    """A plan is kept with the caller's own tensor, nothing is with what was made of it."""
    indices = many(model)
    given = {"int32": indices.int(), "list": indices.tolist(), "array": indices.numpy()}[form]
    before = len(module._plans)
    found = run(lambda: model.at(given), model)
    assert len(module._plans) == before + (form == "int32")
    assert same_bits(found, run(lambda: model.at(indices), model))


def test_out_of_range(model):
    for value in (2, -1, 2**40):
        indices = many(model)
        indices[7, 1] = value
        sentence = f"^evaluate_at: index {value} of mode 1 is out of range, its dimension is 2$"
        with pytest.raises(IndexError, match=sentence):
            model.at(indices)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and says what it cannot see
@pytest.mark.parametrize("way", ["compile", "jit", "fx"])
def test_a_graph_is_not_for_these_indices_alone(model, way):
    first, other = many(model), many(model)
    with torch.no_grad():
        if way == "compile":
            traced = torch.compile(model.at, backend="eager", fullgraph=True)
        elif way == "jit":
            traced = torch.jit.trace(At(model), first)
        else:
            traced = make_fx(lambda indices: model.at(indices))(first)
        traced(first)
        assert not planned(first)
        testing.assert_matches(traced(other), model.at(other), torch.float64, "forward")


def test_under_transforms_each_sample_is_computed(model):
    indices, module = many(model), At(model)

    def loss(parameters):
        return torch.func.functional_call(module, parameters, indices).square().sum()

    found = torch.func.grad(loss)({k: v.detach() for k, v in module.named_parameters()})
    assert not planned(indices)
    testing.assert_matches(
        list(found.values()), run(lambda: model.at(indices), model)[1:], torch.float64, "backward"
    )


def test_without_the_compiled_loops(model, monkeypatch, caplog):
    """A plan that is asked for is refused, entries are computed without one."""

    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    indices = many(model)
    expected = model.at(indices)
    monkeypatch.setattr(index_build, "import_module", missing)
    index_build.native.cache_clear()
    module._note.cache_clear()
    with pytest.raises(RuntimeError, match=r"IndexPlan: .*htfkernels\._plan cannot be loaded"):
        model.index_plan(indices)
    with caplog.at_level("INFO", logger="htfkernels"):
        for _ in range(2):
            testing.assert_matches(model.at(indices), expected, torch.float64, "forward")
    said = [m for m in caplog.messages if "_plan cannot be loaded" in m]
    assert len(said) == 1 and said[0].startswith("evaluate_at goes without index plans. ")


def test_entries_follow_indices_that_are_written_past_pytorch(model):
    array = many(model).numpy()
    indices = torch.from_numpy(array)
    before = model.at(indices)
    array[:] = 1 - array
    after = model.at(indices)
    assert planned(indices) and not torch.equal(before, after)
    assert torch.equal(after, model.at(numpy.array(array)))
