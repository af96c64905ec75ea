// A tile of a matrix product whose left factor is formed on load: rows gathered from up to four
// frames, multiplied, and multiplied with a matrix.
//
//   sliced   32 x 16, the inner dimension 64 numbers at a time (of 4 bytes), a slice of 8 a warp:
//            for few rows. 64 rows times 512 x 512 are 64 tiles, each of whose eight warps has a
//            product of its own to sum; the eight are added through shared memory in fixed order.
//   square   64 x 64, the inner dimension 32 numbers at a time, 2 x 4 warps of 32 x 16
//   large    128 x 128, the inner dimension 16 numbers at a time, 2 x 4 warps of 64 x 32: for so
//   many
//            rows that the GPU is full of them. A number read from shared memory is used twice as
//            often as in the other two.
//
// Rows of p are gathered into registers a step ahead (rows repeat, so that most come from the first
// level of cache), multiplied there and stored once; what is not gathered, the weight among it,
// goes through asynchronous copies of 16 bytes, two or three steps ahead. Shared memory: a ring of
// stages, a tile of the left factor and one of the right in each; one __syncthreads a stage. A tile
// is stored as its rows are in memory, [rows][columns + padding], and read either way: the padding
// (16 bytes behind rows along the inner dimension; else 32 bytes, so that strides are 4 or 8 banks
// modulo 32) makes both conflict-free. In bytes of float32: sliced 59,392, square 55,296, large
// 56,832.
#pragma once

#include "evaluate_at/planned_cuda_jobs.h"

namespace htf::gpu::planned {

template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

template <class S>
struct alignas(16) Chunk {
  S x[kVector<S>];
};

// 16 bytes, of which n numbers are there; the others become zero.
template <class S>
__device__ __forceinline__ Chunk<S> read_raw(const S* from, int n, bool aligned) {
  Chunk<S> chunk;
  if (aligned && n > 0) return *reinterpret_cast<const Chunk<S>*>(from);
#pragma unroll
  for (int e = 0; e < kVector<S>; ++e) chunk.x[e] = e < n ? from[e] : S(0);
  return chunk;
}
template <class S>
__device__ __forceinline__ void copy_chunk(S* to, const S* from, int n, bool aligned) {
  constexpr int V = kVector<S>;
  if (aligned) {
    copy_async<16>(to, from, n > 0);
    return;
  }
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const bool there = e < n;
    if constexpr (sizeof(S) >= 4) {
      copy_async<static_cast<int>(sizeof(S))>(to + e, from + (there ? e : 0), there);
    } else {
      to[e] = there ? from[e] : S(0);
    }
  }
}

// For each of this thread's chunks of a tile [Rows][Columns]: row, column, place in shared memory.
template <int Rows, int Columns, int Stride, int V, class Do>
__device__ __forceinline__ void each_chunk(Do&& run) {
  constexpr int kAcross = Columns / V;
#pragma unroll
  for (int at = 0; at < Rows * kAcross; at += kPlannedThreads) {
    const int chunk = at + static_cast<int>(threadIdx.x);
    if (Rows * kAcross % kPlannedThreads != 0 && chunk >= Rows * kAcross) break;
    const int row = chunk / kAcross, column = chunk % kAcross * V;
    run(row, column, row * Stride + column);
  }
}

__device__ __forceinline__ int clamped(int n, int most) { return n < 0 ? 0 : n < most ? n : most; }

// -- a warp's X times 32 x Y times 16 -------------------------------------------------------------

// Of 32 x 16 numbers, lane l of 8 x 4 has 4 x 4: neighbours where four of them are read at once,
// else every eighth (fourth) row (column).
template <Mode mode, int X, int Y>
struct WarpTile {
  static constexpr int kStep = 4;  // of the inner dimension at once
  float sum[X][Y][4][4] = {};

