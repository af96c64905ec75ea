"""The list of frames that backends launch, and what is kept of it between calls."""

from __future__ import annotations

import gc

import pytest
import torch

import htfkernels as hk
from htfkernels.runtime import memory
from htfkernels.schedule import frames
from htfkernels.schedule.frames import planned_frames, sample_frames, with_orders
from htfkernels.tree import ModeTree

LAYOUT = hk.Layout.make(ModeTree.balanced(8), 3, 5)
FLAT = hk.Layout.make(ModeTree.flat(9), 3, 5)


@pytest.fixture
def walked():
    """A plan whose nodes are walked per sample: its cuts lack orders."""
    plan = hk.IndexPlan.make(LAYOUT, torch.randint(3, (60, 8)))
    made = planned_frames(LAYOUT.program, plan.table)
    assert made.regrouped
    return plan, made


def test_the_orders_that_a_plan_lacks(walked):
    plan, made = walked
    longer = with_orders(made, plan.batch, plan.lists)
    assert torch.equal(longer[: len(plan.lists)], plan.lists)
    for ids, rows, start, order in made.regrouped:
        listed = plan.lists[ids : ids + plan.batch]
        for row in range(rows):
            first, last = longer[start + row : start + row + 2].tolist()
            mine = longer[order + first : order + last]
            assert torch.equal(mine.long(), (listed == row).nonzero()[:, 0])


def test_what_is_made_while_a_graph_is_captured_is_the_graphs(walked, monkeypatch):
    """It holds nothing before the graph runs: a call outside must not be given it."""
    plan, made = walked
    monkeypatch.setattr(frames, "capturing", lambda like: True)
    inside = with_orders(made, plan.batch, plan.lists)
    monkeypatch.setattr(frames, "capturing", lambda like: False)
    outside = with_orders(made, plan.batch, plan.lists)
    assert outside is not inside
    assert with_orders(made, plan.batch, plan.lists) is outside


def test_what_a_graph_reads_outlives_the_tensor_it_was_made_for(monkeypatch):
    monkeypatch.setattr(memory, "capturing", lambda like: like.dtype == torch.float16)
    monkeypatch.setattr(memory, "_captured", {})
    kept: memory.Kept[list[int]] = memory.Kept(most=2)
    owner = torch.zeros(1)
    first = kept.of(owner, "a", lambda: [1], owner)
    assert kept.of(owner, "a", lambda: [2], owner) is first
    kept.of(owner, "b", lambda: [3], owner.half())
    kept.of(owner, "c", lambda: [4], owner)  # the third: the first is given up
    assert kept.of(owner, "a", lambda: [5], owner) == [5]
    del owner
    gc.collect()
    assert list(memory._captured.values()) == [[3]]


@pytest.mark.parametrize("most", [2, 4])
def test_a_frame_of_many_operands_takes_a_few_at_a_time(most):
    plan = hk.IndexPlan.make(FLAT, torch.randint(3, (60, 9)))
    made = planned_frames(FLAT.program, plan.table, most)
    assert all(len(frame.operands) <= most for frame in made.frames)
    read = [o.source for frame in made.frames for o in frame.operands if o.source < 0]
    whole = planned_frames(FLAT.program, plan.table)
    assert sorted(read) == sorted(
        o.source for frame in whole.frames for o in frame.operands if o.source < 0
    )


def test_every_node_per_sample():
    made = sample_frames(LAYOUT.program, 7)
    assert len(made.frames) == len(LAYOUT.tree.interior)
    assert all(frame.rows == 7 for frame in made.frames)
    assert made.frames[-1].cols == 1 and made.frames[0].step >= 0
