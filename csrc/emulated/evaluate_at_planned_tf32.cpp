#include "evaluate_at/planned_tf32.cu"
