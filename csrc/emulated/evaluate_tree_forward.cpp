#include "evaluate/tree_forward.cu"
