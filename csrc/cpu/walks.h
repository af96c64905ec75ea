// The tree walks of walk.h and walk_backward.h, compiled once for all operations.
#pragma once

#include <vector>

#include "cpu/rows.h"

namespace htf {

constexpr int64_t kMostKept = int64_t{512} << 20;  // bytes; beyond, a backward pass computes again

// What a forward pass keeps for the backward pass: a flat tensor, empty where it would be too
// large.
template <class T>
Tensor kept_tensor(const Tensor& like, int64_t elements) {
  if (elements * static_cast<int64_t>(sizeof(T)) > kMostKept) elements = 0;
  return new_tensor(like, {elements},
                    sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float);
}
template <class T>
const T* kept_pointer(const char* op, const Tensor& kept, int64_t elements) {
  if (kept.numel() == 0) return nullptr;
  const ScalarType dtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  check(kept.is_cpu() && kept.scalar_type() == dtype && kept.is_contiguous() &&
            kept.numel() == elements,
        op, ": kept must be what the forward operation returned, got ", describe(kept));
  return kept.const_data_ptr<T>();
}

// Elements of all interior messages of a row.
template <class T>
int64_t kept_columns(const Tree& tree);

// weight[s]: the matrix of step s, [rows, padded(cols)]; null for the root of a sum. Where pairs
// has the matrix as well, it is taken from there, and weight[s] may be null.
// messages: where to keep the interior messages [column][batch][...], or null.
template <class T>
void walk(const Tree& tree, std::vector<const T*> weight, const Rows<T>& rows,
          std::vector<PairWeight> pairs, int64_t batch, Results out, T* messages);

// dw[s]: where the gradient of weight[s] goes, or null; no two steps may share one. It is
// overwritten. grad [batch, outputs] contiguous; dx [batch, x_width] or null; messages: what walk
// kept, or null.
template <class T>
void walk_back(const Tree& tree, std::vector<const T*> weight, const Rows<T>& rows,
               std::vector<PairWeight> pairs, std::vector<T*> dw, int64_t batch, Numbers grad,
               Results dx, int64_t x_width, const T* messages);

}  // namespace htf
