"""What counts as learned: trajectories made up, parts of tensors against dense ones, real runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import htfkernels as hk
from htflearn import UserError, dynamics, tensor_factorization
from htflearn.dynamics import PRESETS, adapted, run_panel
from htflearn.learned import Evidence, risen, shares

FLAT = [0.003, 0.002, 0.0015]
SMOKE = PRESETS["smoke"]["htf"]


def test_flat_norms_have_not_risen() -> None:
    """Whatever their sizes are beside each other, and whatever they are at the first iteration."""
    assert risen([0], [FLAT]) == []
    assert risen([0, 10, 20], [FLAT, FLAT, FLAT]) == []
    assert risen([0, 10], [FLAT, [1.9 * n for n in FLAT]]) == []
    assert risen([0, 10], [[5.0, 4.0], [1.0, 0.5]]) == [], "nor have norms that fell"


def test_what_has_risen() -> None:
    norms = [[0.1, 0.0, 0.0], [3.0, 0.9, 0.0], [5.0, 1.1, 0.0], [4.0, 2.0, 0.3]]
    assert risen([0, 10, 20, 30], norms) == [
        {"curve": 0, "norm": 4.0, "start": 0.1, "rose": 10},
        {"curve": 1, "norm": 2.0, "start": 0.1, "rose": 10 + 10},
    ]
    # In any order: a component is above all that there was at the start, not above its own only.
    unsorted = [[0.5, 0.0, 0.0], [0.5, 0.0, 1.2], [0.5, 0.9, 4.0]]
    assert [(c["curve"], c["rose"]) for c in risen([0, 5, 9], unsorted)] == [(2, 9)]


@pytest.mark.parametrize("root", ["linear", "sum"])
def test_shares_are_those_of_the_dense_parts(root: Any) -> None:
    tree = hk.ModeTree.from_nested(((0, 1), (2, (3,), 4)))
    model = hk.HTF(tree, (3, 4, 2, 3, 2), 4, root=root, dtype=torch.float64)
    model.reset_parameters(torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = model.full_tensor().detach().norm()
    for node in tree.interior:
        for r, share in zip((2, 0), shares(model, node, [2, 0]), strict=True):
            weights = {n: model.node_weight(n).detach().clone() for n in tree.nodes}
            if node.is_root and root == "sum":
                weights.pop(tree.root)
                others = [i for i in range(4) if i != r]
                for child in node.children:
                    weights[child][:, others] = 0
            else:
                weights[node][[i for i in range(4) if i != r]] = 0
            if root == "sum":
                weights.pop(tree.root, None)
            part = hk.full_tensor(tree, weights)
            assert share == pytest.approx(float(part.norm() / whole))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_shares_of_nothing() -> None:
    model = tensor_factorization((3, 3, 3), 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert shares(model, model.tree.root, [0, 1]) == [0.0, 0.0]


def evidence(**changes: Any) -> Evidence:
    """Of a run that was flat on gradients below eps."""
    flat: dict[str, Any] = {
        "loss": "l2", "start_loss": 1.0, "end_loss": 1.0, "zero_loss": 1.0, "start_error": 1.0,
        "end_error": 1.0, "iterations": 1000, "moved": 1e-9, "gradient_norm": 1e-12,
        "optimizer": "grouprmsprop", "lr": 0.01, "eps": 1e-6, "init_std": 0.01, "usual_std": 0.01,
    }  # fmt: skip
    return Evidence(**{**flat, **changes})


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("changes", "learned", "says"),
    [
        ({}, "nothing", "the steps of grouprmsprop shrink with it: try a larger --init-std than"),
        ({"init_std": 1e-3}, "nothing", "try --init-std 0.01, the default at this order and width"),
        ({"optimizer": "sgd", "eps": INFINITE}, "nothing", "try --optimizer grouprmsprop"),
        ({"gradient_norm": 1e-3}, "nothing", "try a larger --lr than 0.01, or more --iterations"),
        ({"moved": 0.0}, "nothing", "the weights have not moved"),
        ({"moved": 0.7}, "nothing", "try more --iterations than 1,000, or another --seed"),
        ({"end_loss": 1.5, "end_error": 1.2}, "nothing", "try a smaller --lr than 0.01"),
        # From far away to zero: less than it was, and nothing of the target.
        ({"start_loss": 9.0, "start_error": 3.0}, "nothing", "a smaller --init-std than 0.01"),
        ({"end_loss": 1e-5, "end_error": 1.1}, "entries", "try more --samples, or a smaller"),
        ({"end_loss": 0.97, "end_error": 0.97}, "nothing", "nothing was learned: the train loss"),
        ({"end_loss": 0.9, "end_error": 0.9}, "target", None),
        ({"end_loss": 0.98, "end_error": 0.3}, "target", None),  # much noise on the entries
    ],
)
def test_what_was_learned(changes: dict[str, Any], learned: str, says: str | None) -> None:
    found = evidence(**changes)
    assert found.learned == learned
    remarks = found.remarks()
    if says is None:
        assert remarks == []
    else:
        assert says in " ".join(remarks) and all(r.count(": ") <= 1 for r in remarks)


def test_initial_weights_of_the_presets_stay() -> None:
    for presets in PRESETS.values():
        for setting in presets.values():
            assert adapted(setting, seed=3, order=setting.order, dim=5).init_std == setting.init_std
    paper = PRESETS["paper"]["htf"]
    assert adapted(paper) == paper and paper.init_std == 0.01
    assert adapted(paper, order=8, init_std=0.01).init_std == 0.01, "what is given is taken"
    assert adapted(paper, order=3).init_std == 0.01, "smaller trees grow faster anyway"
    assert adapted(PRESETS["paper"]["mf"], depth=2).init_std == 1e-3
    with pytest.raises(UserError, match=r"htf: .*order"):
        adapted(paper, order=1)


@pytest.mark.parametrize(
    ("panel", "changes"), [("htf", {"order": 8}), ("tf", {"order": 6}), ("mf", {"depth": 5})]
)
def test_weights_begin_to_grow_as_fast_at_every_order(panel: str, changes: dict[str, Any]) -> None:
    """Gradients of linear functions of the end tensor relative to the weights, root mean square."""

    def rate(setting: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        model = dynamics._model(setting, (2,) * setting.order)
        matrix = model.layout.num_parameters / len(model.layout.location)  # weights of one
        squares = 0.0
        for _ in range(40):
            model.reset_parameters(generator)
            shape = model.layout.mode_dims
            direction = torch.randn(shape, generator=generator, dtype=torch.float64)
            function = (model.full_tensor() * direction).sum() / direction.norm()
            weights = list(model.parameters())
            gradients = torch.autograd.grad(function, weights)
            squares += matrix * (dynamics._norm(gradients) / dynamics._norm(weights)) ** 2 / 40
        return squares**0.5

    preset = dataclasses.replace(PRESETS["smoke"][panel], dim=2, width=8)
    changed = adapted(preset, **changes)
    assert rate(changed) == pytest.approx(rate(preset), rel=0.5)
    assert rate(dataclasses.replace(changed, init_std=preset.init_std)) < rate(preset) / 5


def test_a_flat_run_has_learned_nothing_and_says_what_to_change(tmp_path: Path) -> None:
    """Gradient descent at order 8 on the l1 loss; what it advises then learns."""
    flat = adapted(
        SMOKE, order=8, dim=2, loss="l1", optimizer="sgd", iterations=60, init_std=SMOKE.init_std
    )
    panel = run_panel(flat, tmp_path / "flat", progress=False)
    assert panel["learned"] == "nothing"
    assert all(series["components"] == [] for series in panel["series"])
    found, advice = panel["remarks"]
    assert found.startswith("nothing was learned: the train loss (l1) was 0.307 at the start and")
    assert "--optimizer grouprmsprop" in advice and "--init-std 0.206, the default at" in advice
    assert panel["evidence"]["eps"] is None and panel["evidence"]["gradient_norm"] < 1e-9
    advised = dataclasses.replace(flat, optimizer="grouprmsprop", init_std=0.206, iterations=500)
    panel = run_panel(advised, tmp_path / "advised", progress=False)
    assert panel["learned"] == "target" and panel["remarks"] == []
    assert panel["reconstruction_error"] < 0.2
    for series in panel["series"]:
        for component in series["components"]:
            assert component["norm"] > 2 * component["start"] and component["rose"] > 0
            assert component["share"] > 0.01
        assert series["components"], series["name"]


def test_entries_that_were_fitted_alone(tmp_path: Path) -> None:
    """Few entries of many, large initial weights: all are fitted, nothing else is."""
    setting = dataclasses.replace(SMOKE, samples=8, init_std=0.4, iterations=100)
    panel = run_panel(setting, tmp_path, progress=False)
    assert panel["learned"] == "entries"
    assert panel["train_loss"] < 0.8 * panel["evidence"]["zero_loss"]
    assert panel["remarks"][0].startswith("only the entries given were fitted")
