"""Exact conversion from and to other libraries' tensors in the same or a wider format.

Weights are copied, never multiplied, so that nothing is rounded. The other libraries are imported
where they are needed: ``pip install "htfkernels[convert]"``.

A hierarchical Tucker tensor has a transfer tensor ``B [k_1, .., k_C, K]`` at each interior node
where a factorization has a matrix, a diagonal ``B``. Any ``B`` is one all the same, with a local
component for each tuple ``(i_1, .., i_C)``: the product of column ``i_c`` of each child's weight,
and ``W[(i_1, .., i_C), :] = B[i_1, .., i_C, :]``. The children's columns are repeated as often as
they are used. Tuples where ``B`` is zero are left out; a diagonal ``B`` keeps its rank, a full one
needs ``R_v = k_1 .. k_C``.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from htfkernels.nn import HTF
from htfkernels.tree import ModeTree, Node

__all__ = [
    "from_hiepy",
    "from_pyttb",
    "from_tensap",
    "from_tensorly",
    "to_hiepy",
    "to_pyttb",
    "to_tensap",
    "to_tensorly",
]

Label = TypeVar("Label", bound=Hashable)


def to_tensap(model: HTF) -> Any:
    """The end tensor as a ``tensap.TreeBasedTensor`` in float64.

    Leaf ``n`` has the core ``W_n [D_n, R]``, an interior node with ``C`` children the core
    ``B [R_v, .., R_v, R_out]`` with ``W_v`` on its diagonal, ``B[r, .., r, k] = W_v[r, k]``; the
    root's last axis is left out where there is a single output.

    Args:
        model: any model whose cores have less than ``2**27`` entries each, ``R_v**C R_out``.

    Returns:
        a ``tensap.TreeBasedTensor`` on the same tree; its node 1 is the root.

    Raises:
        ImportError: tensap is not installed.
        ValueError: a core would be too large.

    Example:
        >>> model = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> to_tensap(model).ranks  # doctest: +SKIP
        array([1, 3, 3, 3, 3, 3, 3])
    """
    tensap = _library("tensap", "to_tensap")
    tree = model.tree
    count = len(tree.nodes)
    number = [count - i for i in range(count)]  # tensap's, from 1; the root's is 1
    children = np.zeros((count, count), dtype=int)
    cores: list[Any] = [None] * count
    for node in tree.nodes:
        weight = _numpy(model.node_weight(node))
        core = weight if node.is_leaf else _diagonal("to_tensap", node, weight)
        if node.is_root and model.layout.out_features == 1:
            core = core[..., 0]
        cores[number[node.index] - 1] = core
        for child in node.children:
            children[number[node.index] - 1, number[child.index] - 1] = 1
    dimensions = tensap.DimensionTree(number[: tree.order], children)
    return tensap.TreeBasedTensor(cores, dimensions)


def from_tensap(tensor: Any, dtype: torch.dtype = torch.float64) -> HTF:
    """A ``tensap.TreeBasedTensor`` as a model with the same end tensor, for its ranks
    see :mod:`htfkernels.convert`.

    Args:
        tensor: the tensor. A leaf that is not active becomes one with the identity as its weight.
            The root's last axis, where it has one more than children, are the outputs.
        dtype: of the parameters.

    Raises:
        ValueError: ``tensor`` is none, or a node with children has a dimension of its own.

    Example:
        >>> model = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> from_tensap(to_tensap(model)).layout.ranks  # doctest: +SKIP
        (3, 3, 3)
    """
    if not hasattr(tensor, "tensors") or not hasattr(tensor, "tree"):
        raise ValueError(
            f"from_tensap: expected a tensap.TreeBasedTensor, got {type(tensor).__name__}"
        )
    tree = tensor.tree
    modes = {int(node): n for n, node in enumerate(tree.dim2ind)}
    children = {}
    cores: dict[int, Tensor] = {}
    for node in range(1, tree.nb_nodes + 1):
        below = [int(c) for c in tree.children(node)]
        if below and node in modes:
            raise ValueError(
                f"from_tensap: node {node} has the dimension {modes[node]} and children; in a mode "
                "tree, dimensions belong to leaves"
            )
        if below:
            children[node] = below
        if tensor.is_active_node[node - 1]:
            cores[node] = _tensor(tensor.tensors[node - 1].numpy(), dtype)
        else:
            cores[node] = torch.eye(int(tensor.shape[modes[node]]), dtype=dtype)
    root = int(tree.root)
    if cores[root].dim() == len(children.get(root, ())):
        cores[root] = cores[root].unsqueeze(-1)
    return _from_cores("from_tensap", children, modes, root, cores)


def to_hiepy(model: HTF) -> Any:
    """The end tensor as a ``hiepy.HTTensor``, with copies of the weights in their dtype and on
    their device: ``U`` the leaves', ``B[r, r, k] = W_v[r, k]``.

    Raises:
        ImportError: hiepy is not installed; it needs Python 3.12.
        ValueError: there are several outputs, a node has one child or more than two, or a core
            would be too large.

    Example:
        >>> model = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> to_hiepy(model).shape  # doctest: +SKIP
        (8, 8, 8, 8)
    """
    hiepy = _library("hiepy", "to_hiepy")
    _one_output("to_hiepy", model)
    tree = model.tree
    odd = next((v for v in tree.interior if len(v.children) != 2), None)
    if odd is not None:
        raise ValueError(
            f"to_hiepy: expected a binary tree, but {odd} has {len(odd.children)} children"
        )
    leaves, transfer, children = {}, {}, {}
    for node in tree.nodes:
        weight = model.node_weight(node).detach()
        if node.is_leaf:
            leaves[node.modes] = weight.clone()
        else:
            transfer[node.modes] = _diagonal("to_hiepy", node, weight)
            children[node.modes] = tuple(c.modes for c in node.children)
    dimensions = hiepy.DimTree(root=tree.root.modes, children=children)
    return hiepy.HTTensor(U=leaves, B=transfer, dtree=dimensions)


def from_hiepy(tensor: Any) -> HTF:
    """A ``hiepy.HTTensor`` as a model with the same end tensor, in its dtype and on its device,
    for its ranks see :mod:`htfkernels.convert`.

    Raises:
        ValueError: ``tensor`` is none.

    Example:
        >>> model = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> from_hiepy(to_hiepy(model)).layout.ranks  # doctest: +SKIP
        (3, 3, 3)
    """
    if not all(hasattr(tensor, name) for name in ("U", "B", "dtree")):
        raise ValueError(f"from_hiepy: expected a hiepy.HTTensor, got {type(tensor).__name__}")
    modes = {leaf: leaf[0] for leaf in tensor.U}
    cores = {node: core.detach() for node, core in {**tensor.U, **tensor.B}.items()}
    root = tensor.dtree.get_root()
    return _from_cores("from_hiepy", tensor.dtree.children, modes, root, cores)


def to_tensorly(model: HTF) -> Any:
    """The end tensor of a flat tree as a ``tensorly.cp_tensor.CPTensor`` of tensorly's current
    backend, in float64: the leaves' weights are the factors, the root's the weights.

    Raises:
        ImportError: tensorly is not installed.
        ValueError: the tree is not flat, or there are several outputs.

    Example:
        >>> model = HTF(ModeTree.flat(3), mode_dims=8, ranks=5)
        >>> to_tensorly(model).rank  # doctest: +SKIP
        5
    """
    tensorly = _library("tensorly", "to_tensorly")
    cp = _library("tensorly.cp_tensor", "to_tensorly")
    weights, factors = _flat("to_tensorly", model)
    return cp.CPTensor((tensorly.tensor(weights), [tensorly.tensor(f) for f in factors]))


def from_tensorly(cp: Any, dtype: torch.dtype = torch.float64) -> HTF:
    """A CP tensor of tensorly as a model on ``ModeTree.flat``.

    Args:
        cp: a ``CPTensor``, or ``(weights, factors)``: ``[R]`` (or None: ones) and ``N`` matrices
            ``[D_n, R]``, of NumPy's or PyTorch's backend.
        dtype: of the parameters.

    Returns:
        a model with ``root="linear"``, whose root has the weights.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> factors = [np.ones((4, 2)), np.ones((5, 2)), np.ones((6, 2))]
        >>> from_tensorly((np.array([1.0, 2.0]), factors)).layout.mode_dims
        (4, 5, 6)
    """
    try:
        weights, factors = cp
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"from_tensorly: expected a CPTensor or (weights, factors), got {type(cp).__name__}"
        ) from error
    return _from_flat("from_tensorly", weights, factors, dtype)


def to_pyttb(model: HTF) -> Any:
    """The end tensor of a flat tree as a ``pyttb.ktensor``: the leaves' weights are the factor
    matrices, the root's the weights.

    Raises:
        ImportError: pyttb is not installed.
        ValueError: the tree is not flat, or there are several outputs.

    Example:
        >>> model = HTF(ModeTree.flat(3), mode_dims=8, ranks=5)
        >>> to_pyttb(model).ncomponents  # doctest: +SKIP
        5
    """
    pyttb = _library("pyttb", "to_pyttb")
    weights, factors = _flat("to_pyttb", model)
    return pyttb.ktensor(factors, weights)


def from_pyttb(ktensor: Any, dtype: torch.dtype = torch.float64) -> HTF:
    """A ``pyttb.ktensor`` as a model on ``ModeTree.flat`` with ``root="linear"``, whose root has
    the weights.

    Args:
        ktensor: the tensor.
        dtype: of the parameters.

    Raises:
        ValueError: ``ktensor`` is none.

    Example:
        >>> model = HTF(ModeTree.flat(3), mode_dims=8, ranks=5)
        >>> from_pyttb(to_pyttb(model)).layout.ranks  # doctest: +SKIP
        (5,)
    """
    if not hasattr(ktensor, "factor_matrices") or not hasattr(ktensor, "weights"):
        raise ValueError(f"from_pyttb: expected a pyttb.ktensor, got {type(ktensor).__name__}")
    return _from_flat("from_pyttb", ktensor.weights, ktensor.factor_matrices, dtype)


# -- hierarchical Tucker cores --------------------------------------------------------------------


def _diagonal(op: str, node: Node, weight: Any) -> Any:
    """``[R_v, .., R_v, R_out]`` with the weight on its diagonal; an array or a tensor, as it is."""
    rank, columns = weight.shape
    axes = len(node.children)
    if rank**axes * columns >= 2**27:
        raise ValueError(
            f"{op}: the core of {node} would have {rank}^{axes} x {columns} entries, more than fit"
        )
    shape = (rank,) * axes + (columns,)
    core = weight.new_zeros(shape) if isinstance(weight, Tensor) else np.zeros(shape)
    core[(range(rank),) * axes] = weight
    return core


def _from_cores(
    op: str,
    children: Mapping[Label, Sequence[Label]],
    modes: Mapping[Label, int],
    root: Label,
    cores: Mapping[Label, Tensor],
) -> HTF:
    """A model of leaves ``[D_n, k]`` and transfer tensors ``[k_1, .., k_C, K]``."""
    tree, node_of = _tree(children, modes, root)
    used = {label: _used_tuples(cores[label], len(below)) for label, below in children.items()}
    weights: dict[Node, Tensor] = {}
    for label, node in node_of.items():
        weights[node] = cores[label][tuple(used[label])] if label in used else cores[label]
    for label, below in children.items():
        for child, columns in zip(below, used[label], strict=True):
            weight = weights[node_of[child]]
            if not torch.equal(columns, torch.arange(weight.shape[1])):
                weights[node_of[child]] = weight[:, columns]
    return HTF.from_weights(tree, weights)


def _used_tuples(core: Tensor, axes: int) -> list[Tensor]:
    """For each child the columns that make up the components: ``C`` index tensors ``[R_v]``."""
    ranks = core.shape[:axes]
    found = list((core != 0).any(-1).nonzero(as_tuple=True))
    diagonal = len(set(ranks)) == 1 and all(torch.equal(f, found[0]) for f in found)
    if diagonal:
        return [torch.arange(ranks[0])] * axes
    if not len(found[0]):
        return [torch.zeros(1, dtype=torch.int64)] * axes
    return [f.cpu() for f in found]


def _tree(
    children: Mapping[Label, Sequence[Label]], modes: Mapping[Label, int], root: Label
) -> tuple[ModeTree, dict[Label, Node]]:
    """The mode tree of labelled nodes, and each label's node."""
    top_down = [root]
    for label in top_down:
        top_down.extend(children.get(label, ()))
    interior = [label for label in top_down if label in children]
    index = dict(zip(interior, itertools.count(len(modes))))
    index.update(modes)
    parents = [-1] * len(index)
    below: dict[Label, set[int]] = {label: {mode} for label, mode in modes.items()}
    level = dict.fromkeys(modes, 0)
    for label in reversed(interior):
        below[label] = set().union(*(below[c] for c in children[label]))
        level[label] = 1 + max(level[c] for c in children[label])
        for c in children[label]:
            parents[index[c]] = index[label]
    tree = ModeTree.from_parents(len(modes), parents)
    return tree, {label: tree.node(below[label], level[label]) for label in top_down}


