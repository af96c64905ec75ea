"""Regularizers: their values, their effect on what is learned, bad arguments."""

from __future__ import annotations

import math

import pytest
import torch

import htfkernels as hk
import htflearn
from htfkernels.testing import assert_matches
from htflearn.regularizers import RANK_MEASURES, RankRegularizer

F64 = torch.float64


def model(dtype: torch.dtype = F64) -> hk.HTF:
    torch.manual_seed(0)
    return hk.HTF(hk.ModeTree.balanced(4), 4, 5, dtype=dtype)


@pytest.mark.parametrize("target", ["raise", "lower"])
@pytest.mark.parametrize("measure", RANK_MEASURES)
def test_values(measure: str, target: str) -> None:
    m = model()
    of = {
        "renyi2": hk.renyi2_rank,
        "stable": hk.stable_rank,
        "effective": hk.effective_rank,
        "entropy": hk.entanglement_entropy,
        "nuclear": hk.nuclear_norm,
    }[measure]
    expected = torch.stack([of(s) for s in m.matricization_spectra().values()]).mean().detach()
    sign = -1 if target == "raise" else 1
    penalty = RankRegularizer(measure, target, 0.25)(m)  # type: ignore[arg-type]
    assert_matches(penalty.detach(), sign * 0.25 * expected, F64, "second")
    penalty.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in m.parameters())


def test_nodes_and_functions() -> None:
    m = model()
    pair = m.tree.node([0, 1])
    penalty = RankRegularizer(lambda s: hk.schatten_norm(s, 3), "lower", nodes=[pair])(m)
    expected = hk.schatten_norm(m.matricization_spectra([pair])[pair], 3)
    assert_matches(penalty.detach(), expected.detach(), F64, "backward")


def trained(regularizer: RankRegularizer | None) -> tuple[hk.HTF, float]:
    """A model that fits a quarter of a tensor; there are many."""
    torch.manual_seed(0)
    target = htflearn.make_target("ht", (4, 4, 4, 4), rank=2, norm=16.0)
    task = htflearn.completion(target, num_samples=64)
    m = hk.HTF(hk.ModeTree.balanced(4), 4, [8, 8], init_std=0.3)
    result = htflearn.Trainer(
        m,
        task,
        torch.optim.Adam(m.parameters(), lr=0.02),
        htflearn.TrainConfig(iterations=300),
        progress=False,
        regularizer=regularizer,
    ).fit()
    return m, float(result.history[-1]["train_loss"])


def test_a_training_with_it_ends_at_another_rank() -> None:
    ranks, losses = {}, {}
    for name, regularizer in {
        "lower": RankRegularizer("renyi2", "lower", 0.1),
        "none": None,
        "raise": RankRegularizer("renyi2", "raise", 0.1),
    }.items():
        m, losses[name] = trained(regularizer)
        spectra = m.matricization_spectra(m.tree.root.children[:1], "qr")
        ranks[name] = float(hk.effective_rank(next(iter(spectra.values())).detach()))
    assert ranks["lower"] < ranks["none"] - 1 < ranks["none"] + 1 < ranks["raise"]
    assert all(loss < 0.05 for loss in losses.values())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"measure must be one of renyi2, stable, .* got 'trace'"):
        RankRegularizer("trace")
    with pytest.raises(ValueError, match='target must be "raise" or "lower", got \'up\''):
        RankRegularizer("renyi2", "up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not negative, got -1 \(target=\"lower\" turns"):
        RankRegularizer("renyi2", "raise", -1)
    with pytest.raises(ValueError, match="finite and not negative, got nan"):
        RankRegularizer("renyi2", "raise", math.nan)
    with pytest.raises(ValueError, match="nodes is empty"):
        RankRegularizer(nodes=[])
    with pytest.raises(TypeError, match=r"expected a htfkernels.HTF, got a Linear"):
        RankRegularizer()(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="node of another tree"):
        RankRegularizer(nodes=hk.ModeTree.balanced(8).leaves)(model())
