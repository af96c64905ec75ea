"""The spectra at the nodes of a mode tree and their ranks, and how nodes are asked for."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import htfkernels as hk
from htflearn.checkpoint import layout_to_dict
from htflearn.errors import UserError
from htflearn.metrics import plain
from htflearn.options import shown
from htflearn.trackers import node_label

__all__ = [
    "METHODS",
    "Measured",
    "NodeSpectrum",
    "choose_nodes",
    "measure",
    "rank_bounds",
    "to_json",
]

METHODS = ("auto", "qr", "gram")

# In half precision "count x eps" would leave no singular value at all.
_LARGEST_RTOL = 0.01
# Largest and smallest power of two within which JSON holds singular values as they are.
_RANGE = 900
# Above it JSON's readers round integers.
_EXACT = 2**53
_LISTED = 12

_NODE = re.compile(r"\{?([\d\s,-]+)\}?(?:\s*level\s*(\d{1,9}))?")
_RUN = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?")


@dataclass(frozen=True)
class NodeSpectrum:
    """The singular values of the matricization at a node (rows: its modes, columns: the others and
    the outputs), and their measures.

    Attributes:
        node: the node.
        rows, columns: of the matricization.
        local_rank: ``R_v`` of an interior node, None for a leaf.
        bound: the largest rank the layout allows, see :func:`rank_bounds`.
        values: float64, descending, at most ``bound``; to be multiplied by ``2 ** log2_scale``.
        log2_scale: 0 where the values need no scale to be in range.
        rtol: the numerical rank counts singular values above this fraction of the largest.
        numerical_rank, effective_rank, stable_rank, renyi2_rank, entanglement_entropy: see
            :mod:`htfkernels.spectra.ranks`.
    """

    node: hk.Node
    rows: int
    columns: int
    local_rank: int | None
    bound: int
    values: Tensor
    log2_scale: int
    rtol: float
    numerical_rank: int
    effective_rank: float
    stable_rank: float
    renyi2_rank: float
    entanglement_entropy: float

    @property
    def label(self) -> str:
        """The node's name."""
        return node_label(self.node)

    @property
    def normalized(self) -> Tensor:
        """The singular values divided by the largest; zeros where all are."""
        top = self.values[:1]
        return torch.where(top > 0, self.values / top, 0.0)

    @property
    def fraction(self) -> float:
        """How much of the bound the effective rank takes."""
        return self.effective_rank / self.bound


@dataclass(frozen=True)
class Measured:
    """The spectra of a model.

    Attributes:
        layout: of the model.
        dtype: of its weights. The spectra are always computed in float64.
        method: how they were computed, of :data:`METHODS`.
        rtol: the tolerance asked for, or None.
        spectra: one for each node asked for, in the tree's order.
    """

    layout: hk.Layout
    dtype: torch.dtype
    method: str
    rtol: float | None
    spectra: tuple[NodeSpectrum, ...]

    @property
    def hierarchical_rank(self) -> tuple[int, ...] | None:
        """The (numerical) hierarchical tensor rank: those at all nodes but the root, in the tree's
        order; None where not all were measured."""
        ranks = tuple(s.numerical_rank for s in self.spectra if not s.node.is_root)
        return ranks if len(ranks) == len(self.layout.tree.nodes) - 1 else None


