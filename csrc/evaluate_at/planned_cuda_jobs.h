// What the kernels of planned evaluation are given, and how a schedule writes it down.
//
// Nodes: p[i, :] = product over at most four operands of frame_c[ids_c[i], :] (ids null: row i),
// `width` columns. A node's frame is p W, [rows, cols]; or p itself.
//
// Jobs are kernel parameters: a block finds its own by comparing blockIdx.x with a few numbers in
// constant memory, and no table is read from the device before the data is.
//
// Schedule: a header of kPlannedHeader numbers, then for each launch [kind, config, jobs] and for
// each of its jobs a record of one number after the other as the structs *Record below name them.
// An address is a space (Space) and an offset in bytes.
#pragma once

#include "cuda/launch.h"

namespace htf::gpu::planned {

enum class Mode { ieee, tf32, tf32x3, bf16, f64 };
template <Mode mode>
struct Numbers {
  using S = float;    // as stored
  using Acc = float;  // as summed
};
template <>
struct Numbers<Mode::bf16> {
  using S = BFloat16;
  using Acc = float;
};
template <>
struct Numbers<Mode::f64> {
  using S = double;
  using Acc = double;
};

constexpr int kPlannedThreads = 256;
constexpr int kOperands = 4;
constexpr int kIdsTogether = 1024;  // rows of one block of a weight's gradient

struct Operand {
  const void* frame;
  const int32_t* ids;  // null: row i
};

// -- forward --------------------------------------------------------------------------------------

struct ForwardJob {
  enum Kind { kProduct, kDot, kRows };  // p W; p w, one column; p
  int first = 0;                        // its first block
  int kind, count;                      // of operands
  int rows, width, cols;
  int across;                 // tiles side by side, or lanes of a row, or chunks of a row
  bool aligned_k, aligned_n;  // rows of operands, of the weight can be read 16 bytes at a time
  const void* weight;         // [width, cols]; kDot, null: ones
  void* out;
  Operand operand[kOperands];
};

// -- backward: matrix products --------------------------------------------------------------------

struct ProductJob {
  // kRows: dp = g W^T, [rows, width]   kWeight: p^T g, [width, cols], over `each` rows a part
  enum Kind { kRows, kWeight };
  int first = 0;
  int kind, count;
  int rows, width, cols;
  int across, tiles;  // tiles side by side; of one part
  int each;
  bool parts, final;  // out is of Acc; out is a gradient
  bool aligned_k, aligned_n;
  const void* weight;
  const void* grad;  // [rows, cols]
  void* out;         // [parts][..]
  Operand operand[kOperands];
};

// -- backward: sums over rows ---------------------------------------------------------------------

struct SegmentJob {
  // Where the gradient dp [rows, width] of p is: stored, stored as Acc, or g[i] w[k] with a column
  // g
  enum Source { kStored, kParts, kColumn };
  int first = 0;
  int source, count;  // of the others
  int segments, width, rows;
  int lane_bits, group_bits,
      repeats;                 // a row's lanes, a segment's groups; segments one after other
  int splits, blocks, chunks;  // of a segment's rows; of segments; of columns
  bool parts, final, aligned;
  const int32_t* start;  // null: segment i is row i, or one segment is all rows
  const int32_t* order;  // null: ascending
  const void* grad;
  const void* weight;  // [width] of kColumn, null: ones
  const void* own;  // [segments, width], the operand itself, where the weight's gradient is taken
  void* weight_parts;  // of Acc, [splits * blocks, width], or null
  void* out;           // [splits][segments, width], or null
  Operand other[kOperands - 1];
};

template <class Job>
struct Jobs {
  static constexpr int kMost = static_cast<int>((4096 - 32) / sizeof(Job));  // of parameters
  int count = 0;
  double* squares = nullptr;  // [blocks], or null
  Job job[kMost];

  __device__ __forceinline__ const Job& mine() const {
    int j = 0;
    while (j + 1 < count && static_cast<int>(blockIdx.x) >= job[j + 1].first) ++j;
    return job[j];
  }
};

static_assert(sizeof(Jobs<ForwardJob>) <= 4096 && sizeof(Jobs<ProductJob>) <= 4096 &&
              sizeof(Jobs<SegmentJob>) <= 4096);

// -- schedules ------------------------------------------------------------------------------------

constexpr int64_t kPlannedVersion = 1;
constexpr int64_t kPlannedHeader = 16;
struct PlannedHeader {
  int64_t version, mode, groups, batch, outputs, length, frame_elements, workspace_bytes;
  int64_t forward, backward;  // launches
  int64_t needed;             // where, for each group, 1 stands if its gradient is given, else 0
  int64_t unused[5];
};
static_assert(sizeof(PlannedHeader) == kPlannedHeader * sizeof(int64_t));

enum Space : int64_t { kNowhere, kFrames, kWorkspace, kResult, kGrad };
constexpr int64_t kWeightSpace = 16;  // + group
constexpr int64_t kGradientSpace = int64_t{1} << 32;

struct Address {
  int64_t space, offset;
};
struct OperandRecord {
  Address frame;
  int64_t ids;  // where in the lists; -1: row i
};
struct LaunchRecord {
  int64_t kind, config, jobs;
};
enum LaunchKind : int64_t { kForward, kProducts, kSegments };
struct ForwardRecord {
  int64_t kind, count, rows, width, cols;
  Address weight, out;
  OperandRecord operand[kOperands];
};
struct ProductRecord {
  int64_t kind, count, rows, width, cols, each, parts, final;
  Address weight, grad, out;
  OperandRecord operand[kOperands];
};
struct SegmentRecord {
  int64_t source, count, segments, width, rows, lane_bits, group_bits, repeats, splits, parts,
      final, start, order;
  Address grad, weight, own, weight_parts, out;
  OperandRecord other[kOperands - 1];
};

// -- launches, one file of instances for each mode ------------------------------------------------

// Tiles of a matrix product, see gather_tile.cuh.
enum Config : int64_t { kSliced, kSquare, kLarge };
struct TileSize {
  int rows, cols;
};
constexpr TileSize tile_size(int64_t config) {
  return config == kSliced   ? TileSize{32, 16}
         : config == kSquare ? TileSize{64, 64}
                             : TileSize{128, 128};
}

constexpr Config tile_of_weights(int64_t config) { return config == kLarge ? kLarge : kSquare; }

template <Mode mode>
void launch_forward(const Current& current, int64_t config, int blocks,
                    const Jobs<ForwardJob>& jobs);
template <Mode mode>
void launch_products(const Current& current, int64_t config, int blocks,
                     const Jobs<ProductJob>& jobs);
template <Mode mode>
void launch_segments(const Current& current, int blocks, const Jobs<SegmentJob>& jobs);

}  // namespace htf::gpu::planned
