// tree_forward: a tree on vectors in one launch, a cut of it into subtrees in parallel.
//
//   x [B, sum of D_n], weights [count, R_in, R_out] folded -> result [B, out_features], and the
//   messages at the cut and above it, each [B, R_out] after another, in float32 (float64)
//
// A block is a task (a subtree of the cut) times a tile of Rows samples. It takes the tile from the
// subtree's leaves to its root: products of messages are in slots of shared memory, which each
// child's message is multiplied into as it comes out of the registers, so that a node costs one
// matrix product and one barrier. Weights and vectors come in chunks of 64 rows through three
// buffers (float64: two): the chunks to come, of this node and the next ones, are under way while
// one is multiplied.
//
// The message at the cut goes to global memory, and the block arrives at the counter of (parent,
// tile). The block that comes last multiplies the children's messages and goes on with the parent,
// and so to the root. Which block that is does not change what is computed. Nobody waits: blocks
// need not be on the device together. The counters are 0 again after the last arrival.
//
// With indices [B, N] in place of x a leaf's message is a row of its weight, which is copied like a
// chunk: evaluate_at.
//
// Why it is fast: a tree of 64 leaves, R = D = 64, has 127 weights of 16 KB. One multiprocessor
// streams some 100 GB/s from L2, 20 us for all of it; 16 subtrees of 7 nodes take 7 * 0.3 us, and
// the 4 levels above them 4 * (0.3 us and an arrival's 1.5). For a tile of 16 rows a product is
// 64 K multiply-adds, 512 cycles of 8 warps, and 64 KB read from shared memory, 512 cycles; for one
// of 4 rows (small batches without tensor cores) a quarter of both, less than the 16 KB take to
// come. Tensor cores: 8 steps of 8 (bfloat16: 4 of 16), 8 warps of 8 columns each, some 300 cycles.
#pragma once

#include "evaluate/tree_parts.cuh"

namespace htf::gpu::tree {

struct Forward {
  Sizes sizes;
  const int* table;
  const void* x;             // or
  const long long* indices;  // [B, N]
  void* result;
  void* messages;
  int* counters;
  Weights weights;
};

// Where a node's message goes: into its parent's product, or global memory.
template <class Stored, int Rows>
struct MessageSink {
  using Value = ValueOf<Stored>;
  Value* slot;  // null: global memory
  int ld;
  bool first;
  Value* message;  // null: the result
  Stored* result;
  int rows, cols;

