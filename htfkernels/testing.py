"""Shared cases, inputs and tolerances: what a backend has to pass, in this project's tests and in
others'.

A backend's author writes::

    for case in testing.cases():
        inputs = testing.make_inputs(case, torch.float32)
        function, arguments = testing.operation("evaluate", case, inputs)
        exact, scale = testing.exact(function, arguments)
        with hk.use_backend("triton"):
            testing.assert_matches(function(*arguments), exact, torch.float32, "forward", scale)

and the same with ``testing.gradients(function)`` for ``"backward"`` and
``testing.second(function)`` for ``"second"``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from htfkernels import functional
from htfkernels.runtime.dispatch import use_backend
from htfkernels.schedule.index_plan import IndexPlan
from htfkernels.spectra import matricizations as spectra
from htfkernels.tree import ModeTree
from htfkernels.tree.layout import Layout

__all__ = [
    "MORE_OPS",
    "OPS",
    "TF32",
    "TOLERANCES",
    "Case",
    "Inputs",
    "assert_matches",
    "cases",
    "error",
    "exact",
    "gradients",
    "group_rmsprop",
    "make_inputs",
    "operation",
    "random_tree",
    "second",
    "small_cases",
    "tolerance",
]

Direction = Literal["forward", "backward", "second"]
Function = Callable[..., Any]

OPS = ("evaluate", "evaluate_at", "full_tensor")
MORE_OPS = ("evaluate_at_planned", "slog", "spectra")
"""What :func:`operation` knows beside them."""

# How far a result may be off the float64 one, relative to the condition scale of `exact`: twice the
# largest error over all `cases`, operations and three seeds, which on an AVX-512 CPU is
#                           forward  backward  second
#     float32   reference   4.1e-7   2.0e-6    2.1e-6
#               C++         4.3e-7   8.4e-7    (the reference's)
#     bfloat16  reference   2.0e-2   9.6e-2    9.8e-2    PyTorch sums gradients of rows in bfloat16
#               C++         1.4e-2   1.5e-2    messages rounded for BF16 instructions
#               C++         3.9e-3   3.9e-3    without them
#     float16   reference   2.4e-3   9.7e-2    4.4e-3    its smallest numbers have fewer bits
#     float64   C++         8.3e-16  4.2e-15   (the reference's)
# (`pytest tests/test_testing.py -m slow -s`). float64 is the reference itself: its entries are
# float32's times 2^-29.
TOLERANCES: dict[tuple[torch.dtype, Direction], float] = {
    (torch.float64, "forward"): 2e-15,
    (torch.float64, "backward"): 7.5e-15,
    (torch.float64, "second"): 8.4e-15,
    (torch.float32, "forward"): 1e-6,
    (torch.float32, "backward"): 4e-6,
    (torch.float32, "second"): 4.5e-6,
    (torch.bfloat16, "forward"): 0.04,
    (torch.bfloat16, "backward"): 0.2,
    (torch.bfloat16, "second"): 0.2,
    (torch.float16, "forward"): 5e-3,
    (torch.float16, "backward"): 0.2,
    (torch.float16, "second"): 9e-3,
}

# For each node. A TF32 product rounds both operands to 11 bits, or cuts them off there in a
# gradient; a node has a part in a term either on the way up or on the way down.
TF32: dict[Direction, float] = {"forward": 2.0**-10, "backward": 2.0**-9}


def tolerance(
    dtype: torch.dtype, direction: Direction, precision: str = "ieee", nodes: int = 1
) -> float:
    """The largest error allowed, relative to the condition scale (see :func:`exact`).

    Args:
        dtype: in what precision a result was computed.
        direction: ``"forward"``, ``"backward"`` or ``"second"``.
        precision: of float32 products; ``"tf32"`` has bounds of its own, for the first two
            directions.
        nodes: of the tree, which those bounds grow with.
    """
    if precision == "tf32" and dtype == torch.float32:
        return TF32[direction] * nodes
    return TOLERANCES[dtype, direction]


@dataclass(frozen=True)
class Case:
    """A layout and a batch size, with a name for test reports."""

    name: str
    layout: Layout
    batch: int

    @property
    def tree(self) -> ModeTree:
        """The layout's mode tree."""
        return self.layout.tree

    def fits(self, op: str) -> bool:
        """Whether the operation is small enough to test on this case (the end tensor may be
        huge)."""
        return op != "full_tensor" or self.layout.num_entries <= 2500

    def __str__(self) -> str:
        return self.name


