// gram: a factor with the Gram matrix of a Khatri-Rao product, by the Gram matrices of its factors.
//
//   G = (x^T x) * (y^T y)  [n, n], elementwise, n <= 128;   x [x_rows, n], y [y_rows, n]
//   T  [n, n] with T^T T = G: pivoted Cholesky with unit diagonal, and zero rows where what is left
//      of every column is rounding. Scaled as triangle's. A column with something that is no
//      number in it becomes one of such, and the others are those without it.
//
// O(n^3) where triangle takes O(n^4), and half of the digits. A block for each matrix: tiles of
// both Gram matrices by mma_f64 into shared memory (135 KB at n = 128), then a step for each row of
// T, every warp finding the pivot by itself, with two barriers: at n = 64 0.5 Mflop and about 30
// us. Rows of T take the places of their pivots' rows, which nobody reads any more.
#include "spectra/steps.cuh"

namespace htf::gpu {
namespace {

constexpr int kOfLane = kWidest / kWarp;

// Row tile i and column tile j of x^T x.
__device__ __forceinline__ void gram_tile(const double* x, int rows, int n, int i, int j,
                                          double (&sum)[2]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int k = 0; k < rows; k += 4) {
    const double* row = x + (k + t) * n;
    const bool there = k + t < rows;
    mma_f64(sum, there && i + g < n ? row[i + g] : 0.0, there && j + g < n ? row[j + g] : 0.0);
  }
}

// The column with most left, the first of several, in every lane.
__device__ __forceinline__ int pivot_of(const double* left, int n, double& most) {
  const int lane = threadIdx.x % kWarp;
  most = -2;
  int at = 0;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int j = lane + i * kWarp;
    if (j < n && left[j] > most) most = left[j], at = j;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(~0u, most, offset);
    const int there = __shfl_xor_sync(~0u, at, offset);
    if (other > most || (other == most && there < at)) most = other, at = there;
  }
  return at;
}

__global__ void __launch_bounds__(kThreads, 1) gram_kernel(SpectraData d, int ld, int columns8) {
  const SpectraTask k = d.task[blockIdx.x];
  const int n = static_cast<int>(k.columns), tiles = (n + 7) / 8;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  double* gram = shared_memory<double>();  // [n][ld]
  double *left = gram + columns8 * ld, *scale = left + kWidest, *row = scale + kWidest;
  int* pivots = reinterpret_cast<int*>(row + kWidest);
  for (int tile = warp; tile < tiles * tiles; tile += kThreads / kWarp) {
    const int i = tile / tiles * 8, j = tile % tiles * 8;
    double x[2] = {}, y[2] = {};
    gram_tile(d.memory + k.x, static_cast<int>(k.x_rows), n, i, j, x);
    gram_tile(d.memory + k.y, static_cast<int>(k.y_rows), n, i, j, y);
    for (int h = 0; h < 2; ++h) gram[(i + g) * ld + j + 2 * t + h] = x[h] * y[h];
  }
  __syncthreads();
  const int own = threadIdx.x;  // this thread's column
  bool number = true;
  if (own < n) {
    const double square = gram[own * ld + own];
    number = square <= 1.7976931348623157e308;
    const bool taken = number && square > 0;
    scale[own] = taken ? 1 / sqrt(square) : 0;
    left[own] = taken ? 1 : 0;
  }
  __syncthreads();
  for (int i = warp; i < n; i += kThreads / kWarp)
    for (int j = lane; j < n; j += kWarp) gram[i * ld + j] *= scale[i] * scale[j];
  __syncthreads();
  // What is left of a unit column after this is rounding.
  const double least = 4 * 2.220446049250313e-16;
  double largest = 0;
  int rank = 0;
  for (; rank < n; ++rank) {
    double most;
    const int pivot = pivot_of(left, n, most);
    if (!(most > least)) break;  // all threads alike
    __syncthreads();
    const double length = sqrt(most);
    if (own < n) {
      const double rest = left[own];
      double x = rest > 0 ? gram[pivot * ld + own] / length : 0.0;
      left[own] = rest - x * x;
      if (own == pivot) x = length, left[own] = -1, pivots[rank] = own;
      row[own] = x;
      const double unscaled = scale[own] != 0 ? x / scale[own] : 0.0;
      gram[pivot * ld + own] = unscaled;
      largest = fabs(unscaled) > largest ? fabs(unscaled) : largest;
    }
    __syncthreads();
    double mine[kOfLane];
#pragma unroll
    for (int u = 0; u < kOfLane; ++u) mine[u] = lane + u * kWarp < n ? row[lane + u * kWarp] : 0.0;
    for (int i = warp; i < n; i += kThreads / kWarp) {
      const double f = row[i];  // 0 of the pivots before
      if (f == 0 || i == pivot) continue;
#pragma unroll
      for (int u = 0; u < kOfLane; ++u)
        if (lane + u * kWarp < n) gram[i * ld + lane + u * kWarp] -= f * mine[u];
    }
  }
  if (own >= n) return;
  const int e = exponent_of(largest);
  const double rest = number ? 0 : nan("");
  double* out = d.memory + k.out;
#pragma unroll 4
  for (int i = 0; i < n; ++i)
    out[i * n + own] = number && i < rank ? ldexp(gram[pivots[i] * ld + own], -e) : rest;
  d.exponents[k.out_exponents + own] = exponent_at(d.exponents, k.x_exponents, own) +
                                       exponent_at(d.exponents, k.y_exponents, own) + e;
}

}  // namespace

void launch_grams(const Current& current, const SpectraData& data, const SpectraLaunch& l) {
  const int n8 = round_up(static_cast<int>(l.columns), 8), ld = padded_row(n8);
  const std::size_t bytes = (n8 * ld + 3 * kWidest) * sizeof(double) + kWidest * sizeof(int);
  launch<gram_kernel>("spectra's Gram matrices", current, static_cast<unsigned>(l.tasks), kThreads,
                      bytes, data, ld, n8);
}

}  // namespace htf::gpu
