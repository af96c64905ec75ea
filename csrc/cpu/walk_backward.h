// The backward pass of the tree walk.
//
// The interior messages m_v are there: kept by the forward pass, or computed again for a chunk of
// rows at a time. Going down, a node forms
//     dp_v = dm_v W_v^T,   dm_c = dp_v * (product of the siblings' messages),
//     dW_v = p_v^T dm_v,   dx_n = dm_n W_n^T
// for the whole chunk, so that its weight and its gradient are streamed once. The nodes next to the
// root ("top") are too few to keep all threads busy: there a thread takes a tile of rows through
// all of them, then the gradients of their weights are items of their own, beside the subtrees
// below, each of which one thread walks alone, depth first. Where all weights together are small,
// parts of the batch go down the whole tree instead, each with gradients of its own.
// A weight's gradient, or a part's, has one owner and one order of summation: no copy per thread,
// and the same bits whatever the number of threads.
#pragma once

#include <vector>

#include "cpu/backward_plan.h"

namespace htf {

constexpr int64_t kGradientRows = 64;    // of a weight's gradient in one work item
constexpr int64_t kGradientDepth = 256;  // rows summed over in one GEMM
constexpr int64_t kScatterColumns = 32;

template <class T>
class BackwardWalk : public BackwardPlan<T> {
  using Base = BackwardPlan<T>;
  using Window = typename Rows<T>::Window;

 public:
  // dw[s]: where the gradient of weight[s] goes, or null; no two steps may share one. It is
  // overwritten. grad [batch, outputs] contiguous; dx [batch, x_width] or null.
  BackwardWalk(const Tree& tree, std::vector<const T*> weight, const Rows<T>& rows,
               std::vector<T*> dw, int64_t batch, Numbers grad, Results dx, int64_t x_width,
               std::vector<PairWeight> pairs = {})
      : Base(tree, std::move(weight), rows, std::move(dw), batch, static_cast<bool>(dx),
             std::move(pairs)),
        grad_(grad),
        dx_(dx),
        x_width_(x_width) {}

  // messages: what forward kept, or null.
  void run(const T* messages) {
    messages_ = messages;
    if (batch_ == 0 || !wanted_[tree_.steps - 1]) {
      clear(dw_, true);
      return;
    }
    Buffer<T> recomputed;
    const int64_t rows = this->part_rows();
    if (rows < batch_) {
      if (messages_ == nullptr) {
        recomputed = Buffer<T>(batch_ * this->kept_columns_);
        this->walk_tiles(0, batch_, batch_, recomputed.get(), [](int64_t, int64_t, const T*) {});
        messages_ = recomputed.get();
      }
      pieces_ = {tree_.steps - 1};
      this->choose_slots();
      this->choose_chunk(rows, true);
      run_parts(rows);
      return;
    }
    clear(dw_, false);
    this->choose_top();
    this->choose_slots();
    this->choose_chunk(batch_, messages != nullptr);
    transpose_top();
    top_matrices_ = Buffer<T>(chunk_ * top_columns_);
    recomputed = Buffer<T>(messages_ == nullptr ? chunk_ * this->kept_columns_ : 0);
    for (int64_t b = 0; b < batch_; b += chunk_) {
      Chunk chunk{b,    std::min(chunk_, batch_ - b), b == 0, messages_, batch_, b,
                  &dw_, top_matrices_.get()};
      if (messages_ == nullptr) {
        this->walk_tiles(b, chunk.count, chunk_, recomputed.get(),
                         [](int64_t, int64_t, const T*) {});
        chunk.kept = recomputed.get(), chunk.kept_rows = chunk_, chunk.kept_first = 0;
      }
      run_chunk(chunk);
    }
  }

