// Gradients of one level of the nodes of planned evaluation, in two launches that follow each
// other; both of 256 threads.
//
// products_level
//   kRows    dp = g W^T, the gradient of p, formed once
//   kWeight  p^T g, in square tiles, over up to 1024 rows a part: parts are summed later
//   They do not depend on each other and fill the GPU together: 64 rows of rank 512 are 64 sliced
//   tiles of the first kind and 64 square ones of the second, with equally many multiply-adds.
//
// segments_level
//   out[j, :] = sum over the rows i of segment j, in their order, of dp[i, :] * the others' rows
//   the gradient of an operand's frame: row j of it was read for the rows of segment j. Where the
//   node has one column, dp = g w^T is not formed: w comes in at the end, and with the sum Z that
//   is there before it the weight's gradient is sum over j of own[j, :] * Z[j, :], of which each
//   block leaves its part. A row has 1 to 32 lanes of 16 bytes, a segment `groups` of them that
//   take every groups-th row, four rows in flight each; what groups have is added through shared
//   memory ([256] chunks of Acc), ascending. Sums of parts are segments too: one, of all rows.
#pragma once

#include "evaluate_at/gather_forward.cuh"

namespace htf::gpu::planned {

template <Mode mode, Config config>
using RowsTile = BlockTile<mode, config, true, true, false>;
template <Mode mode, Config config>
using WeightTile = BlockTile<mode, tile_of_weights(config), false, false, true>;
constexpr std::size_t kIdsBytes = 2 * kIdsTogether * sizeof(int);

template <Mode mode, Config config>
constexpr std::size_t kProductsShared =
    RowsTile<mode, config>::kBytes > kIdsBytes + WeightTile<mode, config>::kBytes
        ? RowsTile<mode, config>::kBytes
        : kIdsBytes + WeightTile<mode, config>::kBytes;

template <Mode mode, Config config>
__device__ __forceinline__ typename Numbers<mode>::Acc rows_tile(const ProductJob& job, int block) {
  using Tile = RowsTile<mode, config>;
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  const int row = block / job.across * Tile::kRows, column = block % job.across * Tile::kColumns;
  const int rows = job.rows, width = job.width, cols = job.cols;
  const bool aligned = job.aligned_n, parts = job.parts;
  const auto row_of = [cols](const void* from) {
    return [cols, from = static_cast<const S*>(from)](int i) {
      return from + static_cast<int64_t>(i) * cols;
    };
  };
  const auto grad = row_of(job.grad), weight = row_of(job.weight);
  void* const out = job.out;
  Acc squares = 0;
  Tile::run(
      shared_memory<S>(), 0, cols,
      [&](int k, S* a, S* b) {
        fill_rows<Tile::kARows, Tile::kAColumns, Tile::kAStride>(a, row, rows, k, cols, aligned,
                                                                 grad);
        fill_rows<Tile::kBRows, Tile::kBColumns, Tile::kBStride>(b, column, width, k, cols, aligned,
                                                                 weight);
      },
      [](int) {}, [](int, S*) {},
      [&](int r, int c, Acc sum) {
        if (row + r < rows && column + c < width)
          squares +=
              put<S, Acc>(out, static_cast<int64_t>(row + r) * width + column + c, sum, parts);
      });
  return squares;
}

template <Mode mode, Config config>
__device__ __forceinline__ typename Numbers<mode>::Acc weight_tile(const ProductJob& job,
                                                                   int block) {
  using Tile = WeightTile<mode, config>;
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  int* const ids = shared_memory<int>();  // [2][kIdsTogether]
  S* const memory = reinterpret_cast<S*>(shared_memory<unsigned char>() + kIdsBytes);
  const int part = block / job.tiles, tile = block % job.tiles;
  const int row = tile / job.across * Tile::kRows, column = tile % job.across * Tile::kColumns;
  const int64_t start = static_cast<int64_t>(part) * job.each;
  const int first = static_cast<int>(start < job.rows ? start : job.rows);
  const int end = job.rows - first > job.each ? first + job.each : job.rows;
  const int width = job.width, cols = job.cols;
  const bool aligned = job.aligned_n, parts = job.parts;
  const S* const grad = static_cast<const S*>(job.grad);
  void* const out = job.out;
  read_ids(job, ids, first, end);
  SameColumns<Tile::kARows, Tile::kAColumns, Tile::kAStride, S, Acc, ProductJob> p(job, ids, first,
                                                                                   row);
  Acc squares = 0;
  Tile::run(
      memory, first, end,
      [&](int i, S*, S* b) {
        fill_rows<Tile::kBRows, Tile::kBColumns, Tile::kBStride>(
            b, i, end, column, cols, aligned,
            [&](int q) { return grad + static_cast<int64_t>(q) * cols; });
      },
      [&](int i) { p.load(i, end); }, [&](int i, S* a) { p.store(a, i, end, row); },
      [&](int r, int c, Acc sum) {
        if (row + r >= width || column + c >= cols) return;
        const int64_t at = (static_cast<int64_t>(part) * width + row + r) * cols + column + c;
        squares += put<S, Acc>(out, at, sum, parts);
      });
  return squares;
}

template <Mode mode, Config config>
__global__ void __launch_bounds__(kPlannedThreads, kBlocksBeside<config>)
    products_level(const __grid_constant__ Jobs<ProductJob> jobs) {
  using Acc = typename Numbers<mode>::Acc;
  const ProductJob& job = jobs.mine();
  const int block = static_cast<int>(blockIdx.x) - job.first;
  const Acc squares = job.kind == ProductJob::kRows ? rows_tile<mode, config>(job, block)
                                                    : weight_tile<mode, config>(job, block);
  leave_squares(jobs.squares, job.final ? squares : Acc{0}, shared_memory<Acc>());
}

// -- segments -------------------------------------------------------------------------------------

constexpr int kTogether = 4;  // rows in flight of a thread

enum class Read { parts, single, together };

// The sum over rows low, low + groups, .. below high, of columns k and on.
template <Mode mode, Read how>
__device__ __forceinline__ void segment_sum(
    typename Numbers<mode>::Acc (&total)[kVector<typename Numbers<mode>::S>], const SegmentJob& job,
    int low, int high, int groups, int k, int n) {
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  constexpr int V = kVector<S>;
  const int width = job.width;
  for (int q = low; q < high; q += kTogether * groups) {
    const int rows = ((high - q - 1) >> job.group_bits) + 1;  // there are
    const auto there = [&](int u) { return u < rows ? n : 0; };
    if constexpr (how == Read::parts) {
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const Acc* const from =
            static_cast<const Acc*>(job.grad) + static_cast<int64_t>(q + u * groups) * width + k;
#pragma unroll
        for (int e = 0; e < V; ++e) total[e] += e < there(u) ? from[e] : Acc{0};
      }
    } else {
      constexpr bool kTogetherRead = how == Read::together;
      const auto read = [&](const void* frame, int row, int u) {
        return read_raw<kTogetherRead>(
            static_cast<const S*>(frame) + static_cast<int64_t>(row) * width + k, there(u));
      };
      const auto row_of = [&](const Operand& other, int i, int u) {
        return other.ids == nullptr || u >= rows ? i : other.ids[i];
      };
      // All loads before what they are for: the rows' numbers, then both factors.
      const bool column = job.source == SegmentJob::kColumn;
      int i[kTogether];
      S g[kTogether];
      Chunk<S> dp[kTogether], x[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int at = q + u * groups;
        i[u] = u < rows ? (job.order == nullptr ? at : job.order[at]) : 0;
      }
      if (column) {
#pragma unroll
        for (int u = 0; u < kTogether; ++u)
          g[u] = u < rows ? static_cast<const S*>(job.grad)[i[u]] : S(0);
      } else {
#pragma unroll
        for (int u = 0; u < kTogether; ++u) dp[u] = read(job.grad, i[u], u);
      }
      if (job.count > 0) {
        int row[kTogether];
#pragma unroll
        for (int u = 0; u < kTogether; ++u) row[u] = row_of(job.other[0], i[u], u);
#pragma unroll
        for (int u = 0; u < kTogether; ++u) x[u] = read(job.other[0].frame, row[u], u);
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        Acc term[V];
#pragma unroll
        for (int e = 0; e < V; ++e) {
          term[e] = static_cast<Acc>(column ? g[u] : dp[u].x[e]);
          if (job.count > 0) term[e] *= static_cast<Acc>(x[u].x[e]);
        }
#pragma unroll 1
        for (int o = 1; o < job.count; ++o) {
          const Operand& other = job.other[o];
          const Chunk<S> more = read(other.frame, row_of(other, i[u], u), u);
#pragma unroll
          for (int e = 0; e < V; ++e) term[e] *= static_cast<Acc>(more.x[e]);
        }
#pragma unroll
        for (int e = 0; e < V; ++e) total[e] = rounded_sum(total[e], term[e]);
      }
    }
  }
}

