// The tree walk on batches of rows, shared by evaluate and evaluate_at.
//
// Forward: a tile of rows goes depth first from the leaves to the root; each node's message is one
// small GEMM whose epilogue multiplies it into the parent's product, so the Hadamard product costs
// no pass and about log2(order) buffers of a tile stay in the core's cache.
//
// Backward, by chunks of rows: (a) tiles recompute and keep the chunk's messages m_v and then their
// gradients dm_v, top down: dp_v = dm_v W_v^T, dm_c = dp_v * (product of the siblings' messages);
// (b) each weight's gradient adds p_v^T dm_v over the chunk. A weight's gradient has one owner in
// (b), so there is no copy per thread, and the bits do not depend on the number of threads.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/weights.h"

namespace htf {

constexpr int64_t kForwardTile = 64;
constexpr int64_t kBackwardTile = 64;
constexpr int64_t kGradientBlock = 96;              // rows of a weight's gradient in one work item
constexpr int64_t kChunkBytes = int64_t{48} << 20;  // messages and gradients kept at a time

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
      macs_ += p_.step[s].rows * ld_cols(s);
    }
  }

  void forward(int64_t batch, S* out) const {
    const int64_t tile = std::min(kForwardTile, std::max<int64_t>(batch, 1));
    const int64_t scratch = (p_.buffers + 2) * tile * widest_;
    for_each_item<T>((batch + tile - 1) / tile, batch * macs_, scratch,
                     [&](int64_t item, T* buffers) {
                       const int64_t b = item * tile;
                       forward_tile(b, std::min(tile, batch - b), tile * widest_, buffers, out);
                     });
  }

  // grad [batch, outputs] contiguous; dx [batch, x_width] or null.
  void backward(int64_t batch, const S* grad, WeightGradients<S>& dw, S* dx) const {
    const auto transposed = transpose(w_);
    std::vector<int64_t> column(p_.steps + 1,
                                0);  // where a step's message lies in a row of the chunk
    for (int64_t s = 0; s < p_.steps; ++s) column[s + 1] = column[s] + padded<T>(p_.step[s].cols);
    const int64_t width = column[p_.steps];
    const int64_t fit = kChunkBytes / (2 * width * static_cast<int64_t>(sizeof(T)));
    const int64_t chunk = std::min((batch + kBackwardTile - 1) / kBackwardTile,
                                   std::clamp<int64_t>(fit / kBackwardTile, 2, 32)) *
                          kBackwardTile;
    Buffer<T> messages(chunk * width), gradients(chunk * width);
    const std::vector<Item> items = gradient_items(dw);
    const std::vector<std::vector<int64_t>> children = children_of();
    for (int64_t b0 = 0; b0 < batch; b0 += chunk) {
      const int64_t rows = std::min(chunk, batch - b0);
      // A step's rows of a tile lie together: [tile][step][row][column].
      const Chunk c{b0, rows, width, column.data(), messages.get(), gradients.get()};
      for_each_item<T>((rows + kBackwardTile - 1) / kBackwardTile, 2 * rows * macs_,
                       3 * kBackwardTile * widest_, [&](int64_t item, T* scratch) {
                         recompute(c, item, children, scratch);
                         descend(c, item, children, transposed, grad, dx, scratch);
                       });
      for_each_item<T>(
          static_cast<int64_t>(items.size()), rows * macs_, kBackwardTile * widest_,
          [&](int64_t item, T* scratch) { accumulate(c, items[item], children, dw, scratch); });
    }
  }

 private:
  struct Chunk {
    int64_t b0, rows, width;
    const int64_t* column;
    T *messages, *gradients;
    int64_t tile_rows(int64_t item) const {
      return std::min(kBackwardTile, rows - item * kBackwardTile);
    }
    T* at(T* base, int64_t item, int64_t s) const {
      return base + item * kBackwardTile * width + column[s] * kBackwardTile;
    }
  };
  // Rows row .. row+rows-1 of the gradient of one weight, from all steps that use it.
  struct Item {
    int64_t group, slot, row, rows;
    std::vector<int64_t> users;
  };

  int64_t ld_rows(int64_t s) const { return padded<T>(p_.step[s].rows); }
  int64_t ld_cols(int64_t s) const { return padded<T>(p_.step[s].cols); }
  const T* weight(int64_t s) const { return w_[p_.step[s].group].at(p_.step[s].slot); }

  void forward_tile(int64_t b, int64_t n, int64_t size, T* buffers, S* out) const {
    T* result = buffers + p_.buffers * size;
    T* widened = result + size;
    for (int64_t s = 0; s < p_.steps; ++s) {
      const Step& st = p_.step[s];
      const bool root = st.parent < 0;
      T* to = root ? result : buffers + p_.step[st.parent].buffer * size;
      const Store store = root || st.first ? Store::assign : Store::multiply;
      if (p_.is_leaf(s)) {
        leaf_message(s, b, n, widened, to, store);
      } else if (st.group < 0) {
        sum_rows(n, st.rows, buffers + st.buffer * size, ld_rows(s), to, ld_cols(s));
      } else {
        k_.gemm(n, ld_cols(s), st.rows, buffers + st.buffer * size, ld_rows(s), 1, weight(s),
                ld_cols(s), to, ld_cols(s), store);
      }
    }
    unpack_rows(n, p_.outputs, result, ld_cols(p_.steps - 1), out + b * p_.outputs, p_.outputs);
  }

  void leaf_message(int64_t s, int64_t b, int64_t n, T* widened, T* to, Store store) const {
    const Step& st = p_.step[s];
    const int64_t ld = ld_cols(s);
    if constexpr (Rows::kDense) {
      const auto [x, stride] = rows_.operand(st, b, n, widened);
      k_.gemm(n, ld, st.rows, x, stride, 1, weight(s), ld, to, ld, store);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const T* row = weight(s) + rows_.row(st, b + i) * ld;
        if (store == Store::assign)
          std::copy_n(row, ld, to + i * ld);
        else
          k_.product(1, ld, to + i * ld, ld, row, ld, to + i * ld, ld, Store::assign);
      }
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

  // p_v for a tile: the only child's message itself, or the product of all in scratch.
  const T* product(const Chunk& c, int64_t item, const std::vector<int64_t>& children, int64_t n,
                   int64_t from, int64_t cols, T* scratch, int64_t& ld) const {
    ld = ld_cols(children[0]);
    const T* p = c.at(c.messages, item, children[0]) + from;
    for (std::size_t i = 1; i < children.size(); ++i) {
      k_.product(n, cols, p, ld, c.at(c.messages, item, children[i]) + from, ld_cols(children[i]),
                 scratch, cols, Store::assign);
      p = scratch;
      ld = cols;
    }
    return p;
  }

  void recompute(const Chunk& c, int64_t item, const std::vector<std::vector<int64_t>>& children,
                 T* scratch) const {
    const int64_t n = c.tile_rows(item), b = c.b0 + item * kBackwardTile;
    for (int64_t s = 0; s + 1 < p_.steps; ++s) {
      T* to = c.at(c.messages, item, s);
      if (p_.is_leaf(s)) {
        leaf_message(s, b, n, scratch, to, Store::assign);
      } else {
        int64_t ld;
        const T* p = product(c, item, children[s], n, 0, ld_rows(s), scratch, ld);
        k_.gemm(n, ld_cols(s), p_.step[s].rows, p, ld, 1, weight(s), ld_cols(s), to, ld_cols(s),
                Store::assign);
      }
    }
  }

  void descend(const Chunk& c, int64_t item, const std::vector<std::vector<int64_t>>& children,
               const std::vector<TransposedGroup<T>>& transposed, const S* grad, S* dx,
               T* scratch) const {
    const int64_t n = c.tile_rows(item), b = c.b0 + item * kBackwardTile, root = p_.steps - 1;
    T* dp = scratch;
    T* other = scratch + kBackwardTile * widest_;
    pack_rows(n, p_.outputs, grad + b * p_.outputs, p_.outputs, c.at(c.gradients, item, root),
              ld_cols(root));
    for (int64_t s = root; s >= 0; --s) {
      const Step& st = p_.step[s];
      const T* dm = c.at(c.gradients, item, s);
      const int64_t ld = ld_rows(s);
      if (p_.is_leaf(s) && (!Rows::kDense || dx == nullptr)) continue;
      if (st.group < 0) {
        for (int64_t i = 0; i < n; ++i) std::fill_n(dp + i * ld, ld, dm[i * ld_cols(s)]);
      } else {
        const auto& wt = transposed[st.group];
        k_.gemm(n, ld, st.cols, dm, ld_cols(s), 1, wt.at(st.slot), wt.ld, dp, ld, Store::assign);
      }
      if (p_.is_leaf(s))
        unpack_rows(n, st.rows, dp, ld, dx + b * p_.x_width + st.offset, p_.x_width);
      else
        split(c, item, children[s], n, ld, dp, other);
    }
  }

  // dm_c = dp * (product of the siblings' messages), by running products from both ends.
  void split(const Chunk& c, int64_t item, const std::vector<int64_t>& children, int64_t n,
             int64_t ld, T* dp, T* other) const {
    const int64_t count = static_cast<int64_t>(children.size());
    auto m = [&](int64_t i) { return c.at(c.messages, item, children[i]); };
    auto dm = [&](int64_t i) { return c.at(c.gradients, item, children[i]); };
    auto times = [&](const T* x, const T* y, T* out) {
      k_.product(n, ld, x, ld, y, ld, out, ld, Store::assign);
    };
    if (count == 1) {
      std::copy_n(dp, n * ld, dm(0));
    } else if (count == 2) {
      times(dp, m(1), dm(0));
      times(dp, m(0), dm(1));
    } else {
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(dp, n * ld, dm(i));
        if (i + 1 < count) times(dp, m(i), dp);
      }
      std::copy_n(m(count - 1), n * ld, other);
      for (int64_t i = count - 2; i >= 0; --i) {
        times(dm(i), other, dm(i));
        if (i > 0) times(other, m(i), other);
      }
    }
  }

  void accumulate(const Chunk& c, const Item& item,
                  const std::vector<std::vector<int64_t>>& children, WeightGradients<S>& dw,
                  T* scratch) const {
    const int64_t ld_out = dw.ld(item.group);
    T* out = dw.at(item.group, item.slot) + item.row * ld_out;
    const int64_t tiles = (c.rows + kBackwardTile - 1) / kBackwardTile;
    for (const int64_t s : item.users) {
      const Step& st = p_.step[s];
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t n = c.tile_rows(t), b = c.b0 + t * kBackwardTile;
        const T* dm = c.at(c.gradients, t, s);
        const T* p;
        int64_t ld;
        if (!p_.is_leaf(s)) {
          p = product(c, t, children[s], n, item.row, padded<T>(item.rows), scratch, ld);
        } else if constexpr (Rows::kDense) {
          std::tie(p, ld) = rows_.operand(st, b, n, scratch);
          p += item.row;
        } else {
          for (int64_t i = 0; i < n; ++i) {
            const int64_t r = rows_.row(st, b + i) - item.row;
            if (r < 0 || r >= item.rows) continue;
            for (int64_t j = 0; j < ld_out; ++j) out[r * ld_out + j] += dm[i * ld_out + j];
          }
          continue;
        }
        k_.gemm(item.rows, ld_out, n, p, 1, ld, dm, ld_out, out, ld_out, Store::add);
      }
    }
  }

  std::vector<Item> gradient_items(const WeightGradients<S>& dw) const {
    std::vector<std::vector<int64_t>> slots(p_.groups);
    std::vector<Item> whole, items;
    for (int64_t g = 0; g < p_.groups; ++g) slots[g].assign(w_[g].count, -1);
    for (int64_t s = 0; s < p_.steps; ++s) {
      const Step& st = p_.step[s];
      if (!dw.needed(st.group)) continue;
      int64_t& at = slots[st.group][st.slot];
      if (at < 0) {
        at = static_cast<int64_t>(whole.size());
        whole.push_back({st.group, st.slot, 0, st.rows, {}});
      }
      whole[at].users.push_back(s);
    }
    for (const Item& w : whole)
      for (int64_t row = 0; row < w.rows; row += kGradientBlock)
        items.push_back({w.group, w.slot, row, std::min(kGradientBlock, w.rows - row), w.users});
    return items;
  }

  std::vector<std::vector<int64_t>> children_of() const {
    std::vector<std::vector<int64_t>> children(p_.steps);
    for (int64_t s = 0; s + 1 < p_.steps; ++s) children[p_.step[s].parent].push_back(s);
    return children;
  }

  const Program& p_;
  const Rows rows_;
  const std::vector<PackedGroup<S>> w_;
  const Kernels<T>& k_;
  int64_t widest_ = 0;
  int64_t macs_ = 0;  // multiply-adds of a row's forward walk
};

}  // namespace htf
