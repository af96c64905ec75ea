"""Tile sizes by shape: a short table with reasons, instead of tuning at run time.

What limits a tile is registers (255 a thread): the sum of a tile is ``m n / (32 warps)`` of them,
and as much again is wanted for operands, products and addresses. What a larger tile saves is
reading the operands once more for each tile of columns, and the weight for each tile of rows.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from htfkernels.gpu.launch import Config, cdiv

__all__ = [
    "STATIC_ARITY",
    "WIDEST_BACKWARD",
    "backward",
    "forward",
    "fused_backward",
    "fused_forward",
    "fuses",
    "power_of_two",
    "ragged_backward",
    "ragged_forward",
    "ragged_weights",
    "splits",
]

STATIC_ARITY = 4  # up to so many operands are held in registers at once
WIDEST_BACKWARD = 256  # a tile of dW has all its columns: 64 x 256 sums are 64 registers of 8 warps

_SMALLEST = 16  # of a tensor-core instruction's tile, in each direction


def power_of_two(n: int, low: int = _SMALLEST, high: int = 1 << 30) -> int:
    """The smallest power of two that is at least ``n``, between ``low`` and ``high``."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))


def _kind(dtype: torch.dtype, precision: str) -> str:
    if dtype == torch.float64:
        return "double"
    if dtype != torch.float32:
        return "half"
    return {"ieee": "plain", "tf32": "single", "tf32x3": "split"}[precision]


# Of the sum [m, n] and the step k through K, for N of at least n:
_FORWARD = {
    # One tile of columns up to N = 256: operands are read once. 128 rows keep a weight's share of
    # the traffic at 1/128 of the multiply-adds. 64-byte and longer rows in each step.
    "half": Config(128, 256, 64, warps=8, stages=3),
    "single": Config(128, 256, 32, warps=8, stages=2),
    # Each operand is two in registers, and three products are summed: half the tile.
    "split": Config(64, 128, 32, warps=8, stages=2),
    # Multiply-adds without tensor cores: sums and operands are all in registers.
    "plain": Config(64, 64, 16, warps=4, stages=2),
    # Double-precision tensor cores; a number is two registers.
    "double": Config(64, 64, 16, warps=4, stages=2),
}

# Of the sum [k, n], all of N, and the step m through the batch:
_BACKWARD = {
    "half": Config(64, 256, 64, warps=8, stages=2),
    "single": Config(32, 256, 64, warps=8, stages=2),
    "split": Config(32, 256, 32, warps=8, stages=1),
    "plain": Config(16, 256, 32, warps=8, stages=1),
    "double": Config(16, 256, 16, warps=8, stages=1),
}

# Of any nodes in one launch: sizes are those of the widest, so tiles are small.
_RAGGED = {
    "half": Config(64, 64, 32, warps=4, stages=2),
    "single": Config(64, 64, 32, warps=4, stages=2),
    "split": Config(32, 64, 32, warps=4, stages=2),
    "plain": Config(32, 64, 16, warps=4, stages=2),
    "double": Config(32, 32, 16, warps=4, stages=2),
}


def fuses(dtype: torch.dtype, precision: str) -> bool:
    """Whether leaves are formed in their parents' kernels: where tensor cores make forming them
    again in the backward pass cheaper than memory."""
    return _kind(dtype, precision) in ("half", "single")


def forward(dtype: torch.dtype, precision: str, rows: int, depth: int, width: int) -> Config:
    """For ``[rows, depth] @ [depth, width]`` with the left side formed on load."""
    base = _FORWARD[_kind(dtype, precision)]
    n = power_of_two(width, high=base.n)
    return _fitted(base, rows, depth, n)


def backward(dtype: torch.dtype, precision: str, rows: int, depth: int, width: int) -> Config:
    """For the gradients of a node ``[depth, width]``."""
    base = _BACKWARD[_kind(dtype, precision)]
    n = power_of_two(width, high=WIDEST_BACKWARD)
    k = power_of_two(depth, high=base.k)
    m = power_of_two(rows, high=base.m)
    return base._replace(m=m, n=n, k=k, warps=_warps(base, k, n))


def _fitted(base: Config, rows: int, depth: int, n: int) -> Config:
    m = power_of_two(rows, high=base.m)
    k = power_of_two(depth, high=base.k)
    return base._replace(m=m, n=n, k=k, warps=_warps(base, m, n))


def _warps(base: Config, a: int, b: int) -> int:
    """Half the warps for a tile of at most a quarter of the sums: more programs fit side by
    side."""
    return base.warps if a * b >= 8192 or base.warps <= 4 else 4


def fused_forward(
    dtype: torch.dtype, precision: str, rows: int, leaves: int, dim: int, depth: int, width: int
) -> Config:
    """For ``leaves`` leaves of dimension ``dim`` under a node ``[depth, width]``: like a forward of
    the node, with all vectors of a tile of rows on chip."""
    half = dtype != torch.float32
    n = power_of_two(width, high=256)
    held = leaves * power_of_two(dim)
    m = 128 if half and held <= 256 else 64
    k = 64 if half else 32
    config = Config(power_of_two(rows, high=m), n, power_of_two(depth, high=k), 8, 2)
    return config._replace(warps=8 if config.m * n >= 8192 else 4)


def fused_backward(
    dtype: torch.dtype, precision: str, rows: int, leaves: int, dim: int, depth: int, width: int
) -> Config:
    """As :func:`fused_forward`; the sums are ``[k, width]`` and ``leaves`` times ``[dim, k]``."""
    half = dtype != torch.float32
    n, d = power_of_two(width, high=256), power_of_two(dim)
    k = power_of_two(depth, high=64 if leaves * d + n <= 384 else 32)
    m = power_of_two(rows, high=64 if half else 32)
    return Config(m, n, k, 8 if k * (n + leaves * d) >= 8192 else 4, 2)


def ragged_forward(dtype: torch.dtype, precision: str, rows: int, depth: int, width: int) -> Config:
    """For nodes of at most ``[depth, width]``."""
    base = _RAGGED[_kind(dtype, precision)]
    m, n = power_of_two(rows, high=base.m), power_of_two(width, high=base.n)
    return base._replace(m=m, n=n, k=power_of_two(depth, high=base.k))


ragged_backward = ragged_weights = ragged_forward


def splits(device: torch.device, programs: int, rows: int, step: int) -> tuple[int, int]:
    """Into how many parts the batch goes, and the rows of one, a multiple of ``step``.

    Two programs for each multiprocessor fill a GPU; a part of fewer than 8 steps would mostly write
    its partial result.
    """
    wanted = cdiv(2 * _multiprocessors(device), max(1, programs))
    most = max(1, rows // (8 * step))
    count = max(1, min(wanted, most))
    per_split = step * max(1, cdiv(rows, count * step))
    return max(1, cdiv(rows, per_split)), per_split


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # an H100's, so that what is compiled without one is what one would run
    return torch.cuda.get_device_properties(device).multi_processor_count
