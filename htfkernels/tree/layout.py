"""Layouts: a mode tree with its dimensions, and how its weights are folded into few tensors.

All nodes of a level whose weights have the same shape form a group; a group's weights are one
tensor ``[F, R_in, R_out]``. A layout is a value: everything about a model that is known before its
numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, Literal, TypeGuard
from weakref import WeakValueDictionary

import numpy
import torch

from htfkernels.arguments import shown
from htfkernels.tree.checks import as_int
from htfkernels.tree.mode_tree import ModeTree, Node
from htfkernels.tree.program import Step, read, written

__all__ = ["Group", "Layout", "Ranks", "RootKind", "layout_of"]

RootKind = Literal["linear", "sum"]
Ranks = int | Sequence[int] | Mapping[Node, int]


@dataclass(frozen=True)
class Group:
    """Same-shaped nodes of one level, whose weights are folded into one tensor.

    Attributes:
        level: height of the nodes.
        nodes: the nodes' indices in ``tree.nodes``.
        rows, cols: shape ``[R_in, R_out]`` of each weight.
        count: number of stored weights: one per node, or 1 where the level shares its weight.
    """

    level: int
    nodes: tuple[int, ...]
    rows: int
    cols: int
    count: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the folded weight."""
        return (self.count, self.rows, self.cols)


@dataclass(frozen=True)
class Layout:
    """A mode tree with mode dimensions and local ranks. Build with :meth:`make`.

    Attributes:
        tree: the mode tree.
        mode_dims: ``D_n`` for each mode.
        ranks: ``R_v`` for each interior node, in the order of ``tree.interior``.
        out_features: columns of the root's weight.
        root: ``"linear"``, or ``"sum"`` where the root's weight is a fixed column of ones.
        share_weights: whether same-shaped nodes of a level share one weight.
    """

    tree: ModeTree
    mode_dims: tuple[int, ...]
    ranks: tuple[int, ...]
    out_features: int = 1
    root: RootKind = "linear"
    share_weights: bool = False

    @classmethod
    def make(
        cls,
        tree: ModeTree,
        mode_dims: int | Sequence[int],
        ranks: Ranks,
        out_features: int = 1,
        root: RootKind = "linear",
        share_weights: bool = False,
    ) -> Layout:
        """Checks the dimensions and expands them to one per mode and one per interior node.

        Args:
            tree: the mode tree.
            mode_dims: one dimension for all modes, or one for each.
            ranks: one local rank for all interior nodes, one for each interior level (level 1
                first, the root last), or a mapping from every interior node to its own.
            out_features: number of outputs.
            root: ``"linear"`` or ``"sum"``.
            share_weights: one weight for all same-shaped nodes of a level.

        Raises:
            ValueError: names the argument, what was expected and what came.
        """
        if not isinstance(tree, ModeTree):
            raise ValueError(f"tree: expected a ModeTree, got {type(tree).__name__}")
        if isinstance(mode_dims, Mapping):
            raise ValueError("mode_dims: expected an integer, or one for each mode, got a mapping")
        if _is_several(mode_dims):
            dims = tuple(as_int("mode_dims", d) for d in mode_dims)
            if len(dims) != tree.order:
                raise ValueError(
                    f"mode_dims: expected {tree.order} (one per mode), got {len(dims)}"
                )
        else:
            dims = (as_int("mode_dims", mode_dims),) * tree.order
        if min(dims) < 1:
            raise ValueError(f"mode_dims: expected positive dimensions, got {min(dims)}")
        if root not in ("linear", "sum"):
            raise ValueError(f'root: expected "linear" or "sum", got {shown(root)}')
        outputs = as_int("out_features", out_features)
        if outputs < 1 or (root == "sum" and outputs != 1):
            expected = "1 with root='sum'" if root == "sum" else "at least 1"
            raise ValueError(f"out_features: expected {expected}, got {outputs}")
        if not isinstance(share_weights, int | numpy.bool_) or share_weights not in (0, 1):
            raise ValueError(f"share_weights: expected True or False, got {shown(share_weights)}")
        per_node = _expand_ranks(tree, ranks)
        if sum(dims) >= 2**63:
            raise ValueError("mode_dims: their sum must fit into 64 bits")
        return _interned(tree, dims, per_node, outputs, root, bool(share_weights))

    @cached_property
    def number(self) -> int:
        """Of this layout in this process, see :func:`layout_of`."""
        raise AttributeError("a layout is made by Layout.make")

    @cached_property
    def _hash(self) -> int:
        return hash(
            (
                self.tree,
                self.mode_dims,
                self.ranks,
                self.out_features,
                self.root,
                self.share_weights,
            )
        )

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:
        # Without what is derived from them: hashes differ between processes.
        fields = (self.tree, self.mode_dims, self.ranks, self.out_features)
        return (_interned, (*fields, self.root, self.share_weights))

    def to_json(self) -> str:
        """A JSON object with the tree (as :meth:`ModeTree.to_json` writes it) and the other
        attributes."""
        return json.dumps(
            {
                "tree": json.loads(self.tree.to_json()),
                "mode_dims": self.mode_dims,
                "ranks": self.ranks,
                "out_features": self.out_features,
                "root": self.root,
                "share_weights": self.share_weights,
            }
        )

    def shape(self, node: Node) -> tuple[int, int]:
        """Shape ``[R_in, R_out]`` of a node's weight."""
        i, order = node.index, self.tree.order
        parent = self.tree.parents[i]
        rows = self.mode_dims[i] if i < order else self.ranks[i - order]
        return rows, self.out_features if parent < 0 else self.ranks[parent - order]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The folded weights, leaves first. With ``root="sum"`` the root has none."""
        groups: list[Group] = []
        for level, nodes in enumerate(self.tree.levels):
            if self.root == "sum" and nodes[0].is_root:
                continue
            same: dict[tuple[int, int], list[int]] = {}
            for node in nodes:
                same.setdefault(self.shape(node), []).append(node.index)
            for (rows, cols), members in same.items():
                count = 1 if self.share_weights else len(members)
                groups.append(Group(level, tuple(members), rows, cols, count))
        return tuple(groups)

    @cached_property
    def weight_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the folded weights."""
        return [group.shape for group in self.groups]

    @cached_property
    def common_dim(self) -> int | None:
        """The dimension of all modes; None where they differ."""
        dim = self.mode_dims[0]
        return dim if self.mode_dims.count(dim) == len(self.mode_dims) else None

    @cached_property
    def location(self) -> dict[int, tuple[int, int]]:
        """Node index -> (group, slot in the folded weight); no entry for the root of a
        ``"sum"``."""
        return {
            node: (g, 0 if self.share_weights else slot)
            for g, group in enumerate(self.groups)
            for slot, node in enumerate(group.nodes)
        }

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First column of each mode in the packed vectors ``[B, D_0 + ... + D_{N-1}]``; then their
        sum."""
        offsets = [0]
        for d in self.mode_dims:
            offsets.append(offsets[-1] + d)
        return tuple(offsets)

    @property
    def num_parameters(self) -> int:
        """Number of stored weights."""
        return sum(g.count * g.rows * g.cols for g in self.groups)

    @property
    def num_entries(self) -> int:
        """Number of entries of the end tensor, outputs included."""
        entries = self.out_features
        for d in self.mode_dims:
            entries *= d
        return entries

    def flops(self, batch: int) -> int:
        """Multiply-adds of the forward GEMMs times two, for dense vectors."""
        return sum(2 * batch * len(g.nodes) * g.rows * g.cols for g in self.groups)

    @cached_property
    def program(self) -> torch.Tensor:
        """The tree as compiled operators read it, see :mod:`htfkernels.tree.program`."""
        return written(self)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The nodes in execution order."""
        return read(self.program).steps


