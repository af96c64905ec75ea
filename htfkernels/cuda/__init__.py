"""The Python side of the CUDA C++ kernels: what they are launched with."""