  template <int V>
  __device__ __forceinline__ void operator()(int row, int col, Pack<Value, V> m) const {
    if (slot != nullptr) {
      Value* to = slot + row * ld + col;
      if (!first) {
        const auto before = load<V>(to);
#pragma unroll
        for (int i = 0; i < V; ++i) m.x[i] *= before.x[i];
      }
      store(to, m);
      return;
    }
    if (row >= rows) return;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (col + i < cols) {
        const long long at = static_cast<long long>(row) * cols + col + i;
        if (message != nullptr) {
          message[at] = m.x[i];
        } else {
          result[at] = static_cast<Stored>(m.x[i]);
        }
      }
  }
};

template <Math M, class Stored, int Rows>
__global__ void __launch_bounds__(kThreads, M == Math::fma && Rows == 32 ? 1 : 2)
    forward_kernel(const __grid_constant__ Forward p) {
  using Value = ValueOf<Stored>;
  constexpr int kForwardStages = kStages<Stored, true>;
  const Sizes& sizes = p.sizes;
  const int task = blockIdx.x % sizes.tasks, tile = blockIdx.x / sizes.tasks;
  const Block<M, Stored, Rows, kForwardStages> block(sizes, p.table, task);
  const long long first_row = static_cast<long long>(tile) * Rows;
  const int rows =
      static_cast<int>(sizes.batch - first_row < Rows ? sizes.batch - first_row : Rows);

  const bool indexed = p.indices != nullptr;
  const Indices indices{p.indices + first_row * sizes.x_width, sizes.x_width, rows};
  int next_step = 0, next_chunk = 0, next_stage = 0;
  const auto fetch = [&] {
    if (next_step < block.steps) {
      const int* step = block.step(next_step);
      const bool row = indexed && step[kVectors] >= 0;
      if (row)
        stage_rows<Stored, Rows>(block.vectors(next_stage), sizes.ld_vectors, p.weights, step,
                                 indices);
      if (step[kGroup] >= 0 && !row)
        stage_weights(block.weights(next_stage), sizes.ld_weights, p.weights, step, next_chunk);
      if (step[kVectors] >= 0 && !row)
        stage_vectors<Stored, Rows>(block.vectors(next_stage), sizes.ld_vectors,
                                    static_cast<const Stored*>(p.x), sizes.x_width, first_row, rows,
                                    step, next_chunk);
      if (++next_chunk == chunks_of(step, row)) ++next_step, next_chunk = 0;
      next_stage = next_stage + 1 == kForwardStages ? 0 : next_stage + 1;
    }
    copy_commit();
  };
  for (int i = 0; i + 1 < kForwardStages; ++i) fetch();

  int at_stage = 0;
  Product<M, Stored, Rows, false> product;
  for (int s = 0; s < block.steps; ++s) {
    const int* step = block.step(s);
    const bool row_of_weight = indexed && step[kVectors] >= 0;
    const int chunks = chunks_of(step, row_of_weight), cols = step[kCols];
    Value* source = block.slot(step[kSource]);
    product.clear();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_wait<kForwardStages - 2>();
      __syncthreads();  // the chunk and the slots are there, the oldest stage is free
      fetch();
      const int depth = rows_of_chunk(step, chunk);
      if (step[kCount] > 0) {
        int* counter = p.counters + static_cast<long long>(step[kArrival]) * sizes.tiles + tile;
        if (!last_to_arrive(counter, step[kCount])) {
          copy_wait<0>();
          return;
        }
        Value operand[Rows / kRowsAtATime];
        products_of<Rows>(operand, static_cast<const Value*>(p.messages), sizes.batch,
                          block.part + step[kList], step[kCount], -1, first_row, rows, depth);
        for_each<Rows>(padded(depth),
                       [&](int row, int col, int i) { source[row * sizes.ld + col] = operand[i]; });
        __syncthreads();
      }
      if (step[kGroup] >= 0 && !row_of_weight) {
        const Stored* w = block.weights(at_stage);
        if constexpr (std::is_same_v<Stored, Value>) {
          const bool leaf = step[kVectors] >= 0;
          product.add(leaf ? block.vectors(at_stage) : source, leaf ? sizes.ld_vectors : sizes.ld,
                      w, sizes.ld_weights, padded(depth), padded(cols));
        } else if (step[kVectors] >= 0) {
          product.add(block.vectors(at_stage), sizes.ld_vectors, w, sizes.ld_weights, padded(depth),
                      padded(cols));
        } else {
          product.add(source, sizes.ld, w, sizes.ld_weights, padded(depth), padded(cols));
        }
      }
      at_stage = at_stage + 1 == kForwardStages ? 0 : at_stage + 1;
    }
    const bool inside = step[kTarget] >= 0, root = step[kMessage] < 0;
    Stored* result = static_cast<Stored*>(p.result) + first_row * cols;
    if (step[kGroup] < 0) {  // the sum of the product's columns
      const int lane = threadIdx.x % kWarp;
      for (int row = threadIdx.x / kWarp; row < rows; row += kWarps) {
        Value sum = 0;
        for (int col = lane; col < step[kRows]; col += kWarp) sum += source[row * sizes.ld + col];
        sum = warp_sum(sum);
        if (lane == 0) result[row] = static_cast<Stored>(sum);
      }
      continue;
    }
    const MessageSink<Stored, Rows> sink{
        inside ? block.slot(step[kTarget]) : nullptr,
        sizes.ld,
        step[kKind] != 0,
        root ? nullptr
             : static_cast<Value*>(p.messages) + step[kMessage] * sizes.batch + first_row * cols,
        result,
        rows,
        cols};
    if (row_of_weight) {
      const Stored* from = block.vectors(at_stage == 0 ? kForwardStages - 1 : at_stage - 1);
      for_each<Rows>(padded(cols), [&](int row, int col, int) {
        sink(row, col, Pack<Value, 1>{{static_cast<Value>(from[row * sizes.ld_vectors + col])}});
      });
      continue;
    }
    product.finish(padded(cols), block.scratch, sink);
  }
}

}  // namespace htf::gpu::tree
