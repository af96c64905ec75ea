"""``slog`` and its backward in Triton kernels, a launch for each level.

Weights are divided by a power of two for each node beforehand, so that their largest magnitude is
in [1/2, 1); messages carry theirs (:mod:`htfkernels.triton.scaled`). What is kept for the backward
pass: messages, their exponents, and the root's scaled value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.scaled import power, sign
from htfkernels.tree.layout import Layout
from htfkernels.triton import configs, ragged, scaled
from htfkernels.triton.launch import check_size
from htfkernels.triton.memory import empty
from htfkernels.triton.reduce import gradients
from htfkernels.triton.tables import Tables, tables_of

__all__ = ["slog", "slog_backward", "slog_keeping", "why_not"]


def why_not(layout: Layout, dtype: torch.dtype) -> str | None:
    """None where the kernels can run a tree, else one sentence that says why they cannot."""
    del dtype
    most = max(map(len, layout.tree._children))
    if most > configs.STATIC_ARITY:
        return (
            f"triton's slog multiplies up to {configs.STATIC_ARITY} messages, and a node has {most}"
        )
    widest = max(group.cols for group in layout.groups)
    if widest > configs.SCALED_WIDTH:
        return f"triton's slog takes up to {configs.SCALED_WIDTH} columns, and a node has {widest}"
    return None


def slog(
    weights: Sequence[Tensor], x: Tensor, program: Tensor, out_features: int, *, precision: str
) -> Tensor:
    """``x [B, sum D_n] -> [B, out_features, 2]``: sign and log-magnitude."""
    return slog_keeping(weights, x, program, out_features, precision=precision)[0]


def slog_keeping(
    weights: Sequence[Tensor], x: Tensor, program: Tensor, out_features: int, *, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; the messages, their exponents ``[nodes, B]``, the scaled value."""
    check_size("slog", x.shape[0], "samples")
    x, tables = x.contiguous(), _tables(program, x)
    mantissas, exponents = _scaled(weights)
    messages, shift, value = _messages(tables, mantissas, x, precision)
    exponent = shift.sum(0, dtype=torch.float64).unsqueeze(-1)  # of whole numbers: exact
    for of, by_weight in zip(tables.of_group, exponents, strict=True):
        # Once for each node; nodes that share a weight share its exponent.
        exponent = exponent + by_weight.sum() * (len(of) // by_weight.numel())
    logabs = value.double().abs().log() + exponent * math.log(2.0)
    result = torch.stack((sign(value).to(x.dtype), logabs.to(x.dtype)), -1)
    return result, messages, shift, value


def slog_backward(
    grad: Tensor, weights: Sequence[Tensor], x: Tensor, kept: Sequence[Tensor], program: Tensor,
    needs: Sequence[int | bool], *, precision: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the weights and of ``x``; an empty tensor where ``needs`` is 0.

    Args:
        grad: ``[B, out_features, 2]``; the signs' part is not read, since a sign has no gradient.
        kept: what :func:`slog_keeping` returned behind the result, or nothing.
    """
    check_size("slog", x.shape[0], "samples")
    x, tables = x.contiguous(), _tables(program, x)
    mantissas, exponents = _scaled(weights)
    messages, shift, value = kept or _messages(tables, mantissas, x, precision)
    zero = value == 0  # has no gradient, and must not spoil those of the other rows
    root = torch.where(zero, 0.0, grad[..., 1] / torch.where(zero, 1.0, value)).to(x.dtype)
    needed = tables.needed(needs)
    grad_messages = empty(messages.shape, x)
    grad_x = empty(x.shape if needs[-1] else (0,), x)
    pack = ragged.pack_of(tables)
    packed = pack.weights(mantissas)
    for visit in needed.visits:
        if visit.deeper:
            ragged.backward(
                tables, visit.launched, needed, messages, pack, packed, root, grad_messages, grad_x,
                x.shape, precision, shift,
            )  # fmt: skip
    wanted = [n for visit in needed.visits for n in visit.weights]
    partial = {}
    if wanted:
        partial = ragged.weight_gradients(
            tables, wanted, x, messages, root, grad_messages, precision, shift
        )
    found = []
    for g, (weight, exponent) in enumerate(zip(weights, exponents, strict=True)):
        if g in partial:
            found.append(_times_power(gradients([partial[g]], weight), -exponent))
        else:
            found.append(weight.new_empty(0))
    return [*found, grad_x]


def _tables(program: Tensor, x: Tensor) -> Tables:
    return tables_of(program, x, fuse=None, levels=True)


def _messages(
    tables: Tables, weights: Sequence[Tensor], x: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    messages = empty(tables.width * rows, x)
    shift = empty((len(tables.nodes), rows), x, torch.int32)
    accumulated = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = empty((rows, tables.root.cols), x, accumulated)
    pack = ragged.pack_of(tables)
    packed = pack.weights(weights)
    for launched in tables.launches:
        scaled.forward(tables, launched, x, messages, pack, packed, value, shift, precision)
    return messages, shift, value


def _scaled(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights whose largest magnitude is in [1/2, 1), and the exponents ``[F, 1, 1]``."""
    exponents = []
    for weight in weights:
        largest = weight.abs().amax((-2, -1), keepdim=True)
        exponents.append(torch.frexp(largest.double()).exponent.double())
    mantissas = [_times_power(w, -e) for w, e in zip(weights, exponents, strict=True)]
    return mantissas, exponents


def _times_power(tensor: Tensor, exponent: Tensor) -> Tensor:
    """``2**exponent * tensor``, exactly: in two steps, since that power may be out of range."""
    half = torch.floor(exponent / 2)
    return tensor * power(half, tensor) * power(exponent - half, tensor)
