"""What the Triton backends of the operations share: launches, tables, tiles, kernels.

Imported when a Triton backend first runs, never with the package: Triton is an optional dependency.
"""
