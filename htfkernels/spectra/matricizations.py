"""Singular values of every matricization of a tree, from its factors, without the tensor.

The matricization at a node ``v`` (rows: the modes of ``v``; columns: all others, and the outputs)
is ``M_v = U_v E_v^T`` with the node's frame ``U_v`` (its message for every index tuple) and its
environment ``E_v``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from htfkernels.arguments import shown
from htfkernels.functional import Weights, check_same, fold
from htfkernels.ops.spectra import Factors, Pull, factors_of, pullback, singular_values, svd
from htfkernels.runtime.plan import Plan, plan_for
from htfkernels.spectra import grams
from htfkernels.spectra.output_mode import with_output_mode
from htfkernels.spectra.ranks import numerical_rank
from htfkernels.tree import ModeTree, Node
from htfkernels.tree.layout import Layout

__all__ = ["PrincipalFrame", "Spectra", "matricization_spectra"]

# How far a singular value may be off, relative to the node's largest (tests/test_spectra.py).
ACCURACY = {"qr": 1e-13, "gram": 1e-7}


class Spectra(dict[Node, Tensor]):
    """Singular values of matricizations: ``{node: [K], descending}``, in the weights' dtype.

    The values of a deep tree may be outside of that dtype's range, and are then 0 or infinite;
    ``relative`` has them in range.

    Where a weight is infinite or not a number, no value is known: all are NaN, at every node, since
    every matricization has all entries of the tensor.

    Attributes:
        method: ``"qr"`` or ``"gram"``, the one that was taken.
        accuracy: what the method guarantees, relative to each node's largest singular value.
        relative: ``{node: [K]}``, the values divided by ``2 ** log2_scale``, the largest between a
            half and 1 up to rounding.
    """

    method: str
    accuracy: float
    relative: dict[Node, Tensor]
    _exponents: tuple[list[Node], Tensor]

    @cached_property
    def log2_scale(self) -> dict[Node, int]:
        """``{node: int}``; the first to read it waits for the device."""
        nodes, exponents = self._exponents
        return dict(zip(nodes, exponents.tolist(), strict=True))

    def measure(
        self, function: Callable[[Tensor], Tensor], relative: bool = True
    ) -> dict[Node, Tensor]:
        """A measure of every node's singular values, those of one length together.

        Args:
            function: ``[F, K] -> [F]``, such as :func:`htfkernels.effective_rank`.
            relative: of the values in range, which is the same for ranks; else of the values.

        Example:
            >>> model = hk.HTF(hk.ModeTree.balanced(4), mode_dims=3, ranks=2)
            >>> ranks = model.matricization_spectra().measure(hk.effective_rank)
            >>> sum(ranks.values()).backward()
        """
        lengths: dict[int, list[Node]] = {}
        for node, s in self.items():
            lengths.setdefault(len(s), []).append(node)
        values = self.relative if relative else self
        found: dict[Node, Tensor] = {}
        for same in lengths.values():
            result = function(torch.stack([values[n] for n in same]))
            found.update(zip(same, result.unbind(0), strict=True))
        return {node: found[node] for node in self}

    def numerical_ranks(self, rtol: float | None = None) -> dict[Node, int]:
        """Numbers of singular values above ``rtol`` times the largest, by default the larger of
        ``K eps`` (see :func:`htfkernels.numerical_rank`) and the method's accuracy.

        Raises:
            ValueError: the singular values are NaN, or ``rtol`` is not a number of at least 0.
        """

        def ranks(s: Tensor) -> Tensor:
            least = max(s.shape[-1] * torch.finfo(s.dtype).eps, self.accuracy)
            return numerical_rank(s, rtol=least if rtol is None else rtol)

        found = self.measure(ranks)
        counts = torch.stack([*found.values()]).tolist() if found else []
        return {node: int(count) for node, count in zip(found, counts, strict=True)}


class PrincipalFrame(NamedTuple):
    """Singular vectors of a node's matricization ``M_v = U_v E_v^T``, in factored form.

    Attributes:
        values: ``[K]``, the singular values, descending, without those that are zero to the
            method's accuracy.
        left: ``[R, K]``: the left singular vectors are ``U_v left``, with the node's message
            ``U_v`` for every index tuple of its modes.
        right: ``[R, K]``: the right singular vectors are ``E_v right``.
    """

    values: Tensor
    left: Tensor
    right: Tensor


def matricization_spectra(
    tree: ModeTree,
    weights: Weights,
    nodes: Iterable[Node] | None = None,
    method: str = "auto",
    *,
    layout: Layout | None = None,
) -> Spectra:
    """Singular values of ``M_v`` for nodes ``v``, descending.

    Frames and environments are kept as factors ``F`` of at most as many rows as columns, with the
    same Gram matrix: ``F_leaf = R(W)``, ``F_v = R(R(KhatriRao(F_c)) W_v)``, ``E_c =
    R(KhatriRao(E_v W_v^T, F_siblings))``, so that ``sigma(M_v) = sigma(F_v E_v^T)``. All is
    computed in float64, whatever the weights' dtype, in memory proportional to the weights' and to
    ``R^2``. With ``"qr"``, ``R`` is a QR decomposition's
    triangular factor: errors below 1e-13 of the largest singular value, ``O(N R^4)`` operations.
    With ``"gram"`` it is a Cholesky factor of the Gram matrix: below 1e-7, ``O(N R^3)``. Where no
    factor has more rows than columns, both are exact.

    On a GPU the values are there when its kernels have run; only ``log2_scale`` and
    ``numerical_ranks``, which are Python's numbers, wait for that.

    The result is differentiable with respect to the weights, once. Derivatives are finite
    everywhere: a singular value's is ``u v^T`` with some pair of singular vectors, and 0 where it
    is zero to the method's accuracy.

    Args:
        tree: the mode tree.
        weights: as in :func:`htfkernels.evaluate`.
        nodes: which nodes; by default all but the root. At the root the outputs are the columns.
        method: ``"qr"``, ``"gram"``, or ``"auto"``: ``"qr"`` for float64 weights, else ``"gram"``.
        layout: needed with folded weights only.

    Returns:
        for each node at most ``min(prod D of its modes, R_out)`` singular values, NaN where a
        weight is infinite or not a number.

    Raises:
        ValueError: there is no such method, a node is not of this tree, or the weights are not real
            floating point of one dtype on one device.

    Example:
        >>> model = hk.HTF(hk.ModeTree.balanced(4), mode_dims=3, ranks=2)
        >>> spectra = model.matricization_spectra()
        >>> spectra[model.tree.node([0, 1])].shape, spectra.method
        (torch.Size([2]), 'gram')
    """
    layout, folded = fold("matricization_spectra", tree, weights, layout)
    return run_spectra(layout, folded, nodes, method)


def run_spectra(
    layout: Layout, weights: Sequence[Tensor], nodes: Iterable[Node] | None, method: str
) -> Spectra:
    wanted = wanted_nodes("matricization_spectra", layout, nodes)
    plan, weights, gram, leaf = _prepare("matricization_spectra", layout, weights, method)
    places = [place_of(n, leaf) for n in wanted]
    indices = list(dict.fromkeys(places))
    dtype = weights[0].dtype
    flat, exponents, sizes = _values(plan, weights, indices, gram)
    powers = exponents[_owners(tuple(sizes), exponents.device)]
    # In two steps: 2^k itself may be out of range.
    half = torch.div(powers, 2, rounding_mode="floor").clamp(-1100, 1000)
    rest = (powers - half).clamp(-1100, 1000)
    absolute = flat * half.double().exp2() * rest.double().exp2()
    result = Spectra()
    result.method, result.accuracy = ("gram", ACCURACY["gram"]) if gram else ("qr", ACCURACY["qr"])
    by_index = dict(zip(indices, absolute.to(dtype).split(sizes), strict=True))
    relative = dict(zip(indices, flat.to(dtype).split(sizes), strict=True))
    result.update((n, by_index[i]) for n, i in zip(wanted, places, strict=True))
    result.relative = {n: relative[i] for n, i in zip(wanted, places, strict=True)}
    result._exponents = list(result), exponents.detach()  # in the order of the indices
    return result


@lru_cache(maxsize=64)
def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Of every value the position of its node."""
    counts = torch.tensor(sizes, dtype=torch.int64)
    return torch.arange(len(sizes)).repeat_interleave(counts).to(device)


