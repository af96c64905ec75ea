// The tree walk on batches of rows, shared by evaluate and evaluate_at.
//
// A tile of rows goes depth first from the leaves to the root. Each node's message is one small
// GEMM whose epilogue multiplies it into the parent's product, so the Hadamard product costs no
// pass, and about log2(order) buffers of a tile stay in the core's cache. Where a backward pass
// follows, the interior nodes' messages are kept; a leaf's is cheap to compute again.
//
// Messages are float32 where weights are bfloat16. With PairKernels they are rounded to bfloat16 as
// operands of a product, forwards and backwards, and summed in float32.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/walks.h"

namespace htf {

constexpr int64_t kTile = 64;       // rows that walk together
constexpr int64_t kTallTile = 128;  // where weights are streamed from memory

template <class T>
class Walk {
 public:
  // weight[s]: the matrix of step s, [rows, padded(cols)]; null for the root of a sum. Where pairs
  // has the matrix as well, it is taken from there, and weight[s] may be null.
  Walk(const Tree& tree, std::vector<const T*> weight, const Rows<T>& rows,
       std::vector<PairWeight> pairs = {})
      : tree_(tree),
        rows_(rows),
        weight_(std::move(weight)),
        pairs_(std::move(pairs)),
        k_(kernels<T>()),
        column_(tree.steps) {
    int64_t bytes = 0;  // of all weights that are multiplied with
    for (int64_t s = 0; s < tree_.steps; ++s) {
      widest_ = std::max({widest_, ld_rows(s), ld_cols(s)});
      macs_ += macs(s);
      bytes += weight_of(s).bytes;
      if (kept(s)) {
        column_[s] = kept_columns_;
        kept_columns_ += ld_cols(s);
      }
    }
    fetch_ = bytes > kNearCache;
  }

  // Elements of all interior messages of a row.
  int64_t kept_columns() const { return kept_columns_; }

  // messages: where to keep the interior messages [column][batch][...], or null.
  void forward(int64_t batch, Results out, T* messages) {
    const auto finish = [&](int64_t b, int64_t n, const T* result) {
      unpack_rows(n, tree_.outputs, result, ld_cols(tree_.steps - 1), out + b * tree_.outputs,
                  tree_.outputs);
    };
    if (batch == 0 || batch * macs_ < kWorthThreads || !subtrees_pay(batch)) {
      walk_tiles(0, batch, batch, messages, finish);
      return;
    }
    // Too few rows for all threads: they share out subtrees.
    Buffer<T> own(messages == nullptr ? batch * kept_columns_ : 0);
    walk_subtrees(batch, messages == nullptr ? own.get() : messages, finish);
  }

 protected:
  int64_t ld_rows(int64_t s) const { return padded<T>(tree_.step[s].rows); }
  int64_t ld_cols(int64_t s) const { return padded<T>(tree_.step[s].cols); }
  // Multiply-adds of a row's message; of a gathered one, the elements that are moved.
  int64_t macs(int64_t s) const { return (gathers(s) ? 1 : tree_.step[s].rows) * ld_cols(s); }
  // Whether a step takes rows of its weight, few of many perhaps.
  bool gathers(int64_t s) const { return !rows_.is_dense() && tree_.is_leaf(s); }
  bool kept(int64_t s) const { return !tree_.is_leaf(s) && s + 1 < tree_.steps; }

  // Rows of the kept message of step s, where there are `batch` of them.
  template <class P>
  P* kept_message(P* messages, int64_t batch, int64_t s, int64_t b) const {
    return messages + column_[s] * batch + b * ld_cols(s);
  }

  // The messages of rows b0 .. b0+count-1; finish(b, n, root's message) for each tile.
  template <class F>
  void walk_tiles(int64_t b0, int64_t count, int64_t batch, T* messages, const F& finish) {
    if (count == 0) return;
    const int64_t tile = tile_rows(count);
    rows_.choose_runs(tree_, tile);
    for_each_item<T>((count + tile - 1) / tile, count * macs_, scratch_elements(tile),
                     [&](int64_t item, T* scratch) {
                       const int64_t i = item * tile, n = std::min(tile, count - i);
                       const Tile t(*this, scratch, tile, b0 + i, n);
                       if (messages == nullptr)
                         for (int64_t s = 0; s < tree_.steps; ++s) step_forward(s, t);
                       else
                         for (int64_t s = 0; s < tree_.steps; ++s)
                           step_keeping(s, t, messages, batch, i);
                       finish(b0 + i, n, t.result);
                     });
  }