template <Mode mode>
constexpr std::size_t kSegmentsShared =
    static_cast<std::size_t>(kPlannedThreads) * kVector<typename Numbers<mode>::S> *
    sizeof(typename Numbers<mode>::Acc);

// Adds what the threads tid, tid + step, .. below end have, ascending; for all threads together,
// and the result only where `mine`.
template <int V, class Acc>
__device__ __forceinline__ void add_threads(Acc (&x)[V], Acc* memory, bool mine, int step,
                                            int count) {
  __syncthreads();
#pragma unroll
  for (int e = 0; e < V; ++e) memory[e * kPlannedThreads + threadIdx.x] = x[e];
  __syncthreads();
  if (!mine) return;
  for (int q = 1; q < count; ++q)
#pragma unroll
    for (int e = 0; e < V; ++e) x[e] += memory[e * kPlannedThreads + threadIdx.x + q * step];
}

template <Mode mode>
__global__ void __launch_bounds__(kPlannedThreads, mode == Mode::bf16 ? 2 : 3)
    segments_level(const __grid_constant__ Jobs<SegmentJob> jobs) {
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  constexpr int V = kVector<S>;
  const SegmentJob& job = jobs.mine();
  Acc* const memory = shared_memory<Acc>();
  const int block = static_cast<int>(blockIdx.x) - job.first;
  const int part = block / job.chunks / job.blocks;  // of the rows of each segment
  const int place = block / job.chunks % job.blocks;
  const int lanes = 1 << job.lane_bits, groups = 1 << job.group_bits;
  const int lane = threadIdx.x & (lanes - 1);
  const int group = threadIdx.x >> job.lane_bits & (groups - 1);
  const int beside = threadIdx.x >> (job.lane_bits + job.group_bits);
  const int together = kPlannedThreads >> (job.lane_bits + job.group_bits);
  const int k = (block % job.chunks * lanes + lane) * V, n = clamped(job.width - k, V);
  Acc of_weight[V] = {}, squares = 0;
  for (int repeat = 0; repeat < job.repeats; ++repeat) {
    const int j = (place * job.repeats + repeat) * together + beside;
    const bool there = j < job.segments && n > 0;
    Acc total[V] = {};
    if (there) {
      int low = j, high = j + 1;
      if (job.start != nullptr)
        low = job.start[j], high = job.start[j + 1];
      else if (job.segments == 1)
        high = job.rows;
      if (job.splits > 1) {
        const int each = (high - low + job.splits - 1) / job.splits;
        low += part * each;
        high = low + each < high ? low + each : high;
      }
      if (job.source == SegmentJob::kParts)
        segment_sum<mode, Read::parts>(total, job, low + group, high, groups, k, n);
      else if (job.aligned)
        segment_sum<mode, Read::together>(total, job, low + group, high, groups, k, n);
      else
        segment_sum<mode, Read::single>(total, job, low + group, high, groups, k, n);
      if (job.weight_parts != nullptr) {
        Acc own[V];
        read_chunk<Acc, S>(own,
                           static_cast<const S*>(job.own) + static_cast<int64_t>(j) * job.width + k,
                           n, job.aligned);
#pragma unroll
        for (int e = 0; e < V; ++e) of_weight[e] += own[e] * total[e];
      }
    }
    if (job.out == nullptr) continue;
    if (groups > 1) add_threads<V>(total, memory, group == 0, lanes, groups);
    if (!there || group != 0) continue;
    if (job.source == SegmentJob::kColumn && job.weight != nullptr) {
      Acc w[V];
      read_chunk<Acc, S>(w, static_cast<const S*>(job.weight) + k, n, job.aligned);
#pragma unroll
      for (int e = 0; e < V; ++e) total[e] *= w[e];
    }
    const int64_t at = (static_cast<int64_t>(part) * job.segments + j) * job.width + k;
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (e < n) squares += put<S, Acc>(job.out, at + e, total[e], job.parts);
  }
  if (job.weight_parts != nullptr) {
    const bool mine = static_cast<int>(threadIdx.x) < lanes;
    add_threads<V>(of_weight, memory, mine, lanes, kPlannedThreads >> job.lane_bits);
    Acc* const to = static_cast<Acc*>(job.weight_parts) +
                    (static_cast<int64_t>(part) * job.blocks + place) * job.width + k;
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (mine && e < n) to[e] = of_weight[e];
  }
  leave_squares(jobs.squares, job.final ? squares : Acc{0}, memory);
}

template <Mode mode>
void launch_products(const Current& current, int64_t config, int blocks,
                     const Jobs<ProductJob>& jobs) {
  constexpr const char* kName = "evaluate_at_planned_backward";
  with_config(config, [&](auto c) {
    launch<products_level<mode, c>>(kName, current, blocks, kPlannedThreads,
                                    kProductsShared<mode, c>, jobs);
  });
}

template <Mode mode>
void launch_segments(const Current& current, int blocks, const Jobs<SegmentJob>& jobs) {
  launch<segments_level<mode>>("evaluate_at_planned_backward", current, blocks, kPlannedThreads,
                               kSegmentsShared<mode>, jobs);
}

}  // namespace htf::gpu::planned