 private:
  using Base::chunk_, Base::tile_, Base::tile_elements, Base::piece_elements, Base::kTileMatrices;
  using Base::dw_, Base::batch_, Base::wanted_, Base::slot_, Base::piece_rows_;
  using Base::k_, Base::rows_, Base::tree_, Base::widest_;
  using Base::ld_cols, Base::ld_rows, Base::macs, Base::gathers, Base::elements;
  using Base::multiply_back, Base::multiply_gradient, Base::transpose_weight, Base::weighted;
  using Base::top_, Base::pieces_, Base::product_at_, Base::top_columns_, Base::slots_;

  // Rows that go down together.
  struct Chunk {
    int64_t b0, count;
    bool fresh;                     // nothing has been added to the gradients before
    const T* kept;                  // the messages of all rows,
    int64_t kept_rows, kept_first;  // how many these are, and where the chunk's start
    const std::vector<T*>* dw;
    T* top;  // what lies next to the root
  };

  // Gradients that are added to without having been written.
  void clear(const std::vector<T*>& dw, bool all) const {
    for (int64_t s = 0; s < tree_.steps; ++s)
      if (dw[s] != nullptr && (all || gathers(s))) std::fill_n(dw[s], elements(s), T(0));
  }
  void run_parts(int64_t rows) {
    int64_t size = 0;  // of a part's gradients
    for (int64_t s = 0; s < tree_.steps; ++s) size += dw_[s] != nullptr ? elements(s) : 0;
    const int64_t parts = (batch_ + rows - 1) / rows;
    Buffer<T> own((parts - 1) * size);
    std::vector<std::vector<T*>> dw(parts, dw_);
    for (int64_t part = 1; part < parts; ++part) {
      T* next = own.get() + (part - 1) * size;
      for (int64_t s = 0; s < tree_.steps; ++s)
        if (dw_[s] != nullptr) dw[part][s] = next, next += elements(s);
    }
    const int64_t scratch_size = piece_elements() + chunk_ * top_columns_;
    for_each_item<T>(parts, 2 * batch_ * this->macs_, scratch_size, [&](int64_t part, T* scratch) {
      clear(dw[part], false);
      const int64_t first = part * rows, end = std::min(batch_, first + rows);
      for (int64_t b = first; b < end; b += chunk_) {
        const Chunk chunk{b,         std::min(chunk_, end - b), b == first, messages_, batch_, b,
                          &dw[part], scratch + piece_elements()};
        root_gradient(chunk);
        descend_piece(tree_.steps - 1, chunk, scratch);
      }
    });
    for_each_item<T>(tree_.steps, parts * size, 0, [&](int64_t s, T*) {
      if (dw_[s] == nullptr) return;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < elements(s); ++i) dw_[s][i] += dw[part][s][i];
    });
  }

  // dm of the root.
  void root_gradient(const Chunk& chunk) const {
    const int64_t root = tree_.steps - 1;
    pack_rows(chunk.count, tree_.outputs, grad_ + chunk.b0 * tree_.outputs, tree_.outputs,
              chunk.top + chunk_ * slot_[root], ld_cols(root));
  }

  void transpose_top() {
    int64_t size = 0, work = 0;
    std::vector<int64_t> at;
    for (const int64_t s : top_) {
      at.push_back(size);
      if (weighted(s)) size += tree_.step[s].cols * ld_rows(s);
      for (const int64_t* c = tree_.begin(s); c < tree_.end(s); ++c) {
        if (!tree_.is_leaf(*c) || !dx_) continue;
        size += tree_.step[*c].cols * ld_rows(*c);
      }
    }
    work = kMoved * size;
    transposed_ = Buffer<T>(size);
    transposed_at_.assign(tree_.steps, nullptr);
    for_each_item<T>(static_cast<int64_t>(top_.size()), work, 0, [&](int64_t i, T*) {
      const int64_t s = top_[i];
      T* to = transposed_.get() + at[i];
      const auto put = [&](int64_t v) {
        transposed_at_[v] = to;
        transpose_weight(v, to);
        to += tree_.step[v].cols * ld_rows(v);
      };
      if (weighted(s)) put(s);
      for (const int64_t* c = tree_.begin(s); c < tree_.end(s); ++c)
        if (tree_.is_leaf(*c) && dx_) put(*c);
    });
  }

