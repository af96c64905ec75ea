// group_rmsprop_: a step of RMSprop with one adaptive step size for all parameters.
//
//   d_i = g_i + weight_decay_i p_i                         i = all parameters
//   a'  = alpha a + (1 - alpha) sum of |d_i|^2             the result, rounded to a's dtype
//   p_i = p_i - lr_i / (sqrt(a' / (1 - alpha^step)) + eps) d_i
//
//   params, grads     contiguous CPU tensors of one dtype: float32, float64 or bfloat16; params are
//                     written
//   average           a, a number: float64 for float64 parameters, float32 for the others
//   lr, weight_decay  a number for each parameter
//   step              1, 2, ...
//
// Squares are summed in blocks, and the blocks' sums in float64 in their order: the same bits for
// any number of threads. bfloat16 is computed in float32 and rounded once, at the end.
#pragma once

#include <vector>

#include "cpu/support.h"

namespace htf {

struct GroupStep {
  const std::vector<Tensor>&params, &grads;
  const std::vector<double>&lr, &weight_decay;
  double alpha, eps;
  int64_t step;
};

// The new average.
Tensor group_rmsprop_cpu(const GroupStep& step, const Tensor& average);

}  // namespace htf
