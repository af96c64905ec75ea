"""Which way of evaluating on a GPU is estimated to be faster, and how dispatch goes by it."""

from __future__ import annotations

import pytest
import torch

from htfkernels import Layout, ModeTree
from htfkernels.cuda.whole_tree import estimate
from htfkernels.cuda.whole_tree import geometry as tree_geometry
from htfkernels.runtime import dispatch
from htfkernels.runtime.dispatch import Spec, choose
from htfkernels.runtime.plan import make_plan

F32, BF16 = torch.float32, torch.bfloat16


def balanced(order: int, rank: int, dim: int = 8) -> Layout:
    return Layout.make(ModeTree.balanced(order), dim, rank)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("order", "rank", "rows"),
    [(16, 16, 1), (16, 64, 64), (16, 16, 1024), (64, 16, 64), (64, 64, 1), (64, 64, 256)],
)
def test_small_trees_and_batches_are_for_one_launch(
    dtype: torch.dtype, order: int, rank: int, rows: int
) -> None:
    better, phrase = estimate.chosen(balanced(order, rank), rows, dtype, "tf32")
    assert better, phrase
    assert f"for {rows} rows" in phrase and "level by level" in phrase


def test_large_batches_of_large_trees_are_not() -> None:
    better, _ = estimate.chosen(balanced(256, 64, 64), 65536, BF16, "ieee")
    assert not better


@pytest.mark.parametrize("backward", [False, True])
def test_estimates_grow_with_the_work(backward: bool) -> None:
    layout = balanced(64, 64)
    for seconds in (
        lambda rows: estimate.levels_seconds(layout, rows, F32, "ieee", backward),
        lambda rows: tree_geometry.seconds(
            layout, rows, F32, "ieee", estimate.PROCESSORS, backward
        ),
    ):
        times = [seconds(rows) for rows in (1, 256, 4096, 65536)]
        assert times == sorted(times) and times[0] > 1e-6 and times[-1] > 4 * times[0]
    wide = balanced(16, 512)  # bound by its products, not by memory
    exact, fast = (estimate.levels_seconds(wide, 65536, F32, p, backward) for p in ("ieee", "tf32"))
    assert exact > fast


def test_dispatch_goes_by_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where both can run."""
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: None)
    monkeypatch.setattr(dispatch.cuda_module, "why_not", lambda device: None)
    small, large = balanced(16, 16), balanced(256, 64, 64)
    backend, why = choose(Spec("evaluate", F32, "cuda", small, 64), "auto")
    assert backend == "cuda" and "in one launch each way" in why
    backend, why = choose(Spec("evaluate", BF16, "cuda", large, 65536), "auto")
    assert backend == "triton" and "level by level" in why
    backend, why = choose(Spec("evaluate", BF16, "cuda", large, 65536), "cuda")
    assert (backend, why) == ("cuda", "asked for")
    wide = balanced(16, 128)
    backend, why = choose(Spec("evaluate", F32, "cuda", wide, 64), "auto")
    assert backend == "triton" and "at most 64, and this one has 128" in why
    make_plan.cache_clear()
    printed = str(make_plan("evaluate", small, F32, "cuda", "auto", 64))
    make_plan.cache_clear()
    assert "backend cuda (for 64 rows with gradients, estimated" in printed
