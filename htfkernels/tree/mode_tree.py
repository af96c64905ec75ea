"""Mode trees: the shape of a hierarchical tensor factorization, and nothing else.

A mode tree over ``order`` modes has one leaf per mode; an interior node stands for the union of its
children's modes; the root stands for all of them. Matrix, tensor (CP) and hierarchical tensor
factorizations are the same object on three trees: a chain, a flat tree, and everything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from htfkernels.tree.checks import analyse, as_int, depth_first, format_modes, partition_owners

__all__ = ["ModeTree", "Node"]


class Node:
    """A node of a :class:`ModeTree`: a frozen, hashable handle.

    Attributes:
        tree: the tree the node belongs to.
        index: position in ``tree.nodes``; the leaf of mode ``n`` has index ``n``.
    """

    __slots__ = ("index", "tree")

    tree: ModeTree
    index: int

    def __init__(self, tree: ModeTree, index: int) -> None:
        object.__setattr__(self, "tree", tree)
        object.__setattr__(self, "index", index)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Node is immutable: cannot set {name!r}")

    @property
    def modes(self) -> tuple[int, ...]:
        """The modes below this node, its first child's first."""
        start, stop = self.tree._spans[self.index]
        return self.tree._leaf_order[start:stop]

    @property
    def children(self) -> tuple[Node, ...]:
        """The children, the one with the smallest mode first; empty for a leaf."""
        nodes = self.tree.nodes
        return tuple(nodes[c] for c in self.tree._children[self.index])

    @property
    def parent(self) -> Node | None:
        """The parent, or None for the root."""
        parent = self.tree.parents[self.index]
        return None if parent < 0 else self.tree.nodes[parent]

    @property
    def level(self) -> int:
        """Height above the leaves: 0 for a leaf, else one more than the highest child's level."""
        return self.tree._heights[self.index]

    @property
    def is_leaf(self) -> bool:
        """Whether this node stands for a single mode with no node below it."""
        return self.index < self.tree.order

    @property
    def is_root(self) -> bool:
        """Whether this node stands for all modes with no node above it."""
        return self.tree.parents[self.index] < 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Node):
            return NotImplemented
        return self.index == other.index and (self.tree is other.tree or self.tree == other.tree)

    def __hash__(self) -> int:
        return hash((self.index, self.tree._hash))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_node, (self.tree, self.index))

    def __repr__(self) -> str:
        return f"Node({format_modes(self.modes)}, level={self.level})"


def _node(tree: ModeTree, index: int) -> Node:
    return tree.nodes[index]


