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
    for_each_item<T>(count, kMoved * count * rows * ld, 0, [&](int64_t f, T*) {
      pack_rows(rows, cols, x + f * rows * cols, cols, copy.get() + f * rows * ld, ld);
    });
  }
  const T* at(int64_t slot) const { return data + slot * rows * ld; }
};

template <class S>
std::vector<PackedGroup<S>> pack(const std::vector<Tensor>& weights) {
  std::vector<PackedGroup<S>> groups;
  groups.reserve(weights.size());
  for (const Tensor& w : weights) groups.emplace_back(w);
  return groups;
}

// The matrix of every step, rows padded; null where a step has none.
template <class S>
auto weights_of(const Program& p, const std::vector<PackedGroup<S>>& groups) {
  std::vector<const typename ComputeOf<S>::type*> all(p.steps, nullptr);
  for (int64_t s = 0; s < p.steps; ++s)
    if (p.step[s].group >= 0) all[s] = groups[p.step[s].group].at(p.step[s].slot);
  return all;
}

// Gradients of the groups' weights, computed in padded rows, one matrix for every step; those of
// steps that share a weight are summed at the end.
template <class S>
class WeightGradients {
 public:
  using T = typename ComputeOf<S>::type;

  WeightGradients(const Program& p, const std::vector<Tensor>& weights,
                  const std::vector<int64_t>& needs)
      : entries_(weights.size()), step_(p.steps, nullptr) {
    for (std::size_t g = 0; g < weights.size(); ++g) {
      Entry& e = entries_[g];
      const Tensor& w = weights[g];
      if (!needs[g]) {
        e.tensor = torch::stable::new_empty(w, {0});
        continue;
      }
      e.count = w.size(0), e.rows = w.size(1), e.cols = w.size(2), e.ld = padded<T>(e.cols);
      e.tensor = new_tensor(w, {e.count, e.rows, e.cols}, w.scalar_type());
      if constexpr (std::is_same_v<S, T>) {
        if (e.ld == e.cols) e.data = e.tensor.template mutable_data_ptr<T>();
      }
      if (e.data == nullptr) {
        e.own = Buffer<T>(e.count * e.rows * e.ld);
        e.data = e.own.get();
      }
      e.users.resize(e.count);
    }
    for (int64_t s = 0; s < p.steps; ++s) {
      if (p.step[s].group < 0) continue;
      Entry& e = entries_[p.step[s].group];
      if (e.data == nullptr) continue;
      auto& users = e.users[p.step[s].slot];
      const int64_t size = e.rows * e.ld;
      if (users.empty()) {
        step_[s] = e.data + p.step[s].slot * size;
      } else {
        e.others.emplace_back(size);
        step_[s] = e.others.back().get();
      }
      users.push_back(step_[s]);
    }
    // A weight that no step uses: a group of one shape may have spare slots in a foreign program.
    for (Entry& e : entries_)
      for (std::size_t f = 0; f < e.users.size(); ++f)
        if (e.users[f].empty())
          std::fill_n(e.data + static_cast<int64_t>(f) * e.rows * e.ld, e.rows * e.ld, T(0));
  }
  // Where the gradient of a step's weight goes, or null where it is not needed.
  T* step(int64_t s) const { return step_[s]; }
  const std::vector<T*>& steps() const { return step_; }

  std::vector<Tensor> finish() {
    std::vector<Tensor> out;
    for (Entry& e : entries_) {
      for (auto& users : e.users)
        for (std::size_t u = 1; u < users.size(); ++u)
          for (int64_t i = 0; i < e.rows * e.ld; ++i) users[0][i] += users[u][i];
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
    std::vector<Buffer<T>> others;
    std::vector<std::vector<T*>> users;  // of each slot
  };
  std::vector<Entry> entries_;
  std::vector<T*> step_;
};

}  // namespace htf
