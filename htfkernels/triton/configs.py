"""Tile sizes by shape: a short table with reasons, instead of tuning at run time.

What limits a tile is registers (255 a thread): the sum of a tile is ``m n / (32 warps)`` of them,
and as much again is wanted for operands, products and addresses. What a larger tile saves is
reading the operands once more for each tile of columns, and the weight for each tile of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from htfkernels.triton.launch import Config, cdiv

__all__ = [
    "SCALED_WIDTH",
    "STATIC_ARITY",
    "assumed",
    "backward",
    "forward",
    "fused_backward",
    "fused_forward",
    "fuses",
    "power_of_two",
    "ragged_backward",
    "ragged_forward",
    "ragged_weights",
    "scaled_backward",
    "scaled_forward",
    "splits",
    "widest_backward",
]

STATIC_ARITY = 4  # up to so many operands are held in registers at once

SCALED_WIDTH = 512  # columns of a message that one program scales

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

# Where a block has 99 KiB of shared memory, the same in half the room.
_FORWARD_SMALL = {
    **_FORWARD,
    "half": Config(64, 128, 64, warps=8, stages=2),
    "single": Config(64, 128, 32, warps=8, stages=2),
}

# Of the sum [k, n], all of N, and the step m through the batch: by kind, and for N up to n.
_BACKWARD = {
    # Tiles of 64 and more for the warpgroup instructions of Hopper, which take their right side
    # from shared memory; before it, rows of W are held in registers, and fewer fit.
    ("half", 9): [Config(64, 256, 64, warps=8, stages=2)],
    ("half", 8): [Config(32, 256, 64, warps=8, stages=1)],
    ("single", 9): [
        Config(32, 128, 64, warps=8, stages=2),
        Config(32, 256, 32, warps=8, stages=1),
    ],
    ("single", 8): [Config(32, 256, 32, warps=8, stages=1)],
    ("split", 8): [Config(32, 64, 32, warps=4, stages=1)],
    ("plain", 8): [Config(32, 64, 32, warps=4, stages=1)],
    ("double", 8): [Config(16, 32, 32, warps=4, stages=1)],
}

# The same of the leaves' kernel, whose sums are [k, N] and, for each leaf, [D, k].
_FUSED_BACKWARD = {
    ("half", 9): [Config(64, 128, 64, warps=8, stages=2), Config(32, 256, 64, warps=8, stages=1)],
    ("half", 8): [Config(32, 256, 32, warps=8, stages=1)],
    ("single", 9): [Config(32, 256, 64, warps=8, stages=1)],
    ("single", 8): [Config(32, 128, 32, warps=8, stages=2), Config(32, 256, 16, warps=8, stages=1)],
}

# Of any nodes in one launch: sizes are those of the widest, so tiles are small; eight warps, since
# sizes and addresses that are read from tables take registers.
_RAGGED = {
    "half": Config(64, 64, 32, warps=8, stages=2),
    "single": Config(64, 64, 32, warps=8, stages=2),
    "split": Config(32, 64, 32, warps=8, stages=2),
    "plain": Config(32, 64, 16, warps=4, stages=2),
    "double": Config(32, 32, 16, warps=4, stages=2),
}

# Of messages that are scaled: rows, entries of the sum, which has all columns, and the step k.
_SCALED = {
    "half": (64, 8192, 32),
    "single": (64, 8192, 32),
    "split": (64, 4096, 16),
    "plain": (64, 4096, 16),
    "double": (32, 2048, 16),
}


def fuses(
    device: torch.device, dtype: torch.dtype, precision: str, leaves: int, dim: int, depth: int,
    width: int,
) -> bool:  # fmt: skip
    """Whether so many leaves of dimension ``dim`` are formed in the kernel of their parent
    ``[depth, width]``.

    They are where tensor cores make it cheaper, once more in the backward pass, than memory is, and
    as far as there is room. Shared memory: 64 rows of 256 numbers in float32 are 64 KiB, which with
    two stages of weights is what a block of compute capability 8.0 has. Registers, in the backward
    pass: the leaves' messages and sums beside sums of all columns. And :func:`backward` has to take
    them too, for the gradients of vectors.
    """
    if _kind(dtype, precision) not in ("half", "single"):
        return False
    wide, small = width > 128, _is_small(device)
    return (
        max(depth, width) <= widest_backward(device, dtype, precision)
        and leaves <= (2 if wide else STATIC_ARITY)
        and leaves * power_of_two(dim) <= (128 if wide or small else 256)
    )


def forward(
    device: torch.device, dtype: torch.dtype, precision: str, rows: int, depth: int, width: int
) -> Config:
    """For ``[rows, depth] @ [depth, width]`` with the left side formed on load."""
    base = (_FORWARD_SMALL if _is_small(device) else _FORWARD)[_kind(dtype, precision)]
    return _fitted(base, power_of_two(rows), power_of_two(width), power_of_two(depth))


def widest_backward(device: torch.device, dtype: torch.dtype, precision: str) -> int:
    """How many columns a node may have for :func:`backward`."""
    widest = _BACKWARD[_kind(dtype, precision), 8][-1].n
    return min(widest, 128) if _is_small(device) else widest


def backward(
    device: torch.device, dtype: torch.dtype, precision: str, rows: int, depth: int, width: int
) -> Config:
    """For the gradients of a node ``[depth, width]``."""
    base = _chosen(_BACKWARD, device, _kind(dtype, precision), width)
    return _fitted(base, power_of_two(rows), power_of_two(width), power_of_two(depth))


def fused_forward(
    device: torch.device, dtype: torch.dtype, precision: str, rows: int, leaves: int, dim: int,
    depth: int, width: int,
) -> Config:  # fmt: skip
    """For ``leaves`` leaves of dimension ``dim`` under a node ``[depth, width]``: like a forward of
    the node, with all vectors of a tile of rows on chip."""
    half = dtype != torch.float32
    m = 128 if half and not _is_small(device) else 64
    base = Config(m, 256, 64 if half else 32, warps=8, stages=2)
    return _fitted(base, power_of_two(rows), power_of_two(width), power_of_two(depth))


def fused_backward(
    device: torch.device, dtype: torch.dtype, precision: str, rows: int, leaves: int, dim: int,
    depth: int, width: int,
) -> Config:  # fmt: skip
    """As :func:`fused_forward`; the sums are ``[k, width]`` and ``leaves`` times ``[dim, k]``."""
    base = _chosen(_FUSED_BACKWARD, device, _kind(dtype, precision), width)
    if leaves * power_of_two(dim) > 128:  # the sums of the leaves take what k has to give
        base = base._replace(k=max(_SMALLEST, base.k // 2))
    return _fitted(base, power_of_two(rows), power_of_two(width), power_of_two(depth))


def ragged_forward(dtype: torch.dtype, precision: str, rows: int, depth: int, width: int) -> Config:
    """For nodes of at most ``[depth, width]``."""
    base = _RAGGED[_kind(dtype, precision)]
    return _fitted(base, power_of_two(rows), power_of_two(width), power_of_two(depth))


ragged_backward = ragged_weights = ragged_forward


def scaled_backward(
    dtype: torch.dtype, precision: str, rows: int, depth: int, width: int
) -> Config:
    """As :func:`ragged_backward`, with half the rows: their scales and powers take registers."""
    base = ragged_backward(dtype, precision, rows, depth, width)
    return base._replace(m=max(_SMALLEST, base.m // 2))


def scaled_forward(dtype: torch.dtype, precision: str, rows: int, depth: int, width: int) -> Config:
    """For nodes of at most ``[depth, width]``, all columns in one tile."""
    most, entries, step = _SCALED[_kind(dtype, precision)]
    n = power_of_two(width)
    m = min(power_of_two(rows), max(_SMALLEST, min(most, entries // n)))
    k = min(power_of_two(depth), step if n <= 256 else _SMALLEST)
    return Config(m, n, k, warps=8 if m * n >= 8192 else 4, stages=1)


def _chosen(
    table: dict[tuple[str, int], list[Config]], device: torch.device, kind: str, width: int
) -> Config:
    """The row for so many columns, of this GPU or the last before it that has any."""
    rows = table.get((kind, 9)) if _architecture(device) >= 90 and not _is_small(device) else None
    return next(c for c in rows or table[kind, 8] if width <= c.n)


def _fitted(base: Config, m: int, n: int, k: int) -> Config:
    """No larger than the problem, and half the warps where a quarter of the sums is left."""
    m, n, k = min(m, base.m), min(n, base.n), min(k, base.k)
    small = base.warps > 4 and 4 * m * n * k <= base.m * base.n * base.k
    return Config(m, n, k, 4 if small else base.warps, base.stages)


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


_assumed = 90


@contextmanager
def assumed(architecture: int) -> Iterator[None]:
    """In the block, tensors that are on no GPU get the tiles of this architecture (80, 86, 90):
    what is compiled without a GPU. Otherwise it is 90, a Hopper's."""
    global _assumed
    before, _assumed = _assumed, architecture
    try:
        yield
    finally:
        _assumed = before


def _architecture(device: torch.device) -> int:
    return _architecture_of(device) if device.type == "cuda" else _assumed


def _is_small(device: torch.device) -> bool:
    """Whether a block has but 99 KiB of shared memory, as on GPUs that are not for data centers."""
    return _architecture(device) in (86, 87, 89) or _architecture(device) >= 120


@lru_cache(maxsize=16)
def _architecture_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
