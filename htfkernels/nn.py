"""The hierarchical tensor factorization as a PyTorch module."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from htfkernels import functional
from htfkernels.arguments import shown
from htfkernels.schedule.index_cache import index_plan
from htfkernels.schedule.index_plan import IndexPlan, Indices
from htfkernels.spectra import inner_products, mode_sets
from htfkernels.spectra import matricizations as spectra
from htfkernels.spectra.trace_ranks import run_trace_ranks
from htfkernels.tree import ModeTree, Node
from htfkernels.tree.layout import Layout, Ranks, RootKind

__all__ = ["HTF"]


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HTF(nn.Module):
    """A hierarchical tensor factorization: a tensor of order N as a tree of small matrices.

    Leaf ``n`` holds ``W_n [D_n, R_parent]``, an interior node ``v`` holds ``W_v [R_v, R_parent]``,
    the root ``[R_root, out_features]``. On vectors ``x_n``: ``m_n = x_n W_n``, ``p_v`` = Hadamard
    product of the children's messages, ``m_v = p_v W_v``; the answer is the root's message.
    (Razin, Maman & Cohen, ICML 2022.) Matrix and CP factorizations are the trees
    ``ModeTree.chain`` and ``ModeTree.flat`` with ``root="sum"``.

    Under FSDP2, ``model(vectors)`` gathers the sharded weights. Register the other methods that
    are called, after ``fully_shard(model)``:
    ``torch.distributed.fsdp.register_fsdp_forward_method(model, "at")``.

    Control-C ends a long call on the CPU within a moment. A process that was forked computes on one
    thread, and warns once: the threads of its parent are not in it, and PyTorch's own operations
    may hang there. Start processes by the method ``"spawn"``, or call ``torch.set_num_threads(1)``
    before the fork or first thing in the new process.

    Args:
        tree: the mode tree.
        mode_dims: ``D_n``: one integer for all modes, or one for each.
        ranks: ``R_v``: one integer for all interior nodes, one for each interior level (level 1
            first, the root last), or a mapping from every interior node to its own.
        out_features: number of outputs (columns of the root's weight).
        root: ``"linear"``, or ``"sum"``: the root's weight is a fixed column of ones.
        share_weights: one weight for all same-shaped nodes of a level, as in a convolutional
            network.
        init_std: standard deviation of the normal initial weights; by default ``R_in ** -0.5``,
            which keeps the messages' variance through the tree for unit-variance products.
        dtype, device: of the parameters. On the device ``"meta"`` they have shapes alone, and so
            has what is computed of them.

    Raises:
        ValueError: dimensions or ranks that do not fit the tree, or an argument of another kind.

    A ``state_dict`` holds the layout beside the weights (``"_extra_state"``), and
    ``load_state_dict`` refuses weights of another tree, dimensions or ranks, with ``strict=False``
    too; a state without it, as earlier versions saved it, is taken if its shapes fit.

    Attributes:
        layout: tree, dimensions and the folding of the weights.
        weights: the parameters: one ``[F, R_in, R_out]`` per group of same-shaped nodes of a level.

    Example:
        >>> model = HTF(ModeTree.balanced(4), mode_dims=8, ranks=[16, 16])
        >>> model(torch.randn(32, 4, 8)).shape
        torch.Size([32])
    """

    def __init__(
        self,
        tree: ModeTree,
        mode_dims: int | Sequence[int],
        ranks: Ranks,
        out_features: int = 1,
        root: RootKind = "linear",
        share_weights: bool = False,
        init_std: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout = Layout.make(tree, mode_dims, ranks, out_features, root, share_weights)
        self.init_std = _checked_std(init_std)
        if dtype is not None and dtype not in _DTYPES:
            expected = ", ".join(map(str, _DTYPES))
            raise ValueError(f"dtype: expected one of {expected}, got {shown(dtype)}")
        _ = (
            self.layout.program,
            self.layout.offsets,
        )  # computed now: torch.compile would trace into it
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(g.shape, dtype=dtype, device=device))
            for g in self.layout.groups
        )
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls, tree: ModeTree, weights: functional.Weights, layout: Layout | None = None
    ) -> HTF:
        """A model with copies of given weights as its parameters.

        Args:
            tree: the mode tree.
            weights: as in :func:`htfkernels.evaluate`: ``{node: [R_in, R_out]}``, the matrices in
                the order of ``tree.nodes`` (without the root's: ``root="sum"``), or folded tensors
                of a layout.
            layout: needed with folded weights only.

        Raises:
            ValueError: shapes that do not fit the tree or each other, or several dtypes.

        Example:
            >>> tree = ModeTree.flat(3)
            >>> HTF.from_weights(tree, [torch.randn(5, 2) for _ in tree.leaves]).layout.root
            'sum'
        """
        layout, folded = functional.fold("from_weights", tree, weights, layout)
        functional.check_same("from_weights", folded)
        ranks = dict(zip(tree.interior, layout.ranks, strict=True))
        # On "meta", so that the initial weights neither take time nor draw random numbers.
        model = cls(
            tree, layout.mode_dims, ranks, layout.out_features, layout.root,
            layout.share_weights, dtype=folded[0].dtype, device="meta",
        )  # fmt: skip
        model.weights = nn.ParameterList(
            nn.Parameter(w.detach().clone(memory_format=torch.contiguous_format)) for w in folded
        )
        return model

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new initial weights."""
        with torch.no_grad():
            for group, weight in zip(self.layout.groups, self.weights, strict=True):
                if weight.is_meta:
                    continue  # PyTorch would take milliseconds to draw nothing
                std = group.rows**-0.5 if self.init_std is None else self.init_std
                weight.normal_(0.0, std, generator=generator)

    @property
    def tree(self) -> ModeTree:
        """The mode tree."""
        return self.layout.tree

    def _folded(self) -> list[Tensor]:
        # Not list(self.weights): iterating a ParameterList costs as much as a small tree.
        plain = self.weights._parameters
        if len(plain) == len(self.layout.groups):
            return list(plain.values())  # type: ignore[arg-type]
        return list(self.weights)  # parametrized weights are computed when asked for

    def forward(self, vectors: Tensor | Sequence[Tensor]) -> Tensor:
        """Contracts the end tensor with vectors, see :func:`htfkernels.evaluate`.

        Args:
            vectors: ``[B, N, D]``, or ``N`` tensors ``[B, D_n]``.

        Returns:
            ``[B]``, or ``[B, out_features]``.
        """
        return functional.run_evaluate(self.layout, self._folded(), vectors)

    def at(self, indices: Indices | IndexPlan) -> Tensor:
        """Entries of the end tensor, see :func:`htfkernels.evaluate_at`.

        Many samples of few distinct indices are computed by an :class:`htfkernels.IndexPlan`, on
        the CPU without being asked for, see :func:`htfkernels.use_index_plans`. Everywhere, also
        for a few samples and under ``torch.compile`` and ``torch.func``, :meth:`index_plan` makes
        one by hand.

        Args:
            indices: ``[B, N]`` integers, or a plan.

        Returns:
            ``[B]``, or ``[B, out_features]``.
        """
        return functional.run_evaluate_at(self.layout, self._folded(), indices)

    def index_plan(self, indices: Indices) -> IndexPlan:
        """A plan that :meth:`at` takes in place of the indices: each node is evaluated once per
        distinct sub-tuple of its modes. Cached as long as the tensor ``indices`` lives, and built
        anew once its values are others.

        Example:
            >>> model = HTF(ModeTree.balanced(4), mode_dims=8, ranks=16)
            >>> plan = model.index_plan(torch.randint(8, (2048, 4)))
            >>> model.at(plan).shape
            torch.Size([2048])
        """
        return index_plan(self.layout, indices)

    def full_tensor(self) -> Tensor:
        """The end tensor ``[D_0, ..., D_{N-1}]`` (``out_features`` behind, where there are
        several)."""
        return functional.run_full_tensor(self.layout, self._folded())

    def slog(self, vectors: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``(sign, logabs)`` of :meth:`forward`, without overflow or underflow at any order."""
        return functional.run_slog(self.layout, self._folded(), vectors)

    def node_weight(self, node: Node) -> Tensor:
        """A node's ``[R_in, R_out]`` matrix: a view into the parameters, so that writing into it
        (under ``no_grad``) writes the model. The root of ``root="sum"`` gives a new column of
        ones."""
        if not isinstance(node, Node) or node.tree != self.tree:
            raise ValueError(f"node_weight: {shown(node)} is not a node of this model's tree")
        if node.index not in self.layout.location:
            first = self.weights[0]
            return torch.ones(self.layout.shape(node), dtype=first.dtype, device=first.device)
        group, slot = self.layout.location[node.index]
        weight: Tensor = self.weights[group][slot]
        return weight

    def norm(self) -> Tensor:
        """The end tensor's Euclidean norm, all outputs together, see :func:`htfkernels.norm`."""
        weights = self._folded()
        functional.check_same("norm", weights, None)
        return inner_products.norm([(1.0, (self.layout, weights))]).value(weights[0].dtype)

    def local_component_norms(self) -> dict[Node, Tensor]:
        """For each interior node ``v`` the norms ``[R_v]`` of its local components.

        Component ``(v, r)``: the columns ``r`` of the children's weights and row ``r`` of ``W_v``;
        its norm is the product of these vectors' Euclidean norms.
        """
        norms = {}
        for node in self.tree.interior:
            norm = self.node_weight(node).norm(dim=1)
            for child in node.children:
                norm = norm * self.node_weight(child).norm(dim=0)
            norms[node] = norm
        return norms

    def matricization_spectra(
        self, nodes: Iterable[Node] | None = None, method: str = "auto"
    ) -> spectra.Spectra:
        """Singular values of the matricizations at nodes, see
        :func:`htfkernels.spectra.matricizations.matricization_spectra`."""
        return spectra.run_spectra(self.layout, self._folded(), nodes, method)

    def hierarchical_rank(self, rtol: float | None = None, method: str = "auto") -> tuple[int, ...]:
        """The numerical ranks of the matricizations at all nodes, in the order of ``tree.nodes``
        (leaves first, the root last): the hierarchical tensor rank (Hackbusch & Kühn, 2009).

        Args:
            rtol: counts singular values above this fraction of the node's largest; by default the
                larger of ``K eps`` and the method's accuracy.
            method: as in :meth:`matricization_spectra`.

        Example:
            >>> HTF(ModeTree.balanced(4), mode_dims=8, ranks=[3, 2]).hierarchical_rank()
            (3, 3, 3, 3, 2, 2, 1)
        """
        found = self.matricization_spectra(self.tree.nodes, method).numerical_ranks(rtol)
        return tuple(found[node] for node in self.tree.nodes)

    def principal_frames(
        self, nodes: Iterable[Node] | None = None, method: str = "auto"
    ) -> dict[Node, spectra.PrincipalFrame]:
        """Singular vectors of the matricizations at nodes, in factored form.

        With the node's message ``U_v`` for every index tuple of its modes (frame) and its
        environment ``E_v``, ``M_v = U_v E_v^T = (U_v left) diag(values) (E_v right)^T``, and the
        columns of ``U_v left`` and of ``E_v right`` are orthonormal (in ill-conditioned frames
        that of a singular value ``sigma`` to about ``1e-16 sigma_1 / sigma``). Not differentiable.

        Args:
            nodes: by default all but the root.
            method: as in :meth:`matricization_spectra`.

        Returns:
            ``{node: (values [K], left [R, K], right [R, K])}``.
        """
        return spectra.run_principal_frames(self.layout, self._folded(), nodes, method)

    def renyi2_ranks(self, nodes: Iterable[Node] | None = None) -> dict[Node, Tensor]:
        """``(sum sigma^2)^2 / sum sigma^4`` of the matricizations at nodes, without any
        decomposition.

        With Gram matrices of frame and environment, ``tr(G H)^2 / tr(G H G H)``: products of
        matrices, as cheap as an evaluation, and differentiable any number of times; a rank to
        regularize in every step. Computed in float64; 0 for a zero tensor. See
        :func:`htfkernels.renyi2_rank`.

        Args:
            nodes: by default all but the root.

        Example:
            >>> ranks = HTF(ModeTree.balanced(4), mode_dims=8, ranks=[3, 2]).renyi2_ranks()
            >>> sum(ranks.values()).backward()
        """
        return run_trace_ranks(self.layout, self._folded(), nodes, stable=False)

    def stable_ranks(self, nodes: Iterable[Node] | None = None) -> dict[Node, Tensor]:
        """``sum sigma^2 / sigma_1^2`` of the matricizations at nodes, without any decomposition.

        Like :meth:`renyi2_ranks`; the largest eigenvalue of ``G H`` comes from squaring that
        product again and again. Differentiable once. See :func:`htfkernels.stable_rank`.
        """
        return run_trace_ranks(self.layout, self._folded(), nodes, stable=True)

    def matricization_spectrum(
        self,
        modes: Iterable[int],
        method: str = "auto",
        max_cost: tuple[float, float] | float | None = None,
    ) -> Tensor:
        """Singular values of the matricization with any set of modes as rows, see
        :func:`htfkernels.spectra.mode_sets.matricization_spectrum`.

        Example:
            >>> model = HTF(ModeTree.balanced(8), mode_dims=2, ranks=3)
            >>> model.matricization_spectrum([0, 2, 4, 6]).shape
            torch.Size([16])
        """
        weights = {node: self.node_weight(node) for node in self.tree.nodes}
        return mode_sets.matricization_spectrum(self.tree, weights, modes, method, max_cost)

    def get_extra_state(self) -> Tensor:
        """The layout as a ``state_dict`` holds it, under ``"_extra_state"``: its JSON as bytes,
        ``uint8`` on the CPU. Weights alone do not tell the tree that they are of."""
        return torch.tensor([*self.layout.to_json().encode()], dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Checks that weights come from a model with this layout.

        Raises:
            ValueError: they come from another tree, or from other dimensions, ranks or sharing.
        """
        if (reason := self._not_of_this_layout(state)) is not None:
            raise ValueError(f"set_extra_state: {reason}")

    def _not_of_this_layout(self, state: Any) -> str | None:
        """One sentence, or None where the saved layout is this model's."""
        mine = json.loads(self.layout.to_json())
        try:
            # Rounded: somebody may have averaged, or cast, all tensors of a state.
            codes = state.to("cpu", torch.float64).round().to(torch.uint8).tolist()
            saved = json.loads(bytes(codes).decode())
            tree = ModeTree.from_json(json.dumps(saved["tree"]))
            others = {key: saved[key] for key in mine if key != "tree"}
        except (AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError):
            return "_extra_state must be the layout that the weights are of, and cannot be read"
        if tree != self.tree:
            return (
                f"the weights are of the mode tree {_cut(tree.to_nested())}; this model's is "
                f"{_cut(self.tree.to_nested())} (without _extra_state in the state, they are taken "
                "all the same)"
            )
        for key, value in others.items():
            if value != mine[key]:
                return (
                    f"the weights are of a model whose {key} is {_cut(value)}; this model's is "
                    f"{_cut(mine[key])}"
                )
        return None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A mismatch is listed beside those of the shapes. Earlier states do not hold their layout.
        key = f"{prefix}_extra_state"
        others = dict(state_dict)
        if key in others and (reason := self._not_of_this_layout(others.pop(key))) is not None:
            error_msgs.append(reason)
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` calls first."""
        raise RuntimeError(
            "HTF: torch.jit.script cannot compile this module; torch.export.export can, and "
            'torch.jit.trace under hk.use_backend("reference")'
        )

    def extra_repr(self) -> str:
        layout = self.layout
        dims, ranks = sorted(set(layout.mode_dims)), sorted(set(layout.ranks))
        shared = ", share_weights=True" if layout.share_weights else ""
        return (
            f"order={layout.tree.order}, mode_dims={_span(dims)}, ranks={_span(ranks)}, "
            f"out_features={layout.out_features}, root={layout.root!r}{shared}, "
            f"parameters={layout.num_parameters}"
        )


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checked_std(value: Any) -> float | None:
    if value is None:
        return None
    try:
        std = None if isinstance(value, (bool, str, bytes)) else float(value)
    except OverflowError:
        std = math.inf
    except (TypeError, ValueError, RuntimeError):
        std = None
    if std is None or not 0 <= std < math.inf:
        came = shown(value) if std is None else std
        raise ValueError(f"init_std: expected a finite number that is not negative, got {came}")
    return std


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}..{values[-1]}"
