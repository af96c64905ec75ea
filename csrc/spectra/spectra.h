// spectra: singular values of the matricizations at a tree's nodes, from its factors.
//
// The matricization at node v (rows: its modes; columns: all other modes and the outputs) is
// M_v = U_v E_v^T, with the node's frame U_v (its message for every index tuple) and its
// environment E_v. Both are kept as factors of at most R_out rows with the same Gram matrix, so
// that M_v has the singular values of a small matrix:
//
//   leaf:              F_v = R(W_v)
//   interior node:     F_v = R(R(KhatriRao(F_c)) W_v)
//   root:              E_v = identity of the outputs
//   child c of v:      E_c = R(KhatriRao(E_v W_v^T, F_siblings))
//   singular values:   sigma(M_v) = sigma(F_v E_v^T)
//
// R(X) is X, or, where X has more rows than columns, a factor with R^T R = X^T X: the triangular
// factor of a QR decomposition, or, with `gram`, the Cholesky factor of the Hadamard product of
// Gram matrices, which costs O(R^3) instead of O(R^4) and half of the digits. The Khatri-Rao
// product of two triangular factors has its rows sorted by their first column, which saves five
// sixths of the work of a dense one. A node of many children takes them two at a time.
//
// Scale: the columns of a frame are divided by powers of two, 2^k each, which the node's weights
// take up (the tree with weights 2^k_in W 2^-k_out is the same tensor). An environment is divided
// by one power. So numbers stay near 1, whatever the size of the weights and the tree's depth.
//
//   spectral_factors
//     weights  one [F, R_in, R_out] for each group; float32, float64 or bfloat16
//     program  the tree, see cpu/program.h
//     wanted   nodes (indices of tree.nodes) whose environments are asked for
//     gram     0 or 1
//     keep     0: only what factor_values reads. Below a node whose frame has a row for each pair
//              of its children's rows, M_child is M_node with its rows and columns dealt out anew,
//              and needs no environment. 1: every node's own factors.
//     result   frames and environments, float64, of all nodes one after the other, rows padded to
//              eight columns, NaN where a weight is not finite; int64 table [nodes, 10] in the
//              order of tree.nodes, see FactorRow; int64 exponents k of the frames' columns
//   factor_values
//     frames, environments, table: as above
//     wanted   nodes
//     result   float64: all singular values of each wanted node, descending, between 0 and about
//              1, NaN where factors are not finite; int64 [wanted]: the powers of two that belong
//              to them
#pragma once

#include "cpu/kernels.h"
#include "cpu/program.h"

namespace htf {

// Where a node's factors are in the flat results. The node has `rows` rows of the matrix M
// [frame_rows x environment_rows]: row b * rows * after + i * after + a of M belongs to row i; its
// column is named by b, a and the column of M. environment_rows is 0 where no environment was asked
// for. The exponents are the node's own.
struct FactorRow {
  int64_t frame, frame_rows, environment, environment_rows, cols, ld, exponents, scale, rows, after;
};
constexpr int64_t kFactorFields = 10;
static_assert(sizeof(FactorRow) == kFactorFields * sizeof(int64_t));

std::vector<Tensor> spectral_factors_cpu(const Program& program, const std::vector<Tensor>& weights,
                                         const std::vector<char>& wanted, bool gram, bool keep);
std::vector<Tensor> factor_values_cpu(const Tensor& frames, const Tensor& environments,
                                      const std::vector<FactorRow>& wanted);

}  // namespace htf
