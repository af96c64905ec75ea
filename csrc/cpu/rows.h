// Where leaves get their rows from: vectors, or indices.
#pragma once

#include <utility>
#include <vector>

#include "cpu/weights.h"

namespace htf {

// Vectors, as a packed [B, x_width] matrix. Rows that lie far apart share few cache sets, and a
// leaf's piece of a row need not be a whole cache line: a window copies some rows of a run of
// leaves, in the order of the walk, so that each line is fetched once. It widens them as well.
//
// Or indices: a leaf's message is a row of its matrix. Index (b, mode) lies at b * down + mode *
// across.
template <class T>
class Rows {
 public:
  Rows(Numbers x, int64_t stride) : dense_(true), x_(x), stride_(stride) {}
  Rows(const int64_t* indices, int64_t down, int64_t across)
      : dense_(false), indices_(indices), stride_(down), across_(across) {}
  Rows(const int32_t* indices, int64_t down, int64_t across)
      : dense_(false), narrow_(indices), stride_(down), across_(across) {}

  bool is_dense() const { return dense_; }

  // Some rows of one run, in a thread's scratch memory.
  struct Window {
    T* data;
    int64_t first, count;  // the rows that it has when a run is loaded
    int64_t run = -1;
  };

  // Runs of leaves for windows of so many rows.
  void choose_runs(const Tree& tree, int64_t rows) {
    rows_ = std::max<int64_t>(rows, 1);
    window_ = 0;
    runs_.clear();
    if (!is_dense()) return;
    place_.assign(tree.steps, {});
    const bool near = rows <= 1 || x_.bytes(stride_) < kFarApart;
    if (in_place<T>(x_) != nullptr && near) return;
    const int64_t widest = kWindowBytes / (static_cast<int64_t>(sizeof(T)) * rows_);
    int64_t width = 0;
    for (int64_t s = 0; s < tree.steps; ++s) {
      if (!tree.is_leaf(s)) continue;
      const int64_t cols = tree.step[s].rows;
      if (runs_.empty() || width + cols > widest) runs_.emplace_back(), width = 0;
      runs_.back().push_back({s, width});
      place_[s] = {static_cast<int64_t>(runs_.size()) - 1, width};
      width += cols;
      window_ = std::max(window_, width * rows_);
    }
  }
  int64_t window_elements() const { return window_; }

  // A leaf's operand for rows b .. b+n-1 of the window's: the caller's memory, or the window's.
  std::pair<const T*, int64_t> operand(const Tree& tree, int64_t s, int64_t b, Window& window,
                                       const Kernels<T>& k) const {
    const Step& leaf = tree.step[s];
    if (window_ == 0) return {in_place<T>(x_) + b * stride_ + leaf.offset, stride_};
    const auto [run, at] = place_[s];
    if (run != window.run) load(tree, run, window, k);
    return {window.data + at * window.count + (b - window.first) * leaf.rows, leaf.rows};
  }

  // The same without a window: the caller's memory, or a widened copy in scratch.
  std::pair<const T*, int64_t> alone(const Step& leaf, int64_t b, int64_t n, T* scratch) const {
    const Numbers from = x_ + b * stride_ + leaf.offset;
    if (const T* there = in_place<T>(from)) return {there, stride_};
    pack_rows(n, leaf.rows, from, stride_, scratch, leaf.rows);
    return {scratch, leaf.rows};
  }

  // The rows of a leaf's matrix for indices b .. b+n-1.
  void rows(const Step& leaf, int64_t b, int64_t n, int64_t* to) const {
    const int64_t first = b * stride_ + leaf.mode * across_;
    if (narrow_ != nullptr)
      for (int64_t i = 0; i < n; ++i) to[i] = narrow_[first + i * stride_];
    else
      for (int64_t i = 0; i < n; ++i) to[i] = indices_[first + i * stride_];
  }

 private:
  static constexpr int64_t kFarApart = 2048;  // bytes
  static constexpr int64_t kTogether = 8;  // rows whose lines stay in the cache for the next leaf
  static constexpr int64_t kLine = 64;     // bytes
  static constexpr int64_t kWindowBytes = int64_t{256} << 10;

  struct Place {
    int64_t run = -1, at = 0;
  };
  struct Member {
    int64_t step, at;
  };

  void load(const Tree& tree, int64_t run, Window& window, const Kernels<T>& k) const {
    for (int64_t i = 0; i < window.count; i += kTogether) {
      const int64_t m = std::min(kTogether, window.count - i);
      for (const auto [s, at] : runs_[run]) {
        const Step& leaf = tree.step[s];
        const Numbers from = x_ + (window.first + i) * stride_ + leaf.offset;
        T* to = window.data + at * window.count + i * leaf.rows;
        if (i + kTogether < window.count) fetch(from + kTogether * stride_, leaf.rows);
        if (const T* there = in_place<T>(from))
          k.copy(m, leaf.rows, there, stride_, to, leaf.rows);
        else
          pack_rows(m, leaf.rows, from, stride_, to, leaf.rows);
      }
    }
    window.run = run;
  }

  // The same piece of the next rows.
  void fetch(Numbers from, int64_t cols) const {
    const int64_t bytes = from.bytes(cols), apart = from.bytes(stride_);
    for (int64_t r = 0; r < kTogether; ++r)
      for (int64_t j = 0; j < bytes; j += kLine) __builtin_prefetch(from.data + r * apart + j);
  }

  bool dense_;
  Numbers x_;
  const int64_t* indices_ = nullptr;
  const int32_t* narrow_ = nullptr;
  int64_t stride_, across_ = 0;
  int64_t rows_ = 1, window_ = 0;
  std::vector<std::vector<Member>> runs_;  // leaves of each, and columns before them
  std::vector<Place> place_;               // of a leaf: its run, and columns before it
};

}  // namespace htf
