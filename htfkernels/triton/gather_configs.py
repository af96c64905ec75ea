"""Tile sizes of the kernels over gathered rows, by dtype and shape. Nothing is tried at run time:
the same shapes always run the same code."""

from __future__ import annotations

import torch

from htfkernels.triton.launch import Config

__all__ = ["BLOCK", "gemm_tile", "segment_tile", "splits", "vector_tile"]

BLOCK = 1024
"""Elements of a program that sums parts: 8 of each thread, whole cache lines of each part."""

_WAVES = 2 * 132  # programs that fill the streaming multiprocessors of an H100 twice
_MOST_PARTS = 64  # of one sum: they are added up one after the other


def gemm_tile(
    dtype: torch.dtype, precision: str, down: int, across: int, easy: bool = True
) -> Config:
    """``m`` rows and ``n`` columns of the result in a tile, ``k`` terms at a time. ``easy``:
    addresses take few registers."""
    warps = 4 if easy else 8
    if dtype == torch.float64:
        # DMMA; a wider tile's accumulators and products do not fit in registers.
        m, n, k, stages = 32, 32, 16, 2
    elif dtype == torch.float32 and precision == "ieee":
        # FFMA: 16 accumulators a thread, and operands that are read again from registers.
        m, n, k, stages, warps = 64, 64, 16, 2, 8
    elif dtype == torch.float32 and precision == "tf32x3":
        # Split operands take the registers twice.
        m, n, k, stages = 64, 64, 32, 3
    elif dtype == torch.float32:
        # One warp group's 64 rows; 32 terms are 128 bytes of a row.
        m, n, k, stages = 64, 128, 32, 3
    else:
        # As many bytes of a row: 64 terms.
        m, n, k, stages = 64, 128, 64, 3
    # No wider than the result: what is masked is computed all the same.
    m, n = min(m, _power(down)), min(n, _power(across))
    return Config(m, n, k, warps if m == 64 else 4, stages)


def vector_tile(rows: int, width: int) -> Config:
    """``m`` rows and ``k`` columns of what is multiplied without tensor cores: memory bounds it, so
    that a tile is some whole cache lines of some rows."""
    k = min(128, _power(width))
    m = max(16, min(_power(rows), 2048 // k))
    return Config(m, 16, k, 8 if m * k > 1024 else 4, 2)


def segment_tile(average: int, width: int, grid: bool, looped: bool) -> tuple[Config, bool]:
    """``m`` rows and ``k`` columns at a time, for sums of ``average`` rows each; and whether these
    are rows of as many sums, or of one. Many sums at once idle where the others are shorter than
    the longest, which never happens on a grid; one at once idles where it has fewer rows than
    ``m``. ``looped``: over the operands, for which a smaller tile leaves registers."""
    many = grid or average <= 8
    if looped:
        return Config(8, 16, min(64, _power(width)), 4, 3), many
    k = min(128, _power(width))
    return Config(16, 16, k, 8 if k == 128 else 4, 3), many


def splits(rows: int, step: int, tiles: int) -> int:
    """In how many parts the rows are summed, so that few tiles still fill the device; each part
    loops over four steps or more. It depends on shapes alone: so does the order of summation."""
    return max(1, min(_WAVES // max(tiles, 1), rows // (4 * step), _MOST_PARTS))


def _power(n: int) -> int:
    """The power of two at or above n, at least the 16 of a tensor core's instruction."""
    return 16 if n <= 16 else 1 << (n - 1).bit_length()
