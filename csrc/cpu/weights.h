// Weights as the kernels want them: padded rows, and transposed for the backward pass.
#pragma once

#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/program.h"

namespace htf {

// Copies and converts rows, padding them with zeros.
template <class T, class S>
void pack_rows(int64_t rows, int64_t cols, const S* x, int64_t ldx, T* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) out[i * ldo + j] = static_cast<T>(x[i * ldx + j]);
    for (int64_t j = cols; j < ldo; ++j) out[i * ldo + j] = T(0);
  }
}
template <class S, class T>
void unpack_rows(int64_t rows, int64_t cols, const T* x, int64_t ldx, S* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) out[i * ldo + j] = static_cast<S>(x[i * ldx + j]);
}

// One folded group [F, rows, cols], its rows padded; the caller's own memory where that fits as it
// is.
template <class S>
struct PackedGroup {
  using T = typename ComputeOf<S>::type;
  Tensor source;
  int64_t count, rows, cols, ld;
  const T* data = nullptr;
  Buffer<T> copy;

  explicit PackedGroup(const Tensor& w)
      : source(torch::stable::contiguous(w)),
        count(w.size(0)),
        rows(w.size(1)),
        cols(w.size(2)),
        ld(padded<T>(cols)) {
    const S* x = source.const_data_ptr<S>();
    if constexpr (std::is_same_v<S, T>) {
      if (ld == cols) {
        data = x;
        return;
      }
    }
    copy = Buffer<T>(count * rows * ld);
    data = copy.get();
    for_each_item<T>(count, count * rows * ld, 0, [&](int64_t f, T*) {
      pack_rows(rows, cols, x + f * rows * cols, cols, copy.get() + f * rows * ld, ld);
    });
  }
  const T* at(int64_t slot) const { return data + slot * rows * ld; }
};

// The transposes [F, cols, padded(rows)] of a packed group.
template <class T>
struct TransposedGroup {
  int64_t ld = 0, cols = 0;
  Buffer<T> data;

  template <class S>
  explicit TransposedGroup(const PackedGroup<S>& w)
      : ld(padded<T>(w.rows)), cols(w.cols), data(w.count * w.cols * padded<T>(w.rows)) {
    // Blocks of columns: with few large weights the threads share one.
    constexpr int64_t kBlock = 64;
    const int64_t blocks = (cols + kBlock - 1) / kBlock;
    for_each_item<T>(w.count * blocks, w.count * cols * ld, 0, [&](int64_t item, T*) {
      const int64_t f = item / blocks, j = item % blocks * kBlock;
      kernels<T>().transpose(w.rows, std::min(kBlock, cols - j), w.at(f) + j, w.ld,
                             data.get() + (f * cols + j) * ld, ld);
    });
  }
  const T* at(int64_t slot) const { return data.get() + slot * cols * ld; }
};

template <class S>
std::vector<PackedGroup<S>> pack(const std::vector<Tensor>& weights) {
  std::vector<PackedGroup<S>> groups;
  groups.reserve(weights.size());
  for (const Tensor& w : weights) groups.emplace_back(w);
  return groups;
}

template <class S>
auto transpose(const std::vector<PackedGroup<S>>& groups) {
  std::vector<TransposedGroup<typename ComputeOf<S>::type>> out;
  out.reserve(groups.size());
  for (const auto& g : groups) out.emplace_back(g);
  return out;
}

// Gradients of the groups' weights, accumulated in padded rows, copied into tensors at the end.
template <class S>
class WeightGradients {
 public:
  using T = typename ComputeOf<S>::type;

  WeightGradients(const std::vector<Tensor>& weights, const std::vector<int64_t>& needs)
      : entries_(weights.size()) {
    for (std::size_t g = 0; g < weights.size(); ++g) {
      Entry& e = entries_[g];
      const Tensor& w = weights[g];
      if (!needs[g]) {
        e.tensor = torch::stable::new_empty(w, {0});
        continue;
      }
      e.count = w.size(0), e.rows = w.size(1), e.cols = w.size(2), e.ld = padded<T>(e.cols);
      e.tensor = torch::stable::new_empty(w, {e.count, e.rows, e.cols});
      if constexpr (std::is_same_v<S, T>) {
        if (e.ld == e.cols) e.data = e.tensor.template mutable_data_ptr<T>();
      }
      if (e.data == nullptr) {
        e.own = Buffer<T>(e.count * e.rows * e.ld);
        e.data = e.own.get();
      }
      std::fill_n(e.data, e.count * e.rows * e.ld, T(0));
    }
  }
  bool needed(int64_t group) const { return group >= 0 && entries_[group].data != nullptr; }
  T* at(int64_t group, int64_t slot) const {
    const Entry& e = entries_[group];
    return e.data + slot * e.rows * e.ld;
  }
  int64_t ld(int64_t group) const { return entries_[group].ld; }

  std::vector<Tensor> finish() {
    std::vector<Tensor> out;
    for (Entry& e : entries_) {
      if (e.own.get() != nullptr)
        unpack_rows(e.count * e.rows, e.cols, e.data, e.ld, e.tensor.template mutable_data_ptr<S>(),
                    e.cols);
      out.push_back(e.tensor);
    }
    return out;
  }

 private:
  struct Entry {
    Tensor tensor;
    int64_t count = 0, rows = 0, cols = 0, ld = 0;
    T* data = nullptr;
    Buffer<T> own;
  };
  std::vector<Entry> entries_;
};

}  // namespace htf
