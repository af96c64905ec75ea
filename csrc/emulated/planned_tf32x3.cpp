#include "units/cuda/planned_tf32x3.cu"
