"""Index plans that are kept with their indices: as long as these live, and never stale."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from index_plan_format import Check, uniform

from htfkernels import Layout, ModeTree
from htfkernels.schedule import index_cache as module
from htfkernels.schedule.index_cache import index_plan

native = pytest.importorskip("htfkernels._plan")


def test_a_plan_is_kept_with_its_tensor():
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    other = Layout.make(ModeTree.halves(4), 2, 3)
    indices = uniform(layout, 50)
    plan = index_plan(layout, indices)
    assert plan.indices is indices and index_plan(layout, indices) is plan
    assert index_plan(other, indices).layout is other
    assert index_plan(layout, indices) is plan
    assert index_plan(layout, indices.clone()) is not plan
    lists = plan.lists
    del plan
    assert index_plan(layout, indices).lists is lists  # not built again
    indices[0] = 0
    again = index_plan(layout, indices)
    assert again.lists is not lists
    Check(again).run()


def test_a_plan_of_inference_mode():
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    with torch.inference_mode():
        indices = uniform(layout, 50)
        plan = index_plan(layout, indices)
        assert index_plan(layout, indices) is plan
        indices[7] = 1 - indices[7]
        again = index_plan(layout, indices)
        assert again is not plan
        Check(again).run()


def preserving_the_version(t):
    with torch.autograd._unsafe_preserve_version_counter(t):
        t[7] = 1 - t[7]


def in_inference_mode(t):
    with torch.inference_mode():
        t[7] = 1 - t[7]


def flip(t):
    """Writes another row 7 into any view of the indices."""
    t[7] = 1 - t[7]


def of_base(t):
    flip(t._base[: len(t)])


# How the values of a tensor change, with or without PyTorch counting.
WRITES = {
    "in_place": flip,
    "detach": lambda t: flip(t.detach()),
    "data": lambda t: flip(t.data),
    "data_is_set": lambda t: setattr(t, "data", 1 - t),
    "numpy": lambda t: flip(t.numpy()),
    "array_interface": lambda t: flip(numpy.asarray(t)),
    "dlpack": lambda t: flip(torch.from_dlpack(t)),
    "numpy_dlpack": lambda t: flip(numpy.from_dlpack(t)),
    "storage": lambda t: t.untyped_storage().fill_(0),
    "address": lambda t: ctypes.memset(t.data_ptr(), 0, t.nbytes),
    "version_is_kept": preserving_the_version,
    "inference_mode": in_inference_mode,
    "another_view": lambda t: flip(t.view(-1).view_as(t)),
    "base": of_base,
    "set": lambda t: t.set_(1 - t),
    "resize": lambda t: t.resize_(20, 4),
    "as_strided": lambda t: t.as_strided_((50, 4), (4, 0)),
    "transposed": lambda t: t.copy_(t.clone().view(4, 50).t()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_plan_is_never_stale(dtype, write):
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    indices = uniform(layout, 51).to(dtype)
    if write is of_base:
        indices = indices[:50]
    elif write is not WRITES["storage"]:
        indices = indices[:50].clone()
    plan = index_plan(layout, indices)
    assert index_plan(layout, indices) is plan
    write(indices)
    again = index_plan(layout, indices)
    assert again is not plan
    Check(again).run()


@pytest.mark.parametrize(
    "make",
    [
        lambda array: torch.from_numpy(array),
        lambda array: torch.asarray(array)[:, :4],
        lambda array: torch.frombuffer(array, dtype=torch.int64).view(50, 4),
        lambda array: torch.from_dlpack(array),
    ],
    ids=["from_numpy", "asarray", "frombuffer", "from_dlpack"],
)
def test_a_plan_of_borrowed_memory_is_never_stale(make):
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    array = uniform(layout, 50).numpy().copy()
    indices = make(array)
    plan = index_plan(layout, indices)
    assert index_plan(layout, indices) is plan
    array[49, 3] = 1 - array[49, 3]
    again = index_plan(layout, indices)
    assert again is not plan
    Check(again).run()
    array[49, 3] = 1 - array[49, 3]
    Check(index_plan(layout, indices)).run()


def test_a_plan_of_shared_memory_is_never_stale():
    """Another process writes."""
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    indices = uniform(layout, 50).share_memory_()
    plan = index_plan(layout, indices)
    child = os.fork()
    if child == 0:
        indices[7] = 1 - indices[7]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    again = index_plan(layout, indices)
    assert again is not plan
    Check(again).run()


def test_planning_leaves_the_tensor_resizable():
    """As it is not after ``Tensor.numpy``."""
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    indices = uniform(layout, 50)
    index_plan(layout, indices)
    assert indices.resize_(70, 4).shape == (70, 4)


@given(st.integers(1, 300), st.integers(0, 10**6))
def test_fingerprints_notice_a_single_change(size, seed):
    draw = numpy.random.default_rng(seed)
    words = draw.integers(-5, 5, size)
    before = native.fingerprint(words)
    assert native.fingerprint(words.copy()) == before
    words[draw.integers(size)] += draw.integers(1, 2**40)
    assert native.fingerprint(words) != before


def test_fingerprints_depend_on_place_and_size():
    seen = set()
    long = numpy.arange(100_000)  # several blocks
    other = long.copy()
    other[[3, 90_000]] = other[[90_000, 3]]
    arrays = [long, other, long[:-1], *(numpy.zeros(n, numpy.uint8) for n in range(70))]
    for array in arrays:
        numbers = {native.fingerprint(array, threads) for threads in (1, 2, 5)}
        assert len(numbers) == 1
        seen |= numbers
    assert len(seen) == len(arrays)
    with pytest.raises(ValueError, match="fingerprint: expected a contiguous array"):
        native.fingerprint(long[::2])


@pytest.mark.parametrize("first", ["plan", "tensor"])
def test_memory_is_given_back_without_the_collector(first):
    layout = Layout.make(ModeTree.balanced(4), 2, 3)
    indices = uniform(layout, 50)
    plan = index_plan(layout, indices)
    before = len(module._plans)
    alive = [weakref.ref(indices), weakref.ref(plan), weakref.ref(plan.lists)]
    gc.disable()
    try:
        if first == "plan":
            del plan
            assert [r() is not None for r in alive] == [True, False, True]
            del indices
        else:
            del indices
            assert [r() is not None for r in alive] == [True, True, True]
            del plan
        assert [r() for r in alive] == [None, None, None]
        assert len(module._plans) == before - 1
    finally:
        gc.enable()