  template <bool InnerFirst, int Stride, int Lanes>
  static __device__ __forceinline__ void load(float (&to)[4][4], const float* tile, int outer,
                                              int k, int l) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (InnerFirst) {
        const float4 v =
            *reinterpret_cast<const float4*>(tile + (outer + l + Lanes * i) * Stride + k);
        to[i][0] = v.x, to[i][1] = v.y, to[i][2] = v.z, to[i][3] = v.w;
      } else {
        const float4 v = *reinterpret_cast<const float4*>(tile + (k + i) * Stride + outer + 4 * l);
        to[0][i] = v.x, to[1][i] = v.y, to[2][i] = v.z, to[3][i] = v.w;
      }
    }
  }
  template <bool AInner, int AStride, bool BInner, int BStride>
  __device__ __forceinline__ void step(const float* a, const float* b, int m, int n, int k) {
    const int lane = threadIdx.x % kWarp;
    float y[Y][4][4];
#pragma unroll
    for (int v = 0; v < Y; ++v) load<BInner, BStride, 4>(y[v], b, n + 16 * v, k, lane % 4);
#pragma unroll
    for (int u = 0; u < X; ++u) {
      float x[4][4];
      load<AInner, AStride, 8>(x, a, m + 32 * u, k, lane / 4);
#pragma unroll
      for (int v = 0; v < Y; ++v)
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
              sum[u][v][i][j] = __fmaf_rn(x[i][q], y[v][j][q], sum[u][v][i][j]);
    }
  }
  template <bool AInner, bool BInner, int Stride>
  __device__ __forceinline__ void store(float* to) const {
    const int lane = threadIdx.x % kWarp, lm = lane / 4, ln = lane % 4;
#pragma unroll
    for (int u = 0; u < X; ++u)
#pragma unroll
      for (int v = 0; v < Y; ++v)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            to[(32 * u + (AInner ? lm + 8 * i : 4 * lm + i)) * Stride + 16 * v +
               (BInner ? ln + 4 * j : 4 * ln + j)] = sum[u][v][i][j];
  }
};

// Instructions' tiles of 16 x 8.
template <int X, int Y>
struct TensorCoreTile {
  static constexpr int kM = 2 * X, kN = 2 * Y;
  float sum[kM][kN][4] = {};

  template <bool, bool, int Stride>
  __device__ __forceinline__ void store(float* to) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          to[(16 * i + g + e / 2 * 8) * Stride + 8 * j + 2 * t + e % 2] = sum[i][j][e];
  }
};

template <bool InnerFirst, int Stride, class S>
__device__ __forceinline__ S entry(const S* tile, int outer, int k) {
  return InnerFirst ? tile[outer * Stride + k] : tile[k * Stride + outer];
}

template <bool Split, int X, int Y>
struct Tf32Tile : TensorCoreTile<X, Y> {
  static constexpr int kStep = 8;
  using TensorCoreTile<X, Y>::kM;
  using TensorCoreTile<X, Y>::kN;
  using TensorCoreTile<X, Y>::sum;

  static __device__ __forceinline__ void part(float x, uint32_t& high, uint32_t& low) {
    high = to_tf32(x);
    if constexpr (Split) low = to_tf32(x - __uint_as_float(high));
  }
  template <bool AInner, int AStride, bool BInner, int BStride>
  __device__ __forceinline__ void step(const float* a, const float* b, int m, int n, int k) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    uint32_t x[kM][4], y[kN][2], x_low[kM][4] = {}, y_low[kN][2] = {};
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        part(entry<AInner, AStride>(a, m + 16 * i + g + e % 2 * 8, k + t + e / 2 * 4), x[i][e],
             x_low[i][e]);
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        part(entry<BInner, BStride>(b, n + 8 * j + g, k + t + e * 4), y[j][e], y_low[j][e]);
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if constexpr (Split) {
          mma_tf32(sum[i][j], x_low[i], y[j]);
          mma_tf32(sum[i][j], x[i], y_low[j]);
        }
        mma_tf32(sum[i][j], x[i], y[j]);
      }
  }
};
template <int X, int Y>
struct WarpTile<Mode::tf32, X, Y> : Tf32Tile<false, X, Y> {};
template <int X, int Y>
struct WarpTile<Mode::tf32x3, X, Y> : Tf32Tile<true, X, Y> {};

