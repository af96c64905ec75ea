"""The engine as functions of a tree and its weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from htfkernels.arguments import came
from htfkernels.ops.evaluate import evaluate as _evaluate
from htfkernels.ops.evaluate_at import evaluate_at as _evaluate_at
from htfkernels.ops.evaluate_at import evaluate_at_planned as _evaluate_at_planned
from htfkernels.ops.full_tensor import full_tensor as _full_tensor
from htfkernels.ops.slog import slog as _slog
from htfkernels.runtime.plan import Plan, plan_for
from htfkernels.schedule.index_cache import plan_that_pays
from htfkernels.schedule.index_plan import IndexPlan, Indices, check_indices
from htfkernels.tree import ModeTree, Node
from htfkernels.tree.layout import Layout

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
    indices: Indices | IndexPlan,
    *,
    layout: Layout | None = None,
) -> Tensor:
    """Entries of the end tensor, without forming it.

    Args:
        tree, weights, layout: as in :func:`evaluate`.
        indices: ``[B, N]``, ``0 <= indices[:, n] < D_n``: a tensor of integers, or a list, tuple or
            NumPy array of them; or an :class:`IndexPlan` of them, which evaluates each node once
            per distinct sub-tuple of its modes. On the CPU such a plan is made without being asked
            for where it pays, see :func:`htfkernels.use_index_plans`.

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
    layout: Layout, weights: Sequence[Tensor], indices: Indices | IndexPlan
) -> Tensor:
    if isinstance(indices, IndexPlan):
        return _run_planned(layout, weights, indices)
    values = check_indices("evaluate_at", layout, indices)
    plan, weights, first = _prepare("evaluate_at", layout, weights, None, values.shape[0])
    if values.device != first.device:
        if isinstance(indices, Tensor):
            raise ValueError(
                f"evaluate_at: indices are on {values.device}, the weights on {first.device}"
            )
        values = values.to(first.device)
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        if plan.backend == "cpp":
            shared = plan_that_pays("evaluate_at", layout, weights, indices, values)
            if shared is not None:
                plan = plan_for("evaluate_at_planned", layout, first.dtype, first.device.type)
                return _evaluate_at_planned(plan, weights, shared)
        if not (values.is_cuda and plan.backend != "reference"):
            _check_range(layout, values)  # else it is asserted there, without waiting for it
    return _evaluate_at(plan, weights, values)


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
    check_same("slog", weights, x, layout)
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
    if not isinstance(tree, ModeTree):
        raise ValueError(f"{op}: tree must be a ModeTree, got {type(tree).__name__}")
    if isinstance(weights, Mapping):
        foreign = next((n for n in weights if not isinstance(n, Node) or n.tree != tree), None)
        if foreign is not None:
            what = "a node of another tree" if isinstance(foreign, Node) else "not a node"
            raise ValueError(f"{op}: weights are a mapping from nodes, and {foreign!r} is {what}")
        known = {node.index: w for node, w in weights.items()}
    else:
        listed = _listed(op, "weights must be {node: [R_in, R_out]} or a list of tensors", weights)
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
        if not isinstance(w, Tensor) or w.dim() != 2 or w.layout is not torch.strided:
            raise ValueError(
                f"{op}: the weight of {tree.nodes[i]} must be [R_in, R_out], got {came(w)}"
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
    if not isinstance(layout, Layout):
        raise ValueError(f"{op}: layout must be a Layout, got {type(layout).__name__}")
    if layout.tree != tree:
        raise ValueError(f"{op}: the layout is of another tree")
    _check_shapes(op, layout, weights)
    return layout, weights


def pack_vectors(op: str, layout: Layout, vectors: Vectors) -> Tensor:
    """``[B, N, D]`` or ``N`` tensors ``[B, D_n]`` as one ``[B, sum D_n]``."""
    order = layout.tree.order
    if isinstance(vectors, Tensor):
        strided = vectors.layout is torch.strided and not vectors.is_nested
        shape = vectors.shape if strided else ()
        if len(shape) != 3 or shape[1] != order or shape[2] != layout.common_dim:
            several = f"{order} tensors [B, D_n] (the mode dimensions differ)"
            expected = f"[B, {order}, {layout.common_dim}]" if layout.common_dim else several
            raise ValueError(f"{op}: vectors must be {expected}, got {came(vectors)}")
        return vectors.flatten(1)
    parts = _listed(op, f"vectors must be a tensor or {order} tensors [B, D_n]", vectors)
    if len(parts) != order:
        raise ValueError(
            f"{op}: expected {order} tensors of vectors, one per mode, got {len(parts)}"
        )
    batch = parts[0].shape[0] if parts[0].dim() == 2 else "B"
    for n, (part, d) in enumerate(zip(parts, layout.mode_dims, strict=True)):
        dense = part.layout is torch.strided and not part.is_nested
        if not dense or part.shape != (batch, d):
            raise ValueError(
                f"{op}: the vectors of mode {n} must be [{batch}, {d}], got {came(part)}"
            )
    return torch.cat(parts, dim=1)


def _listed(op: str, expected: str, values: Iterable[Any]) -> list[Tensor]:
    """A sequence of tensors as a list; ``expected`` says what it should be."""
    try:
        listed = list(values)
    except TypeError:
        raise ValueError(f"{op}: {expected}, got {came(values)}") from None
    for value in listed:
        if not isinstance(value, Tensor):
            kinds = type(values).__name__, type(value).__name__
            raise ValueError(f"{op}: {expected}, got {kinds[0]} of {kinds[1]}")
    return listed


def _check_range(layout: Layout, indices: Tensor) -> None:
    if indices.is_meta or not len(indices):
        return
    bounds: Any = torch.aminmax(indices)  # .item() would end a trace
    if bounds.min.tolist() >= 0 and bounds.max.tolist() < min(layout.mode_dims):
        return
    least, most = (bound.tolist() for bound in torch.aminmax(indices, dim=0))
    for n, d in enumerate(layout.mode_dims):
        if least[n] < 0 or most[n] >= d:
            worst = least[n] if least[n] < 0 else most[n]
            raise IndexError(
                f"evaluate_at: index {worst} of mode {n} is out of range, its dimension is {d}"
            )


def _prepare(
    op: str, layout: Layout, weights: Sequence[Tensor], x: Tensor | None, rows: int = 0
) -> tuple[Plan, Sequence[Tensor], Tensor]:
    check_same(op, weights, x, layout)
    first = weights[0]
    device = first.device.type
    if _autocast(device) and first.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weights = [w.to(dtype) for w in weights]
        first = weights[0]
        x = None if x is None else x.to(dtype)
    plan = plan_for(op, layout, first.dtype, device, rows)
    return plan, weights, first if x is None else x


def _autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def check_same(
    op: str, weights: Sequence[Tensor], x: Tensor | None = None, layout: Layout | None = None
) -> None:
    """Whether weights, and vectors, are floating point of one dtype on one device; and whether the
    weights are those of a layout.

    Raises:
        ValueError: they are not, with what came; ``op`` names who was called.
    """
    first = weights[0]
    if type(first) is not Parameter and type(first) is not Tensor:
        _check_kind(op, first, x)
    dtype, device = first.dtype, first.device
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: weights must be floating point, got {dtype}")
    for w in weights:
        if w.dtype is not dtype or w.device != device:
            raise ValueError(f"{op}: weights are {dtype} on {device} and {w.dtype} on {w.device}")
    if layout is not None:
        _check_shapes(op, layout, weights)
    if x is None or (x.dtype is dtype and x.device == device):
        return
    if x.device == device and x.is_floating_point() and _autocast(device.type):
        return
    raise ValueError(f"{op}: vectors are {x.dtype} on {x.device}, the weights {dtype} on {device}")


def _check_shapes(op: str, layout: Layout, weights: Sequence[Tensor]) -> None:
    shapes = [w.shape for w in weights]
    if shapes != layout.weight_shapes:
        raise ValueError(
            f"{op}: expected folded weights of the shapes {layout.weight_shapes}, got "
            f"{[tuple(shape) for shape in shapes]}"
        )


def _check_kind(op: str, weight: Any, x: Tensor | None) -> None:
    """Refuses what stands where weights should be, and weights that are elsewhere in part."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"{op}: weights must be tensors, got {type(weight).__name__}")
    distributed = sys.modules.get("torch.distributed.tensor")
    sharded = () if distributed is None else distributed.DTensor
    if isinstance(weight, sharded) and not isinstance(x, sharded):
        raise RuntimeError(
            f"{op}: the weights are sharded (DTensor). FSDP gathers them for model(vectors) alone, "
            "and for methods that are registered after fully_shard(model): "
            'torch.distributed.fsdp.register_fsdp_forward_method(model, "at")'
        )


def _squeeze(layout: Layout, result: Tensor) -> Tensor:
    return result.squeeze(-1) if layout.out_features == 1 else result
