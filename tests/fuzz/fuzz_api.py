"""The public operations on random models, against the dense end tensor in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from drawing import (
    DTYPES,
    contracted,
    draw_layout,
    draw_tensor,
    end_tensor,
    matricization,
    model_of,
    node_weights,
    restride,
)
from torch import Tensor

import htfkernels as hk
from htfkernels import functional, testing
from htfkernels.spectra import matricizations as spectra

EPS = torch.finfo(torch.float64).eps


class Drawn:
    """A layout, weights and vectors of one dtype, indices, and who computes."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.layout = layout = draw_layout(draw)
        self.tree = layout.tree
        self.dtype = draw.choice(DTYPES)
        self.weights = [self.tensor(g.shape) for g in layout.groups]
        self.batch = draw.choice((0, 1, 2, 3, 7, 40, 130))
        self.vectors = [self.tensor((self.batch, d)) for d in layout.mode_dims]
        entries = [[draw.randrange(d) for d in layout.mode_dims] for _ in range(self.batch)]
        self.indices = torch.tensor(entries, dtype=torch.int64).reshape(self.batch, self.tree.order)
        self.backend = draw.choice(("reference", "cpp", "auto"))

    def tensor(self, shape: Sequence[int]) -> Tensor:
        return restride(self.draw, draw_tensor(self.draw, shape, self.dtype))

    def squeezed(self, result: Tensor) -> Tensor:
        return result.squeeze(-1) if self.layout.out_features == 1 else result

    def dense(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        return end_tensor(self.layout, [w.double() for w in weights or self.weights])

    def model(self) -> hk.HTF:
        return model_of(self.layout, self.weights)

    def allowed(self, method_accuracy: float) -> float:
        """Of a singular value, relative to the largest: the method's error, and the result's
        rounding."""
        return method_accuracy + 2 * torch.finfo(self.dtype).eps


def _hold(
    drawn: Drawn,
    ours: Callable[..., Tensor],
    dense: Callable[..., Tensor],
    arguments: Sequence[Tensor],
) -> None:
    """Value and gradients of a polynomial with non-negative coefficients, whose condition scale is
    therefore its value at the arguments' magnitudes."""
    wide = [a.double() for a in arguments]
    positive = [a.abs() for a in wide]
    actual = ours(*arguments)
    testing.assert_matches(actual, dense(*wide), drawn.dtype, "forward", dense(*positive))
    if drawn.draw.random() < 0.5:
        return
    cotangent = draw_tensor(drawn.draw, actual.shape, drawn.dtype)
    found = testing.gradients(ours)(cotangent, *arguments)
    run = testing.gradients(dense)
    expected, scale = run(cotangent.double(), *wide), run(cotangent.double().abs(), *positive)
    testing.assert_matches(found, expected, drawn.dtype, "backward", scale)


def evaluate(drawn: Drawn) -> None:
    count = len(drawn.weights)
    together = len(set(drawn.layout.mode_dims)) == 1 and drawn.draw.random() < 0.7

    def ours(*given: Tensor) -> Tensor:
        vectors = torch.stack(given[count:], 1) if together else given[count:]
        return functional.evaluate(drawn.tree, given[:count], vectors, layout=drawn.layout)

    def dense(*given: Tensor) -> Tensor:
        tensor = end_tensor(drawn.layout, given[:count])
        return drawn.squeezed(contracted(tensor, given[count:]))

    _hold(drawn, ours, dense, [*drawn.weights, *drawn.vectors])


def evaluate_at(drawn: Drawn) -> None:
    indices = restride(drawn.draw, drawn.indices) if drawn.batch else drawn.indices
    if drawn.draw.random() < 0.5:
        indices = hk.IndexPlan.make(drawn.layout, drawn.indices)

    def ours(*weights: Tensor) -> Tensor:
        return functional.evaluate_at(drawn.tree, weights, indices, layout=drawn.layout)

    def dense(*weights: Tensor) -> Tensor:
        tensor = end_tensor(drawn.layout, weights)
        return drawn.squeezed(tensor[tuple(drawn.indices.unbind(1))])

    _hold(drawn, ours, dense, drawn.weights)


def full_tensor(drawn: Drawn) -> None:
    def ours(*weights: Tensor) -> Tensor:
        return functional.full_tensor(drawn.tree, weights, layout=drawn.layout)

    def dense(*weights: Tensor) -> Tensor:
        return drawn.squeezed(end_tensor(drawn.layout, weights))

    _hold(drawn, ours, dense, drawn.weights)


def slog(drawn: Drawn) -> None:
    sign, logabs = drawn.model().slog(drawn.vectors)
    vectors = [x.double() for x in drawn.vectors]
    expected = drawn.squeezed(contracted(drawn.dense(), vectors))
    scale = drawn.squeezed(
        contracted(drawn.dense([w.abs() for w in drawn.weights]), [x.abs() for x in vectors])
    )
    value = sign.double() * logabs.double().exp()
    # A logarithm that is rounded moves the value by its magnitude times the unit roundoff.
    scale = scale + expected.abs() * logabs.double().abs().nan_to_num(posinf=0)
    testing.assert_matches(value, expected, drawn.dtype, "forward", scale)


def spectra_of_nodes(drawn: Drawn) -> None:
    tensor, method = drawn.dense(), drawn.draw.choice(("auto", "qr", "gram"))
    found = drawn.model().matricization_spectra(drawn.tree.nodes, method)
    for node, values in found.items():
        _hold_values(values, tensor, node.modes, drawn.allowed(found.accuracy))


def spectrum_of_modes(drawn: Drawn) -> None:
    order = drawn.tree.order
    modes = sorted(drawn.draw.sample(range(order), drawn.draw.randint(1, order)))
    method = drawn.draw.choice(("auto", "qr", "gram"))
    values = drawn.model().matricization_spectrum(modes, method)
    accuracy = spectra.ACCURACY["qr" if method == "qr" else "gram"]
    _hold_values(values, drawn.dense(), modes, drawn.allowed(accuracy))


def _hold_values(values: Tensor, tensor: Tensor, modes: Sequence[int], allowed: float) -> None:
    expected = torch.linalg.svdvals(matricization(tensor, list(modes)))
    top = float(expected[0])
    found = values.detach().double()
    assert bool((found[:-1] >= found[1:]).all()), f"singular values ascend: {found}"
    length = min(len(found), len(expected))
    off = (found[:length] - expected[:length]).abs().max()
    rest = torch.cat([found[length:], expected[length:], found.new_zeros(1)]).max()
    worst = max(float(off), float(rest))
    assert worst <= allowed * top, f"modes {list(modes)}: off by {worst:.2e} of {top:.2e}"


def local_component_norms(drawn: Drawn) -> None:
    matrices = [w.double() for w in node_weights(drawn.layout, drawn.weights)]
    for node, norms in drawn.model().local_component_norms().items():
        expected = matrices[node.index].norm(dim=1)
        for child in node.children:
            expected = expected * matrices[child.index].norm(dim=0)
        testing.assert_matches(norms, expected, drawn.dtype, "forward", expected)


def ranks_without_decomposition(drawn: Drawn) -> None:
    tensor, model = drawn.dense(), drawn.model()
    kind = drawn.draw.choice(("renyi2", "stable"))
    found = (model.renyi2_ranks if kind == "renyi2" else model.stable_ranks)(drawn.tree.nodes)
    measure = hk.renyi2_rank if kind == "renyi2" else hk.stable_rank
    for node, rank in found.items():
        values = torch.linalg.svdvals(matricization(tensor, list(node.modes)))
        expected = float(measure(values))
        # Both are rounded; Gram matrices square the condition of sums that cancel.
        slack = drawn.allowed(spectra.ACCURACY["gram"]) * max(1.0, expected)
        assert abs(float(rank.detach()) - expected) <= slack, (
            f"{node}: {kind} {float(rank.detach())}, not {expected}"
        )


def inner_products(drawn: Drawn) -> None:
    other = [drawn.tensor(g.shape) for g in drawn.layout.groups]
    a, b = drawn.model(), model_of(drawn.layout, other)
    x, y = drawn.dense(), drawn.dense(other)
    eps = torch.finfo(drawn.dtype).eps
    # Sums of products of the factors' entries may cancel down to the result: errors are relative to
    # the sum of magnitudes.
    p = drawn.dense([w.abs() for w in drawn.weights])
    q = drawn.dense([w.abs() for w in other])
    for found, expected, scale in (
        (float(hk.inner(a, b).detach()), (x * y).sum(), (p * q).sum()),
        (float(hk.norm(a).detach()) ** 2, (x * x).sum(), (p * p).sum()),
        (float(hk.distance(a, b).detach()) ** 2, ((x - y) ** 2).sum(), ((p + q) ** 2).sum()),
    ):
        if found == float(expected.to(drawn.dtype)):  # an infinity beyond the dtype's range too
            continue
        off = abs(found - float(expected))
        allowed = 8 * eps * abs(float(expected)) + 1e3 * EPS * float(scale)
        assert off <= allowed, f"inner product {found}, not {float(expected)}"


def sums(drawn: Drawn) -> None:
    if drawn.layout.share_weights:
        return
    other = [drawn.tensor(g.shape) for g in drawn.layout.groups]
    a, b = drawn.model(), model_of(drawn.layout, other)
    number = drawn.draw.choice((0.0, 1.0, -2.5))
    made = hk.add(a, hk.scale(b, number))
    expected = drawn.dense() + number * drawn.dense(other)
    scale = drawn.dense([w.abs() for w in drawn.weights]) + abs(number) * drawn.dense(
        [w.abs() for w in other]
    )
    result = made.full_tensor()
    testing.assert_matches(
        result, drawn.squeezed(expected), drawn.dtype, "forward", drawn.squeezed(scale)
    )


OPERATIONS = (
    evaluate,
    evaluate_at,
    full_tensor,
    slog,
    spectra_of_nodes,
    spectrum_of_modes,
    local_component_norms,
    ranks_without_decomposition,
    inner_products,
    sums,
)


def case(seed: int) -> str:
    """Runs one case; raises where a result is wrong. Returns what was run, for the counts."""
    draw = random.Random(seed)
    operation = draw.choice(OPERATIONS)
    drawn = Drawn(draw)
    with hk.use_backend(drawn.backend):
        operation(drawn)
    return f"{operation.__name__} right"
