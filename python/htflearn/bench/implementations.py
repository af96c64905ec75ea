"""Who is timed: this package, and the ways to compute the same with PyTorch and other libraries.

All use the same weights. Every implementation gets the vectors in the memory layout that suits it
best, made before the clock starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec

import torch
from torch import Tensor

import htfkernels as hk
from htflearn.bench import Implementation, Prepared, Skipped
from htflearn.bench.circuit import circuit
from htflearn.bench.device import free_bytes
from htflearn.bench.workloads import Problem

__all__ = ["IMPLEMENTATIONS", "OURS", "Network", "compiled", "engine", "folded", "network"]

OURS = "htfkernels"
_LARGEST_INTERMEDIATE = 2**28
_PATH_TRIALS, _PATH_SECONDS = 128, 20.0


def engine(problem: Problem) -> Prepared:
    """This package, at indices with a plan."""
    model, indices = problem.model, problem.indices
    if indices is None:
        return _unplanned(problem)
    start = time.perf_counter()
    plan = model.index_plan(indices)
    seconds = time.perf_counter() - start
    return Prepared(lambda: model.at(plan), [], setup_seconds=seconds)


def _unplanned(problem: Problem) -> Prepared:
    model, vectors, indices = problem.model, problem.vectors, problem.indices
    if problem.workload.kind == "tensor":
        return Prepared(model.full_tensor, [])
    if indices is not None:
        return Prepared(lambda: model.at(indices), [])
    if isinstance(vectors, Tensor):
        x = vectors.detach().clone()
        return Prepared(lambda: model(x), [x], lambda grads: list(grads[0].unbind(1)))
    columns = [x.detach().clone() for x in problem.columns]
    return Prepared(lambda: model(columns), columns)


def _no_plan(problem: Problem) -> Prepared:
    indices, model = problem.indices, problem.model
    if indices is None:
        raise Skipped("it differs at indices only")
    fresh = [indices]

    def before() -> None:
        # A tensor not seen before: nothing that is remembered of an earlier one helps.
        fresh[0] = indices.clone()

    def forward() -> Tensor:
        with hk.use_index_plans(False):
            return model.at(fresh[0])

    return Prepared(forward, [], before=before)


def _distinct(problem: Problem) -> Prepared:
    if problem.indices is None:
        raise Skipped("it differs at indices only")
    return _on_reference(engine(problem))


def _on_reference(prepared: Prepared) -> Prepared:
    inner = prepared.computes("forward")

    def forward() -> Tensor:
        with hk.use_backend("reference"):
            return inner()

    prepared.forward = forward
    return prepared


def _reference(problem: Problem) -> Prepared:
    layout = problem.workload.layout
    if problem.workload.kind == "tensor":
        # The root's Khatri-Rao product, saved for the backward, and gradients of that size.
        root = layout.shape(layout.tree.root)[0]
        needed = 4 * problem.workload.batch * root * problem.cotangent.element_size()
        free = free_bytes(problem.device)
        if free is not None and needed > free:
            raise Skipped(f"it needs {needed / 2**30:.0f} GB and {free / 2**30:.0f} GB are free")
    return _on_reference(_unplanned(problem))


def _one_group_per_level(layout: hk.Layout) -> bool:
    levels = [g.level for g in layout.groups]
    return len(set(levels)) == len(levels)


def _gather(
    layout: hk.Layout, nodes: Sequence[int], dim: int
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Messages of the groups -> those of the nodes, folded; a view where they lie evenly."""
    places = [layout.location[i] for i in nodes]
    group, first = places[0]
    step = places[1][1] - first if len(places) > 1 else 1
    if step > 0 and places == [(group, first + k * step) for k in range(len(places))]:
        index = (slice(None),) * dim + (slice(first, places[-1][1] + 1, step),)
        return lambda messages: messages[group][index]
    return lambda messages: torch.stack([messages[g].select(dim, s) for g, s in places], dim)


