"""What is timed: models, their sizes and their data."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

import htfkernels as hk
from htfkernels.testing import random_tree
from htflearn.bench import spectra

__all__ = ["PASSES", "SCALES", "Kind", "Problem", "Workload", "workloads"]

Kind = Literal["vectors", "indices", "tensor", "spectra"]

PASSES = {
    "forward": "forward",
    "backward": "forward+backward",
    "inputs": "forward+backward, inputs",
    "forward-qr": "forward, to 1e-10",
    "forward-gram": "forward, to 1e-7",
    "forward-renyi2": "forward, renyi2",
    "backward-effective": "forward+backward, effective",
    "backward-renyi2": "forward+backward, renyi2",
}
"""Name on the command line -> name in tables and files. ``backward`` differentiates by the weights,
``inputs`` by weights and vectors. Those with a dash are of spectra: singular values to 1e-10 or
1e-7 of the largest, Rényi-2 ranks, and derivatives of the sum of effective or Rényi-2 ranks."""

SCALES = ("full", "tiny")
_SEED = 0


@dataclass(frozen=True)
class Workload:
    """A model and what is asked of it.

    Attributes:
        name, summary: for tables.
        kind: evaluated on vectors, at indices, or as the full tensor; or the singular values of the
            matricizations at all nodes but the root.
        layout: tree and shapes.
        batch: number of vectors or indices; of entries for the full tensor.
        init_std: of the weights, as :class:`htfkernels.HTF` takes it.
        distinct: whether the indices are different from each other.
        near_one: weights and vectors near 1 over the number of terms, so that messages stay near 1
            and little cancels: in a deep tree of normal numbers float32 has no right digits left.
        dtype: of the weights, whatever is asked for; None: what is asked for.
        needs_gpu: too large for a CPU's memory and patience.
    """

    name: str
    summary: str
    kind: Kind
    layout: hk.Layout
    batch: int
    init_std: float | None = None
    distinct: bool = False
    near_one: bool = False
    dtype: torch.dtype | None = None
    needs_gpu: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        """Those of :data:`PASSES` that make sense: only vectors have gradients."""
        if self.kind == "spectra":
            return tuple(name for name in PASSES if "-" in name)
        return ("forward", "backward", "inputs")[: 3 if self.kind == "vectors" else 2]

    @property
    def sizes(self) -> dict[str, Any]:
        """N, D, R and B (not of spectra); a pair is the range of sizes that differ."""
        dims, ranks = self.layout.mode_dims, self.layout.ranks
        span = {"D": (min(dims), max(dims)), "R": (min(ranks), max(ranks))}
        either = {k: low if low == high else [low, high] for k, (low, high) in span.items()}
        batch = {} if self.kind == "spectra" else {"B": self.batch}
        return {"N": self.layout.tree.order, **either, **batch}

    def build(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        """The model and its data, the same numbers in every run and on every device."""
        layout, dtype = self.layout, self.dtype or dtype
        ranks = dict(zip(layout.tree.interior, layout.ranks, strict=True))
        model = hk.HTF(layout.tree, layout.mode_dims, ranks, init_std=self.init_std)
        generator = torch.Generator().manual_seed(_SEED)
        model.reset_parameters(generator)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        if self.near_one:
            with torch.no_grad():
                for group, weight in zip(layout.groups, model.weights, strict=True):
                    spread = torch.randn(group.shape, generator=generator).mul_(0.1)
                    weight.copy_((1 + spread) / (group.rows if group.level else 1))

        vectors: Tensor | list[Tensor] | None = None
        indices = None
        dims, batch = layout.mode_dims, self.batch
        shape: tuple[int, ...] = (batch,)
        if self.kind == "vectors":
            same = len(set(dims)) == 1
            vectors = draw(batch, len(dims), dims[0]) if same else [draw(batch, d) for d in dims]
            if self.near_one and isinstance(vectors, Tensor):
                vectors = (1 + 0.1 * vectors) / dims[0]
        elif self.kind == "tensor":
            shape = dims
        elif self.kind == "spectra":
            one = torch.ones((), dtype=dtype, device=device)
            return Problem(self, model.to(device, dtype), None, None, one)
        elif self.distinct:
            flat = torch.randperm(prod(dims), generator=generator)[:batch]
            indices = torch.stack(torch.unravel_index(flat, dims), 1)
        else:
            columns = [torch.randint(d, (batch,), generator=generator) for d in dims]
            indices = torch.stack(columns, 1)
        if indices is not None:
            indices = indices.to(device)
        return Problem(self, model.to(device, dtype), vectors, indices, draw(*shape))


@dataclass(frozen=True)
class Problem:
    """A workload with its numbers.

    Attributes:
        workload: what it is.
        model: holds the weights that all implementations use.
        vectors: ``[B, N, D]``, or ``N`` tensors ``[B, D_n]`` where the dimensions differ.
        indices: ``[B, N]``.
        cotangent: shaped as the result; the loss is ``<cotangent, result>``. Of spectra it is 1,
            and the result to differentiate a sum of ranks.
    """

    workload: Workload
    model: hk.HTF
    vectors: Tensor | list[Tensor] | None
    indices: Tensor | None
    cotangent: Tensor

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.cotangent.device.type

    @property
    def columns(self) -> list[Tensor]:
        """The vectors of each mode, ``[B, D_n]``."""
        if self.vectors is None:
            return []
        return list(self.vectors.unbind(1) if isinstance(self.vectors, Tensor) else self.vectors)

    def flops(self, which: str) -> int | None:
        """Multiply-adds times two of the matrix products that a pass needs.

        On vectors: one row of the batch at a time through every node. At indices and for the full
        tensor: every node once for each different index tuple of its own modes, leaves being rows
        that are looked up; an implementation that does not share this work does more than it is
        credited with. Of spectra only singular values by QR are counted, see
        :func:`htflearn.bench.spectra.multiply_adds`, and only where the tensor is too large to be
        formed: of a small one they may take less.

        Args:
            which: a key of :data:`PASSES`.

        Returns:
            the number, or None where it is not counted or the index tuples are too long to be told
            apart.
        """
        layout = self.workload.layout
        if self.workload.kind == "spectra":
            if which != "forward-qr" or layout.num_entries <= spectra.LARGEST_TENSOR:
                return None
            count = spectra.multiply_adds(layout)
            return None if count is None else 2 * count
        leaves = sum(2 * len(g.nodes) * g.rows * g.cols for g in layout.groups if not g.level)
        leaves *= self.workload.batch
        if self.workload.kind == "vectors":
            forward = layout.flops(self.workload.batch)
        elif self._rows is None:
            return None
        else:
            leaves, forward = 0, 0
            for node, rows in zip(layout.tree.interior, self._rows, strict=True):
                forward += 2 * rows * prod(layout.shape(node))
        # Backward: a product for each weight, one for each interior node's input, and with
        # `inputs` one for each leaf's.
        return {"forward": forward, "backward": 3 * forward - leaves, "inputs": 3 * forward}[which]

    def bytes(self, which: str) -> int:
        """Bytes that a pass has to move at least: every operand read and every result written once,
        by the forward and again by the backward pass, whatever lies between them.

        Args:
            which: a key of :data:`PASSES`.
        """
        size = self.cotangent.element_size()
        weights = sum(w.numel() for w in self.model.weights) * size
        inputs = sum(x.numel() for x in self.columns) * size
        if self.indices is not None:
            inputs = self.indices.numel() * self.indices.element_size()
        results = self.cotangent.numel() * size
        layout = self.workload.layout
        if which in ("forward-qr", "forward-gram"):
            results = spectra.num_values(layout) * size
        elif which == "forward-renyi2":
            results = (len(layout.tree.nodes) - 1) * size
        forward = weights + inputs + results
        both = 2 * forward + weights
        return {"forward": forward, "backward": both, "inputs": both + inputs}[which.split("-")[0]]

    @cached_property
    def _rows(self) -> list[int] | None:
        """Different index tuples below each interior node."""
        dims, interior = self.workload.layout.mode_dims, self.workload.layout.tree.interior
        if self.indices is None:
            return [prod(dims[n] for n in node.modes) for node in interior]
        if prod(dims) >= 2**63:
            return None
        counts, indices = [], self.indices.cpu()
        for node in interior:
            key = torch.zeros(len(indices), dtype=torch.int64)
            for n in node.modes:
                key = key * dims[n] + indices[:, n]
            counts.append(len(key.unique()))
        return counts


def workloads(scale: str = "full") -> dict[str, Workload]:
    """All workloads by name.

    Args:
        scale: ``"full"``, or ``"tiny"`` for trees of the same kinds that take milliseconds.

    Example:
        >>> list(workloads("tiny"))[:3]
        ['wide', 'huge', 'medium']
    """
    tiny = scale == "tiny"
    made = [make(tiny) for make in _MAKERS]
    return {workload.name: workload for workload in made}


def _balanced(
    name: str,
    summary: str,
    full: tuple[int, int, int, int],
    small: tuple[int, int, int, int],
    needs_gpu: bool = False,
) -> Callable[[bool], Workload]:
    def make(tiny: bool) -> Workload:
        order, dim, rank, batch = small if tiny else full
        layout = hk.Layout.make(hk.ModeTree.balanced(order), dim, rank)
        large = needs_gpu and not tiny
        near_one = order > 256
        return Workload(name, summary, "vectors", layout, batch, near_one=near_one, needs_gpu=large)

    return make


def _ragged(tiny: bool) -> Workload:
    order, batch = (12, 20) if tiny else (100, 300)
    tree, draw = random_tree(order, _SEED), random.Random(_SEED)
    dims = [draw.randint(3, 17) for _ in range(order)]
    ranks = {node: draw.randint(7, 61) for node in tree.interior}
    summary = "vectors, irregular tree of 1 to 4 children, all sizes different"
    return Workload("ragged", summary, "vectors", hk.Layout.make(tree, dims, ranks), batch)


def _paper(tiny: bool) -> Workload:
    dim, rank, batch = (3, 8, 40) if tiny else (8, 512, 2048)
    layout = hk.Layout.make(hk.ModeTree.balanced(4), dim, rank)
    summary = "indices, the paper's completion setting: half of the entries of a small tensor"
    return Workload("paper", summary, "indices", layout, batch, init_std=0.01, distinct=True)


def _completion(tiny: bool) -> Workload:
    dim, rank, batch = (5, 4, 1000) if tiny else (50, 32, 1_000_000)
    layout = hk.Layout.make(hk.ModeTree.balanced(6), dim, rank)
    return Workload("completion", "indices, many of a large tensor", "indices", layout, batch)


def _dense(tiny: bool) -> Workload:
    order, dim, rank = (4, 4, 4) if tiny else (8, 8, 32)
    layout = hk.Layout.make(hk.ModeTree.balanced(order), dim, rank)
    return Workload("dense", "the full tensor", "tensor", layout, layout.num_entries)


def _spectra(
    name: str, summary: str, full: tuple[int, int, int], small: tuple[int, int, int], **how: Any
) -> Callable[[bool], Workload]:
    def make(tiny: bool) -> Workload:
        order, dim, rank = small if tiny else full
        layout = hk.Layout.make(hk.ModeTree.balanced(order), dim, rank)
        return Workload(
            f"spectra-{name}",
            f"singular values at all nodes, float64, {summary}",
            "spectra",
            layout,
            batch=1,
            dtype=torch.float64,
            **how,
        )

    return make


_MAKERS: list[Callable[[bool], Workload]] = [
    _balanced("wide", "vectors, large matrices", (256, 64, 128, 512), (8, 8, 16, 32)),
    _balanced(
        "huge",
        "vectors, many modes, large matrices, for a GPU",
        (1024, 64, 256, 4096),
        (32, 4, 8, 16),
        needs_gpu=True,
    ),
    _balanced("medium", "vectors, medium matrices", (64, 16, 64, 1024), (16, 4, 8, 32)),
    _balanced("deep", "vectors, many modes, small matrices", (1024, 8, 32, 256), (32, 2, 4, 16)),
    _balanced("small", "vectors, few small matrices", (16, 8, 16, 1024), (8, 4, 4, 32)),
    _balanced("few", "vectors, a small batch: latency", (32, 16, 32, 64), (8, 4, 4, 8)),
    _balanced("one", "one vector per mode: latency", (64, 16, 64, 1), (8, 4, 4, 1)),
    _ragged,
    _paper,
    _completion,
    _dense,
    _spectra("64", "medium tree", (64, 16, 32), (8, 3, 4)),
    _spectra("1024", "many modes", (1024, 8, 32), (8, 2, 3)),
    _spectra("256", "large matrices", (256, 16, 64), (8, 3, 2)),
    _spectra("paper", "the paper's completion setting", (4, 8, 512), (4, 3, 8), init_std=0.01),
]