  // Disjoint subtrees, the heaviest first, enough of them for all threads, and the steps above
  // them.
  struct Pieces {
    std::vector<int64_t> roots, above;
  };
  Pieces pieces(const std::vector<int64_t>& cost, const std::vector<char>& wanted) const {
    const int64_t root = tree_.steps - 1, threads = torch::stable::get_num_threads();
    std::vector<int64_t> below = cost;
    for (int64_t s = 0; s < root; ++s) below[tree_.step[s].parent] += below[s];
    Pieces p{{root}, {}};
    if (threads == 1) return p;
    const auto lighter = [&](int64_t a, int64_t b) {
      return below[a] < below[b] || (below[a] == below[b] && a < b);
    };
    // Opens the heaviest piece until none is a large part of the work.
    while (!p.roots.empty() && below[p.roots.front()] * 4 * threads > below[root]) {
      std::pop_heap(p.roots.begin(), p.roots.end(), lighter);
      const int64_t s = p.roots.back();
      p.roots.pop_back();
      p.above.push_back(s);
      for (const int64_t* c = tree_.begin(s); c < tree_.end(s); ++c)
        if (wanted[*c] && !tree_.is_leaf(*c)) {
          p.roots.push_back(*c);
          std::push_heap(p.roots.begin(), p.roots.end(), lighter);
        }
    }
    std::sort(p.roots.begin(), p.roots.end(), [&](int64_t a, int64_t b) { return lighter(b, a); });
    std::sort(p.above.begin(), p.above.end());
    return p;
  }

  // What a tile of rows works with.
  struct Tile {
    T* buffers;
    int64_t size;  // of each
    T* result;
    int64_t b, n;
    mutable typename Rows<T>::Window window;

    Tile(const Walk& walk, T* scratch, int64_t rows, int64_t b, int64_t n)
        : buffers(scratch),
          size(rows * walk.widest_),
          result(buffers + walk.tree_.buffers * size),
          b(b),
          n(n),
          window{result + size, b, n} {}
  };
  int64_t scratch_elements(int64_t tile) const {
    return (tree_.buffers + 1) * tile * widest_ + rows_.window_elements();
  }

  // Rows b .. b+n-1 of a leaf's message.
  void leaf_message(const Rows<T>& rows, int64_t s, int64_t b, int64_t n, T* to, Store store,
                    typename Rows<T>::Window& window) const {
    if (rows.is_dense()) {
      const auto [x, stride] = rows.operand(tree_, s, b, window, k_);
      multiply(s, n, x, stride, to, store);
    } else {
      const Step& st = tree_.step[s];
      const int64_t ld = ld_cols(s);
      int64_t at[kTallTile];
      rows.rows(st, b, n, at);
      k_.gather(n, ld, at, weight_[s], ld, to, ld, store);
    }
  }

  // The weight that a walk needs next.
  Ahead weight_after(int64_t s) const {
    return fetch_ && s + 1 < tree_.steps ? weight_of(s + 1) : Ahead{};
  }
  Ahead weight_of(int64_t s) const {
    if (gathers(s)) return {};
    if (paired(s))
      return {pairs_[s].down,
              pair_rows(tree_.step[s].rows) * ld_cols(s) * static_cast<int64_t>(sizeof(Pair))};
    return {weight_[s], weight_[s] == nullptr
                            ? 0
                            : tree_.step[s].rows * ld_cols(s) * static_cast<int64_t>(sizeof(T))};
  }

  // Whether step s multiplies in pairs of bfloat16.
  bool paired(int64_t s) const { return !pairs_.empty() && pairs_[s].down != nullptr; }
  bool weighted(int64_t s) const { return weight_[s] != nullptr || paired(s); }

  // [n x cols] (=, *=) a W, a [n x rows].
  void multiply(int64_t s, int64_t n, const T* a, int64_t lda, T* to, Store store) const {
    const int64_t rows = tree_.step[s].rows, ld = ld_cols(s);
    if constexpr (std::is_same_v<T, float>)
      if (paired(s))
        return pair_kernels()->gemm(n, ld, rows, a, lda, pairs_[s].down, ld, to, ld, store,
                                    weight_after(s));
    k_.gemm(n, ld, rows, a, lda, 1, weight_[s], ld, to, ld, store, weight_after(s));
  }
  void multiply(int64_t s, int64_t n, const T* a, int64_t lda, const Products<T>& to) const {
    const int64_t rows = tree_.step[s].rows, ld = ld_cols(s);
    if constexpr (std::is_same_v<T, float>)
      if (paired(s))
        return pair_kernels()->gemm_products(n, ld, rows, a, lda, pairs_[s].down, ld, to,
                                             weight_after(s));
    k_.gemm_products(n, ld, rows, a, lda, weight_[s], ld, to, weight_after(s));
  }