  struct Item {  // of the gradient of a top weight
    int64_t step, first, count, product_at;
  };

  void run_chunk(const Chunk& chunk) {
    root_gradient(chunk);
    const auto top_d = [&](int64_t s) { return chunk.top + chunk_ * slot_[s]; };
    int64_t work = 0;
    std::vector<Item> items;
    for (std::size_t i = 0; i < top_.size(); ++i) {
      work += chunk.count * macs(top_[i]);
      const auto add = [&](int64_t s, int64_t product_at) {
        if (dw_[s] == nullptr) return;
        const int64_t all = gathers(s) ? ld_cols(s) : tree_.step[s].rows;
        const int64_t part = gathers(s) ? kScatterColumns : kGradientRows;
        for (int64_t at = 0; at < all; at += part)
          items.push_back({s, at, std::min(part, all - at), product_at});
      };
      add(top_[i], product_at_[i]);
      for (const int64_t* c = tree_.begin(top_[i]); c < tree_.end(top_[i]); ++c)
        if (tree_.is_leaf(*c)) add(*c, -1);
    }
    rows_.choose_runs(tree_, tile_);
    for_each_item<T>(
        top_.empty() ? 0 : (chunk.count + tile_ - 1) / tile_, work,
        tile_elements() + rows_.window_elements(), [&](int64_t item, T* scratch) {
          const int64_t i = item * tile_, n = std::min(tile_, chunk.count - i);
          Window window{scratch + tile_elements(), chunk.b0 + i, n};
          for (std::size_t t = 0; t < top_.size(); ++t) {
            const int64_t s = top_[t];
            T* p = dw_[s] == nullptr ? nullptr : chunk.top + chunk_ * product_at_[t];
            descend(s, i, n, chunk, transposed_at_[s], top_d, p, scratch, rows_, window);
            if (!dx_) continue;
            for (const int64_t* c = tree_.begin(s); c < tree_.end(s); ++c)
              if (tree_.is_leaf(*c))
                input_gradient(*c, i, n, chunk, transposed_at_[*c], top_d(*c), scratch);
          }
        });
    const int64_t whole = static_cast<int64_t>(pieces_.size());
    int64_t most = whole > 0 ? piece_elements() : 0;
    if (!items.empty()) most = std::max(most, kGradientDepth * widest_);
    for_each_item<T>(
        whole + static_cast<int64_t>(items.size()), chunk.count * this->macs_, most,
        [&](int64_t item, T* scratch) {
          if (item < whole) {
            descend_piece(pieces_[item], chunk, scratch);
            return;
          }
          const Item& it = items[item - whole];
          const T* p = it.product_at < 0 ? nullptr : chunk.top + chunk_ * it.product_at;
          const auto operand = [&](int64_t i, [[maybe_unused]] int64_t n) {
            if (tree_.is_leaf(it.step))
              return rows_.alone(tree_.step[it.step], chunk.b0 + i, n, scratch);
            return product_rows(it.step, chunk, p, i);
          };
          weight_gradient(it.step, it.first, it.count, chunk, top_d(it.step), operand, {});
        });
  }

