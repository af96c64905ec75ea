// What the two passes over a tree share: the tables' records, shared memory, streaming of operands.
//
// A table (htfkernels/cuda/tree_tables.py writes it) is int32: for each task [begin, ints, steps],
// then the tasks' parts, each its steps of kFields numbers and lists that the steps point into.
//
// Shared memory, from its start:
//   the task's part of the table
//   Stages x (a chunk of weights, each thread's own, and one of vectors [Rows, ld_vectors])
//   slots x [Rows, ld] messages
//   scratch [quarters, Rows, ld_sums] of Product::finish
//   64 numbers that nothing is written to: tiles of mma read past the last row
// The strides of rows are 16 banks apart (fma: 4), for reads of two (four) rows at a time.
#pragma once

#undef NDEBUG  // indices are asserted to be in range
#include <cassert>
#include <cstring>
#include <vector>

#include "cuda/launch.h"
#include "evaluate/tree_products.cuh"

namespace htf::gpu::tree {

constexpr int kHead = 3;
constexpr int kMostGroups = 400;  // pointers to weights are parameters of the kernels, 4 KB in all

// A step of a task.
struct alignas(16) Step {
  int group;     // of the weight, or -1: the root of a "sum"
  int weight;    // first row of the weight in its group's [count * rows, cols]
  int rows;      // of the weight
  int cols;      // of the weight
  int vectors;   // leaf: first column of its vectors, or its mode; interior: -1
  int source;    // slot of the operand (forward), of the message's cotangent (backward)
  int target;    // slot of what is computed; -1: global memory
  int kind;      // forward: whether its message is the first of its parent's product; or Kind
  int message;   // forward: first column of the message in `messages`, -1 for the result
  int children;  // in the list; forward: 0 where the operand is in shared memory
  int list;      // where the list begins in the task's part: columns of messages, or slots
  int arrival;   // forward: the counter of a node whose children are other blocks'
  int flags;     // backward
  int on_path;   // backward, along the path: which of the children leads to the task
  int partial;   // backward: first number of the weight's gradient
  int spare;

  __device__ __forceinline__ bool leaf() const { return vectors >= 0; }
};
constexpr int kFields = sizeof(Step) / sizeof(int);
enum Kind { kUp, kPath, kDown };
enum Flag { kWeightGradient = 1, kOperandGradient = 2, kLoadGradient = 4 };

// Sizes that do not depend on the task.
struct Sizes {
  long long batch;
  long long x_width;
  int tasks, tiles;
  int part;  // numbers of the longest part of the table, in bytes a multiple of 128
  int slots;
  int pieces;  // of a row of a chunk of weights: the threads that have a share of one
  int quarters;
  int ld_vectors, ld, ld_sums;
};

struct Weights {
  const void* of[kMostGroups];
};

// Chunks under way: two of float64 are 86 KB, and a block may have no more than 99.
template <class Stored, bool Forward>
constexpr int kStages = Forward && sizeof(Stored) < 8 ? 3 : 2;

template <class Stored>
__host__ __device__ __forceinline__ int weight_numbers(const Sizes& s) {
  return 4 * kFour * s.pieces;
}
template <class Stored>
__host__ __device__ __forceinline__ int stage_bytes(const Sizes& s, int rows) {
  return static_cast<int>(sizeof(Stored)) * (weight_numbers<Stored>(s) + rows * s.ld_vectors);
}

template <Math M, class Stored, int Rows>
std::size_t shared_bytes(const Sizes& s, int stages) {
  const std::size_t rows = static_cast<std::size_t>(s.slots) * s.ld + s.quarters * s.ld_sums;
  return sizeof(int) * static_cast<std::size_t>(s.part) +
         static_cast<std::size_t>(stages) * stage_bytes<Stored>(s, Rows) +
         sizeof(ValueOf<Stored>) * (rows * Rows + kSide);
}

// Messages at most `width` wide and chunks of vectors at most `vectors`, multiples of 16.
template <Math M, class Stored>
void set_widths(Sizes& s, int width, int vectors) {
  const auto apart = [](int columns, std::size_t size) {
    if (M == Math::fma) return columns + static_cast<int>(16 / size);
    return columns % 32 == 0 ? columns + 16 : columns;
  };
  s.ld = apart(width, sizeof(ValueOf<Stored>));
  s.ld_vectors = apart(vectors, sizeof(Stored));
  const int most = width > vectors ? width : vectors;  // of a product and of its sums
  s.ld_sums = most + kFour;
  s.quarters = most / 16;
  s.pieces = kWarp * (2 * (s.quarters - 1) + (most + 31) / 32);
}

// Shared memory through a register: or ptxas reads its window anew at each use, for some 30 cycles.
template <class T>
__device__ __forceinline__ T* kept_shared_memory() {
#ifdef HTF_EMULATE
  return shared_memory<T>();
#else
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory<T>()));
  return static_cast<T*>(__cvta_shared_to_generic(__shfl_sync(~0u, at, 0)));
#endif
}

