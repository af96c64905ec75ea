"""``evaluate`` and its backward in CUDA C++, the whole tree in one launch each.

The functions have the names, arguments and results of the compiled operators. What is kept for the
backward pass are the messages at the cut of the tree and above it
(:mod:`htfkernels.cuda.whole_tree.tree`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from htfkernels.cuda.whole_tree import run as tree_run

__all__ = ["evaluate", "evaluate_backward", "evaluate_keeping"]


def evaluate(
    weights: Sequence[Tensor], x: Tensor, program: Tensor, out_features: int, *, precision: str
) -> Tensor:
    """``x [B, sum D_n] -> [B, out_features]``, or ``[B]`` where that is 1."""
    made = tree_run.evaluation(program, weights[0], x, precision)
    return _squeezed(tree_run.forward(made, weights, x, False)[0], out_features)


def evaluate_keeping(
    weights: Sequence[Tensor], x: Tensor, program: Tensor, out_features: int, *, precision: str
) -> list[Tensor]:
    """The result, and the messages."""
    made = tree_run.evaluation(program, weights[0], x, precision)
    result, messages = tree_run.forward(made, weights, x, True)
    return [_squeezed(result, out_features), messages]


def evaluate_backward(
    grad: Tensor, weights: Sequence[Tensor], x: Tensor, kept: Tensor, program: Tensor,
    needs: Sequence[int | bool], *, precision: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the weights and of ``x``; an empty tensor where ``needs`` is 0. Without the
    messages of the forward pass (``kept`` is empty) they are computed again."""
    made = tree_run.evaluation(program, weights[0], x, precision)
    return tree_run.backward(made, grad, weights, x, kept, needs)


def _squeezed(result: Tensor, out_features: int) -> Tensor:
    return result.squeeze(-1) if out_features == 1 else result
