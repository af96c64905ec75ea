// tree_backward: the gradients of a tree on vectors in one launch, with recomputation.
//
//   grad [B, out_features], weights, x, the messages that tree_forward left
//   -> gradients of the weights, of x
//
// A block is a task (a subtree of the same cut) times a split of the batch, and goes through the
// split's tiles of Rows samples in order. For each tile:
//   up    the subtree's messages are computed again and all stay in shared memory
//   path  from the root down to the subtree: g_child = (g_v W_v^T) * the siblings' messages, which
//         are in global memory and come while the product is formed. Blocks below a node all do
//         this again; it is one product a level.
//         The weight's gradient of a node above the cut is computed by one of them, its owner.
//   down  the subtree's nodes, parents first: dW += p^T g, dp = g W^T, and in place of the
//         children's messages their cotangents, dp * the other children's messages. Leaves:
//         dW += x^T g, dx = g W^T.
// Nobody waits for another block. Every product of messages without one factor is computed as such:
// nothing is divided.
//
// With indices in place of x a leaf's gradient is formed by the same product, x being zeros and
// ones that are written to shared memory: deterministic without sorting, and cheap where D is
// small.
//
// A weight's gradient is added up over a split's tiles, in their order, in the split's own part of
// `partials` [splits, numbers], and sum_partials adds the splits' in theirs, and those of nodes
// that share a weight. That is a second launch, with a thread for every weight: the blocks of a
// subtree end together, and the last of them would have to read splits x weights by itself (16
// splits of 15 nodes of 16 KB: 4 MB, 40 us). With one split and no shared weights the gradients are
// written where they belong, in one launch; so are all batches of one tile.
//
// A node costs three products, 3 * 2 Rows K N operations, three barriers (up: two), and 16 KB of
// weights read; the gradient's part is read and written again for every tile but the first.
#pragma once

#include "evaluate/tree_parts.cuh"

namespace htf::gpu::tree {

// Slots that are no node's: a product of messages, and, in the table, the cotangent on the path.
constexpr int kOperandSlot = 0;

struct Backward {
  Sizes sizes;
  const int* table;
  const void* grad;
  const void* x;             // or
  const long long* indices;  // [B, N]
  const void* messages;
  void* grad_x;
  void* grad_weights;  // where partials is null
  void* partials;
  long long numbers;  // of a split's partials
  int splits;
  int outputs;
  Weights weights;
};

// A tile of a weight's gradient goes into its split's part, or where it belongs.
template <class Stored>
struct GradientSink {
  using Value = ValueOf<Stored>;
  Value* partial;  // null: the result, of another type, in the first tile
  Stored* result;
  bool first;
  int rows, cols;

  // What the tiles before have added up to.
  __device__ __forceinline__ Four<Value> before(int i, int j) const {
    Four<Value> sum = filled(Value(0));
    if (first || i >= rows || j >= cols) return sum;
    const Value* from = partial + i * cols + j;
    if (cols % kFour == 0) return load<kFour>(from);
#pragma unroll
    for (int e = 0; e < kFour; ++e)
      if (j + e < cols) sum.x[e] = from[e];
    return sum;
  }

  template <class T>
  __device__ __forceinline__ void put(T* to, const Four<T>& v, int count) const {
    if (cols % kFour == 0) {
      store(to, v);
      return;
    }
#pragma unroll
    for (int e = 0; e < kFour; ++e)
      if (e < count) to[e] = v.x[e];
  }
  __device__ __forceinline__ void operator()(int i, int j, const Four<Value>& sum) const {
    if (i >= rows || j >= cols) return;
    const int at = i * cols + j;
    if (std::is_same_v<Stored, Value> || partial != nullptr) {
      put(partial + at, sum, cols - j);
    } else {
      put(result + at, converted<Stored>(sum), cols - j);
    }
  }
};

template <class Stored>
struct VectorsSink {
  using Value = ValueOf<Stored>;
  Stored* to;
  long long stride;
  int rows, cols;
  bool fours;  // of the result are aligned

