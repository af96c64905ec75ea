#include "evaluate_at/planned_ieee.cu"
