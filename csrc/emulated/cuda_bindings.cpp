#include "cuda/bindings.cu"
