#include "evaluate_at/planned_f64.cu"
