// A tile of a matrix product whose left factor is formed on load: rows gathered from up to four
// frames, multiplied, and multiplied with a matrix.
//
//   sliced   32 x 16, the inner dimension 64 numbers at a time (of 4 bytes), a slice of 8 for each
//            warp: for few rows. 64 rows times 512 x 512 are 64 tiles, and each of a tile's eight
//            warps has a product of its own to sum. Shared memory adds the eight in fixed order.
//   square   64 x 64, the inner dimension 32 numbers at a time, 2 x 4 warps of 32 x 16
//   large    128 x 128, the inner dimension 16 numbers at a time, 2 x 4 warps of 64 x 32: for so
//            many rows that they fill the GPU. A number read from shared memory is used twice as
//            often as in the other two.
//
// Rows of p are gathered into registers one step ahead (rows repeat, so that most come from the
// first level of cache), multiplied there and stored once. What is not gathered, the weight among
// it, goes through asynchronous copies of 16 bytes, two or three steps ahead. Shared memory holds a
// ring of stages, with a tile of the left factor and one of the right in each, and one
// __syncthreads for each stage. A tile is stored as its rows are in memory, [rows][columns +
// padding], and read either way. The padding makes both conflict-free: 16 bytes behind rows along
// the inner dimension; else 32 bytes, so that strides are 4 or 8 banks modulo 32. Bytes in float32:
// sliced 59,392, square 55,296, large 56,832.
#pragma once

#include "evaluate_at/gather_warp.cuh"

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
// The same where it is known beforehand, without a branch around the load where Together.
template <bool Together, class S>
__device__ __forceinline__ Chunk<S> read_raw(const S* from, int n) {
  if constexpr (!Together) {
    return read_raw(from, n, false);
  } else {
    Chunk<S> chunk{};
    if (n > 0) chunk = *reinterpret_cast<const Chunk<S>*>(from);
    return chunk;
  }
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
      // Split operands and partial sums of several steps at once are more than registers hold.
      [[maybe_unused]] constexpr int kTogether = mode == Mode::tf32x3 ? 1 : kOfSlice / Warp::kStep;
#pragma unroll kTogether
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
template <Config config>
constexpr int kBlocksBeside = config == kLarge ? 1 : 2;

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
// What jobs say is copied: constant memory at a computed place is slow to read again and again.
template <int Rows, int Columns, int Stride, class S, class Acc, class Job>
class Chunks {
 public:
  __device__ __forceinline__ explicit Chunks(const Job& job)
      : width_(job.width),
        two_(job.count > 1),
        more_(job.count > 2),
        aligned_(job.aligned_k),
        job_(job) {}

  // The product of what was loaded, for rows first .. end - 1 and columns `column` and on.
  __device__ __forceinline__ void store(S* a, int first, int end, int column) {
    int c = 0;
    each_chunk<Rows, Columns, Stride, V>([&](int r, int at, int place) {
      Chunk<S> chunk = raw_[0][c];
      if (two_) {
        Acc p[V];
#pragma unroll
        for (int e = 0; e < V; ++e)
          p[e] = static_cast<Acc>(chunk.x[e]) * static_cast<Acc>(raw_[1][c].x[e]);
        if (more_ && first + r < end) multiply(p, first + r, column + at);
#pragma unroll
        for (int e = 0; e < V; ++e) chunk.x[e] = static_cast<S>(p[e]);
      }
      *reinterpret_cast<Chunk<S>*>(a + place) = chunk;
      ++c;
    });
  }

 protected:
  static constexpr int V = kVector<S>, kChunks = Rows * Columns / V / kPlannedThreads;
  static_assert(Rows * Columns % (V * kPlannedThreads) == 0);

  int width_;
  bool two_, more_, aligned_;
  Chunk<S> raw_[2][kChunks];

 private:
  __device__ __forceinline__ void multiply(Acc (&p)[V], int row, int column) const {
    const int n = clamped(width_ - column, V);
#pragma unroll 1
    for (int o = 2; o < job_.count; ++o) {
      const Operand& other = job_.operand[o];
      const int64_t i = other.ids == nullptr ? row : other.ids[row];
      const Chunk<S> more =
          read_raw(static_cast<const S*>(other.frame) + i * width_ + column, n, aligned_);
#pragma unroll
      for (int e = 0; e < V; ++e) p[e] *= static_cast<Acc>(more.x[e]);
    }
  }

  const Job& job_;
};

// The same rows for all columns.
template <int Rows, int Columns, int Stride, class S, class Acc, class Job>
class SameRows : public Chunks<Rows, Columns, Stride, S, Acc, Job> {
 public:
  __device__ __forceinline__ SameRows(const Job& job, int first, int end) : Base(job) {
    int c = 0;
    each_chunk<Rows, Columns, Stride, V>([&](int r, int at, int) {
      there_[c] = first + r < end;
      const int i = there_[c] ? first + r : first;
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const Operand& operand = job.operand[o < job.count ? o : 0];
        const int64_t row = operand.ids == nullptr ? i : operand.ids[i];
        from_[o][c] = static_cast<const S*>(operand.frame) + row * job.width + at;
      }
      ++c;
    });
  }
  __device__ __forceinline__ void load(int column) {
    int c = 0;
    each_chunk<Rows, Columns, Stride, V>([&](int, int at, int) {
      const int n = there_[c] ? clamped(this->width_ - column - at, V) : 0;
      this->raw_[0][c] = read_raw(from_[0][c] + column, n, this->aligned_);
      if (this->two_) this->raw_[1][c] = read_raw(from_[1][c] + column, n, this->aligned_);
      ++c;
    });
  }

 private:
  using Base = Chunks<Rows, Columns, Stride, S, Acc, Job>;
  using Base::V, Base::kChunks;
  bool there_[kChunks];
  const S* from_[2][kChunks];
};

// The same columns for all rows, of which `ids` [2][kIdsTogether] has those from `base` on.
template <int Rows, int Columns, int Stride, class S, class Acc, class Job>
class SameColumns : public Chunks<Rows, Columns, Stride, S, Acc, Job> {
 public:
  __device__ __forceinline__ SameColumns(const Job& job, const int* ids, int base, int column)
      : Base(job), ids_(ids - base), column_(column) {
    for (int o = 0; o < 2; ++o)
      frame_[o] = static_cast<const S*>(job.operand[o < job.count ? o : 0].frame) + column;
  }
  __device__ __forceinline__ void load(int first, int end) {
    int c = 0;
    each_chunk<Rows, Columns, Stride, V>([&](int r, int at, int) {
      const int n = first + r < end ? clamped(this->width_ - column_ - at, V) : 0;
      const auto read = [&](int o) {
        const int64_t row = n > 0 ? ids_[o * kIdsTogether + first + r] : 0;
        return read_raw(frame_[o] + row * this->width_ + at, n, this->aligned_);
      };
      this->raw_[0][c] = read(0);
      if (this->two_) this->raw_[1][c] = read(1);
      ++c;
    });
  }

 private:
  using Base = Chunks<Rows, Columns, Stride, S, Acc, Job>;
  using Base::V;
  const int* ids_;
  int column_;
  const S* frame_[2];
};

// Rows of the first two operands, for rows first .. end - 1 of p, read ahead.
template <class Job>
__device__ __forceinline__ void read_ids(const Job& job, int* ids, int first, int end) {
  for (int o = 0; o < 2 && o < job.count; ++o) {
    const int32_t* const list = job.operand[o].ids;
    for (int i = first + threadIdx.x; i < end; i += kPlannedThreads)
      ids[o * kIdsTogether + i - first] = list == nullptr ? i : list[i];
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