class ModeTree:
    """A rooted tree whose leaves are the modes ``0 .. order - 1`` of a tensor.

    Immutable and hashable. Trees are kept in a canonical form (children and the nodes of a level
    are ordered by their smallest mode), so two trees that merge the same modes in the same way are
    equal.
    Use one of the constructors: :meth:`balanced`, :meth:`halves`, :meth:`grid`, :meth:`flat`,
    :meth:`chain`, :meth:`from_levels`, :meth:`from_nested`, :meth:`from_parents`,
    :meth:`from_json`.

    Example:
        >>> tree = ModeTree.balanced(4)
        >>> [node.modes for node in tree.interior]
        [(0, 1), (2, 3), (0, 1, 2, 3)]

    Attributes:
        order: number of modes.
        parents: for each node of ``nodes`` the index of its parent, -1 for the root.
    """

    order: int
    parents: tuple[int, ...]
    _children: tuple[tuple[int, ...], ...]
    _heights: tuple[int, ...]
    _spans: tuple[tuple[int, int], ...]
    _leaf_order: tuple[int, ...]
    _hash: int

    def __init__(self, order: int, parents: Sequence[int]) -> None:
        """``parents[i]`` is the parent of node ``i``; nodes ``0 .. order - 1`` are the leaves."""
        order = as_int("order", order)
        given = [as_int("a parent", p) for p in parents]
        children, heights, smallest = analyse(order, given)
        rank = sorted(range(len(given)), key=lambda i: (heights[i], smallest[i]))
        position = {old: new for new, old in enumerate(rank)}
        set_ = object.__setattr__
        set_(self, "order", order)
        set_(self, "parents", tuple(position.get(given[old], -1) for old in rank))
        set_(self, "_heights", tuple(heights[old] for old in rank))
        ordered = [
            tuple(position[c] for c in sorted(children[old], key=smallest.__getitem__))
            for old in rank
        ]
        set_(self, "_children", tuple(ordered))
        leaf_order, spans = depth_first(order, self.parents, ordered)
        set_(self, "_leaf_order", leaf_order)
        set_(self, "_spans", spans)
        set_(self, "_hash", hash((order, self.parents)))

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("nodes", "levels"):
            raise AttributeError(f"ModeTree is immutable: cannot set {name!r}")
        object.__setattr__(self, name, value)

    # -- constructors -----------------------------------------------------------------------------

    @classmethod
    def from_parents(cls, order: int, parents: Sequence[int]) -> ModeTree:
        """The tree whose node ``i`` has the parent ``parents[i]`` (-1: the root); the first
        ``order`` nodes are the leaves."""
        return cls(order, parents)

    @classmethod
    def from_levels(cls, levels: Iterable[Iterable[Iterable[int]]]) -> ModeTree:
        """The tree of a sequence of ever coarser partitions of the modes.

        Args:
            levels: ``levels[0]`` lists the modes one by one, each further level merges whole nodes
                of the level below (or keeps one as a one-child node), the last is a single node.

        Raises:
            ValueError: a mode is missing or appears twice in a level, a node is empty, or a level
                does not refine the one below.
        """
        parts = [[tuple(as_int("a mode", m) for m in node) for node in level] for level in levels]
        if len(parts) < 2:
            raise ValueError(
                "from_levels: expected at least two levels (the leaves and the root), "
                f"got {len(parts)}"
            )
        merged = next((node for node in parts[0] if len(node) > 1), None)
        if merged is not None:
            raise ValueError(f"from_levels: level 0 must list single modes, got the node {merged}")
        order = len(parts[0])
        parents: list[int] = []
        below: dict[int, int] = {}
        first = 0
        for number, level in enumerate(parts):
            owner = partition_owners(number, level, order)
            if number == 0:
                parents = [-1] * order
                below = {m: m for m in range(order)}
                first = order
                continue
            sizes: dict[int, int] = {}
            for mode in range(order):
                child, parent = below[mode], first + owner[mode]
                if parents[child] not in (-1, parent):
                    split = next(n for n in parts[number - 1] if mode in n)
                    raise ValueError(
                        f"from_levels: level {number} does not refine level {number - 1}: it "
                        f"splits the node {split}"
                    )
                parents[child] = parent
                sizes[child] = sizes.get(child, 0) + 1
            parents += [-1] * len(level)
            below = {m: first + owner[m] for m in range(order)}
            first += len(level)
        if len(parts[-1]) != 1:
            raise ValueError(
                "from_levels: the last level must be one node over all modes, "
                f"got {len(parts[-1])} nodes"
            )
        return cls(order, parents)

    @classmethod
    def from_nested(cls, nested: Any) -> ModeTree:
        """The tree written as nested sequences: ``((0, 1), (2, (3, 4)))``; an integer is a leaf, a
        sequence of one element a one-child node.

        Raises:
            ValueError: a mode is missing or appears twice, or a node is empty.
        """
        if not isinstance(nested, (tuple, list)):
            raise ValueError(
                f"from_nested: expected a nested tuple of modes, got {type(nested).__name__}"
            )
        leaf_parent: dict[int, int] = {}
        interior = [-1]
        stack: list[tuple[Any, int]] = [(nested, 0)]
        while stack:
            item, me = stack.pop()
            if len(item) == 0:
                raise ValueError("from_nested: a node is empty")
            for child in item:
                if isinstance(child, (tuple, list)):
                    interior.append(me)
                    stack.append((child, len(interior) - 1))
                    continue
                mode = as_int("a mode", child)
                if mode in leaf_parent:
                    raise ValueError(f"from_nested: mode {mode} appears twice")
                leaf_parent[mode] = me
        order = len(leaf_parent)
        missing = next((m for m in range(order) if m not in leaf_parent), None)
        if missing is not None:
            raise ValueError(
                f"from_nested: mode {missing} is missing "
                f"(the modes are {format_modes(tuple(sorted(leaf_parent)))})"
            )
        parents = [order + leaf_parent[m] for m in range(order)]
        parents += [p if p < 0 else order + p for p in interior]
        return cls(order, parents)

    @classmethod
    def balanced(cls, order: int, arity: int = 2) -> ModeTree:
        """Neighbours merge first, ``arity`` at a time, level by level. A single node left over at
        the end of a level goes up through a one-child node."""
        arity = as_int("arity", arity)
        if arity < 2:
            raise ValueError(f"balanced: arity must be at least 2, got {arity}")
        return cls._by_merging(
            order, lambda n: [list(range(i, min(i + arity, n))) for i in range(0, n, arity)]
        )

    @classmethod
    def halves(cls, order: int) -> ModeTree:
        """Mode ``i`` merges with mode ``i + order // 2`` first, and so on at every level: the tree
        of partitions that couple far-apart modes. A node left over goes up through a one-child
        node."""

        def merge(n: int) -> list[list[int]]:
            half = n // 2
            return [[i, i + half] for i in range(half)] + [[n - 1]] * (n % 2)

        return cls._by_merging(order, merge)

    @classmethod
    def grid(cls, height: int, width: int, window: tuple[int, int] = (2, 2)) -> ModeTree:
        """Modes on a ``height x width`` grid (mode ``row * width + column``), merged in windows,
        level by level, as the pooling layers of a convolutional network do."""
        height, width = as_int("height", height), as_int("width", width)
        down, across = (as_int("a window side", w) for w in window)
        if height < 1 or width < 1 or height * width < 2:
            raise ValueError(f"grid: expected at least two cells, got {height} x {width}")
        if down < 1 or across < 1 or (down == 1 and height > 1) or (across == 1 and width > 1):
            raise ValueError(
                f"grid: the window {(down, across)} never merges a {height} x {width} grid"
            )
        parents: list[int] = []
        rows, columns, first = height, width, 0
        while rows * columns > 1:
            up_columns = -(-columns // across)
            first += rows * columns
            parents += [
                first + (r // down) * up_columns + c // across
                for r in range(rows)
                for c in range(columns)
            ]
            rows, columns = -(-rows // down), up_columns
        return cls(height * width, [*parents, -1])

    @classmethod
    def flat(cls, order: int) -> ModeTree:
        """A root over all leaves: the tree of a CP tensor factorization."""
        return cls(order, [order] * as_int("order", order) + [-1])

    @classmethod
    def chain(cls, depth: int) -> ModeTree:
        """The tree of a deep matrix factorization ``W_1 W_2 ... W_depth``: leaf 0 carries ``W_1``,
        the ``depth - 2`` one-child nodes above it ``W_2 .. W_{depth-1}``, leaf 1 the transpose of
        ``W_depth``; use it with ``root="sum"``."""
        depth = as_int("depth", depth)
        if depth < 2:
            raise ValueError(f"chain: depth must be at least 2, got {depth}")
        links = depth - 2
        root = 2 + links
        return cls(2, [2 if links else root, root, *range(3, 3 + links), -1])

    @classmethod
    def _by_merging(cls, order: int, merge: Any) -> ModeTree:
        order = as_int("order", order)
        if order < 2:
            raise ValueError(f"a mode tree needs at least 2 modes, got order {order}")
        parents: list[int] = []
        count, first = order, 0
        while count > 1:
            groups = merge(count)
            first += count
            level = [0] * count
            for g, members in enumerate(groups):
                for m in members:
                    level[m] = first + g
            parents += level
            count = len(groups)
        return cls(order, [*parents, -1])

    # -- the tree ---------------------------------------------------------------------------------

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, by level, then by smallest mode: the leaves first, the root last."""
        return tuple(Node(self, i) for i in range(len(self.parents)))

    @property
    def leaves(self) -> tuple[Node, ...]:
        """The leaves, in mode order."""
        return self.nodes[: self.order]

    @property
    def interior(self) -> tuple[Node, ...]:
        """All nodes but the leaves, children before parents, the root last."""
        return self.nodes[self.order :]

    @property
    def root(self) -> Node:
        """The node over all modes."""
        return self.nodes[-1]

    @property
    def depth(self) -> int:
        """Number of interior levels (the root's level)."""
        return self._heights[-1]

    @cached_property
    def levels(self) -> tuple[tuple[Node, ...], ...]:
        """The nodes by height: ``levels[0]`` the leaves, ``levels[-1]`` the root alone."""
        levels: list[list[Node]] = [[] for _ in range(self.depth + 1)]
        for node in self.nodes:
            levels[node.level].append(node)
        return tuple(tuple(level) for level in levels)

    def node(self, modes: int | Iterable[int], level: int | None = None) -> Node:
        """The node over exactly these modes (in any order).

        Args:
            modes: a mode or a set of modes.
            level: picks one of several nodes over the same modes (a chain of one-child nodes);
                without it the lowest is returned.

        Raises:
            KeyError: no node has these modes, or none at that level.
            ValueError: a mode or the level is not an integer.
        """
        if level is not None:
            level = as_int("node: level", level)
        wanted = {
            as_int("node: modes", m) for m in (modes if isinstance(modes, Iterable) else [modes])
        }
        if not wanted or not wanted <= set(range(self.order)):
            raise KeyError(
                f"no node over the modes {sorted(wanted)}: the modes are 0..{self.order - 1}"
            )
        at: int = min(wanted)
        while at >= 0:
            start, stop = self._spans[at]
            if stop - start > len(wanted):
                break
            if stop - start == len(wanted) and (level is None or self._heights[at] == level):
                if set(self._leaf_order[start:stop]) == wanted:
                    return self.nodes[at]
                break
            at = self.parents[at]
        where = "" if level is None else f" at level {level}"
        raise KeyError(
            f"no node over the modes {format_modes(tuple(sorted(wanted)))}{where} in this tree"
        )

    def to_nested(self) -> Any:
        """The tree as nested tuples, the inverse of :meth:`from_nested`."""
        built: dict[int, Any] = {m: m for m in range(self.order)}
        for i in range(self.order, len(self.parents)):
            built[i] = tuple(built.pop(c) for c in self._children[i])
        return built[len(self.parents) - 1]

    def to_json(self) -> str:
        """A JSON object with ``order`` and ``parents`` (as in :meth:`from_parents`)."""
        return json.dumps({"order": self.order, "parents": list(self.parents)})

    @classmethod
    def from_json(cls, text: str) -> ModeTree:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: the text is not a JSON object with ``order`` and ``parents``, or these do
                not describe a tree.
        """
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise ValueError("from_json: the JSON is nested too deeply") from error
        if not isinstance(data, dict) or not {"order", "parents"} <= data.keys():
            raise ValueError('from_json: expected an object with "order" and "parents"')
        if not isinstance(data["parents"], list):
            kind = type(data["parents"]).__name__
            raise ValueError(f"from_json: parents must be a list, got {kind}")
        return cls(data["order"], data["parents"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModeTree):
            return NotImplemented
        return self is other or (self._hash == other._hash and self.parents == other.parents)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return (ModeTree, (self.order, self.parents))

    def __repr__(self) -> str:
        return f"ModeTree(order={self.order}, nodes={len(self.parents)}, depth={self.depth})"

    def __str__(self) -> str:
        return self.draw()

    def draw(self, max_lines: int = 80, label: Any = None) -> str:
        """The tree as indented text, one node a line.

        Args:
            max_lines: the drawing is cut there, with a line that says how much is left out.
            label: optional function from a node to text written after its modes.
        """
        lines: list[str] = []
        stack: list[tuple[Node, str, str]] = [(self.root, "", "")]
        while stack and len(lines) < max_lines:
            node, head, rest = stack.pop()
            note = "" if label is None else f"  {label(node)}"
            lines.append(f"{head}{format_modes(node.modes)}{note}")
            children = node.children
            for i in reversed(range(len(children))):
                last = i == len(children) - 1
                stack.append(
                    (
                        children[i],
                        rest + ("└─ " if last else "├─ "),
                        rest + ("   " if last else "│  "),
                    )
                )
        if stack:
            lines.append(f"... {len(self.parents) - len(lines)} more of {len(self.parents)} nodes")
        return "\n".join(lines)