template <int X, int Y>
struct WarpTile<Mode::bf16, X, Y> : TensorCoreTile<X, Y> {
  static constexpr int kStep = 16;
  using TensorCoreTile<X, Y>::kM;
  using TensorCoreTile<X, Y>::kN;
  using TensorCoreTile<X, Y>::sum;

  // Two neighbours along the inner dimension.
  template <bool InnerFirst, int Stride>
  static __device__ __forceinline__ uint32_t pair(const BFloat16* tile, int outer, int k) {
    if constexpr (InnerFirst)
      return *reinterpret_cast<const uint32_t*>(tile + outer * Stride + k);
    else
      return pack_bf16(tile[k * Stride + outer], tile[(k + 1) * Stride + outer]);
  }
  template <bool AInner, int AStride, bool BInner, int BStride>
  __device__ __forceinline__ void step(const BFloat16* a, const BFloat16* b, int m, int n, int k) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    uint32_t x[kM][4], y[kN][2];
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        x[i][e] = pair<AInner, AStride>(a, m + 16 * i + g + e % 2 * 8, k + 2 * t + e / 2 * 8);
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        y[j][e] = pair<BInner, BStride>(b, n + 8 * j + g, k + 2 * t + e * 8);
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) mma_bf16(sum[i][j], x[i], y[j]);
  }
};

// Instructions' tiles of 8 x 8.
template <int X, int Y>
struct WarpTile<Mode::f64, X, Y> {
  static constexpr int kStep = 4, kM = 4 * X, kN = 2 * Y;
  double sum[kM][kN][2] = {};

  template <bool AInner, int AStride, bool BInner, int BStride>
  __device__ __forceinline__ void step(const double* a, const double* b, int m, int n, int k) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    double x[kM], y[kN];
#pragma unroll
    for (int i = 0; i < kM; ++i) x[i] = entry<AInner, AStride>(a, m + 8 * i + g, k + t);
#pragma unroll
    for (int j = 0; j < kN; ++j) y[j] = entry<BInner, BStride>(b, n + 8 * j + g, k + t);
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) mma_f64(sum[i][j], x[i], y[j]);
  }
  template <bool, bool, int Stride>
  __device__ __forceinline__ void store(double* to) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) to[(8 * i + g) * Stride + 8 * j + 2 * t + e] = sum[i][j][e];
  }
};

// -- a block's tile -------------------------------------------------------------------------------

// AInner, BInner: whether rows in memory of the left, the right factor run along the inner
// dimension: W of p W does not, W of g W^T does, p of p^T g does not.
template <Mode mode, Config config, bool AInner, bool BInner, bool Gathered>
struct BlockTile {
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  static constexpr int kRows = tile_size(config).rows, kColumns = tile_size(config).cols;
  static constexpr int kSlices = config == kSliced ? 8 : 1;
  static constexpr int kTimes = config == kLarge ? 2 : 1;
  using Warp = WarpTile<mode, kTimes, kTimes>;
  static constexpr int kInner = (config == kSliced   ? 256
                                 : config == kSquare ? 128
                                                     : 64) /
                                static_cast<int>(sizeof(S));
  static constexpr int kStages = config == kSliced ? 4 : 3;
  static constexpr int kV = kVector<S>;
  static constexpr int kAcrossPad = sizeof(S) == 8 ? 4 : 8;
  static constexpr int kInnerPad = sizeof(S) == 8 && kInner == 8 ? 4 : kV;

  static constexpr int kARows = AInner ? kRows : kInner, kAColumns = AInner ? kInner : kRows;
  static constexpr int kBRows = BInner ? kColumns : kInner, kBColumns = BInner ? kInner : kColumns;
  static constexpr int kAStride = kAColumns + (AInner ? kInnerPad : kAcrossPad);
  static constexpr int kBStride = kBColumns + (BInner ? kInnerPad : kAcrossPad);
  static constexpr int kA = kARows * kAStride, kB = kBRows * kBStride;
  static constexpr int kStage = kA + kB;
  // The sums go through shared memory in parts, so that they take no more of it than the stages.
  static constexpr int kOutStride = kColumns + kAcrossPad;
  static constexpr int kOutParts = config == kLarge ? 2 : 1, kOutRows = kRows / kOutParts;
  static constexpr std::size_t kOutBytes =
      std::size_t{kSlices} * kOutRows * kOutStride * sizeof(Acc);
  static constexpr std::size_t kStageBytes = std::size_t{kStages} * kStage * sizeof(S);
  static constexpr std::size_t kBytes = kStageBytes > kOutBytes ? kStageBytes : kOutBytes;
  static_assert(kInner % (kSlices * Warp::kStep) == 0);

