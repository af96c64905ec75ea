// The tree walk on batches of rows, shared by evaluate and evaluate_at.
//
// A tile of rows goes depth first from the leaves to the root. Each node's message is one small
// GEMM whose epilogue multiplies it into the parent's product, so the Hadamard product costs no
// pass, and about log2(order) buffers of a tile stay in the core's cache.
#pragma once

#include <utility>
#include <vector>

#include "cpu/weights.h"

namespace htf {

constexpr int64_t kTile = 64;  // rows that walk together

// Where leaves get their rows from: vectors, as a packed [B, x_width] matrix.
template <class S>
struct DenseRows {
  using T = typename ComputeOf<S>::type;
  static constexpr bool kDense = true;
  const S* x;
  int64_t stride;

  // A leaf's operand for rows b .. b+n-1: the caller's memory, or a widened copy in scratch.
  std::pair<const T*, int64_t> operand(const Step& leaf, int64_t b, int64_t n, T* scratch) const {
    const S* from = x + b * stride + leaf.offset;
    if constexpr (std::is_same_v<S, T>) {
      return {from, stride};
    } else {
      const int64_t ld = padded<T>(leaf.rows);
      pack_rows(n, leaf.rows, from, stride, scratch, ld);
      return {scratch, ld};
    }
  }
};

// Indices [B, order]: a leaf's message is a row of its weight.
template <class S>
struct IndexRows {
  using T = typename ComputeOf<S>::type;
  static constexpr bool kDense = false;
  const int64_t* indices;
  int64_t stride;
  int64_t row(const Step& leaf, int64_t b) const { return indices[b * stride + leaf.mode]; }
};

template <class S, class Rows>
class Walk {
 public:
  using T = typename ComputeOf<S>::type;

  Walk(const Program& program, const std::vector<Tensor>& weights, const Rows& rows)
      : p_(program), rows_(rows), w_(pack<S>(weights)), k_(kernels<T>()) {
    for (int64_t s = 0; s < p_.steps; ++s) {
      widest_ = std::max({widest_, ld_rows(s), ld_cols(s)});
      macs_ += macs(s);
    }
  }

  void forward(int64_t batch, S* out) const {
    const int64_t tile = std::min(kTile, std::max<int64_t>(batch, 1)), size = tile * widest_;
    for_each_item<T>((batch + tile - 1) / tile, batch * macs_, (p_.buffers + 2) * size,
                     [&](int64_t item, T* buffers) {
                       const int64_t b = item * tile, n = std::min(tile, batch - b);
                       T *result = buffers + p_.buffers * size, *widened = result + size;
                       for (int64_t s = 0; s < p_.steps; ++s) {
                         const Step& st = p_.step[s];
                         const T* product = buffers + std::max<int64_t>(st.buffer, 0) * size;
                         if (st.parent < 0)
                           message(s, b, n, product, ld_rows(s), result, Store::assign, widened);
                         else
                           message(s, b, n, product, ld_rows(s),
                                   buffers + p_.step[st.parent].buffer * size,
                                   st.first ? Store::assign : Store::multiply, widened);
                       }
                       unpack_rows(n, p_.outputs, result, ld_cols(p_.steps - 1),
                                   out + b * p_.outputs, p_.outputs);
                     });
  }

 protected:
  int64_t ld_rows(int64_t s) const { return padded<T>(p_.step[s].rows); }
  int64_t ld_cols(int64_t s) const { return padded<T>(p_.step[s].cols); }
  int64_t macs(int64_t s) const { return p_.step[s].rows * ld_cols(s); }
  const T* weight(int64_t s) const { return w_[p_.step[s].group].at(p_.step[s].slot); }

  // The message of step s for rows b .. b+n-1, from its product (interior) or from the rows (leaf).
  void message(int64_t s, int64_t b, int64_t n, const T* product, int64_t ld_product, T* to,
               Store store, T* widened) const {
    const Step& st = p_.step[s];
    const int64_t ld = ld_cols(s);
    if (p_.is_leaf(s)) {
      if constexpr (Rows::kDense) {
        const auto [x, stride] = rows_.operand(st, b, n, widened);
        k_.gemm(n, ld, st.rows, x, stride, 1, weight(s), ld, to, ld, store);
      } else {
        gather(s, b, n, to, store);
      }
    } else if (st.group < 0) {
      sum_rows(n, st.rows, product, ld_product, to, ld);
    } else {
      k_.gemm(n, ld, st.rows, product, ld_product, 1, weight(s), ld, to, ld, store);
    }
  }

  const Program& p_;
  const Rows rows_;
  const std::vector<PackedGroup<S>> w_;
  const Kernels<T>& k_;
  int64_t widest_ = 0;
  int64_t macs_ = 0;  // multiply-adds of a row's forward walk

 private:
  void gather(int64_t s, int64_t b, int64_t n, T* to, Store store) const {
    const int64_t ld = ld_cols(s);
    for (int64_t i = 0; i < n; ++i) {
      const T* row = weight(s) + rows_.row(p_.step[s], b + i) * ld;
      if (store == Store::assign)
        std::copy_n(row, ld, to + i * ld);
      else
        k_.product(1, ld, to + i * ld, ld, row, ld, to + i * ld, ld, Store::assign);
    }
  }

  static void sum_rows(int64_t n, int64_t cols, const T* x, int64_t ldx, T* out, int64_t ldo) {
    for (int64_t i = 0; i < n; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < cols; ++j) sum += x[i * ldx + j];
      std::fill_n(out + i * ldo, ldo, T(0));
      out[i * ldo] = sum;
    }
  }
};

}  // namespace htf
