"""Trackers: what is measured of a model while it learns.

Norms of components are recorded in one of two forms. Sorted, the default: the largest at each
logged iteration, so that a curve is a rank and changes its component where two curves meet. Or,
with ``sort=False``, of all components in the order of the weights, so that entry ``r`` is component
``r`` along the whole run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

import htfkernels as hk

__all__ = [
    "ComponentNorms",
    "LocalComponentNorms",
    "ReconstructionError",
    "SingularValues",
    "Spectra",
    "Tracker",
    "Unbalancedness",
    "node_label",
    "unbalancedness",
]


class Tracker(Protocol):
    """Measures a model at every logged iteration.

    Attributes:
        name: the key of the measurement in the metrics.
    """

    name: str

    def measure(self, model: Any, task: Any) -> dict[str, Any]:
        """Numbers, and lists or dictionaries of numbers, that JSON can hold."""
        ...


def node_label(node: hk.Node) -> str:
    """A short name for a node: its modes, and its level where another node has the same modes.

    Example:
        >>> node_label(hk.ModeTree.balanced(4).node((0, 1)))
        '{0,1}'
    """
    modes = sorted(node.modes)
    runs: list[list[int]] = []
    for mode in modes:
        if runs and mode == runs[-1][-1] + 1:
            runs[-1].append(mode)
        else:
            runs.append([mode])
    text = ",".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)
    parent = node.parent
    alone = len(node.children) != 1 and (parent is None or len(parent.children) != 1)
    return f"{{{text}}}" if alone else f"{{{text}}} level {node.level}"


class ComponentNorms:
    """Norms of the components of a CP factorization: of the root's local components.

    Args:
        top: how many, the largest; by default 10. Only where they are sorted.
        sort: descending. False: all of them, entry ``r`` is component ``r``.

    Raises:
        ValueError: ``top`` together with ``sort=False``.

    Example:
        >>> ComponentNorms(top=2).measure(tensor_factorization((3, 3, 3), 8), None).keys()
        dict_keys(['norms'])
    """

    name = "component_norms"

    def __init__(self, top: int | None = None, sort: bool = True) -> None:
        self.top = _top("ComponentNorms", top, sort)

    @torch.no_grad()
    def measure(self, model: hk.HTF, task: Any) -> dict[str, Any]:
        """``{"norms": [...]}``."""
        norms = model.local_component_norms()[model.tree.root]
        return {"norms": _recorded(norms, self.top)}


class LocalComponentNorms:
    """Norms of local components, node by node.

    Args:
        nodes: which interior nodes; by default all of them.
        top: how many of each, the largest; by default 10. Only where they are sorted.
        sort: descending. False: all of them, entry ``r`` is component ``(v, r)``, the one of row
            ``r`` of ``W_v``.

    Raises:
        ValueError: ``top`` together with ``sort=False``.

    Example:
        >>> model = hk.HTF(hk.ModeTree.balanced(4), 3, 5)
        >>> list(LocalComponentNorms().measure(model, None))
        ['{0,1}', '{2,3}', '{0-3}']

        Along a run, and drawn; each curve is one component:

        >>> task = completion(make_target("ht", (3, 3, 3, 3), 2, 9.0), num_samples=40)
        >>> tracker = LocalComponentNorms([model.tree.root], sort=False)
        >>> config = TrainConfig(iterations=20, log_every=10)
        >>> optimizer = GroupRMSprop(model.parameters())
        >>> lines = Trainer(model, task, optimizer, config, [tracker]).fit().history
        >>> iterations = [line["iteration"] for line in lines]
        >>> norms = [line[tracker.name]["{0-3}"] for line in lines]
        >>> draw_norms(iterations, norms, "root.png", sort=False)
    """

    name = "local_component_norms"

    def __init__(
        self,
        nodes: Iterable[hk.Node] | None = None,
        top: int | None = None,
        sort: bool = True,
    ) -> None:
        self.nodes = None if nodes is None else list(nodes)
        self.top = _top("LocalComponentNorms", top, sort)

    @torch.no_grad()
    def measure(self, model: hk.HTF, task: Any) -> dict[str, Any]:
        """``{label of the node: [...]}``."""
        norms = model.local_component_norms()
        nodes = list(norms) if self.nodes is None else self.nodes
        return {node_label(node): _recorded(norms[node], self.top) for node in nodes}


class SingularValues:
    """Singular values of the end matrix of an order-2 model, descending.

    They are sorted by definition: which one is which is told by their vectors alone, and not even
    by these where two values coincide, so there is no other form. Components with an identity are
    those of :class:`LocalComponentNorms`.

    Args:
        top: how many.

    Example:
        >>> len(SingularValues(top=3).measure(matrix_factorization(6, 5), None)["values"])
        3
    """

    name = "singular_values"

    def __init__(self, top: int = 10) -> None:
        self.top = top

    @torch.no_grad()
    def measure(self, model: hk.HTF, task: Any) -> dict[str, Any]:
        """``{"values": [...], "effective_rank": ...}``.

        Raises:
            ValueError: the end tensor is no matrix.
        """
        matrix = model.full_tensor()
        if matrix.dim() != 2:
            raise ValueError(
                f"SingularValues: expected a matrix, got a tensor of order {matrix.dim()}"
            )
        values = torch.linalg.svdvals(matrix)
        return {
            "values": values[: self.top].tolist(),
            "effective_rank": float(hk.effective_rank(values)),
        }


class Spectra:
    """Singular values of matricizations, descending, with their effective and numerical ranks.

    As in :class:`SingularValues` the order is all that tells them apart.

    Args:
        nodes: which; by default all but the root.
        top: how many singular values of each.
        tolerance: the numerical rank counts singular values above this fraction of the largest.

    Example:
        >>> model = hk.HTF(hk.ModeTree.balanced(4), 3, 5)
        >>> sorted(Spectra().measure(model, None)["{0,1}"])
        ['effective_rank', 'numerical_rank', 'singular_values']
    """

    name = "spectra"

    def __init__(
        self, nodes: Iterable[hk.Node] | None = None, top: int = 10, tolerance: float = 0.01
    ) -> None:
        self.nodes = None if nodes is None else list(nodes)
        self.top, self.tolerance = top, tolerance

    @torch.no_grad()
    def measure(self, model: hk.HTF, task: Any) -> dict[str, Any]:
        """``{label of the node: {"singular_values", "effective_rank", "numerical_rank"}}``."""
        spectra = model.matricization_spectra(self.nodes)
        # Values of deep trees may be out of range, their ratios are not.
        ranks = spectra.numerical_ranks(self.tolerance)
        effective = spectra.measure(hk.effective_rank)
        return {
            node_label(node): {
                "singular_values": s[: self.top].tolist(),
                "effective_rank": float(effective[node]),
                "numerical_rank": ranks[node],
            }
            for node, s in spectra.items()
        }


class ReconstructionError:
    """Frobenius distance of the end tensor from a known one, relative to the known one's norm.

    Args:
        target: ``[D_1, ..., D_N]``.

    Example:
        >>> model = matrix_factorization(6, 5)
        >>> ReconstructionError(model.full_tensor().detach()).measure(model, None)
        {'relative': 0.0}
    """

    name = "reconstruction_error"

    def __init__(self, target: Tensor) -> None:
        self.target = target

    @torch.no_grad()
    def measure(self, model: hk.HTF, task: Any) -> dict[str, Any]:
        """``{"relative": ...}``."""
        difference = model.full_tensor() - self.target
        return {"relative": float(difference.norm() / self.target.norm())}


class Unbalancedness:
    """How far the vectors of a local component are from having equal norms, see
    :func:`unbalancedness`.

    Example:
        >>> Unbalancedness().measure(matrix_factorization(6, 5), None).keys()
        dict_keys(['max'])
    """

    name = "unbalancedness"

    @torch.no_grad()
    def measure(self, model: hk.HTF, task: Any) -> dict[str, Any]:
        """``{"max": ...}``."""
        return {"max": float(unbalancedness(model))}


def unbalancedness(model: hk.HTF) -> Tensor:
    """The largest difference between squared norms of two vectors of one local component::

        max over v, r and w, w' in component (v, r) of | |w|^2 - |w'|^2 |

    where the vectors of component ``(v, r)`` are the columns ``r`` of the children's weights and
    row ``r`` of ``W_v`` (at the root of ``root="sum"``, whose weight is fixed, the columns alone).
    Gradient flow keeps each of these differences as it was at the start. (Not where a level shares
    its weights: their gradients are sums over several components.)

    Args:
        model: any factorization.

    Returns:
        a scalar.

    Example:
        >>> unbalancedness(tensor_factorization((3, 3, 3), 4, init_std=1e-3)).item() < 1e-3
        True
    """
    worst = []
    for node in model.tree.interior:
        squares = [model.node_weight(child).square().sum(0) for child in node.children]
        if not (node.is_root and model.layout.root == "sum"):
            squares.append(model.node_weight(node).square().sum(1))
        stacked = torch.stack(squares)
        worst.append((stacked.amax(0) - stacked.amin(0)).max())
    return torch.stack(worst).max()


_TOP = 10


def _top(name: str, top: int | None, sort: bool) -> int | None:
    """How many of the largest to record; None: all, in the order of the weights."""
    if sort:
        return _TOP if top is None else top
    if top is not None:
        raise ValueError(
            f"{name}: top takes the largest at each iteration, sort=False records all components; "
            f"got both, top={top}"
        )
    return None


def _recorded(norms: Tensor, top: int | None) -> list[float]:
    return norms.tolist() if top is None else norms.topk(min(top, norms.numel())).values.tolist()
