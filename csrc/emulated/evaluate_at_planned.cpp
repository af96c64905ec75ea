#include "evaluate_at/planned_cuda.cu"