def run_principal_frames(
    layout: Layout, weights: Sequence[Tensor], nodes: Iterable[Node] | None, method: str
) -> dict[Node, PrincipalFrame]:
    """See :meth:`htfkernels.HTF.principal_frames`."""
    wanted = wanted_nodes("principal_frames", layout, nodes)
    outputs = weights[-1]
    plan, weights, gram, leaf = _prepare("principal_frames", layout, weights, method)
    dtype = weights[0].dtype
    places = [place_of(n, leaf) for n in wanted]
    indices = list(dict.fromkeys(places))
    accuracy = ACCURACY["gram" if gram else "qr"]
    found = {}
    with torch.no_grad():
        factors = factors_of(plan, weights, indices, gram)
        scales = [f.scale for f in factors]
        vectors = _singular_vectors(factors, scales, accuracy, plan.backend)
        kept = [torch.where(s.isnan().any(), -1, (s > 0).sum()) for s, _, _ in vectors]
        counts = torch.stack(kept).tolist() if kept else []  # waits for a device, once
        if -1 in counts:
            raise ValueError("principal_frames: a weight is infinite or not a number")
        each = zip(indices, factors, vectors, counts, strict=True)
        for i, f, (s, left, right), keep in each:
            columns = f.frame_exponents.double()
            left = left[:, :keep] * (-columns).exp2()[:, None]
            right = right[:, :keep] * (columns - f.scale).exp2()[:, None]
            values = s[:keep] * _together([f.scale], s.device).exp2()
            if i == leaf:  # the root's, with rows and columns exchanged
                right = outputs[0].double().T @ left
                left = right / values
            found[i] = PrincipalFrame(values.to(dtype), left.to(dtype), right.to(dtype))
    return {n: found[i] for n, i in zip(wanted, places, strict=True)}


