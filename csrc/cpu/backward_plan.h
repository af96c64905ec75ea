// What the backward pass decides before it goes down: which subtrees are pieces for one thread and
// which steps lie above them, how many rows go together, where gradients of messages lie.
#pragma once

#include <vector>

#include "cpu/walk.h"

namespace htf {

constexpr int64_t kChunkRows = 512;                      // that go through a subtree together
constexpr int64_t kChunkBytes = int64_t{256} << 10;      // of one matrix of a chunk
constexpr int64_t kRecomputedBytes = int64_t{16} << 20;  // of a chunk's messages
constexpr int64_t kScratchBytes = int64_t{64} << 20;     // of a chunk's gradients
constexpr int64_t kTileBytes = int64_t{16} << 20;        // of what a tile needs in a thread
constexpr int64_t kPartRows = 128;                       // least of a part of the batch
constexpr int64_t kMostParts = 16;
constexpr int64_t kPartBytes = int64_t{512} << 10;  // of the gradients of all parts

template <class T>
class BackwardPlan : public Walk<T> {
  using Base = Walk<T>;

 public:
  // dw[s]: where the gradient of weight[s] goes, or null; no two steps may share one. It is
  // overwritten.
  BackwardPlan(const Tree& tree, std::vector<const T*> weight, const Rows<T>& rows,
               std::vector<T*> dw, int64_t batch, bool inputs, std::vector<PairWeight> pairs)
      : Base(tree, std::move(weight), rows, std::move(pairs)),
        dw_(std::move(dw)),
        batch_(batch),
        wanted_(tree.steps, 0),
        slot_(tree.steps, 0),
        piece_rows_(rows) {
    for (int64_t s = 0; s < tree.steps; ++s) {
      if (dw_[s] != nullptr || (tree.is_leaf(s) && inputs)) wanted_[s] = 1;
      if (wanted_[s] && tree.step[s].parent >= 0) wanted_[tree.step[s].parent] = 1;
      if (tree.is_leaf(s)) continue;
      int64_t leaves = 0;
      for (const int64_t* c = tree.begin(s); c < tree.end(s); ++c) leaves += tree.is_leaf(*c);
      most_leaves_ = std::max(most_leaves_, leaves);
    }
  }

 protected:
  using Base::gathers, Base::ld_cols, Base::ld_rows, Base::macs;
  using Base::tree_, Base::weighted, Base::widest_;

  int64_t elements(int64_t s) const { return tree_.step[s].rows * ld_cols(s); }

  // Rows of a part of the batch; all of them where it is not parted. By the shapes alone, so that
  // results depend neither on the number of threads nor on what else is asked for.
  int64_t part_rows() const {
    int64_t bytes = 0;
    for (int64_t s = 0; s < tree_.steps; ++s)
      if (weighted(s)) bytes += elements(s) * static_cast<int64_t>(sizeof(T));
    const bool fits = batch_ * this->kept_columns_ * static_cast<int64_t>(sizeof(T)) <= kMostKept;
    const int64_t parts =
        std::min({kMostParts, batch_ / kPartRows, kPartBytes / std::max<int64_t>(bytes, 1)});
    if (!fits || parts < kMostParts / 4) return batch_;
    return ((batch_ + parts - 1) / parts + 7) / 8 * 8;
  }

  void choose_chunk(int64_t rows, bool kept) {
    chunk_ = std::min(kChunkRows, kChunkBytes / (static_cast<int64_t>(sizeof(T)) * widest_));
    if (!kept)
      chunk_ = std::min(chunk_, kRecomputedBytes / (static_cast<int64_t>(sizeof(T)) *
                                                    std::max<int64_t>(this->kept_columns_, 1)));
    // A node of many children, or a long chain of nodes next to the root, takes fewer rows.
    chunk_ = std::min(chunk_, kScratchBytes / (static_cast<int64_t>(sizeof(T)) *
                                               (top_columns_ + slots_ * widest_)));
    chunk_ = std::max(chunk_ / kTile * kTile, kTile);
    chunk_ = std::min(chunk_, rows);
    // Few but equal chunks.
    const int64_t chunks = (rows + chunk_ - 1) / chunk_;
    chunk_ = std::min(rows, ((rows + chunks - 1) / chunks + 7) / 8 * 8);
    tile_ = std::min(kTile, chunk_);
    const int64_t threads = torch::stable::get_num_threads();
    while (!top_.empty() && tile_ > 16 && chunk_ <= tile_ / 2 * threads)
      tile_ = (tile_ / 2 + 7) / 8 * 8;
    while (tile_ > 8 && tile_elements() * static_cast<int64_t>(sizeof(T)) > kTileBytes)
      tile_ = (tile_ / 2 + 7) / 8 * 8;
    piece_rows_.choose_runs(tree_, chunk_);
  }

  void choose_top() {
    pieces_ = {tree_.steps - 1};
    if (batch_ * this->macs_ < kWorthThreads) return;
    std::vector<int64_t> cost(tree_.steps);
    for (int64_t s = 0; s < tree_.steps; ++s) cost[s] = wanted_[s] ? macs(s) : 0;
    auto [roots, above] = this->pieces(cost, wanted_);
    pieces_ = std::move(roots);
    top_ = std::move(above);
    std::reverse(top_.begin(), top_.end());
  }

  // Where dm of a step lies: a matrix of the chunk of its own next to the top, else one of the
  // thread's few, given back when the step is done.
  void choose_slots() {
    const auto own = [&](int64_t s) {
      slot_[s] = top_columns_;
      top_columns_ += ld_cols(s);
    };
    for (const int64_t s : top_) {
      if (tree_.step[s].parent < 0) own(s);
      for (const int64_t* c = tree_.begin(s); c < tree_.end(s); ++c)
        if (wanted_[*c]) own(*c);
    }
    if (top_.empty()) own(tree_.steps - 1);
    for (const int64_t s : top_) {
      product_at_.push_back(top_columns_);
      top_columns_ += dw_[s] != nullptr ? ld_rows(s) : 0;
    }
    for (const int64_t piece : pieces_) {
      std::vector<int64_t> unused;
      int64_t used = 0;
      for (int64_t s = piece; s >= tree_.first[piece]; --s) {
        if (!wanted_[s]) continue;
        for (const int64_t* c = tree_.begin(s); c < tree_.end(s); ++c) {
          if (!wanted_[*c]) continue;
          if (unused.empty()) unused.push_back(used++);
          slot_[*c] = unused.back();
          unused.pop_back();
        }
        if (s != piece) unused.push_back(slot_[s]);
      }
      slots_ = std::max(slots_, used);
    }
  }

  // Scratch of a thread: what a tile needs, a product and a transposed weight, the slots.
  int64_t tile_elements() const { return (kTileMatrices + most_leaves_) * tile_ * widest_; }
  int64_t piece_elements() const {
    return tile_elements() + chunk_ * widest_ + widest_ * widest_ + slots_ * chunk_ * widest_ +
           piece_rows_.window_elements();
  }

  static constexpr int64_t kTileMatrices = 4;  // products and gradients of groups of children

  const std::vector<T*> dw_;
  const int64_t batch_;
  std::vector<char> wanted_;  // whether a gradient at or below a step is asked for
  std::vector<int64_t> slot_;
  Rows<T> piece_rows_;  // windows of a whole chunk
  std::vector<int64_t> top_, pieces_, product_at_;
  int64_t most_leaves_ = 0, top_columns_ = 0, slots_ = 0;
  int64_t chunk_ = 0, tile_ = 0;
};

}  // namespace htf
