"""Arithmetic of factorizations of one tree, on their weights: the tensors are never formed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from htfkernels.functional import check_same
from htfkernels.nn import HTF
from htfkernels.scaled import sign
from htfkernels.spectra import inner_products as products
from htfkernels.tree.layout import Layout, RootKind

__all__ = ["add", "distance", "inner", "log_distance", "log_norm", "norm", "scale", "slog_inner"]


def inner(a: HTF, b: HTF) -> Tensor:
    """Inner product ``<T_a, T_b>`` of two end tensors: the sum of the products of their entries.

    ``X_leaf = W_a^T W_b``, ``X_v = W_a^T (Hadamard product of the children's X) W_b``, in float64;
    the answer is the trace of the root's ``X``: several outputs are one more mode. It is off by
    rounding of ``|T_a| |T_b|``, however small it is.

    Args:
        a, b: models of one tree with the same mode dimensions, outputs, dtype and device; their
            ranks, kinds of root and sharing of weights may differ.

    Returns:
        a scalar in the models' dtype, differentiable by the weights of both. Where it is out of
        range, :func:`slog_inner` is not.

    Raises:
        ValueError: the trees, dimensions, outputs, dtypes or devices differ.

    Example:
        >>> a = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> b = HTF(ModeTree.balanced(4), mode_dims=8, ranks=5)
        >>> inner(a, b).shape
        torch.Size([])
    """
    return products.inner(*_factors("inner", a, b)).value(_dtype(a))


def slog_inner(a: HTF, b: HTF) -> tuple[Tensor, Tensor]:
    """Sign and log-magnitude of :func:`inner`, without overflow or underflow at any order.

    Returns:
        ``(sign, logabs)``; where the inner product is zero, the sign is 0 and the log-magnitude
        ``-inf``. Only ``logabs`` is differentiable.

    Example:
        >>> a = HTF(ModeTree.balanced(1024), mode_dims=8, ranks=3, init_std=2.0)
        >>> sign, logabs = slog_inner(a, a)
        >>> sign.item(), logabs.item() > 800
        (1.0, True)
    """
    found = products.inner(*_factors("slog_inner", a, b))
    return sign(found.mantissa).to(_dtype(a)), found.logabs(_dtype(a))


def norm(a: HTF) -> Tensor:
    """Euclidean norm of the end tensor, all outputs together.

    From orthonormal frames: QR up the tree, in float64, where the triangular factor of the root's
    frame has the norm. Unlike the square root of ``inner(a, a)`` it keeps all digits where
    components cancel.

    Returns:
        a scalar in the model's dtype, differentiable (with gradient 0 where the norm is 0). Where
        it is out of range, :func:`log_norm` is not.

    Example:
        >>> a = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> torch.allclose(norm(a), a.full_tensor().norm())
        True
    """
    return _norm("norm", a).value(_dtype(a))


def log_norm(a: HTF) -> Tensor:
    """Logarithm of :func:`norm`, without overflow or underflow at any order.

    Example:
        >>> a = HTF(ModeTree.balanced(1024), mode_dims=8, ranks=3, init_std=2.0)
        >>> norm(a).item(), log_norm(a).item() > 400
        (inf, True)
    """
    return _norm("log_norm", a).logabs(_dtype(a))


def distance(a: HTF, b: HTF) -> Tensor:
    """Euclidean distance ``|T_a - T_b|`` of two end tensors.

    The norm of the difference in factored form, ``add(a, scale(b, -1))``, by QR up the tree as in
    :func:`norm`: off by rounding of the norms, a few 1e-15 of them at 64 modes. The square root of
    ``|T_a|^2 + |T_b|^2 - 2 <T_a, T_b>`` would be off by 1e-8 of the norms where the models are near
    each other: half of the digits.

    Args:
        a, b: as in :func:`inner`.

    Returns:
        a scalar in the models' dtype, differentiable. The gradient's relative error is
        rounding of the norms over the distance; where nothing but rounding is left of the
        difference, as between a model and itself, it has no direction, and the gradient is 0.

    Raises:
        ValueError: as in :func:`inner`.

    Example:
        >>> a = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> torch.allclose(distance(a, scale(a, 3.0)), 2 * norm(a))
        True
    """
    return _distance("distance", a, b).value(_dtype(a))


def log_distance(a: HTF, b: HTF) -> Tensor:
    """Logarithm of :func:`distance`, without overflow or underflow at any order.

    Example:
        >>> a = HTF(ModeTree.balanced(1024), mode_dims=8, ranks=3, init_std=2.0)
        >>> relative = torch.exp(log_distance(a, scale(a, 1.5)) - log_norm(a))
        >>> round(relative.item(), 3)
        0.5
    """
    return _distance("log_distance", a, b).logabs(_dtype(a))


def add(a: HTF, b: HTF) -> HTF:
    """The sum ``T_a + T_b`` as a model, exactly: no weight is rounded, and ranks add up.

    Leaves are side by side, ``[W_a | W_b]``, interior weights block-diagonal, the root's stacked.
    Where both roots are ``"sum"``, so is the result's. Weights are shared where both models share
    them, as long as the nodes that would share one have the same weights in both.

    Args:
        a, b: as in :func:`inner`.

    Returns:
        a new model with parameters of its own: gradients do not flow back to ``a`` and ``b``.

    Raises:
        ValueError: as in :func:`inner`.

    Example:
        >>> a = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> b = HTF(ModeTree.balanced(4), mode_dims=8, ranks=5)
        >>> add(a, b).layout.ranks
        (8, 8, 8)
    """
    (x, _), (y, _) = _factors("add", a, b)
    tree = x.tree
    root: RootKind = "sum" if x.root == y.root == "sum" else "linear"
    blocks = {}
    for node in tree.nodes:
        p, q = a.node_weight(node).detach(), b.node_weight(node).detach()
        if node.is_leaf:
            blocks[node.index] = torch.cat([p, q], 1)
        elif node.is_root:
            blocks[node.index] = torch.cat([p, q])
        else:
            blocks[node.index] = torch.block_diag(p, q)
    ranks = {v: r + s for v, r, s in zip(tree.interior, x.ranks, y.ranks, strict=True)}
    shared = x.share_weights and y.share_weights
    layout = Layout.make(tree, x.mode_dims, ranks, x.out_features, root, shared)
    if shared and any(
        len({(x.location.get(v), y.location.get(v)) for v in group.nodes}) > 1
        for group in layout.groups
    ):
        layout = Layout.make(tree, x.mode_dims, ranks, x.out_features, root)
    folded = [torch.stack([blocks[v] for v in g.nodes[: g.count]]) for g in layout.groups]
    return HTF.from_weights(tree, folded, layout)


def scale(a: HTF, factor: float) -> HTF:
    """The multiple ``factor * T_a`` as a model.

    The factor goes into the root's weight; with ``root="sum"`` into that of mode 0. Where that one
    is shared with other modes, the result's root is ``"linear"`` and holds the factor.

    Args:
        a: a model.
        factor: a finite number, or a tensor of one; not differentiated.

    Returns:
        a new model with parameters of its own: gradients do not flow back to ``a``.

    Raises:
        ValueError: ``a`` is not a model, or the factor is not finite.

    Example:
        >>> a = HTF(ModeTree.balanced(4), mode_dims=8, ranks=3)
        >>> torch.equal(scale(a, -1.0).full_tensor(), -a.full_tensor())
        True
    """
    ((layout, weights),) = _factors("scale", a)
    number = float(factor)
    if not math.isfinite(number):
        raise ValueError(f"scale: factor must be finite, got {number}")
    folded = [w.detach().clone() for w in weights]
    tree = layout.tree
    if layout.root == "linear":
        folded[-1] *= number
    elif not layout.share_weights:
        group, slot = layout.location[0]
        folded[group][slot] *= number
    else:
        ranks = dict(zip(tree.interior, layout.ranks, strict=True))
        layout = Layout.make(tree, layout.mode_dims, ranks, share_weights=True)
        folded.append(folded[0].new_full(layout.groups[-1].shape, number))
    return HTF.from_weights(tree, folded, layout)


def _norm(op: str, a: HTF) -> products.Number:
    (x,) = _factors(op, a)
    return products.norm([(1.0, x)])


def _distance(op: str, a: HTF, b: HTF) -> products.Number:
    x, y = _factors(op, a, b)
    return products.norm([(1.0, x), (-1.0, y)])


def _dtype(model: HTF) -> torch.dtype:
    return model.weights[0].dtype


def _factors(op: str, *models: HTF) -> list[products.Factors]:
    """The models' layouts and folded weights, once it is sure that they fit each other."""
    for name, model in zip("ab", models, strict=False):
        if not isinstance(model, HTF):
            raise ValueError(f"{op}: {name} must be an HTF, got {type(model).__name__}")
        check_same(op, model._folded(), None)
    if len(models) == 2:
        x, y = (m.layout for m in models)
        if x.tree != y.tree:
            raise ValueError(f"{op}: the models' trees differ: {x.tree!r} and {y.tree!r}")
        if x.mode_dims != y.mode_dims:
            n = next(n for n, d in enumerate(x.mode_dims) if d != y.mode_dims[n])
            raise ValueError(
                f"{op}: mode {n} has the dimension {x.mode_dims[n]} in a and {y.mode_dims[n]} in b"
            )
        if x.out_features != y.out_features:
            raise ValueError(
                f"{op}: a has {x.out_features} outputs (out_features) and b {y.out_features}"
            )
        p, q = (m.weights[0] for m in models)
        if p.dtype != q.dtype or p.device != q.device:
            raise ValueError(
                f"{op}: a is {p.dtype} on {p.device} and b {q.dtype} on {q.device}; bring one to "
                "the other with model.to"
            )
    return [(m.layout, m._folded()) for m in models]
