// One level of the nodes of planned evaluation, forward, in one launch: jobs of three kinds.
//
//   kProduct  p W by tiles (gather_tile.cuh)
//   kDot      p w, where the node has one column (the root, mostly): 1 to 32 lanes a row, sums by
//             shuffles. Nothing is shared between samples of a bilinear root: 2048 of them are 2048
//             warps, each with 12 loads of 512 bytes in flight
//   kRows     p itself
//
// 256 threads; shared memory: of kProduct alone.
#pragma once

#include "evaluate_at/gather_tile.cuh"

namespace htf::gpu::planned {

// V numbers of a row, those from n on zero.
template <class Acc, class S>
__device__ __forceinline__ void read_chunk(Acc (&to)[kVector<S>], const S* from, int n,
                                           bool aligned) {
  const Chunk<S> chunk = read_raw(from, n, aligned);
#pragma unroll
  for (int e = 0; e < kVector<S>; ++e) to[e] = static_cast<Acc>(chunk.x[e]);
}

// p[i, k ..]
template <class Acc, class S>
__device__ __forceinline__ void product_chunk(Acc (&p)[kVector<S>], const ForwardJob& job,
                                              int64_t i, int k, S) {
  const int n = clamped(job.width - k, kVector<S>);
#pragma unroll
  for (int o = 0; o < kOperands; ++o) {
    if (o >= job.count) break;
    const Operand& operand = job.operand[o];
    const int64_t row = operand.ids == nullptr ? i : operand.ids[i];
    const S* const from = static_cast<const S*>(operand.frame) + row * job.width + k;
    Acc x[kVector<S>];
    read_chunk<Acc, S>(x, from, n, job.aligned_k);
#pragma unroll
    for (int e = 0; e < kVector<S>; ++e) p[e] = o == 0 ? x[e] : p[e] * x[e];
  }
}

template <class S>
constexpr int kInFlight = sizeof(S) == 2 ? 2 : 4;  // chunks of a row, for each lane

// sum over k of w[k] p[i, k], this lane's part. Together: rows can be read 16 bytes at a time.
template <Mode mode, bool Together>
__device__ __forceinline__ typename Numbers<mode>::Acc dot_lane(const ForwardJob& job, int i,
                                                                int lane, int lanes) {
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  constexpr int V = kVector<S>;
  constexpr int kDeep = kInFlight<S>;
  const int width = job.width, count = job.count;
  const S* const weight = static_cast<const S*>(job.weight);
  const auto row_of = [&](int o) {
    const Operand& operand = job.operand[o < count ? o : 0];
    const int64_t row = operand.ids == nullptr ? i : operand.ids[i];
    return static_cast<const S*>(operand.frame) + row * width;
  };
  const S* const first = row_of(0);
  const S* const second = row_of(1);
  Acc sum = 0;
  for (int from = lane * V; from < width; from += kDeep * lanes * V) {
    Chunk<S> a[kDeep], b[kDeep], w[kDeep];
#pragma unroll
    for (int u = 0; u < kDeep; ++u) {
      const int k = from + u * lanes * V, n = clamped(width - k, V);
      a[u] = read_raw<Together>(first + k, n);
      if (count > 1) b[u] = read_raw<Together>(second + k, n);
      if (weight != nullptr) w[u] = read_raw<Together>(weight + k, n);
    }
#pragma unroll
    for (int u = 0; u < kDeep; ++u) {
      Acc p[V];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        p[e] = static_cast<Acc>(a[u].x[e]);
        if (count > 1) p[e] *= static_cast<Acc>(b[u].x[e]);
      }
      const int k = from + u * lanes * V, n = clamped(width - k, V);
#pragma unroll 1
      for (int o = 2; o < count; ++o) {
        const Chunk<S> more = read_raw<Together>(row_of(o) + k, n);
#pragma unroll
        for (int e = 0; e < V; ++e) p[e] *= static_cast<Acc>(more.x[e]);
      }
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (weight != nullptr) p[e] *= static_cast<Acc>(w[u].x[e]);
        sum = rounded_sum(sum, p[e]);
      }
    }
  }
  return sum;
}

