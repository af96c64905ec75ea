#include "plan/device_sort.cu"
