"""A whole tree in one launch of a CUDA C++ kernel."""
