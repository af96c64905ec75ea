#include "evaluate_at/planned_bf16.cu"