  // Of pairs as well: they move like the floats in whose memory they are put.
  void transpose_weight(int64_t s, T* to) const {
    const Step& st = tree_.step[s];
    if (paired(s))
      k_.transpose(st.rows, pair_rows(st.cols), reinterpret_cast<const T*>(pairs_[s].along),
                   pair_rows(st.cols), to, ld_rows(s));
    else
      k_.transpose(st.rows, st.cols, weight_[s], ld_cols(s), to, ld_rows(s));
  }

  // [n x rows] = dm W^T, dm [n x cols], with what transpose_weight made.
  void multiply_back(int64_t s, int64_t n, const T* dm, const T* transposed, T* to) const {
    const int64_t cols = tree_.step[s].cols, ld = ld_rows(s);
    if constexpr (std::is_same_v<T, float>)
      if (paired(s))
        return pair_kernels()->gemm(n, ld, cols, dm, ld_cols(s),
                                    reinterpret_cast<const Pair*>(transposed), ld, to, ld,
                                    Store::assign);
    k_.gemm(n, ld, cols, dm, ld_cols(s), 1, transposed, ld, to, ld, Store::assign);
  }
  void multiply_back(int64_t s, int64_t n, const T* dm, const T* transposed,
                     const Products<T>& to) const {
    const int64_t cols = tree_.step[s].cols, ld = ld_rows(s);
    if constexpr (std::is_same_v<T, float>)
      if (paired(s))
        return pair_kernels()->gemm_products(n, ld, cols, dm, ld_cols(s),
                                             reinterpret_cast<const Pair*>(transposed), ld, to);
    k_.gemm_products(n, ld, cols, dm, ld_cols(s), transposed, ld, to);
  }

  // [count x cols] (=, +=) a^T d, a [n x count], d [n x cols]: rows of the gradient of W.
  void multiply_gradient(int64_t s, int64_t count, int64_t n, const T* a, int64_t lda, const T* d,
                         T* to, Store store, Ahead ahead) const {
    const int64_t ld = ld_cols(s);
    if constexpr (std::is_same_v<T, float>)
      if (paired(s))
        return pair_kernels()->gemm_transposed(count, ld, n, a, lda, d, ld, to, ld, store, ahead);
    k_.gemm(count, ld, n, a, 1, lda, d, ld, to, ld, store, ahead);
  }

  const Tree& tree_;
  Rows<T> rows_;
  const std::vector<const T*> weight_;
  const std::vector<PairWeight> pairs_;
  const Kernels<T>& k_;
  std::vector<int64_t> column_;  // of a kept message
  int64_t kept_columns_ = 0;
  int64_t widest_ = 0;
  int64_t macs_ = 0;    // multiply-adds of a row's forward walk
  bool fetch_ = false;  // whether the weights are too many to stay in the cache by themselves

 private:
  static constexpr int64_t kNearCache = int64_t{512} << 10;
  static constexpr int64_t kTallRow = 1024;  // bytes of a row of which a tall tile stays near

  // Equal tiles, so many of them that all threads have work.
  int64_t tile_rows(int64_t count) const {
    constexpr int64_t kUnit = 8;  // rows of a register tile
    const int64_t threads = torch::stable::get_num_threads();
    int64_t tile =
        fetch_ && widest_ * static_cast<int64_t>(sizeof(T)) <= kTallRow ? kTallTile : kTile;
    while (tile > 2 * kUnit && count <= tile / 2 * threads) tile /= 2;
    int64_t tiles = (count + tile - 1) / tile;
    if (tiles > 1) tiles = (tiles + threads - 1) / threads * threads;
    return std::min(count, ((count + tiles - 1) / tiles + kUnit - 1) / kUnit * kUnit);
  }

  // Whether threads that share out subtrees are done sooner than threads that share out tiles: the
  // multiply-adds of the thread that is last.
  bool subtrees_pay(int64_t batch) const {
    const int64_t threads = torch::stable::get_num_threads(), tile = tile_rows(batch);
    const int64_t tiles = (batch + tile - 1) / tile;
    if (tiles >= threads) return false;
    std::vector<int64_t> below(tree_.steps);
    for (int64_t s = 0; s < tree_.steps; ++s) below[s] = macs(s);
    const Pieces p = pieces(below, std::vector<char>(tree_.steps, 1));
    for (int64_t s = 0; s + 1 < tree_.steps; ++s) below[tree_.step[s].parent] += below[s];
    int64_t heaviest = 0, shared = 0;
    for (const int64_t root : p.roots) {
      heaviest = std::max(heaviest, below[root]);
      shared += below[root];
    }
    return batch * (macs_ - shared + std::max(heaviest, shared / threads)) < tile * macs_;
  }

