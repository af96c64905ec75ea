"""The engine as functions of a tree and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from htfkernels.index_plan import IndexPlan
from htfkernels.layout import Layout
from htfkernels.ops.evaluate import evaluate as _evaluate
from htfkernels.ops.evaluate_at import evaluate_at as _evaluate_at
from htfkernels.ops.evaluate_at import evaluate_at_planned as _evaluate_at_planned
from htfkernels.ops.full_tensor import full_tensor as _full_tensor
from htfkernels.ops.slog import slog as _slog
from htfkernels.plan import Plan, plan_for
from htfkernels.tree import ModeTree, Node

__all__ = ["Weights", "evaluate", "evaluate_at", "full_tensor", "slog_evaluate"]

Weights = Mapping[Node, Tensor] | Sequence[Tensor]
Vectors = Tensor | Sequence[Tensor]


def evaluate(
    tree: ModeTree, weights: Weights, vectors: Vectors, *, layout: Layout | None = None
) -> Tensor:
    """Contracts the end tensor with one vector per mode.

    Leaf ``n`` sends ``m_n = x_n W_n``; an interior node sends ``m_v = p_v W_v`` with ``p_v`` the
    Hadamard product of its children's messages; the answer is the root's message.

    Args:
        tree: the mode tree.
        weights: a mapping from each node to its ``[R_in, R_out]`` matrix, or the matrices in the
            order of ``tree.nodes``, or the folded ``[F, R_in, R_out]`` tensors of a layout.
            Without a weight for the root, its message is the sum of its product (``root="sum"``).
        vectors: ``[B, N, D]``, or ``N`` tensors ``[B, D_n]``.
        layout: needed with folded weights only.

    Returns:
        ``[B]``, or ``[B, out_features]`` where the root's weight has several columns.

    Raises:
        ValueError: shapes or dtypes that do not fit, with what was expected and what came.

    Example:
        >>> tree = ModeTree.balanced(4)
        >>> weights = {node: torch.randn(3, 1 if node.is_root else 3) for node in tree.nodes}
        >>> evaluate(tree, weights, torch.randn(5, 4, 3)).shape
        torch.Size([5])
    """
    layout, folded = fold("evaluate", tree, weights, layout)
    return run_evaluate(layout, folded, vectors)


def evaluate_at(
    tree: ModeTree,
    weights: Weights,
    indices: Tensor | IndexPlan,
    *,
    layout: Layout | None = None,
) -> Tensor:
    """Entries of the end tensor, without forming it.

    Args:
        tree, weights, layout: as in :func:`evaluate`.
        indices: ``[B, N]``, int64, ``0 <= indices[:, n] < D_n``; or an :class:`IndexPlan` of
            them, which evaluates each node once per distinct sub-tuple of its modes.

    Returns:
        ``[B]`` or ``[B, out_features]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        IndexError: an index is out of range. On a GPU that is a device-side assertion, as with
            PyTorch's own indexing.

    Example:
        >>> tree = ModeTree.balanced(4)
        >>> weights = {node: torch.randn(3, 1 if node.is_root else 3) for node in tree.nodes}
        >>> evaluate_at(tree, weights, torch.tensor([[0, 2, 1, 0]])).shape
        torch.Size([1])
    """
    layout, folded = fold("evaluate_at", tree, weights, layout)
    return run_evaluate_at(layout, folded, indices)


def full_tensor(tree: ModeTree, weights: Weights, *, layout: Layout | None = None) -> Tensor:
    """The end tensor ``[D_0, ..., D_{N-1}]`` (and ``out_features`` behind, where there are
    several).

    Args:
        tree, weights, layout: as in :func:`evaluate`.

    Raises:
        ValueError: shapes that do not fit, or a tensor of 2**40 entries or more.
    """
    layout, folded = fold("full_tensor", tree, weights, layout)
    return run_full_tensor(layout, folded)


def slog_evaluate(
    tree: ModeTree, weights: Weights, vectors: Vectors, *, layout: Layout | None = None
) -> tuple[Tensor, Tensor]:
    """Sign and log-magnitude of :func:`evaluate`, without overflow or underflow at any order.

    Args:
        tree, weights, vectors, layout: as in :func:`evaluate`.

    Returns:
        ``(sign, logabs)``, each shaped as the result of :func:`evaluate`; where it is zero, the
        sign is 0 and the log-magnitude ``-inf``. Only ``logabs`` is differentiable.
    """
    layout, folded = fold("slog", tree, weights, layout)
    return run_slog(layout, folded, vectors)


# -- on a layout and folded weights: what HTF calls -----------------------------------------------


def run_evaluate(layout: Layout, weights: Sequence[Tensor], vectors: Vectors) -> Tensor:
    x = pack_vectors("evaluate", layout, vectors)
    plan, weights, x = _prepare("evaluate", layout, weights, x, x.shape[0])
    return _evaluate(plan, weights, x)


def run_evaluate_at(
    layout: Layout, weights: Sequence[Tensor], indices: Tensor | IndexPlan
) -> Tensor:
    if isinstance(indices, IndexPlan):
        return _run_planned(layout, weights, indices)
    rows = len(indices) if indices.dim() else 0
    plan, weights, _ = _prepare("evaluate_at", layout, weights, None, rows)
    _check_indices(layout, indices, plan.backend)
    if indices.device != weights[0].device:
        raise ValueError(
            f"evaluate_at: indices are on {indices.device}, the weights on {weights[0].device}"
        )
    return _evaluate_at(plan, weights, indices)


def _run_planned(layout: Layout, weights: Sequence[Tensor], indices: IndexPlan) -> Tensor:
    if indices.layout is not layout and indices.layout != layout:
        raise ValueError(
            "evaluate_at: the index plan is of another tree or other dimensions; make it with "
            "model.index_plan(indices)"
        )
    plan, weights, first = _prepare("evaluate_at_planned", layout, weights, None)
    if indices.lists.device != first.device:
        raise ValueError(
            f"evaluate_at: the index plan is on {indices.lists.device}, the weights on "
            f"{first.device}; move it with plan.to"
        )
    return _evaluate_at_planned(plan, weights, indices)


def run_full_tensor(layout: Layout, weights: Sequence[Tensor]) -> Tensor:
    if layout.num_entries >= 2**40:
        raise ValueError(
            f"full_tensor: the tensor has about 2^{layout.num_entries.bit_length() - 1} entries, "
            "more than fit; use evaluate_at for entries of it"
        )
    plan, weights, _ = _prepare("full_tensor", layout, weights, None)
    return _full_tensor(plan, weights)


def run_slog(layout: Layout, weights: Sequence[Tensor], vectors: Vectors) -> tuple[Tensor, Tensor]:
    x = pack_vectors("slog", layout, vectors)
    check_same("slog", weights, x)
    first = weights[0]
    # A graph is made of the reference's operations.
    traced = torch.compiler.is_compiling()
    plan = None if traced else plan_for("slog", layout, first.dtype, first.device.type)
    sign, logabs = _slog(plan, layout, weights, x)
    return _squeeze(layout, sign), _squeeze(layout, logabs)


def fold(
    op: str, tree: ModeTree, weights: Weights, layout: Layout | None
) -> tuple[Layout, list[Tensor]]:
    """The layout that the weights' shapes tell, and the weights folded into its groups."""
    if isinstance(weights, Mapping):
        known = {node.index: w for node, w in weights.items()}
        foreign = next((n for n in weights if n.tree != tree), None)
        if foreign is not None:
            raise ValueError(f"{op}: {foreign} is a node of another tree")
    else:
        listed = list(weights)
        if listed and all(w.dim() == 3 for w in listed):
            return _folded_already(op, tree, listed, layout)
        if len(listed) not in (len(tree.nodes), len(tree.nodes) - 1):
            raise ValueError(
                f"{op}: expected a weight for each of {len(tree.nodes)} nodes (or all but the "
                f"root), got {len(listed)}"
            )
        known = dict(enumerate(listed))
    root = tree.root.index
    missing = next((n for n in tree.nodes if n.index not in known and n.index != root), None)
    if missing is not None:
        raise ValueError(f"{op}: no weight for {missing}")
    for i, w in known.items():
        if w.dim() != 2:
            raise ValueError(
                f"{op}: the weight of {tree.nodes[i]} must be [R_in, R_out], got {list(w.shape)}"
            )
    dims = [known[n.index].shape[0] for n in tree.leaves]
    ranks = {node: known[tree._children[node.index][0]].shape[1] for node in tree.interior}
    summed = root not in known
    outputs = 1 if summed else known[root].shape[1]
    made = Layout.make(tree, dims, ranks, outputs, "sum" if summed else "linear")
    for i, w in known.items():
        if tuple(w.shape) != made.shape(tree.nodes[i]):
            raise ValueError(
                f"{op}: the weight of {tree.nodes[i]} must be {list(made.shape(tree.nodes[i]))} to "
                f"fit its neighbours, got {list(w.shape)}"
            )
    return made, [torch.stack([known[i] for i in group.nodes]) for group in made.groups]