def _walk(
    layout: hk.Layout, dim: int, device: str
) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """``(weights, messages of the leaf groups) -> [B]``, nodes along dimension ``dim``."""
    nodes, steps = layout.tree.nodes, []
    for group in layout.groups:
        if not group.level:
            continue
        # Nodes with equally many children are multiplied at once, then put in the weights' order.
        counts = sorted({len(nodes[i].children) for i in group.nodes})
        parts = [[i for i in group.nodes if len(nodes[i].children) == count] for count in counts]
        gathers = [
            [_gather(layout, [nodes[i].children[k].index for i in part], dim) for k in range(count)]
            for count, part in zip(counts, parts, strict=True)
        ]
        mixed = [i for part in parts for i in part]
        order = torch.tensor([mixed.index(i) for i in group.nodes], device=device)
        steps.append((gathers, order))

    def walk(weights: list[Tensor], leaves: list[Tensor]) -> Tensor:
        messages = list(leaves)
        for weight, (gathers, order) in zip(weights[len(leaves) :], steps, strict=True):
            products = [reduce(torch.mul, [g(messages) for g in part]) for part in gathers]
            p = products[0]
            if len(products) > 1:
                p = torch.cat(products, dim).index_select(dim, order)
            messages.append(_multiply(p, weight, dim))
        return messages[-1].select(dim, 0)[:, 0]

    return walk


