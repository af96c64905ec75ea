// What the two passes over a tree share: the tables' records, shared memory, streaming of operands.
//
// A table (htfkernels/cuda/tree_tables.py writes it) is int32: for each task [begin, ints, steps],
// then the tasks' parts, each its steps of kFields numbers and lists that the steps point into.
//
// Shared memory, from its start:
//   the task's part of the table
//   Stages x (a chunk of weights [64, ld_weights], and one of vectors [Rows, ld_vectors])
//   slots x [Rows, ld] messages
//   scratch of Product::finish, and 64 numbers that nothing is written to: tiles of mma read past
//   the last row
// Rows of messages are 4 banks (16 bytes) longer than a multiple of 16 numbers, so that the eight
// rows of a fragment are in different banks.
#pragma once

#undef NDEBUG  // indices are asserted to be in range
#include <cassert>
#include <vector>

#include "cuda/launch.h"
#include "evaluate/tree_products.cuh"

namespace htf::gpu::tree {

constexpr int kFields = 16;
constexpr int kHead = 3;
constexpr int kMostGroups = 400;  // pointers to weights are parameters of the kernels, 4 KB in all

// What the fields of a step are.
enum Field {
  kGroup,    // of the weight, or -1: the root of a "sum"
  kWeight,   // first row of the weight in its group's [count * rows, cols]
  kRows,     // of the weight
  kCols,     // of the weight
  kVectors,  // leaf: first column of its vectors, or its mode; interior: -1
  kSource,   // slot of the operand (forward), of the message's cotangent (backward)
  kTarget,   // slot of what is computed; -1: global memory
  kKind,     // forward: whether its message is the first of its parent's product; backward: Kind
  kMessage,  // forward: first column of the message in `messages`, -1 for the result
  kCount,    // children in the list; forward: 0 where the operand is in shared memory
  kList,     // where the list begins in the task's part: columns of messages, or slots
  kArrival,  // forward: the counter of a node whose children are other blocks'
  kFlags,    // backward
  kOnPath,   // backward, along the path: which of the children leads to the task
  kPartial,  // backward: first number of the weight's gradient
};
enum Kind { kUp, kPath, kDown };
enum Flag { kWeightGradient = 1, kOperandGradient = 2, kLoadGradient = 4 };

// Sizes that do not depend on the task.
struct Sizes {
  long long batch;
  long long x_width;
  int tasks, tiles;
  int part;  // numbers of the longest part of the table, in bytes a multiple of 128
  int slots;
  int ld_weights, ld_vectors, ld;
};

struct Weights {
  const void* of[kMostGroups];
};

// Chunks under way: two of float64 are 68 KB, and a block may have no more than 99.
template <class Stored, bool Forward>
constexpr int kStages = Forward && sizeof(Stored) < 8 ? 3 : 2;

template <class Stored>
constexpr int extra() {
  return 16 / static_cast<int>(sizeof(Stored));
}

template <class Stored>
__host__ __device__ __forceinline__ int stage_bytes(const Sizes& s, int rows) {
  return static_cast<int>(sizeof(Stored)) * (kSide * s.ld_weights + rows * s.ld_vectors);
}

template <Math M, class Stored, int Rows>
std::size_t shared_bytes(const Sizes& s, int stages) {
  return sizeof(int) * static_cast<std::size_t>(s.part) +
         static_cast<std::size_t>(stages) * stage_bytes<Stored>(s, Rows) +
         sizeof(ValueOf<Stored>) *
             (static_cast<std::size_t>(s.slots) * Rows * s.ld + scratch_of<M, Rows>() + kSide);
}

// Messages at most `width` wide and chunks of vectors at most `vectors`, multiples of 16. In a
// forward pass mma reads weights down the columns: rows 8 banks apart.
template <Math M, class Stored>
void set_widths(Sizes& s, int width, int vectors, bool forward) {
  s.ld = width + extra<ValueOf<Stored>>();
  s.ld_vectors = vectors + extra<Stored>();
  const bool down = forward && (M == Math::tf32 || M == Math::tf32x3);
  s.ld_weights = width + (down ? 2 : 1) * extra<Stored>();
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
      : sizes(s), part(shared_memory<int>()) {
    const int* head = table + kHead * task;
    const int begin = __ldg(head), ints = __ldg(head + 1);
    steps = __ldg(head + 2);
    stages = reinterpret_cast<unsigned char*>(part + s.part);
    slots = reinterpret_cast<Value*>(stages + Stages * stage_bytes<Stored>(s, Rows));
    scratch = slots + s.slots * Rows * s.ld;
    for (int i = threadIdx.x; i < ints; i += kThreads) part[i] = __ldg(table + begin + i);
    __syncthreads();
  }
  __device__ __forceinline__ const int* step(int i) const { return part + i * kFields; }
  __device__ __forceinline__ Value* slot(int i) const { return slots + i * Rows * sizes.ld; }
  __device__ __forceinline__ Stored* weights(int stage) const {
    return reinterpret_cast<Stored*>(stages + stage * stage_bytes<Stored>(sizes, Rows));
  }
  __device__ __forceinline__ Stored* vectors(int stage) const {
    return weights(stage) + kSide * sizes.ld_weights;
  }
};

// Starts copying [rows, cols] into shared memory, zeros up to all_rows and padded(cols).
template <class T>
__device__ __forceinline__ void stage(T* to, int ld, const T* from, long long stride, int rows,
                                      int cols, int all_rows) {
  constexpr int kVector = 16 / sizeof(T);
  const int first = threadIdx.x / 16, lane = threadIdx.x % 16;
  const auto odd = reinterpret_cast<std::uintptr_t>(from) | stride * sizeof(T) | cols * sizeof(T);
  if (odd % 16 == 0) {
    const int pieces = padded(cols) / kVector, full = cols / kVector;
    for (int r = first; r < all_rows; r += kThreads / 16)
      for (int c = lane; c < pieces; c += 16) {
        const bool there = r < rows && c < full;
        copy_async<16>(to + r * ld + c * kVector, there ? from + r * stride + c * kVector : from,
                       there);
      }
  } else {
    const int all_cols = padded(cols);
    for (int r = first; r < all_rows; r += kThreads / 16)
      for (int c = lane; c < all_cols; c += 16) {
        const bool there = r < rows && c < cols;
        const T* place = there ? from + r * stride + c : from;
        if constexpr (sizeof(T) >= 4) {
          copy_async<sizeof(T)>(to + r * ld + c, place, there);
        } else {
          to[r * ld + c] = there ? *place : T(0.0f);
        }
      }
  }
}

// A leaf whose message is a row of its weight has that for one chunk.
__device__ __forceinline__ int chunks_of(const int* step, bool row) {
  return row ? 1 : (step[kRows] + kSide - 1) / kSide;
}
__device__ __forceinline__ int rows_of_chunk(const int* step, int chunk) {
  const int left = step[kRows] - chunk * kSide;
  return left < kSide ? left : kSide;
}

template <class Stored>
__device__ __forceinline__ void stage_weights(Stored* to, int ld, const Weights& weights,
                                              const int* step, int chunk) {
  const int rows = rows_of_chunk(step, chunk), cols = step[kCols];
  const long long row = step[kWeight] + static_cast<long long>(chunk) * kSide;
  const Stored* from = static_cast<const Stored*>(weights.of[step[kGroup]]) + row * cols;
  stage(to, ld, from, cols, rows, cols, padded(rows));
}

template <class Stored, int Rows>
__device__ __forceinline__ void stage_vectors(Stored* to, int ld, const Stored* x, long long stride,
                                              long long first_row, int rows, const int* step,
                                              int chunk) {
  const Stored* from = x + first_row * stride + step[kVectors] + chunk * kSide;
  stage(to, ld, from, stride, rows, rows_of_chunk(step, chunk), Rows);
}

// Leaves by index: which rows of their weights.
struct Indices {
  const long long* of;  // [B, N] from the tile's first row on, null where there are vectors
  long long order;
  int rows;  // of the tile, in the batch