# -- CP -------------------------------------------------------------------------------------------


def _flat(op: str, model: HTF) -> tuple[Any, list[Any]]:
    """``[R]`` and ``N`` matrices ``[D_n, R]``."""
    _one_output(op, model)
    tree = model.tree
    if tree != ModeTree.flat(tree.order):
        raise ValueError(
            f"{op}: expected a flat tree (ModeTree.flat), got {len(tree.interior)} interior nodes"
        )
    factors = [_numpy(model.node_weight(leaf)) for leaf in tree.leaves]
    return _numpy(model.node_weight(tree.root))[:, 0], factors


def _from_flat(op: str, weights: Any, factors: Sequence[Any], dtype: torch.dtype) -> HTF:
    leaves = [_tensor(f, dtype) for f in factors]
    if not leaves or any(w.dim() != 2 for w in leaves):
        raise ValueError(f"{op}: expected factors [D_n, R], got {[list(w.shape) for w in leaves]}")
    rank = leaves[0].shape[1]
    root = torch.ones(rank, dtype=dtype) if weights is None else _tensor(weights, dtype)
    if any(w.shape[1] != rank for w in leaves) or root.shape != (rank,):
        raise ValueError(
            f"{op}: expected weights [R] and factors [D_n, R], got {list(root.shape)} and "
            f"{[list(w.shape) for w in leaves]}"
        )
    return HTF.from_weights(ModeTree.flat(len(leaves)), [*leaves, root.unsqueeze(-1)])


# -- numbers and libraries ------------------------------------------------------------------------


def _one_output(op: str, model: HTF) -> None:
    outputs = model.layout.out_features
    if outputs > 1:
        raise ValueError(f"{op}: expected a model with one output, got {outputs}")


def _numpy(weight: Tensor) -> Any:
    return weight.detach().to("cpu", torch.float64, copy=True).numpy()


def _tensor(array: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().to(dtype)
    return torch.from_numpy(np.array(array, dtype=np.float64)).to(dtype)


def _library(name: str, op: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        needs = "hiepy and Python 3.12" if package == "hiepy" else package
        raise ImportError(
            f'{op} needs {needs}: pip install "htfkernels[convert]" ({error})'
        ) from error
