#include "evaluate_at/planned.cpp"
#include "evaluate_at/planned_cpu.cpp"
#include "full_tensor/full_tensor.cpp"
#include "full_tensor/full_tensor_cpu.cpp"
