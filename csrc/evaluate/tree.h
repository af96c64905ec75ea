// Trees whose local ranks are at most 64, evaluated and differentiated in one launch each
// (tree_forward.cuh, tree_backward.cuh). What htfkernels/cuda/tree_geometry.py plans is passed as
// numbers.
//
//   tree_forward(weights, x, table, counters, sizes) -> result [B, outputs], messages
//   tree_backward(grad, weights, x, messages, table, sums, sizes) -> gradients of the weights, one
//       after another in the weights' dtype, and of x; empty where not wanted
//   tree_shared_bytes(dtype, forward, sizes) -> what a block needs of shared memory
//
//   weights   [count, R_in, R_out] per group; float32, float64 or bfloat16
//   x         [B, sum of D_n] in the same dtype, or indices [B, N], int64
//   messages  at the cut and above it, float32 (float64)
//   counters  int32, zero, and zero again behind the launch: one per node above the cut and tile.
//             Launches that may run at the same time must have their own.
//   sums      int32, a row for each group with a gradient: first number of the gradient, its size,
//             first number in a split's partials, how many nodes share each weight
#pragma once

#include <vector>

#include "evaluate/tree_parts.cuh"

namespace htf::gpu::tree {

// The numbers that both passes are given, in the order of `sizes`; the rest is the pass's own.
struct Given {
  Math math;
  int rows;     // of a tile of the batch
  int width;    // of messages
  int vectors;  // of a chunk of vectors
  int tasks;
  int part;
  int slots;
  int outputs;
  static constexpr std::size_t kCount = 8;
};

inline Given given(const char* op, const std::vector<int64_t>& sizes, std::size_t more) {
  check(sizes.size() == Given::kCount + more, op, ": expected ", Given::kCount + more,
        " sizes, got ", sizes.size());
  const auto at = [&](std::size_t i) { return static_cast<int>(sizes[i]); };
  const auto width = [&](std::size_t i) {
    return at(i) % 16 == 0 && at(i) >= 16 && at(i) <= kSide;
  };
  check(at(0) >= 0 && at(0) <= 3 && width(2) && width(3) && at(4) >= 1 && at(5) % 32 == 0 &&
            at(6) >= 1 && at(7) >= 1,
        op, ": the sizes are not those of a plan");
  return {static_cast<Math>(at(0)), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
}

// Calls f<math, dtype, rows>() for what kernels are compiled for.
template <class F>
auto compiled_for(const char* op, ScalarType dtype, Math math, int rows, F f) {
  const auto mma = [&]<Math M, class Stored>() {
    if (rows == 16) return f.template operator()<M, Stored, 16>();
    if (rows == 32) return f.template operator()<M, Stored, 32>();
    fail(op, ": tiles of ", rows, " rows are not compiled");
  };
  if (dtype == ScalarType::Float && math == Math::tf32)
    return mma.template operator()<Math::tf32, float>();
  if (dtype == ScalarType::Float && math == Math::tf32x3)
    return mma.template operator()<Math::tf32x3, float>();
  if (dtype == ScalarType::BFloat16 && math == Math::bf16)
    return mma.template operator()<Math::bf16, BFloat16>();
  check(math == Math::fma && (dtype == ScalarType::Float || dtype == ScalarType::Double), op,
        ": no kernel for ", toString(dtype), " in this precision");
  if (dtype == ScalarType::Float) {
    if (rows == 4) return f.template operator()<Math::fma, float, 4>();
    if (rows == 16) return f.template operator()<Math::fma, float, 16>();
    if (rows == 32) return f.template operator()<Math::fma, float, 32>();
  } else {
    if (rows == 4) return f.template operator()<Math::fma, double, 4>();
    if (rows == 16) return f.template operator()<Math::fma, double, 16>();
  }
  fail(op, ": tiles of ", rows, " rows are not compiled");
}

inline ScalarType value_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_arguments(const char* op, const std::vector<Tensor>& weights, const Tensor& x,
                            const Tensor& table) {
  check(!weights.empty() && weights.size() <= static_cast<std::size_t>(kMostGroups), op,
        ": expected 1 to ", kMostGroups, " folded weights, got ", weights.size());
  const ScalarType dtype = weights[0].scalar_type();
  for (const Tensor& w : weights)
    check(on_device(w) && w.dim() == 3 && w.is_contiguous() && w.scalar_type() == dtype, op,
          ": weights must be contiguous [count, R_in, R_out] on the device, got ", describe(w));
  check(on_device(x) && x.dim() == 2 && x.is_contiguous() &&
            (x.scalar_type() == dtype || x.scalar_type() == ScalarType::Long),
        op, ": x must be contiguous [B, sum of D_n] on the device, or int64 [B, N], got ",
        describe(x));
  check(on_device(table) && table.scalar_type() == ScalarType::Int && table.is_contiguous(), op,
        ": the table must be int32 on the device, got ", describe(table));
}

// Leaves by index, or null.
inline const long long* indices_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Long ? static_cast<const long long*>(x.const_data_ptr())
                                             : nullptr;
}

inline Weights pointers(const std::vector<Tensor>& weights) {
  Weights found{};
  for (std::size_t i = 0; i < weights.size(); ++i) found.of[i] = weights[i].const_data_ptr();
  return found;
}

template <Math M, class Stored>
Sizes sizes_of(const Given& g, const Tensor& x) {
  Sizes s{};
  s.batch = x.size(0);
  s.x_width = x.size(1);
  s.tasks = g.tasks;
  const long long tiles = (s.batch + g.rows - 1) / g.rows;
  check(tiles * g.tasks <= INT32_MAX, "evaluate: a batch of ", s.batch, " samples in tiles of ",
        g.rows, " times ", g.tasks, " subtrees is more blocks than a launch can have");
  s.tiles = static_cast<int>(tiles);
  s.part = g.part;
  s.slots = g.slots;
  set_widths<M, Stored>(s, g.width, g.vectors);
  return s;
}

}  // namespace htf::gpu::tree