  void descend_piece(int64_t piece, const Chunk& chunk, T* scratch) const {
    T* product = scratch + tile_elements();
    T* transposed = product + chunk_ * widest_;
    T* slots = transposed + widest_ * widest_;
    Window window{slots + slots_ * chunk_ * widest_, chunk.b0, chunk.count};
    const auto d_of = [&](int64_t s) {
      return s == piece ? chunk.top + chunk_ * slot_[s] : slots + slot_[s] * chunk_ * widest_;
    };
    for (int64_t s = piece; s >= tree_.first[piece]; --s) {
      if (!wanted_[s]) continue;
      const bool leaf = tree_.is_leaf(s);
      const bool below = !leaf || dx_;
      if (below && weighted(s)) transpose_weight(s, transposed);
      for (int64_t i = 0; i < chunk.count && below; i += tile_) {
        const int64_t n = std::min(tile_, chunk.count - i);
        if (leaf)
          input_gradient(s, i, n, chunk, transposed, d_of(s), scratch);
        else
          descend(s, i, n, chunk, transposed, d_of, dw_[s] == nullptr ? nullptr : product, scratch,
                  piece_rows_, window);
      }
      if (dw_[s] == nullptr) continue;
      const auto operand = [&](int64_t i, int64_t) {
        if (leaf) return piece_rows_.operand(tree_, s, chunk.b0 + i, window, k_);
        return product_rows(s, chunk, product, i);
      };
      weight_gradient(s, 0, gathers(s) ? ld_cols(s) : tree_.step[s].rows, chunk, d_of(s), operand,
                      this->fetch_ && s > 0 ? this->weight_of(s - 1) : Ahead{});
    }
  }

  const T* kept(int64_t s, const Chunk& chunk, int64_t i) const {
    return this->kept_message(chunk.kept, chunk.kept_rows, s, chunk.kept_first + i);
  }

  // Whether a node's product is its only child's kept message.
  bool passes(int64_t s) const { return tree_.count(s) == 1 && !tree_.is_leaf(*tree_.begin(s)); }

  // Rows i .. i+n-1 of the chunk: from dm of an interior step to dm of its children, and its
  // product, unless it passes.
  template <class F>
  void descend(int64_t s, int64_t i, int64_t n, const Chunk& chunk, const T* transposed,
               const F& d_of, T* product, T* scratch, const Rows<T>& rows, Window& window) const {
    const int64_t ld = ld_rows(s), count = tree_.count(s), size = tile_ * widest_;
    const int64_t* child = tree_.begin(s);
    bool below = false;
    for (int64_t c = 0; c < count; ++c) below |= wanted_[child[c]] != 0;
    product = product == nullptr || passes(s) ? nullptr : product + i * ld;
    if (!below && product == nullptr) return;
    T* free = scratch + kTileMatrices * size;
    const T* dm = d_of(s) + i * ld_cols(s);
    const auto message = [&](int64_t c, T* to) -> const T* {
      if (!tree_.is_leaf(child[c])) return kept(child[c], chunk, i);
      if (to == nullptr) to = free, free += size;
      this->leaf_message(rows, child[c], chunk.b0 + i, n, to, Store::assign, window);
      return to;
    };
    const auto gradient = [&](int64_t c) -> T* {
      return wanted_[child[c]] ? d_of(child[c]) + i * ld : nullptr;
    };
    const auto spread = [&](T* dp) {  // dp = dm W^T
      if (weighted(s))
        multiply_back(s, n, dm, transposed, dp);
      else
        for (int64_t r = 0; r < n; ++r) std::fill_n(dp + r * ld, ld, dm[r * ld_cols(s)]);
    };
    if (count == 1) {
      if (T* to = gradient(0)) spread(to);
      if (product != nullptr) message(0, product);
      return;
    }
    std::vector<const T*> m(count);
    for (int64_t c = 0; c < count; ++c) m[c] = message(c, nullptr);
    T *left = scratch, *right = left + size, *spare = right + size;
    if (!weighted(s)) {
      spread(spare);
      split(m.data(), 0, count, n, ld, spare, left, gradient);
      return;
    }
    // Two groups of children: dp times the product of one is what the other one gets.
    const int64_t half = count / 2;
    const T* x = product_of(m.data(), 0, half, n, ld, left);
    const T* y = product_of(m.data(), half, count, n, ld, right);
    if (!below) {
      k_.product(n, ld, x, ld, y, ld, product, ld, Store::assign);
      return;
    }
    T *dx = half == 1 ? gradient(0) : spare, *dy = count - half == 1 ? gradient(1) : spare + size;
    multiply_back(s, n, dm, transposed, {ld, x, y, nullptr, dy, dx, product});
    if (half > 1) split(m.data(), 0, half, n, ld, dx, left, gradient);
    if (count - half > 1) split(m.data(), half, count, n, ld, dy, left, gradient);
  }

