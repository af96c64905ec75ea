// One level of the nodes of planned evaluation, forward, in one launch: jobs of three kinds.
//
//   kProduct  p W by tiles (gather_tile.cuh)
//   kDot      p w, where the node has one column (the root, mostly): 1 to 32 lanes a row, sums by
//             shuffles; samples of a bilinear root are independent and in their own order, all the
//             latency is hidden by 2048 of them being 256 blocks of eight warps
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

template <Mode mode>
__device__ __forceinline__ void dot_rows(const ForwardJob& job, int block) {
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  constexpr int V = kVector<S>;
  const int lanes = job.across, lane = threadIdx.x % lanes;
  const int64_t i = static_cast<int64_t>(block) * (kPlannedThreads / lanes) + threadIdx.x / lanes;
  const S* const weight = static_cast<const S*>(job.weight);
  Acc sum = 0;
  if (i < job.rows) {
#pragma unroll 4
    for (int k = lane * V; k < job.width; k += lanes * V) {
      Acc p[V], w[V];
      product_chunk(p, job, i, k, S{});
      const int n = clamped(job.width - k, V);
      if (weight != nullptr) read_chunk<Acc, S>(w, weight + k, n, job.aligned_n);
#pragma unroll
      for (int e = 0; e < V; ++e) sum += weight == nullptr ? (e < n ? p[e] : Acc{0}) : p[e] * w[e];
    }
  }
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
struct ForwardTile : BlockTile<mode, config, true, false, true> {
  using Tile = BlockTile<mode, config, true, false, true>;
  static constexpr std::size_t kIds = 2 * Tile::kRows * sizeof(int);
  static constexpr std::size_t kShared = kIds + Tile::kBytes;
};

template <Mode mode, Config config>
__device__ __forceinline__ void product_tile(const ForwardJob& job, int block) {
  using Tile = ForwardTile<mode, config>;
  using S = typename Numbers<mode>::S;
  using Acc = typename Numbers<mode>::Acc;
  int* const ids = shared_memory<int>();  // [2][kRows]
  S* const memory = reinterpret_cast<S*>(shared_memory<unsigned char>() + Tile::kIds);
  const int row = block / job.across * Tile::kRows, column = block % job.across * Tile::kColumns;
  read_ids<Tile::kRows>(job, ids, row, job.rows);
  Gather<Tile::kARows, Tile::kAColumns, Tile::kAStride, Tile::kRows, S, Acc, ForwardJob> p(job, ids,
                                                                                           row);
  const S* const weight = static_cast<const S*>(job.weight);
  Tile::run(
      memory, 0, job.width,
      [&](int k, S*, S* b) {
        fill_rows<Tile::kBRows, Tile::kBColumns, Tile::kBStride>(
            b, k, job.width, column, job.cols, job.aligned_n,
            [&](int i) { return weight + static_cast<int64_t>(i) * job.cols; });
      },
      [&](int k) { p.load(row, job.rows, k); }, [&](int k, S* a) { p.store(a, row, job.rows, k); },
      [&](int r, int c, Acc sum) {
        if (row + r < job.rows && column + c < job.cols)
          static_cast<S*>(job.out)[static_cast<int64_t>(row + r) * job.cols + column + c] =
              static_cast<S>(sum);
      });
}

template <Mode mode, Config config>
__global__ void __launch_bounds__(kPlannedThreads, kBlocksBeside<mode, config>)
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
                                   ForwardTile<mode, c>::kShared, jobs);
  });
}

}  // namespace htf::gpu::planned