def _folded_already(
    op: str, tree: ModeTree, weights: list[Tensor], layout: Layout | None
) -> tuple[Layout, list[Tensor]]:
    if layout is None:
        raise ValueError(
            f"{op}: folded weights ([F, R_in, R_out]) need layout=, for example model.layout"
        )
    if layout.tree != tree:
        raise ValueError(f"{op}: the layout is of another tree")
    shapes = [tuple(w.shape) for w in weights]
    expected = [g.shape for g in layout.groups]
    if shapes != expected:
        raise ValueError(f"{op}: expected folded weights of the shapes {expected}, got {shapes}")
    return layout, weights


def pack_vectors(op: str, layout: Layout, vectors: Vectors) -> Tensor:
    """``[B, N, D]`` or ``N`` tensors ``[B, D_n]`` as one ``[B, sum D_n]``."""
    dims, order = layout.mode_dims, layout.tree.order
    if isinstance(vectors, Tensor):
        if (
            vectors.dim() != 3
            or vectors.shape[1] != order
            or any(d != vectors.shape[2] for d in set(dims))
        ):
            expected = (
                f"[B, {order}, {dims[0]}]"
                if len(set(dims)) == 1
                else f"{order} tensors [B, D_n] (the mode dimensions differ)"
            )
            raise ValueError(f"{op}: vectors must be {expected}, got {list(vectors.shape)}")
        return vectors.flatten(1)
    parts = list(vectors)
    if len(parts) != order:
        raise ValueError(
            f"{op}: expected {order} tensors of vectors, one per mode, got {len(parts)}"
        )
    batch = parts[0].shape[0] if parts[0].dim() else 0
    if [part.shape for part in parts] != [(batch, d) for d in dims]:
        n = next(i for i, d in enumerate(dims) if tuple(parts[i].shape) != (batch, d))
        raise ValueError(
            f"{op}: the vectors of mode {n} must be [{batch}, {dims[n]}], got "
            f"{list(parts[n].shape)}"
        )
    return torch.cat(parts, dim=1)


