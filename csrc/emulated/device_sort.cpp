#include "units/cuda/device_sort.cu"