@lru_cache(maxsize=256)
def _interned(*fields: Any) -> Layout:
    """Equal layouts are one object, so that the functional API pays for a layout once; what is
    derived from it is computed here, since torch.compile cannot trace into it."""
    layout = Layout(*fields)
    _ = layout.program, layout.offsets, layout.location, layout.weight_shapes, layout.common_dim
    layout.__dict__["number"] = number = next(_numbers)
    _numbered[number] = layout
    return layout


_numbers = count()
_numbered: WeakValueDictionary[int, Layout] = WeakValueDictionary()


def layout_of(number: int) -> Layout:
    """The layout with that ``number``, for code that torch.compile traces: of a layout itself, some
    versions cannot make a constant."""
    return _numbered[number]


def _is_several(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether there may be one for each; a scalar array or tensor says that it can be iterated."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def _expand_ranks(tree: ModeTree, ranks: Ranks) -> tuple[int, ...]:
    if isinstance(ranks, Mapping):
        missing = [node for node in tree.interior if node not in ranks]
        unknown = [node for node in ranks if node not in set(tree.interior)]
        if missing or unknown:
            what = (
                f"no rank for {missing[0]}" if missing else f"{unknown[0]} is not an interior node"
            )
            raise ValueError(f"ranks: expected one for every interior node, but {what}")
        per_node = tuple(as_int("ranks", ranks[node]) for node in tree.interior)
    elif _is_several(ranks):
        levels = [as_int("ranks", r) for r in ranks]
        if len(levels) != tree.depth:
            raise ValueError(
                f"ranks: expected {tree.depth} (one per interior level, the root last), "
                f"got {len(levels)}"
            )
        per_node = tuple(levels[node.level - 1] for node in tree.interior)
    else:
        per_node = (as_int("ranks", ranks),) * len(tree.interior)
    if min(per_node) < 1:
        raise ValueError(f"ranks: expected positive local ranks, got {min(per_node)}")
    return per_node
