"""The library cirkit, which folds and fuses tensorized circuits: a HTF at indices is one.

Imported only where it is installed, and by this benchmark only.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from htflearn.bench import Prepared, Skipped
from htflearn.bench.workloads import Problem

__all__ = ["circuit"]


def circuit(problem: Problem) -> Prepared:
    """A leaf is an embedding, an interior node an elementwise product and a sum layer.

    The compiled circuit has parameters of its own, ``[folds, R_out, R_in]`` in an order of its own:
    they get the model's numbers, and gradients are sorted back outside the clock.
    """
    if problem.workload.kind == "tensor":
        raise Skipped("it evaluates single entries only")
    indices = problem.indices
    if indices is None:
        raise Skipped("its input layers take one index or number of each mode, not a vector")
    if find_spec("cirkit") is None:
        raise Skipped("it is not installed: pip install libcirkit")
    from cirkit.backend.torch.compiler import TorchCompiler
    from cirkit.symbolic.circuit import Circuit
    from cirkit.symbolic.initializers import NormalInitializer
    from cirkit.symbolic.layers import EmbeddingLayer, HadamardLayer, SumLayer
    from cirkit.symbolic.parameters import Parameter, TensorParameter
    from cirkit.utils.scope import Scope

    layout = problem.workload.layout
    tree = layout.tree
    symbols: list[Any] = []  # of each node's weight
    tops: list[Any] = []  # the layer that gives each node's message
    below: dict[Any, list[Any]] = {}
    for node in tree.nodes:
        rows, cols = layout.shape(node)
        symbol = TensorParameter(cols, rows, initializer=NormalInitializer())
        weight = Parameter.from_input(symbol)
        if node.is_leaf:
            top = EmbeddingLayer(Scope(node.modes), cols, num_states=rows, weight=weight)
        else:
            top = SumLayer(rows, cols, weight=weight)
            below[top] = [tops[child.index] for child in node.children]
            if len(node.children) > 1:
                product = HadamardLayer(rows, arity=len(node.children))
                below[product] = below[top]
                below[top] = [product]
        symbols.append(symbol)
        tops.append(top)
    compiler = TorchCompiler(semiring="sum-product", fold=True, optimize=True)
    layers = list(dict.fromkeys([*tops, *below]))
    compiled = compiler.compile_pipeline(Circuit(layers, below, [tops[tree.root.index]]))
    compiled.to(problem.device, problem.cotangent.dtype)

    found = [compiler.state.retrieve_compiled_parameter(symbol) for symbol in symbols]
    folded = list(dict.fromkeys(module for module, _ in found))
    weights: list[Tensor] = [module() for module in folded]
    slots = [(folded.index(module), at) for module, at in found]
    places = [[slots[i] for i in group.nodes] for group in layout.groups]
    with torch.no_grad():
        for numbers, group in zip(problem.model.weights, places, strict=True):
            for number, (which, at) in zip(numbers, group, strict=True):
                weights[which][at] = number.T

    def by_weight(grads: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack([grads[which][at].T for which, at in group]) for group in places]

    return Prepared(lambda: compiled(indices)[:, 0, 0], [], weights=weights, by_weight=by_weight)
