#include "evaluate_at/planned_ieee.cu"
#include "evaluate_at/planned_tf32.cu"
