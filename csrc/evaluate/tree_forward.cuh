// tree_forward: a tree on vectors in one launch, a cut of it into subtrees in parallel.
//
//   x [B, sum of D_n], weights [count, R_in, R_out] folded -> result [B, out_features], and the
//   messages at the cut and above it, each [B, R_out] after another, in float32 (float64)
//
// A block is a task (a subtree of the cut) times a tile of Rows samples. It takes the tile from the
// subtree's leaves to its root: products of messages are in slots of shared memory, which each
// child's message is multiplied into as it comes out of the registers, so that a node costs one
// matrix product. Weights and vectors come in chunks of 64 rows through three buffers (float64:
// two): the chunks to come, of this node and the next ones, are under way while one is multiplied.
//
// The message at the cut goes to global memory, and the block arrives at the counter of (parent,
// tile). The block that comes last multiplies the children's messages and goes on with the parent,
// and so to the root. Which block that is does not change what is computed. Nobody waits: blocks
// need not be on the device together. The counters are 0 again after the last arrival.
//
// With indices [B, N] in place of x a leaf's message is a row of its weight, which is copied like a
// chunk: evaluate_at.
//
// Why it is fast: nothing but latencies and instructions is in the way. A tree of 64 leaves, R = D
// = 64, has 127 weights of 16 KB. One multiprocessor streams some 100 GB/s from L2, 20 us for all
// of it, so that the tree is cut; a node's step is some 400 instructions of a warp and two
// barriers.
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
  bool shared;  // else global memory
  Value* slot;
  int ld;
  bool first;
  Value* message;  // null: the result
  Stored* result;
  int rows, cols;
  bool fours;  // of the message are aligned

  __device__ __forceinline__ void operator()(int row, int col, Four<Value> m) const {
    if (shared) {
      Value* to = slot + row * ld + col;
      if (!first) m = m * load<kFour>(to);
      store_shared(to, m);
      return;
    }
    if (row >= rows || col >= cols) return;
    const int at = row * cols + col;
    if (fours && message != nullptr) {
      store(message + at, m);
      return;
    }
#pragma unroll
    for (int i = 0; i < kFour; ++i)
      if (col + i < cols) {
        if (message != nullptr) {
          message[at + i] = m.x[i];
        } else {
          result[at + i] = static_cast<Stored>(m.x[i]);
        }
      }
  }
};

// How many blocks a multiprocessor should have room for: 2 leave 128 registers for a thread.
template <Math M, class Stored, int Rows>
constexpr int forward_blocks() {
  const bool tall = Rows == 32 && M == Math::fma;
  return tall || M == Math::tf32x3 || (Rows == 16 && sizeof(Stored) == 8) ? 1 : 2;
}

template <Math M, class Stored, int Rows>
__global__ void __launch_bounds__(kThreads, forward_blocks<M, Stored, Rows>())
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
  const Vectors<Stored> x{static_cast<const Stored*>(p.x) + first_row * sizes.x_width,
                          sizes.x_width, rows};
  int next_step = 0, next_chunk = 0, next_stage = 0;
  const auto fetch = [&] {
    if (next_step < block.steps) {
      const Step step = block.step(next_step);
      const bool row = indexed && step.leaf();
      Stored* vectors = block.vectors(next_stage);
      if (row) {
        stage_rows<Rows>(vectors, sizes.ld_vectors, p.weights, step, indices);
      } else {
        if (step.group >= 0)
          stage_weights<false>(block.weights(next_stage), sizes.pieces, p.weights, step,
                               next_chunk);
        if (step.leaf()) stage_vectors<Rows>(vectors, sizes.ld_vectors, x, step, next_chunk);
      }
      if (++next_chunk == chunks_of(step, row)) ++next_step, next_chunk = 0;
      next_stage = next_stage + 1 == kForwardStages ? 0 : next_stage + 1;
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i + 1 < kForwardStages; ++i) fetch();

  int at_stage = 0;
  Product<M, Stored, Rows, false> product;
  for (int s = 0; s < block.steps; ++s) {
    const Step step = block.step(s);
    const bool row_of_weight = indexed && step.leaf();
    const int chunks = chunks_of(step, row_of_weight), cols = step.cols;
    Value* source = block.slot(step.source);
    if (step.children > 0) {
      int* counter = p.counters + static_cast<long long>(step.arrival) * sizes.tiles + tile;
      if (!last_to_arrive(counter, step.children)) {
        copy_wait<0>();
        return;
      }
      Four<Value> operand[kPlaces<Rows>];
      products_of<Rows>(operand, static_cast<const Value*>(p.messages), sizes.batch,
                        block.list(step), step.children, -1, first_row, rows, step.rows);
      for_fours<Rows>(padded(step.rows), [&](int row, int col, int i) {
        store_shared(source + row * sizes.ld + col, operand[i]);
      });
    }
    product.clear();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_wait<kForwardStages - 2>();
      __syncthreads();  // the chunk and the slots are there, the oldest stage is free
      const int depth = rows_of_chunk(step, chunk);
      if (step.group >= 0 && !row_of_weight) {
        const Stored* w = block.weights(at_stage);
        const Stored* vectors = block.vectors(at_stage);
        const int terms = padded(depth), columns = padded(cols);
        if constexpr (std::is_same_v<Stored, Value>) {
          product.add(step.leaf() ? vectors : source, step.leaf() ? sizes.ld_vectors : sizes.ld, w,
                      sizes.pieces, terms, columns);
        } else if (step.leaf()) {
          product.add(vectors, sizes.ld_vectors, w, sizes.pieces, terms, columns);
        } else {
          product.add(source, sizes.ld, w, sizes.pieces, terms, columns);
        }
      }
      fetch();  // while the tensor cores are at work
      at_stage = at_stage + 1 == kForwardStages ? 0 : at_stage + 1;
    }
    Stored* result = static_cast<Stored*>(p.result) + first_row * cols;
    if (step.group < 0) {  // the sum of the product's columns
      const int lane = threadIdx.x % kWarp;
      for (int row = threadIdx.x / kWarp; row < rows; row += kWarps) {
        Value sum = 0;
        for (int col = lane; col < step.rows; col += kWarp) sum += source[row * sizes.ld + col];
        sum = warp_sum(sum);
        if (lane == 0) result[row] = static_cast<Stored>(sum);
      }
      continue;
    }
    Value* message = static_cast<Value*>(p.messages) + step.message * sizes.batch;
    const MessageSink<Stored, Rows> sink{step.target >= 0,
                                         block.slot(step.target),
                                         sizes.ld,
                                         step.kind != 0,
                                         step.message < 0 ? nullptr : message + first_row * cols,
                                         result,
                                         rows,
                                         cols,
                                         (step.message | cols) % kFour == 0};
    Four<Value> m[kPlaces<Rows>];
    if (row_of_weight) {
      const Stored* from = block.vectors(at_stage == 0 ? kForwardStages - 1 : at_stage - 1);
      for_fours<Rows>(padded(cols), [&](int row, int col, int i) {
        m[i] = converted<Value>(load<kFour>(from + row * sizes.ld_vectors + col));
      });
    } else {
      const int terms = padded(step.rows < kSide ? step.rows : kSide);
      product.finish(terms, padded(cols), block.scratch, sizes.ld_sums, m);
    }
    for_fours<Rows>(padded(cols), [&](int row, int col, int i) { sink(row, col, m[i]); });
  }
}

}  // namespace htf::gpu::tree
