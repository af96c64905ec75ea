#include "cuda/primitives.cu"
