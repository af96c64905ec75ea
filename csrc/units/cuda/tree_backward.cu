#include "evaluate/tree_backward.cu"
