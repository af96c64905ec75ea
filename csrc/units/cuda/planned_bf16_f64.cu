#include "evaluate_at/planned_bf16.cu"
#include "evaluate_at/planned_f64.cu"