  template <class F>
  void walk_subtrees(int64_t batch, T* messages, const F& finish) {
    std::vector<int64_t> cost(tree_.steps);
    for (int64_t s = 0; s < tree_.steps; ++s) cost[s] = macs(s);
    const Pieces p = pieces(cost, std::vector<char>(tree_.steps, 1));
    const int64_t tile = std::min(batch, kTile);
    rows_.choose_runs(tree_, tile);
    for_each_item<T>(static_cast<int64_t>(p.roots.size()), batch * macs_, scratch_elements(tile),
                     [&](int64_t item, T* scratch) {
                       const int64_t root = p.roots[item];
                       for (int64_t i = 0; i < batch; i += tile) {
                         const Tile t(*this, scratch, tile, i, std::min(tile, batch - i));
                         for (int64_t s = tree_.first[root]; s <= root; ++s)
                           step_apart(s, t, messages, batch, i);
                         if (root + 1 == tree_.steps) finish(i, t.n, t.result);
                       }
                     });
    Buffer<T> scratch(p.above.empty() ? 0 : scratch_elements(tile));
    for (int64_t i = 0; i < batch && !p.above.empty(); i += tile) {
      const Tile t(*this, scratch.get(), tile, i, std::min(tile, batch - i));
      for (const int64_t s : p.above) step_apart(s, t, messages, batch, i);
      finish(i, t.n, t.result);
    }
  }

  void interior_message(int64_t s, int64_t n, const T* product, T* to, Store store) const {
    const Step& st = tree_.step[s];
    const int64_t ld = ld_cols(s), ldp = ld_rows(s);
    if (weighted(s)) {
      multiply(s, n, product, ldp, to, store);
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < st.rows; ++j) sum += product[i * ldp + j];
      std::fill_n(to + i * ld, ld, T(0));
      to[i * ld] = sum;
    }
  }

  T* buffer(int64_t s, const Tile& t) const { return t.buffers + tree_.step[s].buffer * t.size; }

  void step_forward(int64_t s, const Tile& t) const {
    const Step& st = tree_.step[s];
    T* to = st.parent < 0 ? t.result : buffer(st.parent, t);
    const Store store = st.parent < 0 || st.first ? Store::assign : Store::multiply;
    if (tree_.is_leaf(s))
      leaf_message(rows_, s, t.b, t.n, to, store, t.window);
    else
      interior_message(s, t.n, buffer(s, t), to, store);
  }

  // Whether an interior node has two interior children: the second one's message is multiplied by
  // the first one's as it is kept.
  bool pairs(int64_t s) const {
    return tree_.count(s) == 2 && !tree_.is_leaf(tree_.begin(s)[0]) &&
           !tree_.is_leaf(tree_.begin(s)[1]);
  }

  // A message goes to where it is kept (rows i .. of `batch`), and into its parent's product in the
  // same order as without keeping, for the same bits.
  void step_keeping(int64_t s, const Tile& t, T* messages, int64_t batch, int64_t i) const {
    if (tree_.is_leaf(s)) return;
    const Step& st = tree_.step[s];
    const T* product = pairs(s) ? buffer(s, t) : form_product(s, t, messages, batch, i);
    if (st.parent < 0) {
      interior_message(s, t.n, product, t.result, Store::assign);
      return;
    }
    T* to = kept_message(messages, batch, s, i);
    if (!st.first && pairs(st.parent)) {
      const int64_t ld = ld_cols(s);
      const T* other = kept_message(messages, batch, tree_.begin(st.parent)[0], i);
      multiply(s, t.n, product, ld_rows(s),
               {ld, other, nullptr, to, buffer(st.parent, t), nullptr, nullptr});
    } else {
      interior_message(s, t.n, product, to, Store::assign);
    }
  }

  // The same where a node's children may have been walked by another thread.
  void step_apart(int64_t s, const Tile& t, T* messages, int64_t batch, int64_t i) const {
    if (tree_.is_leaf(s)) return;
    interior_message(s, t.n, form_product(s, t, messages, batch, i),
                     tree_.step[s].parent < 0 ? t.result : kept_message(messages, batch, s, i),
                     Store::assign);
  }

  const T* form_product(int64_t s, const Tile& t, const T* messages, int64_t batch,
                        int64_t i) const {
    T* own = buffer(s, t);
    const int64_t ld = ld_rows(s);
    const T* product = nullptr;
    for (const int64_t* c = tree_.begin(s); c < tree_.end(s); ++c) {
      if (tree_.is_leaf(*c)) {
        if (product != nullptr && product != own) std::copy_n(product, t.n * ld, own);
        leaf_message(rows_, *c, t.b, t.n, own, product == nullptr ? Store::assign : Store::multiply,
                     t.window);
        product = own;
      } else {
        const T* m = kept_message(messages, batch, *c, i);
        if (product != nullptr) k_.product(t.n, ld, product, ld, m, ld, own, ld, Store::assign);
        product = product == nullptr ? m : own;
      }
    }
    return product;
  }
};

}  // namespace htf