def _multiply(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    return torch.einsum("bnr,nrs->bns", x, weight) if dim else torch.bmm(x, weight)


def folded(problem: Problem, dim: int = 0, compiled: str | None = None) -> Prepared:
    """Level by level, same-shaped nodes in one product; nodes along dimension ``dim``.

    Args:
        problem: vectors or indices.
        dim: 0, or 1: the batch comes first, as in the paper's code.
        compiled: a mode of ``torch.compile``; None: run as written.
    """
    layout = problem.workload.layout
    if problem.workload.kind == "tensor":
        raise Skipped("it evaluates on vectors and at indices only")
    walk = _walk(layout, dim, problem.device)
    weights = list(problem.model.weights)
    indices, columns = problem.indices, problem.columns
    groups = [g for g in layout.groups if not g.level]
    inputs: list[Tensor] = []
    if indices is None:
        inputs = [torch.stack([columns[n].detach() for n in g.nodes], dim) for g in groups]
        lookups = []
    else:
        lookups = [_lookup(indices, g.nodes, dim) for g in groups]

    def run(weights: list[Tensor], inputs: list[Tensor]) -> Tensor:
        leaves = [_multiply(x, w, dim) for x, w in zip(inputs, weights, strict=False)]
        leaves += [w[at] for w, at in zip(weights, lookups, strict=False)]
        return walk(weights, leaves)

    if compiled is not None:
        # Dynamo counts recompilations by code object, which all workloads share, and at its limit
        # it would stop to compile.
        torch._dynamo.reset()
        run = torch.compile(run, dynamic=False, fullgraph=True, mode=compiled)

    def by_mode(grads: Sequence[Tensor]) -> list[Tensor]:
        modes = [n for g in layout.groups if not g.level for n in g.nodes]
        parts = [part for grad in grads for part in grad.unbind(dim)]
        return [part for _, part in sorted(zip(modes, parts, strict=True), key=lambda x: x[0])]

    return Prepared(lambda: run(weights, inputs), inputs, by_mode)


def _lookup(indices: Tensor, modes: Sequence[int], dim: int) -> tuple[Tensor, Tensor]:
    number, chosen = torch.arange(len(modes), device=indices.device), indices[:, list(modes)]
    return (number, chosen) if dim else (number[:, None], chosen.T.contiguous())


def compiled(problem: Problem, mode: str = "default") -> Prepared:
    """:func:`folded` under ``torch.compile``."""
    layout = problem.workload.layout
    if problem.workload.kind != "tensor" and not _one_group_per_level(layout):
        raise Skipped(f"compiling {len(layout.tree.nodes)} nodes one by one takes many minutes")
    return folded(problem, compiled=mode)


def _batch_major(problem: Problem) -> Prepared:
    if problem.workload.kind != "tensor" and not _one_group_per_level(problem.workload.layout):
        raise Skipped("the paper's code takes trees whose levels have one shape")
    return folded(problem, dim=1)


@dataclass(frozen=True)
class Network:
    """A workload as one contraction.

    Attributes:
        equation: of ``einsum``; samples are an index that many operands share.
        operands: makes them, differentiable by the weights and by ``inputs``.
        inputs: leaf tensors of vectors.
        path: pairs to contract, the best that opt_einsum found.
    """

    equation: str
    operands: Callable[[], list[Tensor]]
    inputs: list[Tensor]
    path: list[tuple[int, ...]]


def network(problem: Problem) -> Network:
    """The whole tree with its vectors or indices as one contraction.

    Raises:
        Skipped: opt_einsum is not there, or finds no path without a huge intermediate tensor.
    """
    if find_spec("opt_einsum") is None:
        raise Skipped("opt_einsum is not installed")
    import opt_einsum as oe

    layout, kind = problem.workload.layout, problem.workload.kind
    tree = layout.tree
    order = tree.order
    # Symbols: node i's input index (a mode's, or its local components'), then the batch.
    letter = [oe.get_symbol(i) for i in range(len(tree.parents))]
    row = oe.get_symbol(len(letter))
    above = [letter[p] if p >= 0 else "" for p in tree.parents]
    inputs = [x.detach().clone() for x in problem.columns]
    terms = [row + letter[n] for n in range(len(inputs))]
    for i in range(len(letter)):
        looked_up = kind == "indices" and i < order
        terms.append((row if looked_up else letter[i]) + above[i])
    output = "".join(letter[:order]) if kind == "tensor" else row
    slots = [layout.location[i] for i in range(len(letter))]
    root = tree.root.index
    lookups = [] if problem.indices is None else list(problem.indices.unbind(1))

    def operands() -> list[Tensor]:
        split = [w.unbind(0) for w in problem.model.weights]
        weights = [split[g][s] for g, s in slots]
        weights[root] = weights[root][:, 0]
        for n, lookup in enumerate(lookups):
            weights[n] = weights[n][lookup]
        return [*inputs, *weights]

    equation = f"{','.join(terms)}->{output}"
    shapes = [tuple(t.shape) for t in operands()]
    found = [
        oe.contract_path(equation, *shapes, shapes=True, optimize=how)
        for how in ("auto", oe.RandomGreedy(max_repeats=_PATH_TRIALS, max_time=_PATH_SECONDS))
    ]
    path, info = min(found, key=lambda f: f[1].opt_cost)
    if info.largest_intermediate > _LARGEST_INTERMEDIATE:
        size = f"{float(info.largest_intermediate):.1e}"
        raise Skipped(f"the best path found has an intermediate tensor of {size} numbers")
    return Network(equation, operands, inputs, path)


def _opt_einsum(problem: Problem) -> Prepared:
    whole = network(problem)
    import opt_einsum as oe

    shapes = [tuple(t.shape) for t in whole.operands()]
    expression = oe.contract_expression(whole.equation, *shapes, optimize=whole.path)
    return Prepared(lambda: expression(*whole.operands(), backend="torch"), whole.inputs)


def _einsum_tensor(problem: Problem) -> Prepared:
    layout = problem.workload.layout
    tree = layout.tree
    if problem.workload.kind != "tensor":
        raise Skipped("it builds the full tensor only")
    if any(len(node.children) != 2 for node in tree.interior):
        raise Skipped("it takes trees whose nodes have two children")

    def forward() -> Tensor:
        split = [w.unbind(0) for w in problem.model.weights]
        frames: dict[int, Tensor] = {}
        for node in tree.nodes:
            group, slot = layout.location[node.index]
            weight = split[group][slot]
            if not node.is_leaf:
                left, right = (frames.pop(child.index) for child in node.children)
                weight = torch.einsum("ar,br,rs->abs", left, right, weight).flatten(0, 1)
            frames[node.index] = weight
        return frames[tree.root.index].reshape(layout.mode_dims)

    if [n for child in tree.root.children for n in child.modes] != list(range(tree.order)):
        raise Skipped("it takes trees that merge neighbours")
    return Prepared(forward, [])


IMPLEMENTATIONS: dict[str, Implementation] = {
    OURS: Implementation("this package; at indices with a plan made before", engine),
    f"{OURS}, no plan": Implementation("this package, at indices not seen before", _no_plan),
    "distinct, PyTorch": Implementation(
        "each node once per distinct sub-index, in plain PyTorch", _distinct
    ),
    "folded bmm": Implementation("one torch.bmm for the same-shaped nodes of a level", folded),
    "folded bmm, compiled": Implementation("the same under torch.compile", compiled, limit=300.0),
    "batch-major": Implementation("einsum on [B, node, R], as the paper's code", _batch_major),
    "reference": Implementation("this package's formulas in plain PyTorch, grouped", _reference),
    "opt_einsum": Implementation("opt_einsum's best path for the whole network", _opt_einsum),
    "cirkit": Implementation("the circuit that libcirkit compiles, folded and fused", circuit),
    "einsum tensor": Implementation("torch.einsum of two children's frames", _einsum_tensor),
}
"""By name, in the order of the tables."""
