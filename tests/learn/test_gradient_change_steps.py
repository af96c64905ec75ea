"""The gradient-change regularizer in a training loop: the steps it counts, the value it keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from htflearn.locality.gradient_change import InputGradientChange, input_gradient_change
from htflearn.locality.patches import FixedPatches, RandomSquares

F64 = torch.float64
A, B = (0, 1, 3, 3), (4, 5, 8, 8)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.Softplus(), nn.Linear(12, 3))


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 2, 8, 8, generator=generator, dtype=F64), torch.arange(count) % 3


def test_every_counts_steps_of_accumulated_micro_batches() -> None:
    """All micro-batches of every second step, or of none; resumed in the middle of a step too."""
    model = mlp().to(F64)
    x, y = batch(12)
    full = InputGradientChange(RandomSquares(2), 0.5)
    lazy = InputGradientChange(RandomSquares(2), 0.5, every=2, accumulation=3)
    due = []
    for call in range(12):
        if call == 7:
            resumed = InputGradientChange(RandomSquares(2, seed=5), 0.5, every=2, accumulation=3)
            resumed.load_state_dict(lazy.state_dict())
            lazy = resumed
        part = slice(4 * (call % 3), 4 * (call % 3) + 4)
        penalty = lazy(model, x[part], y[part])
        due.append(penalty.requires_grad)
        if due[-1]:
            torch.testing.assert_close(penalty, 2 * full(model, x[part], y[part]))
    assert due == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    assert repr(lazy).endswith("0.5, every=2, accumulation=3)")
    # Where calls are counted, one micro-batch of three is regularized at a time.
    lazy = InputGradientChange(RandomSquares(2), 0.5, every=3)
    assert [lazy(model, x, y).requires_grad for _ in range(6)] == [True, False, False] * 2


def test_last_value() -> None:
    """The mean |cos| of the latest computation, without factors and derivatives."""
    model = mlp().to(F64)
    x, y = batch()
    regularize = InputGradientChange(FixedPatches([A, B]), 3.0, every=2)
    assert regularize.last_value is None
    penalty = regularize.with_outputs(model, x, y)[1]
    first = regularize.last_value
    assert first is not None and not first.requires_grad and penalty.requires_grad
    torch.testing.assert_close(first, input_gradient_change(model, x, y, A, B))
    torch.testing.assert_close(penalty, 6 * first)
    assert regularize(model, x, y) == 0 and regularize.last_value is first
    with torch.no_grad():
        regularize(model, x.flip(0), y)
        torch.testing.assert_close(
            regularize.last_value, input_gradient_change(model, x.flip(0), y, A, B)
        )
    regularize.load_state_dict(regularize.state_dict())
    assert regularize.last_value is None
    off = InputGradientChange(FixedPatches([A, B]), 0.0)
    off(model, x, y)
    assert off.last_value is None