// A block's shared memory and its task.
template <Math M, class Stored, int Rows, int Stages>
struct Block {
  using Value = ValueOf<Stored>;
  const Sizes& sizes;
  int* part;
  unsigned char* stages;
  Value* slots;
  Value* scratch;
  int steps;

  __device__ __forceinline__ Block(const Sizes& s, const int* table, int task)
      : sizes(s), part(kept_shared_memory<int>()) {
    const int* head = table + kHead * task;
    const int begin = __ldg(head), ints = __ldg(head + 1);
    steps = __ldg(head + 2);
    stages = reinterpret_cast<unsigned char*>(part + s.part);
    slots = reinterpret_cast<Value*>(stages + Stages * stage_bytes<Stored>(s, Rows));
    scratch = slots + s.slots * Rows * s.ld;
    for (int i = threadIdx.x; i < ints; i += kThreads) part[i] = __ldg(table + begin + i);
    __syncthreads();
  }
  __device__ __forceinline__ Step step(int i) const {
    return reinterpret_cast<const Step*>(part)[i];
  }
  __device__ __forceinline__ const int* list(const Step& step) const { return part + step.list; }
  __device__ __forceinline__ Value* slot(int i) const { return slots + i * Rows * sizes.ld; }
  __device__ __forceinline__ Stored* weights(int stage) const {
    return reinterpret_cast<Stored*>(stages + stage * stage_bytes<Stored>(sizes, Rows));
  }
  __device__ __forceinline__ Stored* vectors(int stage) const {
    return weights(stage) + weight_numbers<Stored>(sizes);
  }
};

// Whether four numbers at a multiple of four from here, in rows of `stride`, can be copied at once.
template <class T>
__device__ __forceinline__ bool in_fours(const T* from, long long stride) {
  constexpr unsigned kBytes = sizeof(T) * kFour < 16 ? sizeof(T) * kFour : 16;
  return (static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(from)) % kBytes |
          static_cast<unsigned>(stride) % kFour) == 0;
}

// Starts copying four numbers that are in_fours; zeros where not there.
template <class T>
__device__ __forceinline__ void stage_four(T* to, const T* from, bool there) {
  constexpr int kBytes = sizeof(T) * kFour < 16 ? sizeof(T) * kFour : 16;
#pragma unroll
  for (int i = 0; i < kFour; i += kBytes / static_cast<int>(sizeof(T)))
    copy_async<kBytes>(to + i, from + i, there);
}

// The same wherever they are, of which the first `count` are there.
template <class T>
__device__ __forceinline__ void stage_some(T* to, const T* from, int count) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if constexpr (sizeof(T) >= 4) {
      copy_async<sizeof(T)>(to + i, from + i, i < count);
    } else {
      to[i] = i < count ? from[i] : T(0.0f);
    }
  }
}

// A leaf whose message is a row of its weight has that for one chunk.
__device__ __forceinline__ int chunks_of(const Step& step, bool row) {
  return row ? 1 : static_cast<int>(static_cast<unsigned>(step.rows + kSide - 1) / kSide);
}
__device__ __forceinline__ int rows_of_chunk(const Step& step, int chunk) {
  const int left = step.rows - chunk * kSide;
  return left < kSide ? left : kSide;
}

// Starts copying this thread's share of a chunk of a weight: as terms of a sum its rows, or
// Transposed its columns.
template <bool Transposed, class Stored>
__device__ __forceinline__ void stage_weights(Stored* to, int pieces, const Weights& weights,
                                              const Step& step, int chunk) {
  const Share own;
  const int rows = rows_of_chunk(step, chunk), cols = step.cols;
  if (Transposed ? own.none(cols, rows) : own.none(rows, cols)) return;
  const int row = Transposed ? own.column() : own.term();
  const int col = Transposed ? own.term() : own.column();
  const Stored* group = static_cast<const Stored*>(weights.of[step.group]);
  const Stored* from = group + (step.weight + chunk * kSide + row) * cols + col;
  to += kFour * threadIdx.x;
  if (in_fours(group, cols)) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      stage_four(to + kFour * i * pieces, from + i * cols, col < cols && row + i < rows);
  } else {
#pragma unroll 1
    for (int i = 0; i < 4; ++i)
      stage_some(to + kFour * i * pieces, from + i * cols, row + i < rows ? cols - col : 0);
  }
}

// A tile of the vectors of all leaves.
template <class Stored>
struct Vectors {
  const Stored* from;  // [rows, stride]
  long long stride;
  int rows;
};

template <int Rows, class Stored>
__device__ __forceinline__ void stage_vectors(Stored* to, int ld, const Vectors<Stored>& x,
                                              const Step& step, int chunk) {
  const int depth = rows_of_chunk(step, chunk), first = threadIdx.x / 16;
  const int col = threadIdx.x % 16 * kFour;
  if (col >= padded(depth)) return;
  const Stored* from = x.from + step.vectors + chunk * kSide + first * x.stride + col;
  to += first * ld + col;
  if (in_fours(from, x.stride) && depth % kFour == 0) {
#pragma unroll
    for (int row = 0; row < Rows; row += 16)
      if (Rows % 16 == 0 || first < Rows)
        stage_four(to + row * ld, from + row * x.stride, first + row < x.rows && col < depth);
  } else {
#pragma unroll 1
    for (int row = 0; first + row < Rows; row += 16)
      stage_some(to + row * ld, from + row * x.stride, first + row < x.rows ? depth - col : 0);
  }
}

