// The tree walk on batches of rows, shared by evaluate and evaluate_at.
//
// A tile of rows goes depth first from the leaves to the root. Each node's message is one small
// GEMM whose epilogue multiplies it into the parent's product, so the Hadamard product costs no
// pass, and about log2(order) buffers of a tile stay in the core's cache. Where a backward pass
// follows, the interior nodes' messages are kept; a leaf's is cheap to compute again.
#pragma once

#include <utility>
#include <vector>

#include "cpu/weights.h"

namespace htf {

constexpr int64_t kTile = 64;                      // rows that walk together
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

// Indices: a leaf's message is a row of its matrix. Index (b, mode) lies at b * down + mode *
// across.
template <class Index>
struct IndexRows {
  static constexpr bool kDense = false;
  const Index* indices;
  int64_t down, across;

  void rows(const Step& leaf, int64_t b, int64_t n, int64_t* to) const {
    const Index* from = indices + b * down + leaf.mode * across;
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * down];
  }
};

template <class S, class Rows>
class Walk {
 public:
  using T = typename ComputeOf<S>::type;

  // weight[s]: the matrix of step s, [rows, padded(cols)]; null for the root of a sum.
  Walk(const Tree& tree, std::vector<const T*> weight, const Rows& rows)
      : tree_(tree),
        rows_(rows),
        weight_(std::move(weight)),
        k_(kernels<T>()),
        column_(tree.steps) {
    for (int64_t s = 0; s < tree_.steps; ++s) {
      widest_ = std::max({widest_, ld_rows(s), ld_cols(s)});
      macs_ += macs(s);
      if (kept(s)) {
        column_[s] = kept_columns_;
        kept_columns_ += ld_cols(s);
      }
    }
  }

  // Elements of all interior messages of a row.
  int64_t kept_columns() const { return kept_columns_; }

  // messages: where to keep the interior messages [column][batch][...], or null.
  void forward(int64_t batch, S* out, T* messages) const {
    walk_tiles(0, batch, batch, messages, [&](int64_t b, int64_t n, const T* result) {
      unpack_rows(n, tree_.outputs, result, ld_cols(tree_.steps - 1), out + b * tree_.outputs,
                  tree_.outputs);
    });
  }

 protected:
  int64_t ld_rows(int64_t s) const { return padded<T>(tree_.step[s].rows); }
  int64_t ld_cols(int64_t s) const { return padded<T>(tree_.step[s].cols); }
  // Multiply-adds of a row's message; of a gathered one, the elements that are moved.
  int64_t macs(int64_t s) const {
    const bool gathers = !Rows::kDense && tree_.is_leaf(s);
    return (gathers ? 1 : tree_.step[s].rows) * ld_cols(s);
  }
  bool kept(int64_t s) const { return !tree_.is_leaf(s) && s + 1 < tree_.steps; }

  // Rows of the kept message of step s, where there are `batch` of them.
  template <class P>
  P* kept_message(P* messages, int64_t batch, int64_t s, int64_t b) const {
    return messages + column_[s] * batch + b * ld_cols(s);
  }

  // The messages of rows b0 .. b0+count-1; finish(b, n, root's message) for each tile.
  template <class F>
  void walk_tiles(int64_t b0, int64_t count, int64_t batch, T* messages, const F& finish) const {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t tile = kTile;
    while (tile > 16 && count <= tile / 2 * threads) tile /= 2;
    tile = std::max<int64_t>(std::min(tile, count), 1);
    const int64_t size = tile * widest_;
    for_each_item<T>((count + tile - 1) / tile, count * macs_, (tree_.buffers + 2) * size,
                     [&](int64_t item, T* buffers) {
                       const int64_t i = item * tile, n = std::min(tile, count - i);
                       T *result = buffers + tree_.buffers * size, *widened = result + size;
                       if (messages == nullptr) {
                         for (int64_t s = 0; s < tree_.steps; ++s)
                           step_forward(s, b0 + i, n, buffers, size, result, widened);
                       } else {
                         for (int64_t s = 0; s < tree_.steps; ++s)
                           step_keeping(
                               s, b0 + i, n, buffers, size, result, widened,
                               [&](int64_t c) { return kept_message(messages, batch, c, i); });
                       }
                       finish(b0 + i, n, result);
                     });
  }

  void leaf_message(int64_t s, int64_t b, int64_t n, T* to, Store store, T* widened) const {
    const Step& st = tree_.step[s];
    const int64_t ld = ld_cols(s);
    if constexpr (Rows::kDense) {
      const auto [x, stride] = rows_.operand(st, b, n, widened);
      k_.gemm(n, ld, st.rows, x, stride, 1, weight_[s], ld, to, ld, store);
    } else {
      int64_t at[kTile];
      rows_.rows(st, b, n, at);
      k_.gather(n, ld, at, weight_[s], ld, to, ld, store);
    }
  }

  void interior_message(int64_t s, int64_t n, const T* product, T* to, Store store) const {
    const Step& st = tree_.step[s];
    const int64_t ld = ld_cols(s), ldp = ld_rows(s);
    if (weight_[s] != nullptr) {
      k_.gemm(n, ld, st.rows, product, ldp, 1, weight_[s], ld, to, ld, store);
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < st.rows; ++j) sum += product[i * ldp + j];
      std::fill_n(to + i * ld, ld, T(0));
      to[i * ld] = sum;
    }
  }

  const Tree& tree_;
  const Rows rows_;
  const std::vector<const T*> weight_;
  const Kernels<T>& k_;
  std::vector<int64_t> column_;  // of a kept message
  int64_t kept_columns_ = 0;
  int64_t widest_ = 0;
  int64_t macs_ = 0;  // multiply-adds of a row's forward walk

 private:
  void step_forward(int64_t s, int64_t b, int64_t n, T* buffers, int64_t size, T* result,
                    T* widened) const {
    const Step& st = tree_.step[s];
    T* to = st.parent < 0 ? result : buffers + tree_.step[st.parent].buffer * size;
    const Store store = st.parent < 0 || st.first ? Store::assign : Store::multiply;
    if (tree_.is_leaf(s))
      leaf_message(s, b, n, to, store, widened);
    else
      interior_message(s, n, buffers + st.buffer * size, to, store);
  }

  // A message goes to where it is kept; its parent forms the product when its own turn comes, in
  // the same order as without keeping, for the same bits.
  template <class F>
  void step_keeping(int64_t s, int64_t b, int64_t n, T* buffers, int64_t size, T* result,
                    T* widened, const F& kept_at) const {
    if (tree_.is_leaf(s)) return;
    const Step& st = tree_.step[s];
    T* own = buffers + st.buffer * size;
    const int64_t ld = ld_rows(s);
    const T* product = nullptr;
    for (const int64_t* c = tree_.begin(s); c < tree_.end(s); ++c) {
      if (tree_.is_leaf(*c)) {
        if (product != nullptr && product != own) std::copy_n(product, n * ld, own);
        leaf_message(*c, b, n, own, product == nullptr ? Store::assign : Store::multiply, widened);
        product = own;
      } else {
        const T* m = kept_at(*c);
        if (product != nullptr) k_.product(n, ld, product, ld, m, ld, own, ld, Store::assign);
        product = product == nullptr ? m : own;
      }
    }
    interior_message(s, n, product, st.parent < 0 ? result : kept_at(s), Store::assign);
  }
};

}  // namespace htf