def choose_nodes(tree: hk.ModeTree, wanted: Iterable[str]) -> list[hk.Node]:
    """The nodes with the given names, in the tree's order.

    Args:
        tree: the mode tree.
        wanted: each the modes of a node, as in ``0,1`` or ``0-3`` or ``{0,1}``. Where several nodes
            have the same modes all of them are meant, unless a level follows: ``{0} level 1``.

    Raises:
        UserError: a name that cannot be read, or that of no node.

    Example:
        >>> choose_nodes(hk.ModeTree.balanced(4), ["2-3", "0"])
        [Node({0}, level=0), Node({2,3}, level=1)]
    """
    chosen: set[hk.Node] = set()
    for name in wanted:
        match = _NODE.fullmatch(name.strip())
        runs = [_RUN.fullmatch(run.strip()) for run in match[1].split(",")] if match else [None]
        if match is None or None in runs:
            raise UserError(
                f"--nodes takes the modes of a node, such as 0,1 or 0-3, and not {shown(name)}"
            )
        modes: set[int] = set()
        for run in runs:
            assert run is not None
            first, last = int(run[1]), int(run[2] or run[1])
            if last >= tree.order or last < first:
                raise UserError(f"--nodes {name}: the modes are 0 to {tree.order - 1}")
            modes |= set(range(first, last + 1))
        level = match[2] and int(match[2])
        found = [
            node
            for node in tree.nodes
            if len(node.modes) == len(modes)
            and set(node.modes) == modes
            and (level is None or node.level == level)
        ]
        if not found:
            known = [node_label(n) for n in tree.interior[:_LISTED]]
            more = ", ..." if len(tree.interior) > _LISTED else ""
            raise UserError(
                f"--nodes {name}: the tree has no such node; besides its leaves it has "
                f"{', '.join(known)}{more}"
            )
        chosen |= set(found)
    return sorted(chosen, key=lambda node: node.index)


def rank_bounds(layout: hk.Layout) -> dict[hk.Node, int]:
    """For each node the largest rank that the matricization of a tensor of this layout can have.

    The matricization is a product of the node's frame and its environment. Ranks multiply in a
    Khatri-Rao product, and no factor has a rank above its number of columns::

        f_leaf = min(D, R_parent),    f_v = min(prod f_children, R_v, R_parent)
        e_root = out_features,        e_c = min(min(e_v, R_v) prod f_siblings, R_v)

    Args:
        layout: tree, dimensions and local ranks.

    Returns:
        ``min(f_v, e_v)``.

    Example:
        >>> bounds = rank_bounds(hk.HTF(hk.ModeTree.balanced(4), 2, 9).layout)
        >>> [bounds[node] for node in bounds]
        [2, 2, 2, 2, 4, 4, 1]
    """
    tree = layout.tree
    frames: dict[int, int] = {}
    for node in tree.nodes:
        below = math.prod(frames[c.index] for c in node.children)
        rows, columns = layout.shape(node)
        frames[node.index] = min(rows, columns) if node.is_leaf else min(below, rows, columns)
    environments = {tree.root.index: layout.out_features}
    for node in reversed(tree.interior):
        rank = layout.shape(node)[0]
        every = math.prod(frames[c.index] for c in node.children)
        for child in node.children:
            siblings = every // frames[child.index]
            environments[child.index] = min(min(environments[node.index], rank) * siblings, rank)
    return {n: min(frames[n.index], environments[n.index]) for n in tree.nodes}