template <class Value, class Stored>
__device__ __forceinline__ Four<Value> converted(const Four<Stored>& from) {
  Four<Value> to;
#pragma unroll
  for (int i = 0; i < kFour; ++i) to.x[i] = static_cast<Value>(from.x[i]);
  return to;
}

// Leaves by index: which rows of their weights.
struct Indices {
  const long long* of;  // [B, N] from the tile's first row on, null where there are vectors
  long long order;
  int rows;  // of the tile, in the batch

  // -1 past the batch. An index out of range must not be followed.
  __device__ __forceinline__ int operator()(int row, const Step& step) const {
    if (row >= rows) return -1;
    const long long i = __ldg(of + row * order + step.vectors);
    const bool inside = i >= 0 && i < step.rows;
#ifndef HTF_EMULATE
    assert(inside && "evaluate_at: an index is out of range");
#endif
    return inside ? static_cast<int>(i) : -1;
  }
};

// Starts copying the leaf's messages [Rows, cols], zeros past the batch.
template <int Rows, class Stored>
__device__ __forceinline__ void stage_rows(Stored* to, int ld, const Weights& weights,
                                           const Step& step, const Indices& indices) {
  const int cols = step.cols, first = threadIdx.x / 16, col = threadIdx.x % 16 * kFour;
  if (col >= padded(cols)) return;
  const Stored* group = static_cast<const Stored*>(weights.of[step.group]);
  const bool fours = in_fours(group, cols);
#pragma unroll 1
  for (int row = first; row < Rows; row += 16) {
    const int i = indices(row, step);
    const Stored* from = group + (step.weight + i) * cols + col;
    if (fours) {
      stage_four(to + row * ld + col, from, i >= 0 && col < cols);
    } else {
      stage_some(to + row * ld + col, from, i >= 0 ? cols - col : 0);
    }
  }
}

// A chunk of the vectors that indices stand for: zeros, and a one.
template <int Rows, class Stored>
__device__ __forceinline__ void stage_ones(Stored* to, int ld, const Step& step, int chunk,
                                           const Indices& indices) {
  const int first = threadIdx.x / 16, col = threadIdx.x % 16 * kFour;
  if (col >= padded(rows_of_chunk(step, chunk))) return;
#pragma unroll
  for (int row = first; row < Rows; row += 16) {
    const int i = indices(row, step) - chunk * kSide - col;
    Four<Stored> ones;
#pragma unroll
    for (int c = 0; c < kFour; ++c) ones.x[c] = Stored(i == c ? 1.0f : 0.0f);
    store(to + row * ld + col, ones);
  }
}

// Four numbers of a message in global memory that another block may have written; zeros from the
// `count`th on.
template <class Value>
__device__ __forceinline__ Four<Value> message_four(const Value* from, int count, bool fours) {
  Four<Value> m;
  if (fours) {
    using Part = std::conditional_t<sizeof(Value) == 8, double2, float4>;
    constexpr int kPart = sizeof(Part) / sizeof(Value);
#pragma unroll
    for (int i = 0; i < kFour; i += kPart) {
      const Part part = __ldcg(reinterpret_cast<const Part*>(from + i));
      memcpy(m.x + i, &part, sizeof part);
    }
    return m;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) m.x[i] = i < count ? __ldcg(from + i) : Value(0);
  return m;
}

// For this thread's places of a tile, as in for_fours, the product of messages [B, depth] of other
// blocks, in the list's order; `without` is left out, and zero is where there is nothing. The loads
// of all places are under way together; that of a single message is not waited for.
template <int Rows, class Value>
__device__ __forceinline__ void products_of(Four<Value> (&product)[kPlaces<Rows>],
                                            const Value* messages, long long batch, const int* list,
                                            int count, int without, long long first_row, int rows,
                                            int depth) {
  const int top = threadIdx.x / 16, col = threadIdx.x % 16 * kFour;
  const auto there = [&](int i) { return col < depth && top + 16 * i < rows; };
  const long long at = (first_row + top) * depth + col;
  const auto take = [&](int c, int i) {
    const int column = list[c];
    return message_four(messages + column * batch + at + 16 * i * depth, depth - col,
                        (column | depth) % kFour == 0);
  };
  if (count == 2 && without >= 0) {
#pragma unroll
    for (int i = 0; i < kPlaces<Rows>; ++i)
      product[i] = there(i) ? take(1 - without, i) : filled(Value(0));
    return;
  }
#pragma unroll
  for (int i = 0; i < kPlaces<Rows>; ++i) product[i] = filled(Value(there(i) ? 1 : 0));
#pragma unroll 2
  for (int c = 0; c < count; ++c)
#pragma unroll
    for (int i = 0; i < kPlaces<Rows>; ++i)
      if (c != without && there(i)) product[i] = product[i] * take(c, i);
}

}  // namespace htf::gpu::tree