  // The sums over the inner dimension `from .. to - 1`, then write(row, column, sum) for each
  // number of the tile, neighbours by neighbours.
  //   fill(k, a, b): starts the copies of a stage, of the left factor only where it is not gathered
  //   load(k), store(k, a): gathers p into this thread's registers, and from there to a
  template <class Fill, class Load, class Store, class Write>
  static __device__ __forceinline__ void run(S* memory, int from, int to, Fill&& fill, Load&& load,
                                             Store&& store, Write&& write) {
    const int count = to > from ? (to - from + kInner - 1) / kInner : 0;
    const auto a_of = [&](int s) { return memory + s % kStages * kStage; };
    const auto b_of = [&](int s) { return a_of(s) + kA; };
    const int warp = threadIdx.x / kWarp;
    const int m = kSlices > 1 ? 0 : warp / 4 * 32 * kTimes;
    const int n = kSlices > 1 ? 0 : warp % 4 * 16 * kTimes;
    const int slice = kSlices > 1 ? warp : 0;
    Warp tile;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < count) fill(from + s * kInner, a_of(s), b_of(s));
      copy_commit();
    }
    if constexpr (Gathered) {
      if (count > 0) load(from), store(from, a_of(0));
      if (count > 1) load(from + kInner);
    }
    for (int s = 0; s < count; ++s) {
      copy_wait<kStages - 2>();
      __syncthreads();
      // What is filled and stored now was last read before this barrier.
      const int next = s + kStages - 1;
      if (next < count) fill(from + next * kInner, a_of(next), b_of(next));
      copy_commit();
      if constexpr (Gathered) {
        if (s + 1 < count) store(from + (s + 1) * kInner, a_of(s + 1));
        if (s + 2 < count) load(from + (s + 2) * kInner);
      }
      const S* const a = a_of(s);
      const S* const b = b_of(s);
      constexpr int kOfSlice = kInner / kSlices;
#pragma unroll
      for (int k = 0; k < kOfSlice; k += Warp::kStep)
        tile.template step<AInner, kAStride, BInner, kBStride>(a, b, m, n, slice * kOfSlice + k);
    }
    copy_wait<0>();
    Acc* const sums = reinterpret_cast<Acc*>(memory);
#pragma unroll
    for (int part = 0; part < kOutParts; ++part) {
      const int first = part * kOutRows;
      __syncthreads();
      if (m >= first && m < first + kOutRows)
        tile.template store<AInner, BInner, kOutStride>(
            sums + (slice * kOutRows + m - first) * kOutStride + n);
      __syncthreads();
      for (int at = threadIdx.x; at < kOutRows * kColumns; at += kPlannedThreads) {
        const int row = at / kColumns, column = at % kColumns;
        Acc sum = 0;
#pragma unroll
        for (int q = 0; q < kSlices; ++q) sum += sums[(q * kOutRows + row) * kOutStride + column];
        write(first + row, column, sum);
      }
    }
  }
};

// Blocks of a processor at once, for which registers are left.
template <Mode mode, Config config>
constexpr int kBlocksBeside = config == kLarge && mode != Mode::tf32 ? 1 : 2;

// Rows first .. end - 1 and columns of a matrix into a tile; row(i) is where row i starts.
template <int Rows, int Columns, int Stride, class S, class Row>
__device__ __forceinline__ void fill_rows(S* tile, int first, int end, int column, int columns,
                                          bool aligned, Row&& row) {
  constexpr int V = kVector<S>;
  each_chunk<Rows, Columns, Stride, V>([&](int r, int c, int at) {
    const int n = first + r < end ? clamped(columns - column - c, V) : 0;
    const S* const from = row(n > 0 ? first + r : first);
    copy_chunk(tile + at, from + (n > 0 ? column + c : 0), n, aligned);
  });
}

