"""Several outputs as one more mode, so that no matrix of outputs times outputs is ever formed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from htfkernels.tree import ModeTree
from htfkernels.tree.layout import Layout

__all__ = ["with_output_mode"]


def with_output_mode(
    layout: Layout, weights: Sequence[Tensor]
) -> tuple[Layout, Sequence[Tensor], int]:
    """The same tensor with its outputs as the last mode, where they are more than the root's rank.

    The root's weight is that mode's then, transposed, and the root sums up its product. Singular
    values of matricizations are the same; those of the root's are the new leaf's.

    Args:
        layout: tree and shapes.
        weights: folded, one ``[F, R_in, R_out]`` for each of the layout's groups.

    Returns:
        layout and folded weights, and the index of the new leaf: nodes from there on are one
        further back. Without more outputs than the root's rank all is left as it is, and the index
        is that of no node.

    Example:
        >>> layout = Layout.make(ModeTree.flat(2), mode_dims=3, ranks=4, out_features=10)
        >>> weights = [torch.randn(group.shape) for group in layout.groups]
        >>> made, _, leaf = with_output_mode(layout, weights)
        >>> made.mode_dims, made.root, leaf
        ((3, 3, 10), 'sum', 2)
    """
    if layout.out_features <= layout.ranks[-1]:
        return layout, weights, len(layout.tree.parents)
    made, leaf = _layout_with_output_mode(layout), layout.tree.order
    outputs = weights[-1].mT
    folded = []
    for group in made.groups:
        old = [v - (v > leaf) for v in group.nodes if v != leaf]
        parts = [] if len(old) == len(group.nodes) else [outputs]
        if old:
            weight = weights[layout.location[old[0]][0]]
            parts.insert(0, weight if made.share_weights else weight.expand(len(old), -1, -1))
        folded.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return made, folded, leaf


@lru_cache(maxsize=64)
def _layout_with_output_mode(layout: Layout) -> Layout:
    leaf, outputs = layout.tree.order, (layout.out_features, layout.ranks[-1])
    parents = [p if p < 0 else p + 1 for p in layout.tree.parents]
    parents.insert(leaf, len(parents))
    tree = ModeTree(leaf + 1, parents)
    alike = any(g.level == 0 and (g.rows, g.cols) == outputs for g in layout.groups)
    return Layout.make(
        tree,
        (*layout.mode_dims, layout.out_features),
        dict(zip(tree.interior, layout.ranks, strict=True)),
        root="sum",
        share_weights=layout.share_weights and not alike,
    )
