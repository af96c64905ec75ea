"""How a whole tree is evaluated in one launch: which trees, and into what subtrees they are cut.

The kernels (``csrc/evaluate/tree_forward.cuh``, ``tree_backward.cuh``) give each block a subtree of
a *cut* of the tree and a tile of the batch. Which cut is the fastest is for
:mod:`htfkernels.cuda.whole_tree.geometry`. Nothing here knows of a device.
"""

from __future__ import annotations

import heapq
from functools import cached_property, lru_cache

import torch

from htfkernels.tree.layout import Layout
from htfkernels.tree.program import Step, read

__all__ = [
    "CHUNK",
    "DTYPES",
    "FIELDS",
    "GROUPS",
    "MATH",
    "OWN_SLOTS",
    "SIDE",
    "STREAM",
    "Cut",
    "Tree",
    "math_of",
    "tree_of",
    "why_not",
    "why_not_at",
]

# The numbers of csrc/evaluate/tree_products.cuh and tree_parts.cuh.
SIDE = 64
GROUPS = 400
FIELDS = 16
OWN_SLOTS = 2  # slots of the backward pass that hold no message
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})
MATH = {"ieee": 0, "tf32": 1, "tf32x3": 2}
CHUNK = 0.4e-6
"""Seconds that a step takes beside its arithmetic, on an H100: two barriers, the table, copies to
wait for, and the latencies of a product.

Estimated for steps of some 400 instructions in each warp. An earlier version had some 1,200, and
its steps took 1.6 us on an H200 at every rank."""
STREAM = 100e9
"""Bytes a second that one multiprocessor gets from L2."""
LONGEST = 256  # by index: a leaf's gradient is a product with vectors of zeros and ones
NODES = 2048  # every task's table lists the nodes above it, and their children


def math_of(dtype: torch.dtype, precision: str) -> int:
    """How products are computed: 0 multiply-adds, 1 TF32, 2 TF32 three times, 3 bfloat16."""
    if dtype == torch.float32:
        return MATH[precision]
    return 3 if dtype == torch.bfloat16 else 0


def why_not(layout: Layout, dtype: torch.dtype) -> str | None:
    """None where a layout is evaluated in one launch, else one sentence that says why not."""
    del dtype
    widest = max(*layout.ranks, layout.out_features)
    if widest > SIDE:
        return (
            f"cuda evaluates trees whose local ranks and out_features are at most {SIDE}, and "
            f"this one has {widest}"
        )
    if len(layout.groups) > GROUPS:
        return (
            f"cuda evaluates trees of at most {GROUPS} groups of weights, and this one has "
            f"{len(layout.groups)}"
        )
    if len(layout.tree.nodes) > NODES:
        return (
            f"cuda evaluates trees of at most {NODES} nodes, and this one has "
            f"{len(layout.tree.nodes)}"
        )
    weights = sum(len(g.nodes) * g.rows * g.cols for g in layout.groups)
    if max(weights, layout.offsets[-1]) >= 2**31 - 16 * GROUPS:
        return "cuda evaluates trees of fewer than 2^31 weights and columns of vectors"
    return None


def why_not_at(layout: Layout, dtype: torch.dtype) -> str | None:
    """The same for leaves by index."""
    longest = max(layout.mode_dims)
    if longest > LONGEST:
        return (
            f"cuda evaluates entries of trees whose mode dimensions are at most {LONGEST}, and "
            f"this one has {longest}"
        )
    return why_not(layout, dtype)


