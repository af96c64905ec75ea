#include "evaluate_at/planned_tf32x3.cu"
#include "plan/pairs.cu"
