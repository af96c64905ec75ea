"""Images in another size, by averaging over areas."""

from __future__ import annotations

import numpy as np

__all__ = ["area_average"]

# Bounds the memory of the floats that a large set of images passes through.
_CHUNK = 4096


def area_average(images: np.ndarray, size: int) -> np.ndarray:
    """Images of ``size`` x ``size`` pixels, each the mean of the area that it covers.

    Args:
        images: ``[M, C, H, W]`` uint8. An area may cover parts of pixels, so any size is possible.
        size: height and width of the result.

    Returns:
        ``[M, C, size, size]`` uint8, rounded; ``images`` itself where it has that size already.

    Example:
        >>> area_average(np.uint8([[[[0, 100], [20, 40]]]]), 1)
        array([[[[40]]]], dtype=uint8)
    """
    if images.shape[2:] == (size, size):
        return images
    rows, columns = (_weights(old, size) for old in images.shape[2:])
    result = np.empty((*images.shape[:2], size, size), np.uint8)
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK].astype(np.float32)
        result[start : start + _CHUNK] = np.rint(rows @ part @ columns.T)
    return result


def _weights(old: int, new: int) -> np.ndarray:
    """``[new, old]``: which share each old pixel has in a new one."""
    edges = np.arange(new + 1) * (old / new)
    pixels = np.arange(old)
    ends = np.minimum(edges[1:, None], pixels + 1)
    starts = np.maximum(edges[:-1, None], pixels)
    return (np.clip(ends - starts, 0, None) * (new / old)).astype(np.float32)
