"""Entries of the end tensor by an index plan: the formula, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from htfkernels.schedule.index_plan import NO_OPERAND, IndexPlan
from htfkernels.tree.layout import Layout


def evaluate_at_planned(layout: Layout, weights: Sequence[Tensor], plan: IndexPlan) -> Tensor:
    """``[B, out_features]``, the entries at ``plan.indices``.

    Framed: ``p[i] = frame(left)[left_ids[i]] * frame(right)[right_ids[i]]``, and ``p W`` is what
    the node sends, once per distinct sub-tuple. Walked: the same per sample, with each cut's frame
    gathered by its ids.
    """
    steps = layout.steps
    frames: list[Tensor] = []

    def weight(step: int) -> Tensor:
        group = weights[steps[step].group]
        return group[steps[step].slot]

    def frame(operand: int) -> Tensor:
        return frames[operand] if operand >= 0 else weight(-(operand + 1))

    def send(step: int, product: Tensor) -> Tensor:
        if steps[step].group < 0:  # the root of a "sum"
            return product.sum(-1, keepdim=True)
        return product @ weight(step)

    def gather(operand: int, ids: int, count: int) -> Tensor:
        return frame(operand).index_select(0, plan.lists[ids : ids + count])

    for row in plan.framed:
        if row.right == NO_OPERAND:
            product = frame(row.left)
        else:
            product = gather(row.left, row.left_ids, row.rows)
            product = product * gather(row.right, row.right_ids, row.rows)
        frames.append(product if row.step < 0 else send(row.step, product))

    messages: dict[int, list[Tensor]] = {}
    for cut in plan.cuts:
        messages.setdefault(cut.parent, []).append(gather(cut.operand, cut.ids, plan.batch))
    for s, step in enumerate(steps):
        if s in messages:
            product = reduce(torch.mul, messages.pop(s))
            messages.setdefault(step.parent, []).append(send(s, product))
    return messages[-1][0]