@torch.no_grad()
def measure(
    model: hk.HTF,
    nodes: Sequence[hk.Node] | None = None,
    method: str = "auto",
    rtol: float | None = None,
) -> Measured:
    """Measures the spectra of a model's matricizations, in float64.

    Args:
        model: any factorization.
        nodes: which; by default all of them, the root only where there are several outputs (a
            matrix of one column has but a norm).
        method: see :meth:`htfkernels.HTF.matricization_spectra`.
        rtol: the numerical rank counts singular values above this fraction of the largest. By
            default their number times the machine epsilon of the weights' dtype (or the method's
            accuracy, where that is more), and 1% at most.

    Raises:
        UserError: weights that are not finite.

    Example:
        >>> model = hk.HTF(hk.ModeTree.balanced(4), 3, 5)
        >>> measure(model).hierarchical_rank
        (3, 3, 3, 3, 5, 5)
    """
    layout = model.layout
    tree = layout.tree
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise UserError("the model has weights that are not finite, and so no spectra")
    if nodes is None:
        nodes = [n for n in tree.nodes if not n.is_root or layout.out_features > 1]
    dtype = next((p.dtype for p in model.parameters()), torch.float64)
    double = model if dtype == torch.float64 else copy.deepcopy(model).double()
    spectra = double.matricization_spectra(nodes, method)
    bounds = rank_bounds(layout)
    values = {n: spectra.relative[n][: bounds[n]].cpu() for n in nodes}
    eps = torch.finfo(dtype).eps
    rows: dict[int, int] = {}
    for node in tree.nodes:
        below = math.prod(rows[c.index] for c in node.children)
        rows[node.index] = layout.mode_dims[node.index] if node.is_leaf else below
    total = layout.num_entries

    # Nodes with as many singular values are measured together: a tree can have thousands.
    same: dict[int, list[hk.Node]] = defaultdict(list)
    for node in nodes:
        same[len(values[node])].append(node)
    measured: dict[hk.Node, NodeSpectrum] = {}
    for count, members in same.items():
        stacked = torch.stack([values[n] for n in members])
        accurate = min(max(count * eps, spectra.accuracy), _LARGEST_RTOL)
        tolerance = accurate if rtol is None else rtol
        measures = zip(
            members,
            hk.numerical_rank(stacked, rtol=tolerance).tolist(),
            hk.effective_rank(stacked).tolist(),
            hk.stable_rank(stacked).tolist(),
            hk.renyi2_rank(stacked).tolist(),
            hk.entanglement_entropy(stacked).tolist(),
            strict=True,
        )
        for node, numerical, effective, stable, renyi2, entropy in measures:
            measured[node] = NodeSpectrum(
                node=node,
                rows=rows[node.index],
                columns=total // rows[node.index],
                local_rank=None if node.is_leaf else layout.shape(node)[0],
                bound=bounds[node],
                values=values[node],
                log2_scale=spectra.log2_scale[node],
                rtol=tolerance,
                numerical_rank=numerical,
                effective_rank=effective,
                stable_rank=stable,
                renyi2_rank=renyi2,
                entanglement_entropy=entropy,
            )
    return Measured(layout, dtype, spectra.method, rtol, tuple(measured[n] for n in nodes))


def to_json(measured: Measured, top: int | None = None) -> dict[str, Any]:
    """Everything measured, as JSON holds it.

    Args:
        measured: the spectra.
        top: how many singular values are kept of each.

    Returns:
        among the rest ``nodes``, a list: the singular values of a node are its
        ``singular_values`` times ``2 ** log2_scale``, which is 1 wherever they are in range.
        ``rows`` and ``columns`` are None where a double cannot hold them; their logarithms are
        always there.
    """
    return plain(
        {
            "htfkernels": hk.__version__,
            "torch": torch.__version__,
            "layout": layout_to_dict(measured.layout),
            "dtype": str(measured.dtype).removeprefix("torch."),
            "method": measured.method,
            "rtol": measured.rtol,
            "hierarchical_rank": measured.hierarchical_rank,
            "nodes": [_node_to_json(s, top) for s in measured.spectra],
        }
    )


def _node_to_json(s: NodeSpectrum, top: int | None) -> dict[str, Any]:
    values, scale = s.values.tolist(), s.log2_scale
    if scale and (not any(values) or abs(math.log2(values[0]) + scale) < _RANGE):
        values, scale = [math.ldexp(value, scale) for value in values], 0
    return {
        "node": s.label,
        "modes": list(s.node.modes),
        "level": s.node.level,
        "rows": s.rows if s.rows < _EXACT else None,
        "columns": s.columns if s.columns < _EXACT else None,
        "log2_rows": math.log2(s.rows),
        "log2_columns": math.log2(s.columns),
        "local_rank": s.local_rank,
        "bound": s.bound,
        "rtol": s.rtol,
        "numerical_rank": s.numerical_rank,
        "effective_rank": s.effective_rank,
        "stable_rank": s.stable_rank,
        "renyi2_rank": s.renyi2_rank,
        "entanglement_entropy": s.entanglement_entropy,
        "singular_values": values[:top],
        "log2_scale": scale,
    }
