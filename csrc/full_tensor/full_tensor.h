// full_tensor: the end tensor of a tree.
//
//   leaf:           U_n = W_n
//   interior node:  U_v = KhatriRao(U_c of the children c) W_v
//   root:           T[i, j, o] = sum_r L[i, r] W[r, o] N[j, r]
//
// The rows of U_v are all index tuples of v's modes; L and N are the Khatri-Rao products of the
// root's first and of its other children.
//
//   weights  one [F, R_in, R_out] per group                        float32, float64 or bfloat16
//   program  the tree, see cpu/program.h
//   result   [product of the mode dimensions, out_features] (one dimension where that is 1), rows
//            in depth-first mode order (of
//            siblings, the one with the smallest mode first), the last mode fastest
#pragma once

#include "cpu/program.h"

namespace htf {

Tensor full_tensor_cpu(const Program& program, const std::vector<Tensor>& weights, int64_t entries);
std::vector<Tensor> full_tensor_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const std::vector<int64_t>& needs);

}  // namespace htf
