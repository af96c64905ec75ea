"""The loops over samples behind index plans, on a GPU: ``csrc/plan/pairs.cu``, ``lists.cu``.

Indices and lists never leave the device. The host needs to know how many distinct pairs operands
have, since that decides which nodes are framed: all nodes of a height combine their operands
before the host waits, once, for these numbers. A plan takes one wait for each height above the
leaves, more where nodes have more than two children: ``k - 1`` for the most children ``k`` of a
height's nodes, fewer where combining ends early. Whether indices are in range comes with the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from htfkernels.cuda import module
from htfkernels.index_build import Request
from htfkernels.layout import Layout

__all__ = ["OnDevice"]

IN_RANGE = 2**31 - 1


class OnDevice:
    """The loops of the CUDA module, on int32 tensors on the indices' device.

    Memory while a plan is built, beside the plan's own: 4 bytes for each index, and for each pair
    of operands of a height up to 8 bytes per sample.

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
        found = module.call("plan_columns", self.indices, self.dims, self.status)
        self.columns = dict(enumerate(found.unbind()))

    def column(self, mode: int) -> Tensor:
        return self.columns.pop(mode)

    def distinct_pairs(self, requests: Sequence[Request], limit: int) -> list[Any]:
        modes = len(self.dims)
        found = [
            module.call("plan_pairs", *request, limit, self.status, modes + i)
            for i, request in enumerate(requests)
        ]
        counts = self.wait()[modes:]
        return [
            (ids, left[:rows], right[:rows]) if rows <= limit else None
            for (ids, left, right), rows in zip(found, counts, strict=False)
        ]

    def group(self, ids: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
        start, order = module.call("plan_group", ids, buckets)
        return start, order

    def starts(self, ids: Tensor, buckets: int) -> Tensor:
        return module.call("plan_starts", ids, buckets)

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
                        f"IndexPlan: index {int(self.indices[sample, mode])} of mode {mode} is out "
                        f"of range, its dimension is {dim}"
                    )
            self.checked = True
        return values
