// Small things the CPU operations share: errors, aligned memory, work spread over PyTorch's
// threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/memory.h"

namespace htf {

using torch::headeronly::BFloat16;

// A tensor whose elements lie one after the other; without a trip through PyTorch's dispatcher
// where they do already.
inline Tensor in_one_piece(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Work below this many multiply-adds is not worth waking other threads for: about 10 microseconds'.
constexpr int64_t kWorthThreads = 1 << 19;
constexpr int64_t kMoved = 8;  // multiply-adds in the time of moving one element

// Runs f(item, scratch) for every item, the next free thread taking the next item; items must not
// share results. Each thread has scratch memory of its own. work is that of all items together.
void run_items(int64_t items, int64_t work, int64_t scratch_size, std::size_t element,
               void (*f)(const void* context, int64_t item, void* scratch), const void* context);
template <class T, class F>
void for_each_item(int64_t items, int64_t work, int64_t scratch_size, const F& f) {
  run_items(
      items, work, scratch_size, sizeof(T),
      [](const void* context, int64_t item, void* scratch) {
        (*static_cast<const F*>(context))(item, static_cast<T*>(scratch));
      },
      &f);
}

// What is computed in: bfloat16 operands are widened when they are packed, except the weights that
// a walk multiplies with where the processor multiplies bfloat16 itself (PairKernels).
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};

// Calls f with a value of the type that such a tensor's elements are computed in.
template <class F>
auto with_computed(ScalarType dtype, const F& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

// Calls f with a value of the tensor's element type.
template <class F>
auto with_dtype(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      fail(op, ": no kernel computes in ", toString(dtype));
  }
}

}  // namespace htf
