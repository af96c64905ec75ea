"""Checks of kernels on the device at hand."""

from htfkernels.verify.run import HEADER, Row, chosen, notes, rows

__all__ = ["HEADER", "Row", "chosen", "notes", "rows"]