// A tile [Rows][Columns] of p in registers: chunks of the first two operands as they are in memory.
// ids: [2][Most], of rows `base` and on.
template <int Rows, int Columns, int Stride, int Most, class S, class Acc, class Job>
class Gather {
 public:
  __device__ __forceinline__ Gather(const Job& job, const int* ids, int base)
      : job_(job), ids_(ids), base_(base) {}

  __device__ __forceinline__ void load(int first, int end, int column) {
    int c = 0;
    each_chunk<Rows, Columns, Stride, V>([&](int r, int at, int) {
      const int n = first + r < end ? clamped(job_.width - column - at, V) : 0;
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        if (o >= job_.count) break;
        const int64_t row = n > 0 ? ids_[o * Most + first + r - base_] : 0;
        const S* const from =
            static_cast<const S*>(job_.operand[o].frame) + row * job_.width + column + at;
        raw_[o][c] = read_raw(from, n, job_.aligned_k);
      }
      ++c;
    });
  }

  __device__ __forceinline__ void store(S* a, int first, int end, int column) {
    int c = 0;
    each_chunk<Rows, Columns, Stride, V>([&](int r, int at, int place) {
      Chunk<S> chunk = raw_[0][c];
      if (job_.count > 1) {
        Acc p[V];
#pragma unroll
        for (int e = 0; e < V; ++e)
          p[e] = static_cast<Acc>(chunk.x[e]) * static_cast<Acc>(raw_[1][c].x[e]);
        const int n = first + r < end ? clamped(job_.width - column - at, V) : 0;
        for (int o = 2; o < job_.count && n > 0; ++o) {
          const Operand& other = job_.operand[o];
          const int64_t i = other.ids == nullptr ? first + r : other.ids[first + r];
          const Chunk<S> more = read_raw(
              static_cast<const S*>(other.frame) + i * job_.width + column + at, n, job_.aligned_k);
#pragma unroll
          for (int e = 0; e < V; ++e) p[e] *= static_cast<Acc>(more.x[e]);
        }
#pragma unroll
        for (int e = 0; e < V; ++e) chunk.x[e] = static_cast<S>(p[e]);
      }
      *reinterpret_cast<Chunk<S>*>(a + place) = chunk;
      ++c;
    });
  }

 private:
  static constexpr int V = kVector<S>, kChunks = Rows * Columns / V / kPlannedThreads;
  static_assert(Rows * Columns % (V * kPlannedThreads) == 0);

  const Job& job_;
  const int* ids_;
  int base_;
  Chunk<S> raw_[2][kChunks];
};

// Rows of the first two operands, for rows first .. first + Most - 1 of p, read ahead.
template <int Most, class Job>
__device__ __forceinline__ void read_ids(const Job& job, int* ids, int first, int end) {
#pragma unroll
  for (int o = 0; o < 2; ++o) {
    if (o >= job.count) break;
    const int32_t* const list = job.operand[o].ids;
    for (int r = threadIdx.x; r < Most && first + r < end; r += kPlannedThreads)
      ids[o * Most + r] = list == nullptr ? first + r : list[first + r];
  }
  __syncthreads();
}

// -- what blocks write and leave ------------------------------------------------------------------

// Writes a number as it is stored; the square of what was written.
template <class S, class Acc>
__device__ __forceinline__ Acc put(void* to, int64_t at, Acc x, bool parts) {
  if (parts) {
    static_cast<Acc*>(to)[at] = x;
    return x * x;
  }
  const S stored = static_cast<S>(x);
  static_cast<S*>(to)[at] = stored;
  return static_cast<Acc>(stored) * static_cast<Acc>(stored);
}

// Each thread's sum of squares to the block's place. Shared memory is free before.
template <class Acc>
__device__ __forceinline__ void leave_squares(double* squares, Acc mine, Acc* memory) {
  if (squares == nullptr) return;
  mine = warp_sum(mine);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int w = 0; w < kPlannedThreads / kWarp; ++w) sum += static_cast<double>(memory[w]);
    squares[blockIdx.x] = sum;
  }
}

}  // namespace htf::gpu::planned