def random_tree(order: int, seed: int) -> ModeTree:
    """An irregular tree over ``order`` modes: nodes of one to four children, at any height, over
    modes that need not be neighbours."""
    draw = random.Random(seed)
    parents = [-1] * order
    tops = list(range(order))
    while len(tops) > 1 or len(parents) == order:
        size = min(draw.choice((1, 2, 2, 3, 4)), len(tops))
        chosen = set(draw.sample(tops, size))
        for child in chosen:
            parents[child] = len(parents)
        tops = [t for t in tops if t not in chosen] + [len(parents)]
        parents.append(-1)
    return ModeTree.from_parents(order, parents)


def _random_layout(order: int, seed: int, dims: Sequence[int], outputs: int = 1) -> Layout:
    tree = random_tree(order, seed)
    draw = random.Random(seed)
    ranks = {node: draw.choice((1, 2, 7, 16, 17, 33)) for node in tree.interior}
    return Layout.make(tree, [draw.choice(dims) for _ in range(order)], ranks, outputs)


def cases() -> list[Case]:
    """Small cases that between them visit every shape of tree and every awkward size."""
    make, T = Layout.make, ModeTree
    caterpillar: Any = (0, 1)
    for mode in range(2, 40):
        caterpillar = (caterpillar, mode)
    links = T.from_nested(((((0,),), 1), ((2, (3,)),), 4))
    return [
        Case("balanced4", make(T.balanced(4), 3, [5, 4]), 7),
        Case("balanced8_rank64", make(T.balanced(8), 3, 64), 65),
        Case("balanced16_rank16", make(T.balanced(16), 2, 16), 65),
        Case("balanced7_arity3", make(T.balanced(7, 3), 3, [17, 7]), 65),
        Case("balanced64", make(T.balanced(64), 5, 17), 65),
        Case("halves8", make(T.halves(8), 2, [4, 4, 3]), 300),
        Case("halves11", make(T.halves(11), 2, 7), 65),
        Case("grid4x4", make(T.grid(4, 4), 2, [8, 16]), 7),
        Case("grid3x5", make(T.grid(3, 5), 2, [3, 4, 5]), 1),
        Case("flat3_sum", make(T.flat(3), [4, 5, 3], 17, root="sum"), 65),
        Case("flat7_linear", make(T.flat(7), 3, 33), 7),
        Case("chain2_sum", make(T.chain(2), [6, 5], 16, root="sum"), 65),
        Case("chain5_sum", make(T.chain(5), [6, 5], [9, 8, 7, 6], root="sum"), 300),
        Case("chain4_linear", make(T.chain(4), [17, 16], [33, 16, 7], 2), 7),
        Case("one_of_each", make(T.balanced(2), 1, 1), 1),
        Case("order2_wide", make(T.balanced(2), 17, 64, 5), 300),
        Case("one_child_nodes", make(links, 4, 7), 65),
        Case("one_child_nodes_sum", make(links, [1, 2, 3, 4, 5], 3, root="sum"), 7),
        Case("one_child_root", make(T.from_nested((((0, 1), 2),)), 3, [5, 4, 3]), 7),
        Case("caterpillar40", make(T.from_nested(caterpillar), 2, 7), 65),
        Case("primes", make(T.balanced(5), [2, 3, 5, 7, 11], [13, 7, 5], 3), 65),
        Case("dims_1_to_17", make(T.balanced(4), [1, 17, 8, 9], [33, 17]), 65),
        Case("rank1", make(T.balanced(6), 3, 1), 65),
        Case("outputs10", make(T.halves(4), 5, 7, 10), 65),
        Case("shared8", make(T.balanced(8), 3, 8, share_weights=True), 65),
        Case("shared6_sum", make(T.balanced(6), 3, 7, root="sum", share_weights=True), 7),
        Case("shared_mixed", make(T.balanced(5), [2, 3, 3, 2, 3], 7, 2, share_weights=True), 65),
        Case("empty_batch", make(T.balanced(4), 3, 5), 0),
        Case("empty_batch_outputs", make(T.flat(3), 3, 5, 4), 0),
        Case("batch1", make(T.balanced(4), 8, 16), 1),
        Case("random6", _random_layout(6, 0, (2, 3, 4)), 65),
        Case("random7_outputs", _random_layout(7, 1, (1, 2, 3), 2), 7),
        Case("random9", _random_layout(9, 2, (1, 2, 3)), 300),
        Case("random23", _random_layout(23, 3, (1, 2, 5, 16, 17)), 65),
    ]


