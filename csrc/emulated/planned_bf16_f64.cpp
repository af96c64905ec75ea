#include "units/cuda/planned_bf16_f64.cu"