def _check_indices(layout: Layout, indices: Tensor, backend: str) -> None:
    order = layout.tree.order
    if indices.dtype != torch.int64 or indices.dim() != 2 or indices.shape[1] != order:
        raise ValueError(
            f"evaluate_at: indices must be int64 [B, {order}], got {indices.dtype} "
            f"{list(indices.shape)}"
        )
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (indices.is_cuda and backend != "reference")  # asserted there, without waiting for it
        or not len(indices)
    ):
        return
    low, high = indices.amin(0).tolist(), indices.amax(0).tolist()
    for n, d in enumerate(layout.mode_dims):
        if low[n] < 0 or high[n] >= d:
            worst = low[n] if low[n] < 0 else high[n]
            raise IndexError(
                f"evaluate_at: index {worst} of mode {n} is out of range, its dimension is {d}"
            )


def _prepare(
    op: str, layout: Layout, weights: Sequence[Tensor], x: Tensor | None, rows: int = 0
) -> tuple[Plan, Sequence[Tensor], Tensor]:
    check_same(op, weights, x)
    first = weights[0]
    device = first.device.type
    if torch.is_autocast_enabled(device) and first.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weights = [w.to(dtype) for w in weights]
        first = weights[0]
        x = None if x is None else x.to(dtype)
    plan = plan_for(op, layout, first.dtype, device, rows)
    return plan, weights, first if x is None else x


def check_same(op: str, weights: Sequence[Tensor], x: Tensor | None) -> None:
    first = weights[0]
    if not first.is_floating_point():
        raise ValueError(f"{op}: weights must be floating point, got {first.dtype}")
    for w in weights:
        if w.dtype != first.dtype or w.device != first.device:
            raise ValueError(
                f"{op}: weights are {first.dtype} on {first.device} and {w.dtype} on {w.device}"
            )
    if x is None or (x.dtype == first.dtype and x.device == first.device):
        return
    if (
        x.device == first.device
        and x.is_floating_point()
        and torch.is_autocast_enabled(x.device.type)
    ):
        return
    raise ValueError(
        f"{op}: vectors are {x.dtype} on {x.device}, the weights {first.dtype} on {first.device}"
    )


def _squeeze(layout: Layout, result: Tensor) -> Tensor:
    return result.squeeze(-1) if layout.out_features == 1 else result
