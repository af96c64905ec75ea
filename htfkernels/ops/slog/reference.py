"""Sign and log-magnitude: every message carries its scale apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.scaled import leading, power, sign, split
from htfkernels.tree.layout import Layout


def slog(layout: Layout, weights: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [B, sum D_n] -> (sign, log |value|)``, each ``[B, out_features]``.

    After each node a row of its message is divided by ``2 ** e`` so that its largest magnitude
    lies in [1/2, 1), and ``e`` is added up. Scales are powers of two and constants to autograd, so
    values and
    gradients are those of the unscaled tree: ``d log|f| = d log|f 2^-e|``. Weights and vectors are
    scaled the same way beforehand, so that no single product leaves the range either.
    """
    columns, children = layout.offsets, layout.tree._children
    messages: dict[int, Tensor] = {}
    exponents: dict[int, Tensor] = {}

    def product(nodes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        p, exponent = messages[nodes[0]], exponents[nodes[0]]
        own: Tensor | None = None  # each entry's: one that has fallen far behind may come back
        for i, c in enumerate(nodes[1:], start=1):
            p, exponent = p * messages[c], exponent + exponents[c]
            if i % 4 == 0:
                p, extra = split(p)
                own = extra if own is None else own + extra
        if own is not None:
            largest = leading(p, own, -1)
            p, exponent = p * power(own - largest, p), exponent + largest.squeeze(-1)
        return p, exponent

    for group, raw in zip(layout.groups, weights, strict=True):
        weight, by_weight = _scaled(raw, (-2, -1))
        if group.level == 0:
            vectors = [x[:, columns[n] : columns[n + 1]] for n in group.nodes]
            p, by_p = _scaled(torch.stack(vectors), -1)
        else:
            products = [product(children[v]) for v in group.nodes]
            p, carried = (torch.stack(parts) for parts in zip(*products, strict=True))
            p, by_p = _scaled(p, -1)
            by_p = by_p + carried
        m, by_m = _scaled(p @ weight, -1)
        messages.update(zip(group.nodes, m.unbind(0), strict=True))
        exponents.update(zip(group.nodes, (by_m + by_p + by_weight).unbind(0), strict=True))
    if layout.root == "sum":
        p, exponent = product(children[-1])
        value = p.sum(-1, keepdim=True)
    else:
        value, exponent = messages[len(children) - 1], exponents[len(children) - 1]
    zero = value == 0  # has no gradient, and must not spoil those of the other rows
    log = torch.where(zero, -math.inf, torch.where(zero, 1.0, value).abs().log())
    logabs = log + exponent.to(value.dtype).unsqueeze(-1) * math.log(2.0)
    return sign(value), logabs


def _scaled(t: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``t / 2**e``, its largest magnitude along ``dim`` in [1/2, 1), and ``e`` (no gradient)."""
    exponent = torch.frexp(t.detach().abs().amax(dim, keepdim=True)).exponent.to(torch.float64)
    half = torch.floor(exponent / 2)  # in two steps: 2**-e itself may be out of range
    return t * power(-half, t) * power(half - exponent, t), exponent.squeeze(-1)
