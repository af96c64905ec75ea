"""How far off a result may be, for each dtype and way to round products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from htflearn.bench import spectra

__all__ = ["TOLERANCE", "Judge", "judge"]

Judge = tuple[Callable[[Sequence[Tensor], Sequence[Tensor]], float], float]
"""``(result, exact result) -> how far off``, and how far it may be."""

TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-9,
    torch.bfloat16: 0.1,
    torch.float16: 0.05,
}
"""How far a result may be off, relative to the largest number of the tensor: far above rounding,
far below what a wrong formula gives."""

# On tensor cores, relative to the largest number after a common factor has been taken out; two or
# three times the worst of the full-size workloads wide, medium, deep, small, ragged and paper, with
# products that were rounded like that on a CPU (`pytest tests/learn/test_bench_gpu.py -m slow -s`):
#                                 off     factor, as a logarithm
#     tf32, operands rounded      1.8e-2  0.01
#     tf32, operands cut off      1.3e-2  0.73 2^-10 for each node: 1.5 in deep
#     bfloat16                    8.3e-2  0.39 in deep
#     float16                     1.3e-2  0.02; paper's numbers are below its range
# A cut operand is always smaller than what was meant, and in a product over all nodes what is
# missing adds up: a factor that all numbers of a tensor have in common, which no formula gives.
_REDUCED = {"tf32": 0.05, torch.bfloat16: 0.2, torch.float16: 0.05}
_LOST_PER_NODE = 2**-10


def judge(dtype: torch.dtype, device: str, precision: str, nodes: int) -> Judge:
    """How results are held against float64, and what is allowed.

    Args:
        dtype: of the numbers.
        device: ``"cpu"`` or ``"cuda"``.
        precision: of float32 on a GPU.
        nodes: of the tree.

    Example:
        >>> measure, allowed = judge(torch.float32, "cpu", "ieee", nodes=7)
        >>> measure([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.0])]) < allowed
        True
    """
    kind = "tf32" if dtype == torch.float32 and precision == "tf32" else dtype
    if device == "cpu" or kind not in _REDUCED:
        return spectra.relative, TOLERANCE[dtype]
    return lambda actual, exact: _up_to_a_factor(actual, exact, nodes), _REDUCED[kind]


def _up_to_a_factor(actual: Sequence[Tensor], exact: Sequence[Tensor], nodes: int) -> float:
    """:func:`htflearn.bench.spectra.relative` after each tensor has been multiplied by the number
    that brings it closest, or how far that number is beyond what rounding explains."""
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        if a.shape != e.shape:
            return math.inf
        a = a.detach().double()
        factor = float((a * e).sum() / (a * a).sum()) if a.any() else 1.0
        if not 0 < factor < math.inf:
            return math.inf
        beyond = abs(math.log(factor)) - nodes * _LOST_PER_NODE
        worst = max(worst, spectra.relative([a * factor], [e]), beyond)
    return worst
