// evaluate_at: entries of a tree's end tensor. As evaluate on one-hot vectors: a leaf's message is
// a row of its weight.
//
//   weights  one [F, R_in, R_out] per group      float32, float64 or bfloat16
//   indices  [B, order]                          int64, 0 <= indices[:, n] < D_n
//   program  the tree, see cpu/program.h
//   result   [B, out_features], or [B] where that is 1
#pragma once

#include "cpu/program.h"

namespace htf {

// With keep: the result, and what the backward pass can use again (flat, possibly empty).
std::vector<Tensor> evaluate_at_cpu(const Program& program, const std::vector<Tensor>& weights,
                                    const Tensor& indices, bool keep);
std::vector<Tensor> evaluate_at_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const Tensor& indices, const Tensor& kept,
                                             const std::vector<int64_t>& needs);

}  // namespace htf
