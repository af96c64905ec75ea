// Weights as the kernels want them: padded rows, and transposed for the backward pass.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/numbers.h"
#include "cpu/program.h"

namespace htf {

// One folded group [F, rows, cols], its rows padded.
template <class T>
struct PackedGroup {
  int64_t rows, ld;
  const T* data;
  const T* at(int64_t slot) const { return data == nullptr ? nullptr : data + slot * rows * ld; }
};

// All groups but those of `skip`; the caller's own memory where that fits as it is, else copies,
// side by side.
template <class T>
class PackedWeights {
 public:
  explicit PackedWeights(const std::vector<Tensor>& weights, const std::vector<char>& skip = {});
  const PackedGroup<T>& operator[](int64_t group) const { return group_[group]; }

 private:
  std::vector<Tensor> source_;
  std::vector<PackedGroup<T>> group_;
  Buffer<T> copy_;
};

// The matrix of every step, rows padded; null where a step has none, or only pairs.
template <class T>
std::vector<const T*> weights_of(const Program& p, const PackedWeights<T>& groups) {
  std::vector<const T*> all(p.steps, nullptr);
  for (int64_t s = 0; s < p.steps; ++s)
    if (p.step[s].group >= 0) all[s] = groups[p.step[s].group].at(p.step[s].slot);
  return all;
}

// A bfloat16 weight for PairKernels; null where a step multiplies with none.
struct PairWeight {
  const Pair* down = nullptr;   // pairs of rows, [pair_rows(rows)][padded(cols)]
  const Pair* along = nullptr;  // of columns, [rows][pair_rows(cols)]: its transpose's transposed
};

// The pairs of every step, where weights are bfloat16 and the processor has kernels for them.
// gathers: leaves take rows of their weights as they are. backward: with pairs of columns.
class PairWeights {
 public:
  PairWeights(const Program& p, const std::vector<Tensor>& weights, bool gathers, bool backward);
  const std::vector<PairWeight>& steps() const { return step_; }
  // Whether a group is needed in pairs only.
  const std::vector<char>& only() const { return only_; }

 private:
  std::vector<Tensor> source_;
  std::vector<char> only_;
  std::vector<PairWeight> step_;
  Buffer<Pair> copy_;
};

// Gradients of the groups' weights, computed in padded rows, one matrix for every step; those of
// steps that share a weight are summed at the end.
template <class T>
class WeightGradients {
 public:
  WeightGradients(const Program& p, const std::vector<Tensor>& weights,
                  const std::vector<int64_t>& needs);

  // Where the gradient of a step's weight goes, or null where it is not needed.
  T* step(int64_t s) const { return step_[s]; }
  const std::vector<T*>& steps() const { return step_; }

  std::vector<Tensor> finish();

 private:
  struct Entry {
    Tensor tensor;
    int64_t count = 0, rows = 0, cols = 0, ld = 0;
    int64_t start = -1;  // in padded_, where the tensor's own rows are not padded
    T* data = nullptr;
  };
  struct Other {  // of a weight that another step has as well
    T* owner;
    Buffer<T> own;
    int64_t elements;
  };
  std::vector<Entry> entries_;
  std::vector<T*> step_;
  Buffer<T> padded_;
  std::vector<Other> others_;
};

}  // namespace htf
