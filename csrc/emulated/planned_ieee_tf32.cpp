#include "units/cuda/planned_ieee_tf32.cu"
