"""The loops over samples behind index plans, on a GPU: ``csrc/plan/pairs.cu``, ``lists.cu``.

Indices and lists never leave the device. The host needs to know how many distinct pairs operands
have, since that decides which nodes are framed: all nodes of a height combine their operands
before the host waits, once, for these numbers. A plan takes one wait for each height above the
leaves, more where nodes have more than two children: ``k - 1`` for the most children ``k`` of a
height's nodes, fewer where combining ends early. Whether indices are in range comes with the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htfkernels.runtime import cuda_module
from htfkernels.schedule.index_build import Pairs, Request
from htfkernels.tree.layout import Layout

__all__ = ["OnDevice"]

IN_RANGE = 2**31 - 1


class OnDevice:
    """The loops of the CUDA module, on int32 tensors on the indices' device.

    Memory while a plan is built, beside the plan's own: 4 bytes for each index, and for each pair
    of operands of a height up to 8 bytes per sample; tables of up to 256 MB; where pairs are
    sorted, 24 bytes per sample.

    Attributes:
        waits: how often the host has waited for the device.
    """

    together = True

    def __init__(self, layout: Layout, indices: Tensor) -> None:
        self.indices = indices.detach()
        self.dims = list(layout.mode_dims)
        self.waits = 0
        self.checked = len(indices) == 0
        # For each mode the first sample whose index is out of range; for each request of a call
        # its distinct pairs.
        modes = len(self.dims)
        self.status = torch.full(
            (modes + max(modes // 2, 1),), IN_RANGE, dtype=torch.int32, device=indices.device
        )
        found = cuda_module.call("plan_columns", self.indices, self.dims, self.status)
        self.columns = dict(enumerate(found.unbind()))

    def column(self, mode: int) -> Tensor:
        return self.columns.pop(mode)

    def distinct_pairs(self, requests: Sequence[Request], limit: int) -> list[Pairs | None]:
        modes = len(self.dims)
        left, left_rows, right, right_rows = map(list, zip(*requests, strict=True))
        lists = cuda_module.call(
            "plan_pairs", left, left_rows, right, right_rows, limit, self.status, modes
        )
        counts = self.wait()[modes:]
        found = []
        for i in range(len(requests)):
            ids, left_ids, right_ids = lists[3 * i : 3 * i + 3]
            if (rows := counts[i]) <= limit:
                found.append((i, ids, left_ids[:rows], right_ids[:rows]))
        answers: list[Pairs | None] = [None] * len(requests)
        if not found:
            return answers
        which, all_ids, all_left, all_right = zip(*found, strict=True)
        starts = cuda_module.call("plan_starts", list(all_left), [left_rows[i] for i in which])
        grouped = cuda_module.call("plan_group", list(all_right), [right_rows[i] for i in which])
        parts = (all_ids, all_left, all_right, starts, grouped[: len(which)], grouped[len(which) :])
        for i, *of_pair in zip(which, *parts, strict=True):
            answers[i] = Pairs(*of_pair)
        return answers

    def group(self, ids: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
        start, order = cuda_module.call("plan_group", [ids], [buckets])
        return start, order

    def joined(self, pieces: list[Tensor]) -> Tensor:
        if not self.checked:
            self.wait()
        lists = torch.cat(pieces)
        pieces.clear()
        return lists

    def wait(self) -> list[int]:
        """The status, once the device has come so far.

        Raises:
            IndexError: an index is out of range, the first of the lowest mode that has one.
        """
        values: list[int] = self.status.tolist()
        self.waits += 1
        if not self.checked:
            for mode, dim in enumerate(self.dims):
                if (sample := values[mode]) != IN_RANGE:
                    raise IndexError(
                        f"index {int(self.indices[sample, mode])} of mode {mode} is out of range, "
                        f"its dimension is {dim}"
                    )
            self.checked = True
        return values