  // -1 past the batch. An index out of range must not be followed.
  __device__ __forceinline__ int operator()(int row, const int* step) const {
    if (row >= rows) return -1;
    const long long i = __ldg(of + row * order + step[kVectors]);
    const bool inside = i >= 0 && i < step[kRows];
#ifndef HTF_EMULATE
    assert(inside && "evaluate_at: an index is out of range");
#endif
    return inside ? static_cast<int>(i) : -1;
  }
};

// Starts copying the leaf's messages [Rows, cols], zeros past the batch.
template <class Stored, int Rows>
__device__ __forceinline__ void stage_rows(Stored* to, int ld, const Weights& weights,
                                           const int* step, const Indices& indices) {
  const int cols = step[kCols];
  const Stored* from = static_cast<const Stored*>(weights.of[step[kGroup]]) +
                       static_cast<long long>(step[kWeight]) * cols;
  for (int r = threadIdx.x / 16; r < Rows; r += kThreads / 16) {
    const int i = indices(r, step);
    for (int c = threadIdx.x % 16; c < padded(cols); c += 16) {
      const bool there = i >= 0 && c < cols;
      const Stored* place = there ? from + static_cast<long long>(i) * cols + c : from;
      if constexpr (sizeof(Stored) >= 4) {
        copy_async<sizeof(Stored)>(to + r * ld + c, place, there);
      } else {
        to[r * ld + c] = there ? *place : Stored(0.0f);
      }
    }
  }
}

// A chunk of the vectors that indices stand for: zeros, and a one.
template <class Stored, int Rows>
__device__ __forceinline__ void stage_ones(Stored* to, int ld, const int* step, int chunk,
                                           const Indices& indices) {
  for (int r = threadIdx.x / 16; r < Rows; r += kThreads / 16) {
    const int i = indices(r, step);
    for (int c = threadIdx.x % 16; c < padded(rows_of_chunk(step, chunk)); c += 16)
      to[r * ld + c] = Stored(i == chunk * kSide + c ? 1.0f : 0.0f);
  }
}

// f(row, col, i) for every place of a tile, the same thread for equal places; i counts a thread's.
constexpr int kRowsAtATime = kThreads / kSide;

template <int Rows, class F>
__device__ __forceinline__ void for_each(int width, F f) {
  const int col = threadIdx.x % kSide;
  if (col >= width) return;
#pragma unroll
  for (int i = 0; i < Rows / kRowsAtATime; ++i)
    f(static_cast<int>(threadIdx.x) / kSide + i * kRowsAtATime, col, i);
}

// For this thread's places of a tile, as in for_each, the product of messages [B, depth] of other
// blocks, in the list's order; `without` is left out, and zero is where there is nothing. The loads
// of all places are under way together; that of a single message is not waited for.
template <int Rows, class Value>
__device__ __forceinline__ void products_of(Value (&product)[Rows / kRowsAtATime],
                                            const Value* messages, long long batch, const int* list,
                                            int count, int without, long long first_row, int rows,
                                            int depth) {
  const int col = threadIdx.x % kSide, top = threadIdx.x / kSide;
  const long long at = (first_row + top) * depth + col;
  const auto there = [&](int i) { return col < depth && top + i * kRowsAtATime < rows; };
  if (count == 2 && without >= 0) {
    const Value* from = messages + list[1 - without] * batch + at;
#pragma unroll
    for (int i = 0; i < Rows / kRowsAtATime; ++i)
      product[i] = there(i) ? __ldcg(from + i * kRowsAtATime * depth) : Value(0);
    return;
  }
#pragma unroll
  for (int i = 0; i < Rows / kRowsAtATime; ++i) product[i] = there(i) ? 1 : 0;
#pragma unroll 2
  for (int c = 0; c < count; ++c) {
    const Value* from = messages + list[c] * batch + at;
#pragma unroll
    for (int i = 0; i < Rows / kRowsAtATime; ++i)
      if (c != without && there(i)) product[i] *= __ldcg(from + i * kRowsAtATime * depth);
  }
}

}  // namespace htf::gpu::tree
