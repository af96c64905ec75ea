// evaluate: a tree on vectors.
//
//   leaf n:           m_n = x_n W_n
//   interior node v:  p_v = Hadamard product of the children's messages, m_v = p_v W_v
//   result:           the root's message, or the sum of its product where the root has no weight
//
//   weights  one [F, R_in, R_out] per group of same-shaped nodes      float32, float64 or bfloat16
//   x        [B, sum of the mode dimensions]                          the same dtype
//   program  the tree, see cpu/program.h
//   result   [B, out_features], or [B] where that is 1
//
// evaluate_backward gives the gradients of the weights and of x for which needs is not 0, and empty
// tensors for the others. bfloat16 is computed in float32.
#pragma once

#include "cpu/program.h"

namespace htf {

// With keep: the result, and what the backward pass can use again (flat, possibly empty).
std::vector<Tensor> evaluate_cpu(const Program& program, const std::vector<Tensor>& weights,
                                 const Tensor& x, bool keep);
std::vector<Tensor> evaluate_backward_cpu(const Program& program, const Tensor& grad,
                                          const std::vector<Tensor>& weights, const Tensor& x,
                                          const Tensor& kept, const std::vector<int64_t>& needs);

}  // namespace htf
