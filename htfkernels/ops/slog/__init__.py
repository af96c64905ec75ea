"""``slog``: sign and log-magnitude of a tree's value, on any device, in PyTorch operations."""

from htfkernels.ops.slog.reference import slog

__all__ = ["slog"]
