"""Running the whole-tree kernels: schedules and tables kept between calls, counters, launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from htfkernels.cuda.whole_tree.geometry import Geometry, Machine, geometries, geometry
from htfkernels.cuda.whole_tree.tables import Gradients, backward_table, forward_table, messages
from htfkernels.cuda.whole_tree.tree import Tree, math_of
from htfkernels.runtime.cuda_module import call
from htfkernels.runtime.memory import Kept, keep_for_graph

__all__ = ["Evaluation", "backward", "evaluation", "forward"]

_MOST = 64  # batch sizes, and kinds of gradients, for which plans of one tree are kept


K = TypeVar("K")
V = TypeVar("V")


def _keep(kept: dict[K, V], key: K, value: V) -> None:
    if len(kept) >= _MOST:
        kept.pop(next(iter(kept)))
    kept[key] = value


def _machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return Machine()
    found = torch.cuda.get_device_properties(device)
    # What a block can have on 8.6 and 8.9, the least of the devices the kernels run on.
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    return Machine(found.multi_processor_count, shared)


class _Forward(NamedTuple):
    geometry: Geometry
    table: Tensor
    sizes: list[int]
    counters: int


class _Backward(NamedTuple):
    geometry: Geometry
    table: Tensor
    sums: Tensor
    sizes: list[int]
    gradients: Gradients


class Evaluation:
    """A program on one device, in one dtype and precision."""

    def __init__(
        self,
        program: Tensor,
        dtype: torch.dtype,
        math: int,
        device: torch.device,
        indexed: bool,
    ) -> None:
        self.tree = Tree(program, indexed)
        self._dtype, self._math, self._device = dtype, math, device
        self._machine = _machine(device)
        self._pairs: dict[int, tuple[Geometry, Geometry]] = {}
        self._forward: dict[tuple[int, bool], _Forward] = {}
        self._backward: dict[tuple[int, tuple[bool, ...]], _Backward] = {}
        self._tables: dict[tuple[object, ...], Tensor] = {}
        self._counters: dict[int, Tensor] = {}

    @property
    def how(self) -> tuple[torch.dtype, int, Machine]:
        """What plans depend on beside the tree and the batch."""
        return self._dtype, self._math, self._machine

    def _both(self, batch: int) -> tuple[Geometry, Geometry]:
        made = self._pairs.get(batch)
        if made is None:
            made = geometries(self.tree, batch, *self.how)
            _keep(self._pairs, batch, made)
        return made

    def fix(self, batch: int, pair: tuple[Geometry, Geometry]) -> None:
        """From now on, forward and backward passes over so many samples are launched like this, one
        after the other over one cut, in place of the way that the model of time chooses."""
        self._pairs[batch] = pair
        self._forward.pop((batch, True), None)
        self._backward = {key: made for key, made in self._backward.items() if key[0] != batch}

    def _sizes(self, g: Geometry) -> list[int]:
        launched = (g.rows, *self.tree.widths, len(g.cut.roots), g.part, g.slots)
        return [self._math, *launched, self.tree.outputs]

    def forward(self, batch: int, keeping: bool) -> _Forward:
        """The plan of a forward pass, with ``keeping`` of one that a backward pass follows."""
        made = self._forward.get((batch, keeping))
        if made is None:
            g = self._both(batch)[0] if keeping else geometry(self.tree, batch, *self.how)
            table = self._table(("forward", g.cut), lambda: forward_table(g.cut))
            sizes = [*self._sizes(g), messages(g.cut)[1]]
            made = _Forward(g, table, sizes, max(1, len(g.cut.above) * g.tiles))
            _keep(self._forward, (batch, keeping), made)
        return made

    def backward(self, batch: int, needs: tuple[bool, ...]) -> _Backward:
        """The plan of a backward pass for the gradients that are needed."""
        made = self._backward.get((batch, needs))
        if made is None:
            g, found = self._both(batch)[1], Gradients(self.tree, needs)
            one_write = g.tiles <= 1 or self._dtype != torch.bfloat16
            direct = g.splits == 1 and not found.shared and one_write
            key = ("backward", g.cut, needs, direct)
            table = self._table(key, lambda: backward_table(g.cut, needs, found, direct))
            sums = self._table(("sums", needs), lambda: found.sums)
            numbers = 0 if direct else found.numbers
            own = [g.splits, numbers, found.total, int(needs[-1]), found.largest]
            made = _Backward(g, table, sums, [*self._sizes(g), *own], found)
            _keep(self._backward, (batch, needs), made)
        return made

    def _table(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        made = self._tables.get(key)
        if made is None:
            made = make().to(self._device)
            _keep(self._tables, key, made)
        return made

    def counters(self, count: int) -> Tensor:
        """Zeros for a launch, which leaves them zero: each stream has its own, and so has each
        launch that a graph captures, since graphs may run beside each other."""
        if self._device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=self._device)
        if torch.cuda.is_current_stream_capturing():
            spare = _spares.setdefault(self._device, Spare(self._device, 0))
            keep_for_graph(spare.zeros, spare)
            return spare.take(count)
        if self._device not in _spares or _spares[self._device].left == 0:
            _spares[self._device] = Spare(self._device)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        made = self._counters.get(stream)
        if made is None or made.numel() < count:
            made = torch.zeros(2 * count, dtype=torch.int32, device=self._device)
            self._counters[stream] = made
        return made


class Spare:
    """Zeros that were written before a capture, for the launches that are captured: zeros made
    within would be written by a launch of their own at every replay.

    Args:
        device: where they are.
        size: how many.
    """

    def __init__(self, device: torch.device, size: int = 1 << 16) -> None:
        self.zeros = torch.zeros(size, dtype=torch.int32, device=device)
        self.left = size

    def take(self, count: int) -> Tensor:
        """Zeros that nobody else is given; made on the spot where too few are left."""
        if count > self.left:
            if count <= self.zeros.numel():
                self.left = 0  # the next call that is not captured makes another
            return torch.zeros(count, dtype=torch.int32, device=self.zeros.device)
        self.left -= count
        return self.zeros[self.left : self.left + count]


_spares: dict[torch.device, Spare] = {}
_evaluations: Kept[Evaluation] = Kept()


def evaluation(program: Tensor, weight: Tensor, x: Tensor, precision: str) -> Evaluation:
    """The evaluation of a program for weights like this one, on vectors or indices, made at the
    first call."""
    indexed = not x.is_floating_point()
    dtype, device = weight.dtype, weight.device

    def make() -> Evaluation:
        return Evaluation(program, dtype, math_of(dtype, precision), device, indexed)

    return _evaluations.of(program, (dtype, device, precision, indexed), make, x)


def forward(
    made: Evaluation, weights: Sequence[Tensor], x: Tensor, keeping: bool
) -> tuple[Tensor, Tensor]:
    """The result ``[B, out_features]`` and the messages, of vectors ``[B, sum D_n]`` or indices
    ``[B, N]``."""
    plan = made.forward(x.shape[0], keeping)
    keep_for_graph(x, plan)
    weights = [w.contiguous() for w in weights]
    counters = made.counters(plan.counters)
    result, kept = call("tree_forward", weights, x.contiguous(), plan.table, counters, plan.sizes)
    return result, kept


def backward(
    made: Evaluation, grad: Tensor, weights: Sequence[Tensor], x: Tensor, kept: Tensor,
    needs: Sequence[int | bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the weights and of ``x``; ``[0]`` where not needed, as those of indices."""
    plan = made.backward(x.shape[0], tuple(bool(n) for n in needs))
    if kept.numel() == 0:
        if len(plan.geometry.cut.roots) > 1:
            kept = forward(made, weights, x, True)[1]
        else:  # nothing is kept of a tree in one piece
            kept = kept.to(torch.float64 if kept.dtype == torch.float64 else torch.float32)
    keep_for_graph(x, plan)
    arguments = ([w.contiguous() for w in weights], x.contiguous(), kept, plan.table, plan.sums)
    all_weights, grad_x = call("tree_backward", grad.contiguous(), *arguments, plan.sizes)
    found = []
    for g, weight in enumerate(weights):
        if g in plan.gradients.places:
            at, shape = plan.gradients.places[g]
            # One call, of a third of the time that a slice and a view take.
            found.append(all_weights.as_strided(shape, (shape[1] * shape[2], shape[2], 1), at))
        else:
            found.append(weight.new_empty(0))
    return [*found, grad_x if needs[-1] else grad.new_empty(0)]
