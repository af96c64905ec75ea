#include "units/cuda/operations.cu"
