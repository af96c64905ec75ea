#include "units/cuda/tree_backward.cu"