def wanted_nodes(op: str, layout: Layout, nodes: Iterable[Node] | None) -> list[Node]:
    tree = layout.tree
    if nodes is None:
        return [n for n in tree.nodes if not n.is_root]
    if isinstance(nodes, str) or not isinstance(nodes, Iterable):
        raise ValueError(f"{op}: nodes must be a sequence of the tree's nodes, got {shown(nodes)}")
    wanted = list(nodes)
    for node in wanted:
        if not isinstance(node, Node):
            raise ValueError(
                f"{op}: nodes must be nodes of the tree (tree.nodes), got {shown(node)}"
            )
        if node.tree != tree:
            raise ValueError(f"{op}: {node} is a node of another tree")
    return wanted


def place_of(node: Node, leaf: int) -> int:
    """A node's index in a tree that may have a leaf for the outputs, see
    :func:`htfkernels.spectra.output_mode.with_output_mode`."""
    if node.index < leaf:
        return node.index
    return leaf if node.is_root else node.index + 1


def check_method(op: str, method: str) -> None:
    if not isinstance(method, str) or method not in ("auto", "qr", "gram"):
        raise ValueError(f'{op}: method must be "auto", "qr" or "gram", got {shown(method)}')


def _prepare(
    op: str, layout: Layout, weights: Sequence[Tensor], method: str
) -> tuple[Plan, Sequence[Tensor], bool, int]:
    check_method(op, method)
    check_same(op, weights, None)
    dtype, device = weights[0].dtype, weights[0].device.type
    layout, weights, leaf = with_output_mode(layout, weights)
    plan = plan_for("spectra", layout, dtype, device)
    gram = method == "gram" or (method == "auto" and dtype != torch.float64)
    return plan, weights, gram, leaf


def _values(
    plan: Plan, weights: Sequence[Tensor], nodes: list[int], gram: bool
) -> tuple[Tensor, Tensor, list[int]]:
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
        flat, exponents, sizes, *_ = _SingularValues.apply(plan, nodes, gram, *weights)
        return flat, exponents, sizes.tolist()
    return singular_values(plan, [w.detach() for w in weights], nodes, gram)[:3]


