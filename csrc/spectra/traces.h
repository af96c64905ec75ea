// trace_ranks: (sum sigma^2)^2 / sum sigma^4 of the matricizations at a tree's nodes, from traces
// of products, without a decomposition; and its derivative.
//
// A frame or an environment is kept as it is where it has no more rows than columns, else as its
// Gram matrix (notation of spectra.h):
//
//   up:                  F_v = KhatriRao(F_c) W_v
//                    or  G_v = W_v^T (Hadamard product of the G_c) W_v
//   down, child c of v:  E_c = KhatriRao(E_v W_v^T, F_s)     siblings s
//                    or  H_c = (W_v H_v W_v^T) * G_s
//   rank = t^2 / u,      t = tr(G H), u = tr(G H G H), with F F^T H etc. in place of G H
//
//   weights   one [F, R_in, R_out] for each group; float32, float64 or bfloat16
//   program   the tree, see cpu/program.h
//   wanted    nodes (indices of tree.nodes)
//   stable    0 or 1
//   result    float64 [wanted], 0 where t is 0; what the backward pass needs: float64 and int64
//
//   backward  grad float64 [wanted], the same arguments and what was kept -> gradients of all
//             weights, in their dtype
//
// matricization_pullback: the derivative of a function of singular values. With the singular
// vectors u_i = U_v l_i, v_i = E_v r_i of a node's matricization,
//
//   d sigma_i = u_i^T dM v_i = sigma_i (l_i^T dG l_i + r_i^T dH r_i) / 2
//
//   left, right  float64 [R_out, K] for each wanted node: the l_i and r_i, in the scale of the
//                factors of spectra.h: of the frame without 2^exponents, of M without 2^scale
//   weight       float64 [K]: sigma_i / 2 times the derivative by sigma_i
//   exponents    int64 [R_out]
//   result       gradients of all weights, in their dtype
//
// Everything is computed in float64. Scale as in spectra.h: the divisors are constants, and the
// ranks do not change with them.
#pragma once

#include "cpu/program.h"

namespace htf {

std::vector<Tensor> trace_ranks_cpu(const Program& program, const std::vector<Tensor>& weights,
                                    const std::vector<int64_t>& wanted, bool stable);
std::vector<Tensor> trace_ranks_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const std::vector<int64_t>& wanted,
                                             const Tensor& numbers, const Tensor& exponents,
                                             bool stable);

std::vector<Tensor> matricization_pullback_cpu(
    const Program& program, const std::vector<Tensor>& weights, const std::vector<int64_t>& wanted,
    const std::vector<Tensor>& left, const std::vector<Tensor>& right,
    const std::vector<Tensor>& weight, const std::vector<Tensor>& exponents,
    const std::vector<int64_t>& scales);

}  // namespace htf