  // The product of messages from .. to-1: the message itself, or in `out`.
  const T* product_of(const T* const* m, int64_t from, int64_t to, int64_t n, int64_t ld,
                      T* out) const {
    if (to - from == 1) return m[from];
    for (int64_t c = from + 1; c < to; ++c)
      k_.product(n, ld, c == from + 1 ? m[from] : out, ld, m[c], ld, out, ld, Store::assign);
    return out;
  }

  // dm_c = dp * (product of the other messages from .. to-1), by running products from both ends.
  template <class G>
  void split(const T* const* m, int64_t from, int64_t to, int64_t n, int64_t ld, const T* dp,
             T* other, const G& gradient) const {
    const auto times = [&](const T* x, const T* y, T* out) {
      k_.product(n, ld, x, ld, y, ld, out, ld, Store::assign);
    };
    const T* before = nullptr;
    for (int64_t c = from; c < to; ++c) {
      if (T* d = gradient(c)) {
        if (before == nullptr)
          std::copy_n(dp, n * ld, d);
        else
          times(dp, before, d);
      }
      if (c + 1 == to) break;
      if (before != nullptr) times(before, m[c], other);
      before = before == nullptr ? m[c] : other;
    }
    const T* after = m[to - 1];
    for (int64_t c = to - 1; c-- > from;) {
      if (T* d = gradient(c)) times(d, after, d);
      if (c == from) break;
      times(after, m[c], other);
      after = other;
    }
  }

  void input_gradient(int64_t s, int64_t i, int64_t n, const Chunk& chunk, const T* transposed,
                      const T* d, T* scratch) const {
    const Step& st = tree_.step[s];
    const int64_t ld = ld_rows(s);
    multiply_back(s, n, d + i * ld_cols(s), transposed, scratch);
    unpack_rows(n, st.rows, scratch, ld, dx_ + (chunk.b0 + i) * x_width_ + st.offset, x_width_);
  }

  // A product from row i of the chunk on, and its leading dimension.
  std::pair<const T*, int64_t> product_rows(int64_t s, const Chunk& chunk, const T* product,
                                            int64_t i) const {
    const int64_t ld = ld_rows(s);
    return {passes(s) ? kept(*tree_.begin(s), chunk, i) : product + i * ld, ld};
  }

  // Rows first .. first+count-1 of dW (columns, where rows are scattered), over the whole chunk;
  // operand(i, n): the product, or a leaf's rows, from row i on.
  template <class F>
  void weight_gradient(int64_t s, int64_t first, int64_t count, const Chunk& chunk, const T* d,
                       const F& operand, Ahead ahead) const {
    const Step& st = tree_.step[s];
    const int64_t ld = ld_cols(s);
    if (gathers(s)) {
      int64_t at[kTile];
      for (int64_t i = 0; i < chunk.count; i += kTile) {
        const int64_t n = std::min(kTile, chunk.count - i);
        rows_.rows(st, chunk.b0 + i, n, at);
        k_.scatter(n, count, at, d + i * ld + first, ld, (*chunk.dw)[s] + first, ld);
      }
      return;
    }
    T* to = (*chunk.dw)[s] + first * ld;
    for (int64_t i = 0; i < chunk.count; i += kGradientDepth) {
      const int64_t n = std::min(kGradientDepth, chunk.count - i);
      const Store store = chunk.fresh && i == 0 ? Store::assign : Store::add;
      const auto [a, lda] = operand(i, n);
      multiply_gradient(s, count, n, a + first, lda, d + i * ld, to, store,
                        i == 0 ? ahead : Ahead{});
    }
  }

  const Numbers grad_;
  const T* messages_ = nullptr;
  const Results dx_;
  const int64_t x_width_;
  std::vector<const T*> transposed_at_;
  Buffer<T> top_matrices_, transposed_;
};

}  // namespace htf