class _SingularValues(Function):
    """Differentiated by Gram matrices: with ``u_i = U a_i / sigma_i``, ``a_i = E^T v_i``, and
    ``v_i = E b_i / sigma_i``, ``b_i = U^T u_i``::

        d sigma_i = u_i^T dM v_i = (a_i^T dG a_i + b_i^T dH b_i) / (2 sigma_i)
    """

    @staticmethod
    def forward(plan: Plan, nodes: list[int], gram: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        flat, exponents, sizes, kept = singular_values(plan, weights, nodes, gram, keep=True)
        return flat, exponents, torch.tensor(sizes, dtype=torch.int64), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, ctx.nodes, ctx.gram, *weights = inputs
        ctx.kept = len(output) - 1
        ctx.save_for_backward(*output[1:], *weights)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved, n = ctx.saved_tensors, ctx.kept
        arguments = (ctx.plan, ctx.nodes, ctx.gram, n, grad, *saved)
        return (None, None, None, *_Gradients.apply(*arguments))


class _Gradients(Function):
    @staticmethod
    def forward(
        plan: Plan,
        nodes: list[int],
        gram: bool,
        kept: int,
        grad: Tensor,
        *saved: Tensor,
    ) -> tuple[Tensor, ...]:
        exponents, sizes, *packed = saved[:kept]
        weights = saved[kept:]
        factors = factors_of(plan, weights, nodes, gram, packed)
        accuracy = ACCURACY["gram" if gram else "qr"]
        by_node = grad.split(sizes.tolist())
        on_device = plan.backend == "cuda"
        powers = list(exponents.unbind(0)) if on_device else exponents.tolist()
        pulls = _pulls(factors, powers, by_node, accuracy, plan.backend)
        if plan.backend == "cpp":
            return pullback(plan, weights, nodes, pulls)
        pull_of = dict(zip(nodes, pulls, strict=True))
        leaves = [w.detach().double().requires_grad_() for w in weights]
        with torch.enable_grad():
            sides = grams.frames_and_environments(plan.layout, leaves, nodes)
            total = sum((_contracted(s, pull_of) for s in sides), torch.zeros(()))
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return tuple(g.to(w.dtype) for g, w in zip(grads, weights, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError("htfkernels: singular values have no second derivatives")


_Vectors = tuple[Tensor, Tensor, Tensor]


def _singular_vectors(
    factors: list[Factors], exponents: list[int | Tensor], accuracy: float, backend: str
) -> list[_Vectors]:
    """Of each node ``s``, and ``left``, ``right`` with orthonormal ``F left`` and ``E right`` such
    that ``F E^T 2^(scale - exponent) = (F left) diag(s) (E right)^T``; nodes of one shape together.
    """
    found: dict[int, _Vectors] = {}
    shapes: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for i, f in enumerate(factors):
        shapes.setdefault((f.frame.shape, f.environment.shape), []).append(i)
    for same in shapes.values():
        frame = torch.stack([factors[i].frame for i in same])
        shift = _together([factors[i].scale for i in same], frame.device)
        shift = shift - _together([exponents[i] for i in same], frame.device)
        environment = torch.stack([factors[i].environment for i in same])
        environment = environment * shift.exp2()[:, None, None]
        s, left, right = _decomposed(frame, environment, accuracy, backend)
        found.update(zip(same, zip(s, left, right, strict=True), strict=True))
    return [found[i] for i in range(len(factors))]


def _together(powers: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """Powers of two as float64, on a device without waiting for it."""
    if all(isinstance(p, int) for p in powers):
        return torch.tensor(powers, dtype=torch.float64, device=device)
    return torch.stack([torch.as_tensor(p, device=device) for p in powers]).double()


def _decomposed(frame: Tensor, environment: Tensor, accuracy: float, backend: str) -> _Vectors:
    """Values and vectors, all zero where a value is below the accuracy.

    With ``a = E^T v``, ``F a / sigma = u`` at any rank of ``F``. For a small ``sigma`` this is off
    by ``1e-16 sigma_1 / sigma``, along the vectors of the large ones; the part of ``u`` that is
    missing is put together from those.
    """
    u, s, v = svd(frame @ environment.mT, backend)
    found = ~(s <= accuracy * s[..., :1])  # NaN stays
    inverse = torch.where(found, 1 / torch.where(found, s, 1), 0)[..., None, :]
    left, right = environment.mT @ v * inverse, frame.mT @ u * inverse
    left = left + left @ (u.mT @ (u - frame @ left))
    right = right + right @ (v.mT @ (v - environment @ right))
    return torch.where(found, s, 0), left * found[..., None, :], right * found[..., None, :]


def _pulls(
    factors: list[Factors],
    exponents: list[int | Tensor],
    grads: Sequence[Tensor],
    accuracy: float,
    backend: str,
) -> list[Pull]:
    vectors = _singular_vectors(factors, exponents, accuracy, backend)
    return [
        Pull(grad * s / 2, left, right, f.frame_exponents, exponent)
        for f, exponent, grad, (s, left, right) in zip(
            factors, exponents, grads, vectors, strict=True
        )
    ]


def _contracted(sides: grams.Sides, pulls: dict[int, Pull]) -> Tensor:
    """``sum grad_i (a_i^T G a_i + b_i^T H b_i) / (2 sigma_i)``, in the scale of ``sides``."""
    alike: dict[int, list[int]] = {}  # by their numbers of singular values
    for slot, node in enumerate(sides.nodes):
        if node in pulls:
            alike.setdefault(len(pulls[node].weight), []).append(slot)
    parts = (_contracted_slots(sides, slots, pulls) for slots in alike.values())
    return sum(parts, torch.zeros(()))


def _contracted_slots(sides: grams.Sides, slots: list[int], pulls: dict[int, Pull]) -> Tensor:
    chosen = [pulls[sides.nodes[i]] for i in slots]
    columns = sides.frame_exponents[slots] - torch.stack([p.columns for p in chosen])
    shift = sides.environment_exponents[slots] - _together(
        [p.scale for p in chosen], columns.device
    )
    weight = torch.stack([p.weight for p in chosen])
    # Columns of zeros, which no singular vector has a part of, may have any exponent.
    by_left, by_right = (k.clamp(max=1000).exp2() for k in (columns, shift[:, None] - columns))
    a = torch.stack([p.left for p in chosen]) * by_left[:, :, None]
    b = torch.stack([p.right for p in chosen]) * by_right[:, :, None]
    return _quadratic(sides.frames[slots], sides.frames_explicit, a, weight) + _quadratic(
        sides.environments[slots], sides.environments_explicit, b, weight
    )


def _quadratic(side: Tensor, explicit: bool, vectors: Tensor, weight: Tensor) -> Tensor:
    image = side @ vectors
    return (image * (image if explicit else vectors) * weight[:, None, :]).sum()