  __device__ __forceinline__ void operator()(int row, int col, const Four<Value>& g) const {
    if (row >= rows || col >= cols) return;
    Stored* place = to + row * stride + col;
    if (fours) {
      Four<Stored> stored;
#pragma unroll
      for (int i = 0; i < kFour; ++i) stored.x[i] = static_cast<Stored>(g.x[i]);
      store(place, stored);
      return;
    }
#pragma unroll
    for (int i = 0; i < kFour; ++i)
      if (col + i < cols) place[i] = static_cast<Stored>(g.x[i]);
  }
};

template <class Value>
struct SlotSink {
  Value* to;
  int ld;
  bool first;

  __device__ __forceinline__ void operator()(int row, int col, Four<Value> m) const {
    Value* place = to + row * ld + col;
    if (!first) {
      const Four<Value> before = load<kFour>(place);
#pragma unroll
      for (int i = 0; i < kFour; ++i) m.x[i] += before.x[i];
    }
    store_shared(place, m);
  }
};

// The cotangents of the children's messages at one place, from that of their product, in place of
// the messages. place(c) points to that of child c.
template <class Value, class Place>
__device__ __forceinline__ void to_children(Four<Value> g, int count, Place place) {
  if (count == 1) {
    store_shared(place(0), g);
    return;
  }
  if (count == 2) {
    const Four<Value> a = load<kFour>(place(0)), b = load<kFour>(place(1));
    store_shared(place(0), g * b);
    store_shared(place(1), g * a);
    return;
  }
  // Four children at a time; g has all that came before as factors.
#pragma unroll 1
  for (int c = 0; c < count; c += 4) {
    Four<Value> outside = g, m[4];
#pragma unroll 1
    for (int after = c + 4; after < count; ++after) outside = outside * load<kFour>(place(after));
#pragma unroll
    for (int i = 0; i < 4; ++i) m[i] = c + i < count ? load<kFour>(place(c + i)) : filled(Value(1));
    const Four<Value> low = m[0] * m[1], high = m[2] * m[3];
    const Four<Value> left = outside * high, right = outside * low;
    store_shared(place(c), left * m[1]);
    if (c + 1 < count) store_shared(place(c + 1), left * m[0]);
    if (c + 2 < count) store_shared(place(c + 2), right * m[3]);
    if (c + 3 < count) store_shared(place(c + 3), right * m[2]);
    g = g * (low * high);
  }
}

// How many blocks a multiprocessor should have room for: 2 leave 128 registers for a thread.
template <Math M, class Stored, int Rows>
constexpr int backward_blocks() {
  return sizeof(Stored) == 8 || M == Math::tf32x3 || Rows == 32 ? 1 : 2;
}

template <Math M, class Stored, int Rows>
__global__ void __launch_bounds__(kThreads, backward_blocks<M, Stored, Rows>())
    backward_kernel(const __grid_constant__ Backward p) {
  using Value = ValueOf<Stored>;
  constexpr int kBackwardStages = kStages<Stored, false>;
  const Sizes& sizes = p.sizes;
  const int task = blockIdx.x % sizes.tasks, split = blockIdx.x / sizes.tasks;
  const Block<M, Stored, Rows, kBackwardStages> block(sizes, p.table, task);
  const int ld = sizes.ld;
  const auto tile_of = [&](int s) {
    return static_cast<int>(static_cast<long long>(sizes.tiles) * s / p.splits);
  };
  const int first_tile = tile_of(split), end_tile = tile_of(split + 1);
  const Stored* x = static_cast<const Stored*>(p.x);
  const Value* messages = static_cast<const Value*>(p.messages);
  const auto rows_of = [&](int tile) {
    const long long left = sizes.batch - static_cast<long long>(tile) * Rows;
    return static_cast<int>(left < Rows ? left : Rows);
  };

  const bool indexed = p.indices != nullptr;
  int next_tile = first_tile, next_step = 0, next_chunk = 0, next_stage = 0;
  const auto fetch = [&] {
    if (next_tile < end_tile && block.steps > 0) {
      const Step step = block.step(next_step);
      const bool up = step.kind == kUp, by_index = indexed && step.leaf();
      const long long row = static_cast<long long>(next_tile) * Rows * sizes.x_width;
      Stored *weights = block.weights(next_stage), *vectors = block.vectors(next_stage);
      if (by_index) {
        const Indices indices{p.indices + row, sizes.x_width, rows_of(next_tile)};
        if (up) {
          stage_rows<Rows>(vectors, sizes.ld_vectors, p.weights, step, indices);
        } else {
          stage_ones<Rows>(vectors, sizes.ld_vectors, step, next_chunk, indices);
        }
      } else {
        if (step.group >= 0 && up) {
          stage_weights<false>(weights, sizes.pieces, p.weights, step, next_chunk);
        } else if (step.group >= 0 && (step.flags & kOperandGradient) != 0) {
          stage_weights<true>(weights, sizes.pieces, p.weights, step, next_chunk);
        }
        if (step.leaf() && (up || (step.flags & kWeightGradient) != 0)) {
          const Vectors<Stored> of{x + row, sizes.x_width, rows_of(next_tile)};
          stage_vectors<Rows>(vectors, sizes.ld_vectors, of, step, next_chunk);
        }
      }
      if (++next_chunk == chunks_of(step, by_index && up)) ++next_step, next_chunk = 0;
      if (next_step == block.steps) ++next_tile, next_step = 0;
      next_stage = next_stage + 1 == kBackwardStages ? 0 : next_stage + 1;
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i + 1 < kBackwardStages; ++i) fetch();

  int tile = first_tile, s = 0, chunk = 0, at_stage = 0;
  while (tile < end_tile && block.steps > 0) {
    copy_wait<kBackwardStages - 2>();
    __syncthreads();  // the chunk and the slots are there, the oldest stage is free
    fetch();
    const long long first_row = static_cast<long long>(tile) * Rows;
    const int rows = rows_of(tile);
    const Step step = block.step(s);
    const int* list = block.list(step);
    const int kind = step.kind, flags = step.flags, count = step.children;
    const bool leaf = step.leaf();
    const int depth = rows_of_chunk(step, chunk), tall = padded(depth);
    const int cols = step.cols, wide = padded(cols);
    const Stored* w = block.weights(at_stage);
    const Stored* vectors = block.vectors(at_stage);
    Value* g = block.slot(step.source);
    Value* operand = block.slot(kOperandSlot);

    if ((flags & kLoadGradient) != 0 && chunk == 0) {
      const Stored* from = static_cast<const Stored*>(p.grad) + first_row * p.outputs;
      for_fours<Rows>(wide, [&](int row, int col, int) {
        Four<Value> v;
#pragma unroll
        for (int i = 0; i < kFour; ++i) {
          const bool there = row < rows && col + i < p.outputs;
          v.x[i] = there ? static_cast<Value>(from[row * p.outputs + col + i]) : Value(0);
        }
        store_shared(g + row * ld + col, v);
      });
    }
    // The product of the children's messages: those in shared memory, or on the path others'.
    if (!leaf && (kind == kUp ? count > 1 : (flags & kWeightGradient) != 0)) {
      Four<Value> product[kPlaces<Rows>];
      if (kind == kPath)
        products_of<Rows>(product, messages, sizes.batch, list, count, -1, first_row, rows, depth);
      for_fours<Rows>(tall, [&](int row, int col, int i) {
        const int at = row * ld + col;
        Four<Value> v = product[i];
        if (kind != kPath) {
          v = load<kFour>(block.slot(list[0]) + at);
#pragma unroll 1
          for (int c = 1; c < count; ++c) v = v * load<kFour>(block.slot(list[c]) + at);
        }
        store_shared(operand + at, v);
      });
    }
    if (!leaf || (flags & kLoadGradient) != 0) __syncthreads();

    const bool row_of_weight = kind == kUp && leaf && indexed;
    if (kind == kUp) {
      Four<Value> m[kPlaces<Rows>];
      if (row_of_weight) {
        for_fours<Rows>(wide, [&](int row, int col, int i) {
          m[i] = converted<Value>(load<kFour>(vectors + row * sizes.ld_vectors + col));
        });
      } else {
        Product<M, Stored, Rows, false> product;
        product.clear();
        const Value* source = count > 1 ? operand : block.slot(leaf ? 0 : list[0]);
        if constexpr (std::is_same_v<Stored, Value>) {
          product.add(leaf ? vectors : source, leaf ? sizes.ld_vectors : ld, w, sizes.pieces, tall,
                      wide);
        } else if (leaf) {
          product.add(vectors, sizes.ld_vectors, w, sizes.pieces, tall, wide);
        } else {
          product.add(source, ld, w, sizes.pieces, tall, wide);
        }
        product.finish(tall, wide, block.scratch, sizes.ld_sums, m);
      }
      const SlotSink<Value> sink{block.slot(step.target), ld, chunk == 0};
      for_fours<Rows>(wide, [&](int row, int col, int i) { sink(row, col, m[i]); });
    } else {
      if ((flags & kWeightGradient) != 0) {
        const long long at = step.partial + static_cast<long long>(chunk) * kSide * cols;
        Value* partial = static_cast<Value*>(p.partials);
        if (partial != nullptr) partial += split * p.numbers + at;
        Stored* result = static_cast<Stored*>(p.grad_weights) + at;
        if constexpr (std::is_same_v<Stored, Value>)
          if (partial == nullptr) partial = result;
        const GradientSink<Stored> sink{partial, result, tile == first_tile, depth, cols};
        if constexpr (std::is_same_v<Stored, Value>) {
          outer<M, Stored, Rows>(leaf ? vectors : operand, leaf ? sizes.ld_vectors : ld, g, ld,
                                 tall, wide, sink);
        } else if (leaf) {
          outer<M, Stored, Rows>(vectors, sizes.ld_vectors, g, ld, tall, wide, sink);
        } else {
          outer<M, Stored, Rows>(static_cast<const Value*>(operand), ld, g, ld, tall, wide, sink);
        }
      }
      if ((flags & kOperandGradient) != 0) {
        // The siblings' messages are under way during the product.
        Four<Value> others[kPlaces<Rows>];
        if (kind == kPath)
          products_of<Rows>(others, messages, sizes.batch, list, count, step.on_path, first_row,
                            rows, depth);
        Four<Value> v[kPlaces<Rows>];
        if (step.group >= 0) {
          Product<M, Stored, Rows, true> product;
          product.clear();
          product.add(g, ld, w, sizes.pieces, wide, tall);
          product.finish(wide, tall, block.scratch, sizes.ld_sums, v);
        } else {  // of a sum: the same for every column
          for_fours<Rows>(tall, [&](int row, int col, int i) {
#pragma unroll
            for (int j = 0; j < kFour; ++j) v[i].x[j] = col + j < depth ? g[row * ld] : Value(0);
          });
          __syncthreads();
        }
        const int first_column = step.vectors + chunk * kSide;
        Stored* grad_x = static_cast<Stored*>(p.grad_x) + first_row * sizes.x_width;
        const VectorsSink<Stored> sink{
            grad_x + first_column, sizes.x_width, rows, depth,
            in_fours(grad_x + first_column, sizes.x_width) && depth % kFour == 0};
        for_fours<Rows>(tall, [&](int row, int col, int i) {
          const int at = row * ld + col;
          if (leaf) {
            sink(row, col, v[i]);
          } else if (kind == kDown) {
            to_children(v[i], count, [&](int c) { return block.slot(list[c]) + at; });
          } else {  // one level further down the path, in place of this node's cotangent
            store_shared(g + at, v[i] * others[i]);
          }
        });
      }
    }
    at_stage = at_stage + 1 == kBackwardStages ? 0 : at_stage + 1;
    if (++chunk == chunks_of(step, row_of_weight)) ++s, chunk = 0;
    if (s == block.steps) ++tile, s = 0;
  }
}

}  // namespace htf::gpu::tree
