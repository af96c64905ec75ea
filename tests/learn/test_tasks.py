"""Tasks, losses, targets and the two named models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import htfkernels as hk
from htflearn import (
    CompletionTask,
    SensingTask,
    completion,
    make_target,
    matrix_factorization,
    sensing,
    tensor_factorization,
)
from htflearn.losses import loss_function

DATA = Path(__file__).parent.parent / "data"
DIMS = (3, 4, 2, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(dims: tuple[int, ...] = DIMS) -> hk.HTF:
    made = hk.HTF(hk.ModeTree.balanced(len(dims)), dims, 4, init_std=0.5, dtype=torch.float64)
    made.reset_parameters(generator(1))
    return made


def target(dims: tuple[int, ...] = DIMS) -> Tensor:
    return make_target("ht", dims, 2, 5.0, generator=generator(), dtype=torch.float64)


class Spy:
    """A model that records which route was taken."""

    def __init__(self, inner: hk.HTF) -> None:
        self.inner, self.routes = inner, []  # type: ignore[var-annotated]
        self.layout, self.index_plan = inner.layout, inner.index_plan

    def full_tensor(self) -> Tensor:
        self.routes.append("full")
        return self.inner.full_tensor()

    def at(self, indices: Tensor | hk.IndexPlan) -> Tensor:
        self.routes.append("plan" if isinstance(indices, hk.IndexPlan) else "at")
        return self.inner.at(indices)


def test_all_routes_give_the_same_entries_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    task, htf = completion(target(), 60, generator=generator()), model()
    rows, many = torch.tensor([5, 0, 59, 5]), torch.arange(60).repeat(2)
    for chosen, route in ((None, "plan"), (rows, "at"), (many, "full"), (rows, "plan")):
        if (chosen is rows) and route == "plan":
            monkeypatch.setattr(hk.IndexPlan, "pays", staticmethod(lambda layout, batch: True))
        spy = Spy(htf)
        predicted = task.predict(spy, chosen)  # type: ignore[arg-type]
        assert spy.routes == [route]
        indices = task.indices if chosen is None else task.indices[chosen]
        expected = htf.full_tensor()[tuple(indices.T)]
        torch.testing.assert_close(predicted, expected, rtol=1e-12, atol=1e-14)
        grads = torch.autograd.grad(predicted.square().sum(), list(htf.weights))
        others = torch.autograd.grad(expected.square().sum(), list(htf.weights))
        for a, b in zip(grads, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_tensor_too_large_to_form_is_never_formed() -> None:
    dims = (300, 300, 300)
    indices = torch.randint(0, 300, (50, 3), generator=generator())
    task = CompletionTask(indices, torch.zeros(50), dims, indices[:5], torch.zeros(5))
    spy = Spy(hk.HTF(hk.ModeTree.balanced(3), dims, 2))
    task.loss(spy)  # type: ignore[arg-type]
    assert set(task.evaluate(spy)) == {"train_loss", "test_loss", "test_mse"}  # type: ignore[arg-type]
    assert set(spy.routes) == {"plan"}


def test_a_tree_whose_modes_are_not_in_order() -> None:
    htf = hk.HTF(hk.ModeTree.halves(4), DIMS, 3, dtype=torch.float64)
    task = completion(target(), 100, generator=generator())
    torch.testing.assert_close(task.predict(htf), htf.at(task.indices), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_evaluate_is_the_dense_computation(loss: str) -> None:
    truth, htf = target(), model()
    task = completion(truth, 70, generator=generator(), loss=loss)
    scores = task.evaluate(htf)
    full = htf.full_tensor().detach()
    train, test = tuple(task.indices.T), tuple(task.test_indices.T)
    function = loss_function(loss)
    assert task.loss(htf).item() == pytest.approx(scores["train_loss"])
    assert scores["train_loss"] == pytest.approx(float(function(full[train], truth[train])))
    assert scores["test_loss"] == pytest.approx(float(function(full[test], truth[test])))
    assert scores["test_mse"] == pytest.approx(float((full - truth)[test].square().mean()))
    assert scores["reconstruction_error"] == pytest.approx(float((full - truth).norm() / 5.0))


def test_losses() -> None:
    prediction, truth = torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0])
    assert float(loss_function("l2")(prediction, truth)) == pytest.approx((0.25 + 9) / 2)
    assert float(loss_function("l1")(prediction, truth)) == pytest.approx((0.5 + 3) / 2)
    assert float(loss_function("huber")(prediction, truth)) == pytest.approx((0.125 + 2.5) / 2)
    with pytest.raises(ValueError, match="l3"):
        loss_function("l3")


def test_completion_draws_distinct_entries_and_leaves_the_others_clean() -> None:
    truth = target()
    task = completion(truth, 90, noise_std=0.1, generator=generator(3))
    every = torch.cat([task.indices, task.test_indices])
    assert len(torch.unique(every, dim=0)) == len(every) == truth.numel()
    noise = task.values - truth[tuple(task.indices.T)]
    assert 0.07 < float(noise.std()) < 0.13
    assert torch.equal(task.test_values, truth[tuple(task.test_indices.T)])
    again = completion(truth, 90, noise_std=0.1, generator=generator(3))
    assert torch.equal(again.values, task.values) and torch.equal(again.indices, task.indices)


def test_completion_of_everything_has_no_test() -> None:
    scores = completion(target(), 120, generator=generator()).evaluate(model())
    assert set(scores) == {"train_loss", "reconstruction_error"}


@pytest.mark.parametrize(
    ("indices", "values", "error", "says"),
    [
        (torch.zeros(4, 4), torch.zeros(4), ValueError, "int64"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4), ValueError, r"\[4, 4\]"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4), ValueError, r"\[4, 4\]"),
        (torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0), ValueError, "no training"),
        (torch.tensor([[0, 0, 2, 0]]), torch.zeros(1), IndexError, "mode 2"),
        (torch.tensor([[0, 0, 0, -1]]), torch.zeros(1), IndexError, "mode 3"),
    ],
)
def test_bad_entries(indices: Tensor, values: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        CompletionTask(indices, values, DIMS)


def test_a_model_of_another_shape() -> None:
    task = completion(target(), 60, generator=generator())
    with pytest.raises(ValueError, match="the task's"):
        task.loss(model((3, 4, 2, 6)))


@pytest.mark.parametrize("count", [0, 121])
def test_bad_number_of_samples(count: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.120"):
        completion(target(), count)


@pytest.mark.parametrize("kind", ["rank_one", "gaussian"])
def test_sensing(kind: str) -> None:
    truth, htf = target(), model()
    task = sensing(truth, 50, kind, generator=generator(), num_test=20)  # type: ignore[arg-type]
    assert task.num_samples == 50
    if isinstance(task.measurements, Tensor):
        dense = task.measurements
    else:
        dense = torch.einsum("ma,mb,mc,md->mabcd", *task.measurements)
    torch.testing.assert_close(task.values, (dense * truth).flatten(1).sum(1))
    predicted = (dense * htf.full_tensor()).flatten(1).sum(1)
    torch.testing.assert_close(task.predict(htf), predicted)
    rows = torch.tensor([7, 7, 1])
    torch.testing.assert_close(task.predict(htf, rows), predicted[rows])
    expected = (predicted - task.values)[rows].square().mean()
    torch.testing.assert_close(task.loss(htf, rows), expected)
    scores = task.evaluate(htf)
    assert scores["train_loss"] == pytest.approx((predicted - task.values).square().mean().item())
    assert set(scores) == {"train_loss", "test_loss", "test_mse", "reconstruction_error"}
    assert task.to(dtype=torch.float32).predict(htf.float()).dtype == torch.float32


def test_sensing_noise_is_on_the_training_values_alone() -> None:
    clean = sensing(target(), 200, generator=generator(), num_test=10)
    noisy = sensing(target(), 200, noise_std=0.5, generator=generator(), num_test=10)
    assert 0.4 < float((noisy.values - clean.values).std()) < 0.6
    assert torch.equal(noisy.test_values, clean.test_values)  # type: ignore[arg-type]


def test_bad_sensing() -> None:
    with pytest.raises(ValueError, match="gaussian"):
        sensing(target(), 5, "dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"measurements\[1\]"):
        SensingTask([torch.zeros(5, 3), torch.zeros(4, 3)], torch.zeros(5))
    with pytest.raises(ValueError, match="come together"):
        SensingTask(torch.zeros(5, 3, 3), torch.zeros(5), torch.zeros(5, 3, 3))


@pytest.mark.parametrize(
    ("kind", "dims", "rank"), [("matrix", (7, 6), 3), ("cp", (5, 6, 7), 2), ("ht", (4, 4, 4, 4), 2)]
)
def test_targets_have_their_norm_and_rank(kind: str, dims: tuple[int, ...], rank: int) -> None:
    made = [
        make_target(kind, dims, rank, 64.0, generator=generator(5), dtype=dtype)  # type: ignore[arg-type]
        for dtype in (torch.float32, torch.float64)
    ]
    assert float(made[1].norm()) == pytest.approx(64.0)
    torch.testing.assert_close(made[0].double(), made[1], rtol=1e-6, atol=1e-6)
    rows = dims[0] * (dims[1] if kind == "ht" else 1)
    assert int(torch.linalg.matrix_rank(made[1].reshape(rows, -1))) == rank


def test_a_target_on_a_tree_of_its_own() -> None:
    dims, tree = (4, 4, 4, 4), hk.ModeTree.halves(4)
    made = make_target("ht", dims, 2, 1.0, tree, generator(), torch.float64)
    rank = torch.linalg.matrix_rank(made.permute(0, 2, 1, 3).reshape(16, 16))
    other = torch.linalg.matrix_rank(made.reshape(16, 16))
    assert int(rank) == 2 < int(other)


def test_bad_targets() -> None:
    with pytest.raises(ValueError, match="2 modes"):
        make_target("matrix", (3, 3, 3), 2, 1.0)
    with pytest.raises(ValueError, match="tucker"):
        make_target("tucker", (3, 3, 3), 2, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tree"):
        make_target("cp", (3, 3, 3), 2, 1.0, hk.ModeTree.flat(3))


def test_matrix_factorization_is_the_papers() -> None:
    data = np.load(DATA / "mf_depth3.npz")
    layers = [torch.from_numpy(data[f"layer/{i}"]) for i in range(3)]
    rows, columns = data["matrix"].shape
    hidden = max(w.shape[1] for w in layers[:-1])
    assert matrix_factorization(rows, columns, 3, hidden).full_tensor().shape == (rows, columns)
    tree = hk.ModeTree.chain(3)
    widths = {tree.interior[0]: layers[0].shape[1], tree.root: layers[1].shape[1]}
    mf = hk.HTF(tree, (rows, columns), widths, root="sum", dtype=torch.float64)
    with torch.no_grad():
        for node, w in zip((0, 2, 1), (layers[0], layers[1], layers[2].T), strict=True):
            mf.node_weight(tree.nodes[node]).copy_(w)
    np.testing.assert_allclose(mf.full_tensor().detach(), data["matrix"], rtol=1e-12)


def test_tensor_factorization_is_the_papers() -> None:
    data = np.load(DATA / "cp_order3.npz")
    factors = [torch.from_numpy(data[f"factor/{n}"]).double() for n in range(3)]
    dims, components = [f.shape[0] for f in factors], factors[0].shape[1]
    tf = tensor_factorization(dims, components, dtype=torch.float64)
    with torch.no_grad():
        for node, factor in zip(tf.tree.leaves, factors, strict=True):
            tf.node_weight(node).copy_(factor)
    np.testing.assert_allclose(tf.full_tensor().detach(), data["tensor"], rtol=1e-5, atol=1e-6)
    norms = tf.local_component_norms()[tf.tree.root].detach()
    np.testing.assert_allclose(norms, data["component_norms"], rtol=1e-6)
