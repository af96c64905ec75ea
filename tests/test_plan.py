"""Plans: values, cached, printable."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

import htfkernels as hk
from htfkernels.runtime import dispatch
from htfkernels.runtime.plan import make_plan


@pytest.fixture
def layout():
    tree = hk.ModeTree.from_nested(((0, 1), (2, (3, 4))))
    return hk.Layout.make(tree, 3, 5, out_features=2)


def test_a_plan_is_a_value(layout):
    plan = make_plan("evaluate", layout, torch.float32, "cpu", "reference")
    assert plan == dataclasses.replace(plan)
    assert hash(plan) == hash(dataclasses.replace(plan))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.backend = "cpp"
    assert (plan.op, plan.layout, plan.dtype, plan.device) == (
        "evaluate",
        layout,
        torch.float32,
        "cpu",
    )
    assert (plan.backend, plan.why) == ("reference", "asked for")


def test_planned_once(layout):
    again = hk.Layout.make(layout.tree, 3, 5, out_features=2)
    plan = make_plan("evaluate", layout, torch.float32, "cpu", "reference")
    assert make_plan("evaluate", again, torch.float32, "cpu", "reference") is plan
    assert make_plan("evaluate", layout, torch.float64, "cpu", "reference") is not plan
    assert make_plan("full_tensor", layout, torch.float32, "cpu", "reference") is not plan


def test_printed(layout):
    text = str(make_plan("evaluate", layout, torch.float32, "cpu", "reference"))
    assert text.splitlines()[0] == "evaluate on cpu, float32: backend reference (asked for)"
    assert (
        "order 5, 9 nodes, depth 3, 150 weights" in text
        or f"{layout.num_parameters} weights" in text
    )
    for group in layout.groups:
        assert f"{group.level:5}  {len(group.nodes):5}  {group.rows} x {group.cols}" in text
    shared = hk.Layout.make(hk.ModeTree.balanced(4), 3, 5, share_weights=True)
    assert "shared" in str(make_plan("evaluate", shared, torch.float32, "cpu", "reference"))


def test_a_backend_that_cannot_run_is_no_plan(layout):
    with pytest.raises(RuntimeError, match="backend 'cuda' was asked for, but"):
        make_plan("evaluate", layout, torch.float32, "cpu", "cuda")


def test_auto_logs_its_choice_once(layout, caplog):
    fresh = hk.Layout.make(layout.tree, 3, 5, out_features=7)
    with caplog.at_level(logging.INFO, logger="htfkernels"):
        for _ in range(3):
            make_plan("evaluate", fresh, torch.float32, "cpu", "auto")
    messages = [r.getMessage() for r in caplog.records if r.name == "htfkernels"]
    assert len(messages) == 1
    chosen, why = dispatch.choose(dispatch.Spec("evaluate", torch.float32, "cpu"), "auto")
    assert f"backend {chosen} ({why})" in messages[0]


def test_a_call_follows_the_request_at_that_moment(layout):
    """Plans are kept, but not beyond a change of the request."""
    weights = [torch.randn(g.shape) for g in layout.groups]
    x = torch.randn(4, 5, 3)
    hk.evaluate(layout.tree, weights, x, layout=layout)
    with hk.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda"):
        hk.evaluate(layout.tree, weights, x, layout=layout)
    hk.evaluate(layout.tree, weights, x, layout=layout)