def _padded(width: int) -> int:
    return 16 * -(-width // 16)


class Tree:
    """A program's nodes.

    Attributes:
        nodes: in execution order, the root last.
        indexed: whether leaves are given by index.
        outputs: columns of the result.
        groups: how many folded weights there are.
        widths: of the widest message, and of the widest chunk of vectors, multiples of 16.
    """

    def __init__(self, program: torch.Tensor, indexed: bool = False) -> None:
        read_program = read(program)
        self.nodes = read_program.steps
        self.indexed = indexed
        self.outputs = read_program.out_features
        self.groups = read_program.groups
        leaves = [n for n in self.nodes if n.is_leaf]
        vectors = max(min(SIDE, n.rows) for n in leaves)
        if indexed:  # rows of weights are where chunks of vectors would be
            vectors = max(vectors, *(n.cols for n in leaves))
        self.widths = (_padded(max(n.cols for n in self.nodes)), _padded(vectors))

    def vectors(self, node: Step) -> int:
        """Of a leaf the first column of its vectors, or its mode; else -1."""
        return node.mode if self.indexed else node.offset

    def subtree(self, root: int) -> range:
        """The nodes below a node and itself, in execution order."""
        return range(self.nodes[root].begin, root + 1)

    def path(self, node: int) -> list[int]:
        """The nodes above one, nearest first."""
        found = []
        while (node := self.nodes[node].parent) >= 0:
            found.append(node)
        return found

    def products(self, root: int) -> tuple[dict[int, int], int]:
        """Which buffer holds the product of each interior node of a subtree, and how many there
        are."""
        free: list[int] = []
        buffer: dict[int, int] = {}
        count = 0
        for i in self.subtree(root):
            parent = self.nodes[i].parent
            if i != root and parent not in buffer:
                if not free:
                    free.append(count)
                    count += 1
                buffer[parent] = free.pop()
            if not self.nodes[i].is_leaf:
                free.append(buffer[i])
        return buffer, count

    @cached_property
    def numbers(self) -> int:
        """How many weights there are, shared ones once for each node."""
        return sum(n.rows * n.cols for n in self.nodes if n.group >= 0)

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts that are looked at: from the root alone, always the subtree of the most work is
        cut into its children's."""
        work = [0.0] * len(self.nodes)
        for i, n in enumerate(self.nodes):
            work[i] += CHUNK * max(1, -(-n.rows // SIDE)) + n.rows * n.cols * 4 / STREAM
            if n.parent >= 0:
                work[n.parent] += work[i]
        root = len(self.nodes) - 1
        roots, heap = {root}, [(-work[root], root)]
        cuts, wanted = [Cut(self, (root,))], 2.0
        while heap:
            _, heaviest = heapq.heappop(heap)
            if self.nodes[heaviest].is_leaf:
                continue
            roots.remove(heaviest)
            roots.update(self.nodes[heaviest].children)
            for c in self.nodes[heaviest].children:
                heapq.heappush(heap, (-work[c], c))
            if len(roots) >= wanted or all(self.nodes[i].is_leaf for i in roots):
                cuts.append(Cut(self, tuple(sorted(roots))))
                wanted = max(len(roots) + 1, len(roots) * 1.2)
        return tuple(cuts)


class Cut:
    """A cut of a tree into subtrees.

    Attributes:
        roots: the subtrees' roots, one task each, in execution order.
        above: the nodes above them, in execution order.
        sizes: for a forward and a backward pass: how many messages a block holds in shared memory,
            and the numbers of the longest task's part of the table, a multiple of 32.
    """

    def __init__(self, tree: Tree, roots: tuple[int, ...]) -> None:
        self.tree, self.roots = tree, roots
        found: set[int] = set()
        for v in roots:
            while (v := tree.nodes[v].parent) >= 0 and v not in found:
                found.add(v)
        self.above = tuple(sorted(found))

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        tree = self.tree
        path = [0] * len(tree.nodes)  # numbers of the steps above a node, and of their lists
        for v in reversed(self.above):
            own = FIELDS + len(tree.nodes[v].children)
            for c in tree.nodes[v].children:
                path[c] = path[v] + own
        insides = [len(tree.subtree(root)) for root in self.roots]
        longest = [0, 0]
        for root, inside in zip(self.roots, insides, strict=True):
            forward = path[root] + inside * FIELDS
            # Backward, all but the root go up and down, each with its children's slots.
            longest[0] = max(longest[0], forward)
            longest[1] = max(longest[1], forward + (inside - 1) * (FIELDS + 2))
        up, down = (-(-numbers // 32) * 32 for numbers in longest)
        products = max(1, *(tree.products(root)[1] for root in self.roots))
        return (products, up), (OWN_SLOTS + max(insides) - 1, down)


@lru_cache(maxsize=64)
def tree_of(layout: Layout) -> Tree:
    """A layout's tree."""
    return Tree(layout.program)
