"""Who is timed on a GPU only: captured steps, torch.compile's autotuning, cuTensorNet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import torch

from htflearn.bench import Implementation, Prepared, Skipped
from htflearn.bench.implementations import OURS, compiled, engine, folded, network
from htflearn.bench.workloads import Problem

__all__ = ["GPU_IMPLEMENTATIONS"]


def _captured(prepare: Callable[[Problem], Prepared]) -> Callable[[Problem], Prepared]:
    """The same, each pass as one CUDA graph."""

    def run(problem: Problem) -> Prepared:
        # On weights of its own: autograd runs a leaf's node on the stream that used the leaf first,
        # and a capture must not meet the stream of those who run eagerly.
        model = copy.deepcopy(problem.model)
        prepared = prepare(replace(problem, model=model))
        return replace(prepared, weights=list(model.weights), captured=True)

    return run


def _autotuned(problem: Problem) -> Prepared:
    prepared = compiled(problem, "max-autotune")
    # Its CUDA graphs would copy arguments that may lie elsewhere at the next call; these do not.
    for tensor in (*problem.model.weights, *prepared.inputs):
        torch._dynamo.mark_static_address(tensor)
    step = torch.compiler.cudagraph_mark_step_begin
    return replace(prepared, before=step, allocates=False)


def _cutensornet(problem: Problem) -> Prepared:
    if find_spec("cuquantum") is None:
        raise Skipped("it is not installed: pip install cuquantum-python-cu13")
    from cuquantum.tensornet import contract

    whole = network(problem)
    how = {"path": whole.path}
    return Prepared(lambda: contract(whole.equation, *whole.operands(), optimize=how), whole.inputs)


GPU_IMPLEMENTATIONS: dict[str, Implementation] = {
    f"{OURS}, CUDA graph": Implementation(
        "this package, a pass captured once and replayed", _captured(engine)
    ),
    "folded bmm, CUDA graph": Implementation(
        "one torch.bmm for the same-shaped nodes of a level, captured", _captured(folded)
    ),
    "folded bmm, max-autotune": Implementation(
        "the same under torch.compile, which tries GEMM kernels and captures", _autotuned, 300.0
    ),
    "cuTensorNet": Implementation(
        "cuquantum.tensornet.contract along opt_einsum's best path", _cutensornet
    ),
}
"""By name, in the order of the tables, behind those that run everywhere."""