template <Mode mode>
__device__ __forceinline__ void dot_rows(const ForwardJob& job, int block) {
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  const int lanes = job.across, lane = threadIdx.x % lanes;
  const int i = block * (kPlannedThreads / lanes) + static_cast<int>(threadIdx.x) / lanes;
  Acc sum = 0;
  if (i < job.rows)
    sum = job.aligned_k && job.aligned_n ? dot_lane<mode, true>(job, i, lane, lanes)
                                         : dot_lane<mode, false>(job, i, lane, lanes);
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0 && i < job.rows) static_cast<S*>(job.out)[i] = static_cast<S>(sum);
}

constexpr int kChunksOfThread = 4;

template <Mode mode>
__device__ __forceinline__ void copy_rows(const ForwardJob& job, int block) {
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  constexpr int V = kVector<S>;
  const int64_t all = static_cast<int64_t>(job.rows) * job.across;
#pragma unroll
  for (int q = 0; q < kChunksOfThread; ++q) {
    const int64_t at =
        (static_cast<int64_t>(block) * kChunksOfThread + q) * kPlannedThreads + threadIdx.x;
    if (at >= all) break;
    const int64_t i = at / job.across;
    const int k = static_cast<int>(at % job.across) * V;
    Acc p[V];
    product_chunk(p, job, i, k, S{});
    S* const to = static_cast<S*>(job.out) + i * job.width + k;
    const int n = clamped(job.width - k, V);
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (e < n) to[e] = static_cast<S>(p[e]);
  }
}

template <Mode mode, Config config>
using ForwardTile = BlockTile<mode, config, true, false, true>;

template <Mode mode, Config config>
__device__ __forceinline__ void product_tile(const ForwardJob& job, int block) {
  using Tile = ForwardTile<mode, config>;
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  const int row = block / job.across * Tile::kRows, column = block % job.across * Tile::kColumns;
  const int rows = job.rows, width = job.width, cols = job.cols;
  const bool aligned = job.aligned_n;
  const S* const weight = static_cast<const S*>(job.weight);
  S* const out = static_cast<S*>(job.out);
  SameRows<Tile::kARows, Tile::kAColumns, Tile::kAStride, S, Acc, ForwardJob> p(job, row, rows);
  Tile::run(
      shared_memory<S>(), 0, width,
      [&](int k, S*, S* b) {
        fill_rows<Tile::kBRows, Tile::kBColumns, Tile::kBStride>(
            b, k, width, column, cols, aligned,
            [&](int i) { return weight + static_cast<int64_t>(i) * cols; });
      },
      [&](int k) { p.load(k); }, [&](int k, S* a) { p.store(a, row, rows, k); },
      [&](int r, int c, Acc sum) {
        if (row + r < rows && column + c < cols)
          out[static_cast<int64_t>(row + r) * cols + column + c] = static_cast<S>(sum);
      });
}

template <Mode mode, Config config>
__global__ void __launch_bounds__(kPlannedThreads, kBlocksBeside<config>)
    forward_level(const __grid_constant__ Jobs<ForwardJob> jobs) {
  const ForwardJob& job = jobs.mine();
  const int block = static_cast<int>(blockIdx.x) - job.first;
  if (job.kind == ForwardJob::kProduct)
    product_tile<mode, config>(job, block);
  else if (job.kind == ForwardJob::kDot)
    dot_rows<mode>(job, block);
  else
    copy_rows<mode>(job, block);
}

template <class Do>
void with_config(int64_t config, Do&& run) {
  if (config == kSliced)
    run(std::integral_constant<Config, kSliced>{});
  else if (config == kSquare)
    run(std::integral_constant<Config, kSquare>{});
  else
    run(std::integral_constant<Config, kLarge>{});
}

template <Mode mode>
void launch_forward(const Current& current, int64_t config, int blocks,
                    const Jobs<ForwardJob>& jobs) {
  constexpr const char* kName = "evaluate_at_planned";
  with_config(config, [&](auto c) {
    launch<forward_level<mode, c>>(kName, current, blocks, kPlannedThreads,
                                   ForwardTile<mode, c>::kBytes, jobs);
  });
}

}  // namespace htf::gpu::planned
