// multiply: a factor through a weight, with the powers of two of both taken in.
//
//   out[rows, n] = x[rows, inner] S[inner, n],  S = 2^x_exponents W 2^-out_exponents
//
//   x      -1: the identity, and out is S [inner, n]
//   W      [inner, n] from the weights, or with mode 1 the transpose of [n, inner]; -1: ones
//   out_exponents   of each column the largest exponent of an entry 2^x_exponents W, so that S has
//          its columns' largest entries between a half and 1, however far apart rows of W and
//          columns of x are; entries 2^-1100 below are zero. -2^30 where a column is zero.
//
// A block for each 64 columns of a task: it finds their exponents, then has 128 rows of S at a time
// in shared memory (70 KB) and every warp takes eight rows of x, read once for all columns, on the
// tensor cores (mma_f64). S is made once where inner <= 128, else for each 64 rows of x. A node of
// R = 64 is 0.5 Mflop and 96 KB.
#include <algorithm>

#include "spectra/steps.cuh"

namespace htf::gpu {
namespace {

constexpr int kTile = 64;       // columns of a block
constexpr int kDepth = 128;     // rows of S at a time
constexpr int kLd = kTile + 4;  // see padded_row
constexpr int kGroups = kThreads / kTile;
constexpr int kAtOnce = 4;  // rows of W that a thread has under way
constexpr int64_t kNothing = -(int64_t{1} << 40);
constexpr int64_t kLeast = -(int64_t{1} << 30);

struct Weight {
  const double* w;  // null: ones
  int row, column;  // strides

  __device__ double operator()(int i, int j) const {
    return w == nullptr ? 1.0 : w[static_cast<int64_t>(i) * row + static_cast<int64_t>(j) * column];
  }
};

// A column's part in rows first, first + kGroups, ..; zeros from row `end` on.
struct Rows {
  double w[kAtOnce];
  int64_t exponent[kAtOnce];

  __device__ __forceinline__ Rows(const Weight& weight, const SpectraData& d, int64_t exponents,
                                  int first, int end, int column) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = first + u * kGroups;
      w[u] = i < end ? weight(i, column) : 0.0;
      exponent[u] = i < end ? exponent_at(d.exponents, exponents, i) : 0;
    }
  }
};

struct Mantissa {
  double value;
  int64_t exponent;
};
__device__ __forceinline__ Mantissa split(double w, int64_t exponent) {
  if (w == 0) return {0.0, kNothing};
  if (!(fabs(w) <= 1.7976931348623157e308)) return {w, exponent};
  int k = 0;
  const double m = frexp(w, &k);
  return {m, k + exponent};
}
__device__ __forceinline__ double scaled(double w, int64_t exponent, int64_t top) {
  const Mantissa m = split(w, exponent);
  const int64_t by = m.exponent - top;
  return ldexp(m.value, by < -1100 ? -1100 : static_cast<int>(by));
}

__global__ void __launch_bounds__(kThreads) multiply_kernel(SpectraData d) {
  const SpectraTask k = d.task[blockIdx.x];
  const int n = static_cast<int>(k.columns), inner = static_cast<int>(k.inner);
  const int first = blockIdx.y * kTile;
  if (first >= n) return;
  const Weight w{k.weight < 0 ? nullptr : d.weights + k.weight, k.mode == 1 ? 1 : n,
                 k.mode == 1 ? inner : 1};
  // The columns' exponents: four threads for each.
  int64_t* tops = shared_memory<int64_t>();  // [kGroups][kTile], then [kTile]
  const int j = threadIdx.x % kTile, group = threadIdx.x / kTile, column = first + j;
  int64_t top = kNothing;
  if (column < n)
    for (int i = group; i < inner; i += kGroups * kAtOnce) {
      const Rows rows(w, d, k.x_exponents, i, inner, column);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t e = split(rows.w[u], rows.exponent[u]).exponent;
        top = e > top ? e : top;
      }
    }
  tops[group * kTile + j] = top;
  __syncthreads();
  top = kLeast;
  for (int other = 0; other < kGroups; ++other) {
    const int64_t e = tops[other * kTile + j];
    top = e > top ? e : top;
  }
  __syncthreads();
  if (group == 0 && column < n) d.exponents[k.out_exponents + column] = top;
  double* out = d.memory + k.out;
  if (k.x < 0) {
    if (column >= n) return;
    for (int i = group; i < inner; i += kGroups * kAtOnce) {
      const Rows rows(w, d, k.x_exponents, i, inner, column);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (i + u * kGroups < inner)
          out[static_cast<int64_t>(i + u * kGroups) * n + column] =
              scaled(rows.w[u], rows.exponent[u], top);
    }
    return;
  }
  double* s = shared_memory<double>();  // [kDepth at most, a multiple of 4][kLd]
  const double* x = d.memory + k.x;
  const int rows = static_cast<int>(k.x_rows);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int i0 = 0; i0 < rows; i0 += kThreads / kWarp * 8) {
    const int i = i0 + threadIdx.x / kWarp * 8 + g;
    const bool there = i < rows;
    const double* row = x + static_cast<int64_t>(there ? i : 0) * inner;
    double sum[kTile / 8][2] = {};
    for (int c0 = 0; c0 < inner; c0 += kDepth) {
      const int depth = inner - c0 < kDepth ? inner - c0 : kDepth;
      if (i0 == 0 || inner > kDepth) {
        __syncthreads();
        for (int r = group; r < round_up(depth, 4); r += kGroups * kAtOnce) {
          const Rows own(w, d, k.x_exponents, c0 + r, column < n ? c0 + depth : 0, column);
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u)
            if (r + u * kGroups < round_up(depth, 4))
              s[(r + u * kGroups) * kLd + j] = scaled(own.w[u], own.exponent[u], top);
        }
        __syncthreads();
      }
#pragma unroll 4
      for (int c = 0; c < depth; c += 4) {
        const double a = there && c + t < depth ? row[c0 + c + t] : 0.0;
        const double* b = s + (c + t) * kLd + g;
#pragma unroll
        for (int tile = 0; tile < kTile / 8; ++tile) mma_f64(sum[tile], a, b[8 * tile]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTile / 8; ++tile)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = first + 8 * tile + 2 * t + h;
        if (there && at < n) out[static_cast<int64_t>(i) * n + at] = sum[tile][h];
      }
  }
}

}  // namespace

void launch_multiply(const Current& current, const SpectraData& data, const SpectraLaunch& l) {
  const int inner = static_cast<int>(std::min<int64_t>(l.rows, kDepth));
  const std::size_t bytes = std::max(static_cast<std::size_t>(round_up(inner, 4)) * kLd,
                                     static_cast<std::size_t>(kGroups) * kTile) *
                            sizeof(double);
  launch<multiply_kernel>(
      "spectra's products with weights", current,
      dim3(static_cast<unsigned>(l.tasks), static_cast<unsigned>((l.widest + kTile - 1) / kTile)),
      kThreads, bytes, data);
}

}  // namespace htf::gpu
