"""Who is timed at spectra: this package, PyTorch in one batch per level, tensap, and the tensor.

tensap computes with NumPy, whose threads are not those that ``--threads`` sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from math import log10
from typing import Any

import torch
from torch import Tensor

import htfkernels as hk
from htflearn.bench import Implementation, Prepared, Skipped, folded_spectra
from htflearn.bench.implementations import OURS
from htflearn.bench.spectra import LARGEST_TENSOR, total
from htflearn.bench.workloads import PASSES, Problem

__all__ = ["SPECTRA"]

Passes = dict[str, Callable[[], Any] | str]


def _prepared(
    passes: Mapping[str, Callable[[], Any] | str],
    missing: str,
    by_node: Callable[[Any], list[Tensor]],
) -> Prepared:
    by_pass = {which: passes.get(which, missing) for which in PASSES}
    return Prepared(None, [], by_pass=by_pass, by_node=by_node)


def _htfkernels(problem: Problem) -> Prepared:
    return _prepared(_ours(problem), "", _of_dictionary)


def _ours(problem: Problem) -> dict[str, Callable[[], Any]]:
    model = problem.model
    return {
        "forward-qr": lambda: model.matricization_spectra(method="qr"),
        "forward-gram": lambda: model.matricization_spectra(method="gram"),
        "forward-renyi2": model.renyi2_ranks,
        "backward-effective": lambda: total(
            hk.effective_rank, model.matricization_spectra(method="gram")
        ),
        "backward-renyi2": lambda: torch.stack(list(model.renyi2_ranks().values())).sum(),
    }


def _node_by_node(problem: Problem) -> Prepared:
    """What a GPU's kernels are held against."""
    entries = problem.workload.layout.num_entries
    if problem.device == "cpu" and entries > LARGEST_TENSOR:
        raise Skipped(f"on a CPU it takes small tensors, not 10^{log10(entries):.0f} entries")

    def by_reference(compute: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with hk.use_backend("reference"):
                return compute()

        return run

    passes: Passes = {which: by_reference(run) for which, run in _ours(problem).items()}
    return _prepared(passes, "", _of_dictionary)


def _by_qr(problem: Problem) -> Prepared:
    model = problem.model
    passes: Passes = {
        "backward-effective": lambda: total(
            hk.effective_rank, model.matricization_spectra(method="qr")
        )
    }
    return _prepared(passes, "it differs in derivatives of effective ranks only", _of_dictionary)


def _by_values(problem: Problem) -> Prepared:
    model = problem.model

    def ranks() -> dict[hk.Node, Tensor]:
        spectra = model.matricization_spectra(method="gram")
        by_length: dict[int, list[hk.Node]] = {}
        for node, s in spectra.items():
            by_length.setdefault(len(s), []).append(node)
        found: dict[hk.Node, Tensor] = {}
        for nodes in by_length.values():
            stacked = torch.stack([spectra[node] for node in nodes])
            found.update(zip(nodes, hk.renyi2_rank(stacked).unbind(0), strict=True))
        return {node: found[node] for node in spectra}

    passes: Passes = {
        "forward-renyi2": ranks,
        "backward-renyi2": lambda: total(
            hk.renyi2_rank, model.matricization_spectra(method="gram")
        ),
    }
    return _prepared(passes, "it differs in renyi2 ranks only", _of_dictionary)


def _of_dictionary(result: Mapping[hk.Node, Tensor]) -> list[Tensor]:
    return list(result.values())


def _of_levels(result: Sequence[Tensor]) -> list[Tensor]:
    return [s for level in result for s in level.unbind(0)]


def _weights_of_levels(problem: Problem) -> list[Tensor]:
    layout = problem.workload.layout
    levels = layout.tree.levels
    halved = all(
        tuple(node.children) == tuple(level[2 * i : 2 * i + 2])
        for level, above in pairwise(levels)
        for i, node in enumerate(above)
    )
    if not halved or len(layout.groups) != len(levels):
        raise Skipped("it takes balanced binary trees whose levels have one shape")
    return list(problem.model.weights)


def _folded(problem: Problem) -> Prepared:
    weights = _weights_of_levels(problem)
    passes: Passes = {
        "forward-qr": lambda: folded_spectra.by_qr(weights),
        "forward-gram": lambda: folded_spectra.by_gram(weights),
        "forward-renyi2": lambda: folded_spectra.renyi2_ranks_by_gram(weights),
        "backward-effective": lambda: _summed(
            map(folded_spectra.effective_ranks, folded_spectra.by_gram(weights))
        ),
        "backward-renyi2": lambda: _summed(folded_spectra.renyi2_ranks_by_gram(weights)),
    }
    return _prepared(passes, "", _of_levels)


def _summed(ranks: Any) -> Tensor:
    return torch.stack([r.sum() for r in ranks]).sum()


def _tensap(problem: Problem) -> Prepared:
    if find_spec("tensap") is None:
        raise Skipped("it is not installed: pip install tensap")
    if problem.device != "cpu":
        raise Skipped("it computes with NumPy, on a CPU")
    from htfkernels.convert import to_tensap

    model = problem.model
    try:
        tensor = to_tensap(model)
    except ValueError as error:
        raise Skipped(str(error)) from error
    count = len(model.tree.nodes)

    def by_node(values: Any) -> list[Tensor]:
        return [torch.from_numpy(values[count - i - 1]) for i in range(count - 1)]

    passes: Passes = {
        "forward-qr": "it takes square roots of Gram matrices' eigenvalues, which hold 1e-7",
        "forward-gram": tensor.singular_values,
    }
    return _prepared(passes, "it gives singular values only, without derivatives", by_node)


def _dense(problem: Problem, tensor: Callable[[], Tensor]) -> Prepared:
    """The end tensor, and of every matricization the singular values."""
    layout = problem.workload.layout
    if layout.num_entries > LARGEST_TENSOR:
        raise Skipped(f"the tensor has 10^{log10(layout.num_entries):.0f} entries")
    nodes = layout.tree.nodes[:-1]
    rows = [sorted(node.modes) for node in nodes]
    orders = [[*modes, *(n for n in range(layout.tree.order) if n not in modes)] for modes in rows]

    def matricizations() -> list[Tensor]:
        whole = tensor().reshape(layout.mode_dims)
        flat = [whole.permute(order) for order in orders]
        return [x.flatten(len(m)).flatten(0, len(m) - 1) for x, m in zip(flat, rows, strict=True)]

    def values() -> list[Tensor]:
        return [torch.linalg.svdvals(m) for m in matricizations()]

    def renyi2() -> list[Tensor]:
        ranks = []
        for m in matricizations():
            gram = m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m
            gram = gram / gram.detach().amax()
            ranks.append(gram.trace().square() / gram.square().sum())
        return ranks

    passes: Passes = {
        "forward-qr": values,
        "forward-gram": values,
        "forward-renyi2": renyi2,
        "backward-effective": lambda: _summed(
            folded_spectra.effective_ranks(s[None]) for s in values()
        ),
        "backward-renyi2": lambda: _summed(renyi2()),
    }
    return _prepared(passes, "", list)


def _batch_major(problem: Problem) -> Prepared:
    weights, dims = _weights_of_levels(problem), problem.workload.layout.mode_dims
    entries: list[Tensor] = []

    def tensor() -> Tensor:
        h = torch.stack([w[at] for w, at in zip(weights[0], entries, strict=True)], 1)
        for w in weights[1:]:
            h = torch.einsum("bnr,nrs->bns", h[:, 0::2] * h[:, 1::2], w)
        return h[:, 0, 0]

    prepared = _dense(problem, tensor)
    axes = torch.meshgrid([torch.arange(d, device=problem.device) for d in dims], indexing="ij")
    entries += [axis.flatten() for axis in axes]
    return prepared


SPECTRA: dict[str, Implementation] = {
    OURS: Implementation("this package; effective ranks by Gram matrices", _htfkernels),
    f"{OURS}, QR": Implementation("effective ranks by QR decompositions", _by_qr),
    f"{OURS}, values": Implementation("renyi2 ranks of its singular values", _by_values),
    "linalg, node by node": Implementation(
        "torch.linalg in a loop over nodes: this package's reference", _node_by_node
    ),
    "folded linalg": Implementation("batched torch.linalg, by QR or Gram matrices", _folded),
    "tensap": Implementation("singular_values() of its TreeBasedTensor", _tensap),
    "batch-major, dense": Implementation(
        "the tensor as the paper's code, svdvals of each matricization", _batch_major
    ),
    f"{OURS}, dense": Implementation(
        "its full tensor, svdvals of each matricization",
        lambda problem: _dense(problem, problem.model.full_tensor),
    ),
}
"""By name, in the order of the tables."""