def small_cases() -> list[Case]:
    """Cases small enough to differentiate by finite differences."""
    make, T = Layout.make, ModeTree
    irregular = T.from_nested((((0,), 2), 1, (3,)))
    ranks = {node: 3 if node.level == 1 else 2 for node in irregular.interior}
    return [
        Case("small_irregular", make(irregular, [2, 3, 1, 2], ranks, 2), 3),
        Case("small_flat_sum", make(T.flat(3), [2, 3, 2], 2, root="sum"), 2),
        Case("small_chain_sum", make(T.chain(4), [2, 3], [2, 3, 2], root="sum"), 2),
        Case("small_shared", make(T.balanced(4), 2, 2, share_weights=True), 2),
        Case("small_numbers", make(T.balanced(2), 1, 1), 1),
    ]


@dataclass(frozen=True)
class Inputs:
    """Arguments for a case.

    Attributes:
        weights: folded, one ``[F, R_in, R_out]`` for each group.
        vectors: ``[B, N, D]``, or ``N`` tensors ``[B, D_n]`` where the mode dimensions differ.
        indices: ``[B, N]``, int64.
    """

    weights: tuple[Tensor, ...]
    vectors: Tensor | tuple[Tensor, ...]
    indices: Tensor


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    spread: float = 0.5,
) -> Inputs:
    """Random arguments, the same numbers on every device.

    Entries are normal with mean 1 and standard deviation ``spread``, divided by the number of terms
    they are summed over: messages stay near 1, and sums cancel little, so that an error relative to
    the condition scale is about an error relative to the value, and a small one cannot hide a wrong
    formula. Trees of thousands of modes need a smaller spread for that than the cases here.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 1 + spread * torch.randn(shape, generator=generator, dtype=torch.float64)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    layout, batch = case.layout, case.batch
    dims = layout.mode_dims
    weights = tuple(cast(draw(*g.shape) / (g.rows if g.level else 1)) for g in layout.groups)
    vectors: Tensor | tuple[Tensor, ...]
    if len(set(dims)) == 1:
        vectors = cast(draw(batch, len(dims), dims[0]) / dims[0])
    else:
        vectors = tuple(cast(draw(batch, d) / d) for d in dims)
    columns = [torch.randint(d, (batch,), generator=generator) for d in dims]
    return Inputs(weights, vectors, torch.stack(columns, dim=1).to(device))


def operation(op: str, case: Case, inputs: Inputs) -> tuple[Function, tuple[Tensor, ...]]:
    """An operation as a function of its differentiable arguments alone, and those arguments.

    The weights come first, one for each group; for ``"evaluate"`` and ``"slog"`` the vectors
    follow. The function runs on the backend in force when it is called.

    ``"slog"`` is sign times the exponential of log-magnitude, and so has the values and gradients
    of ``"evaluate"``. ``"spectra"`` is the singular values of all nodes' matricizations in one
    tensor.
    """
    layout, tree = case.layout, case.tree
    count = len(inputs.weights)
    if op in ("evaluate", "slog"):
        together = isinstance(inputs.vectors, Tensor)

        def evaluate(*arguments: Tensor) -> Tensor:
            weights, vectors = arguments[:count], arguments[count:]
            x = vectors[0] if together else vectors
            if op == "evaluate":
                return functional.evaluate(tree, weights, x, layout=layout)
            sign, logabs = functional.slog_evaluate(tree, weights, x, layout=layout)
            return sign * logabs.exp()

        given = (inputs.vectors,) if isinstance(inputs.vectors, Tensor) else inputs.vectors
        return evaluate, (*inputs.weights, *given)
    if op == "evaluate_at":

        def evaluate_at(*weights: Tensor) -> Tensor:
            return functional.evaluate_at(tree, weights, inputs.indices, layout=layout)

        return evaluate_at, inputs.weights
    if op == "full_tensor":

        def full_tensor(*weights: Tensor) -> Tensor:
            return functional.full_tensor(tree, weights, layout=layout)

        return full_tensor, inputs.weights
    if op == "evaluate_at_planned":
        with use_backend("reference"):  # the plan is not what is looked at
            made = IndexPlan.make(layout, inputs.indices.cpu()).to(inputs.indices.device)

        def evaluate_at_planned(*weights: Tensor) -> Tensor:
            return functional.evaluate_at(tree, weights, made, layout=layout)

        return evaluate_at_planned, inputs.weights
    if op == "spectra":

        def singular_values(*weights: Tensor) -> Tensor:
            found = spectra.matricization_spectra(tree, weights, tree.nodes, layout=layout)
            return torch.cat([*found.values()])

        return singular_values, inputs.weights
    raise ValueError(f"operation: expected one of {', '.join((*OPS, *MORE_OPS))}, got {op!r}")


def group_rmsprop(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    average: float,
    step: int,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    alpha: float,
    eps: float,
) -> tuple[list[Tensor], float]:
    """A step of RMSprop with one adaptive step size for all parameters, in float64 on the CPU::

        d = g + weight_decay p
        v <- alpha v + (1 - alpha) sum of |d|^2
        p <- p - lr / (sqrt(v / (1 - alpha^step)) + eps) d

    Args:
        params, grads: of the same shapes.
        average: ``v`` before the step.
        step: which step it is, from 1.
        lr, weight_decay: for each parameter.
        alpha, eps: numbers.

    Returns:
        the parameters and ``v`` after it.

    Example:
        >>> group_rmsprop([torch.ones(2)], [torch.ones(2)], 0.0, 1, [0.5], [0.0], 0.5, 0.0)[1]
        1.0
    """
    before = [p.detach().double().cpu() for p in params]
    moves = [
        g.detach().double().cpu() + w * p
        for p, g, w in zip(before, grads, weight_decay, strict=True)
    ]
    squares = sum(float(d.square().sum()) for d in moves)
    average = alpha * average + (1 - alpha) * squares
    denominator = sqrt(average / (1 - alpha**step)) + eps
    steps = zip(before, moves, lr, strict=True)
    return [p - size / denominator * d for p, d, size in steps], average


def gradients(function: Function) -> Function:
    """``(cotangent, *arguments) -> gradients of <cotangent, function(*arguments)>`` by the
    arguments."""

    def run(cotangent: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_() for a in arguments]
        return torch.autograd.grad(function(*leaves), leaves, cotangent)

    return run


def second(function: Function) -> Function:
    """``(cotangent, directions, arguments) -> gradients of <directions, gradients(function)>`` by
    the cotangent and the arguments, all tensors in one flat list: a cotangent, then one direction
    for each argument, then the arguments."""

    def run(cotangent: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        directions, arguments = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        leaves = [t.detach().requires_grad_() for t in (cotangent, *arguments)]
        value = function(*leaves[1:])
        first = torch.autograd.grad(value, leaves[1:], leaves[0], create_graph=True)
        return torch.autograd.grad(
            first, leaves, directions, allow_unused=True, materialize_grads=True
        )

    return run


def exact(function: Function, arguments: Iterable[Tensor]) -> tuple[Any, Any]:
    """The function's value in float64 on the reference, and its condition scale.

    The scale is the function of the arguments' absolute values. All the operations here, their
    gradients and their second derivatives are polynomials with non-negative coefficients, so the
    scale is the sum of the magnitudes of all terms. In any order of summation, rounding errors are
    at most the unit roundoff times the scale times the number of roundings on the way.
    """
    double = [a.detach().double() for a in arguments]
    with use_backend("reference"), torch.autocast("cpu", enabled=False):
        return function(*double), function(*(a.abs() for a in double))


def error(actual: Any, expected: Any, scale: Any) -> float:
    """The largest error of any entry, relative to its scale; ``inf`` where a NaN or an unequal
    infinity is, and where a shape is another."""
    worst = 0.0
    for a, e, s in _leaves(actual, expected, scale):
        if a.shape != e.shape:
            return inf
        if a.numel() == 0:
            continue
        relative = _relative(a, e, s)
        worst = max(worst, float(relative.max()))
    return worst


def assert_matches(
    actual: Any,
    expected64: Any,
    dtype: torch.dtype,
    direction: Direction,
    scale: Any | None = None,
    allowed: float | None = None,
) -> None:
    """Holds a result against the float64 one.

    Args:
        actual: a tensor or a sequence of tensors.
        expected64: the same in float64.
        dtype: in what precision ``actual`` was computed.
        direction: ``"forward"``, ``"backward"`` or ``"second"``.
        scale: the condition scale of :func:`exact`; by default, for functions that have none, the
            largest magnitude of each expected tensor.
        allowed: the largest error; by default :func:`tolerance` of the dtype.

    Raises:
        AssertionError: shapes differ, or an entry is further off than is allowed.
    """
    allowed = tolerance(dtype, direction) if allowed is None else allowed
    if scale is None:
        scale = [
            torch.full_like(e, float(e.detach().abs().max()) if e.numel() else 1.0)
            for e in _flat(expected64)
        ]
    for i, (a, e, s) in enumerate(_leaves(actual, expected64, scale)):
        if a.shape != e.shape:
            raise AssertionError(
                f"result {i}: expected the shape {list(e.shape)}, got {list(a.shape)}"
            )
        found = error(a, e, s)
        if not found <= allowed:
            raise AssertionError(
                f"result {i}: {direction} in {dtype} is off by {found:.2e} of its scale, allowed "
                f"{allowed:.0e}\n{_worst(a, e, s)}"
            )


def _flat(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _leaves(*trees: Any) -> Iterator[tuple[Tensor, ...]]:
    return zip(*map(_flat, trees), strict=True)


def _relative(actual: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Each entry's error over its scale; 0 where they are equal, infinities included."""
    a, e, s = (t.detach().to("cpu", torch.float64) for t in (actual, expected, scale))
    relative = ((a - e).abs() / s).nan_to_num(nan=torch.inf)
    return torch.where(a == e, torch.zeros_like(relative), relative)


def _worst(actual: Tensor, expected: Tensor, scale: Tensor) -> str:
    relative = _relative(actual, expected, scale)
    at = tuple(int(i) for i in torch.unravel_index(relative.argmax(), relative.shape))
    wrong = int((relative >= relative.max() / 1000).sum())
    return (
        f"at {list(at)}: expected {expected[at].item()!r}, got {actual[at].item()!r}; "
        f"{wrong} of {relative.numel()} entries are about as wrong"
    )
