// A warp's part of a tile of a matrix product, X times 32 by Y times 16 numbers in registers, from
// two tiles in shared memory: on float32 multiply-adds, or on tensor cores in TF32 (operands
// rounded to the nearest; in three products of split operands), bfloat16 or float64.
//
//   step<AInner, AStride, BInner, BStride>(a, b, m, n, k)   adds kStep of the inner dimension
//   store<AInner, BInner, Stride>(to)                       writes the sums
//
// A number of a factor is at [outer * stride + inner] where its rows are along the inner dimension
// (Inner), else at [inner * stride + outer]. Strides that are 4 (8) banks modulo 32 in the first
// (second) case make all reads free of conflicts.
#pragma once

#include "evaluate_at/planned_cuda_jobs.h"

namespace htf::gpu::planned {

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
          // None onto the long sum: tensor cores cut off, and would take half a unit in its last
          // place each time, always towards zero. Additions round.
          float part[4] = {}, small[4] = {};
          mma_tf32(small, x_low[i], y[j]);
          mma_tf32(small, x[i], y_low[j]);
          mma_tf32(part, x[i], y[j]);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][j][e] += part[e] + small[e];
        } else {
          mma_tf32(sum[i][j], x[i], y[j]);
        }
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

}  // namespace htf::gpu::planned
