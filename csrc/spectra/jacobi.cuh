// One-sided Jacobi in shared memory: a block turns the columns of a matrix until all are
// orthogonal.
//
//   A [m, n], n <= m <= 128, its largest entry near 1: first A = Q R by Householder's reflections,
//   then L = R^T, then L J = V diag(s) by rotations, so that A = (Q J) diag(s) V^T
//
// Rotations of L converge within about 10 sweeps whatever the singular values; of A itself it would
// be 30 and more where these decay, as they do here (counted at n = 16, 64 and 128).
//
// Columns lie one after the other, `ld` apart (8 modulo 16: neighbouring pairs are read without
// bank conflicts). Eight lanes take a pair of columns, hold both in registers (2 * Entries each),
// sum up the three dots by shuffles and turn. A round of n / 2 disjoint pairs is done by all lanes
// at once and ends with a barrier; n - 1 rounds, in the order of a round-robin tournament, are a
// sweep. It ends when a sweep has turned no pair, or after 60.
//
// At n = 64 a round is 64^2 * 12 flops and about 900 cycles by count, a matrix 10 sweeps or 300 us,
// with two blocks on a multiprocessor; its QR takes as long as half of a sweep. Columns whose
// lengths' product is below 1e-140 of the largest are not turned; nor is what is no number.
#pragma once

#include "spectra/steps.cuh"

namespace htf::gpu {
namespace {

constexpr int kLanes = 8;  // of a pair
constexpr int kSweeps = 60;

__host__ __device__ __forceinline__ int jacobi_ld(int m) { return (m + 7) / 16 * 16 + 8; }

__device__ __forceinline__ double pair_sum(double x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// x -= gamma v (v^T x), both in the registers of eight lanes.
template <int Entries>
__device__ __forceinline__ void reflect(const double (&v)[Entries], double gamma,
                                        double (&x)[Entries]) {
  double dot = 0;
#pragma unroll
  for (int e = 0; e < Entries; ++e) dot += v[e] * x[e];
  const double by = gamma * pair_sum(dot);
#pragma unroll
  for (int e = 0; e < Entries; ++e) x[e] -= by * v[e];
}

template <int Entries>
__device__ __forceinline__ void load(const double* column, int first, int rows,
                                     double (&x)[Entries]) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int e = 0; e < Entries; ++e) {
    const int i = e * kLanes + lane;
    x[e] = i >= first && i < rows ? column[i] : 0.0;
  }
}

// A -> L, n x n, zero from row n to the next multiple of 8. reflections: null, or [n][m + 1], of
// each v and gamma.
template <int Entries>
__device__ void to_triangle(double* a, int m, int n, int ld, double* reflections) {
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int groups = blockDim.x / kLanes;
  for (int k = 0; k < n; ++k) {
    double v[Entries], squares = 0;
    load(a + k * ld, k + 1, m, v);
#pragma unroll
    for (int e = 0; e < Entries; ++e) squares += v[e] * v[e];
    squares = pair_sum(squares);
    const double alpha = a[k * ld + k];
    double beta = alpha, top = 0, gamma = 0;
    // Squares of what is negligible beside the matrix may underflow.
    if (!(squares <= 1e-280)) {
      const double length = sqrt(alpha * alpha + squares);
      beta = alpha > 0 ? -length : length;
      top = alpha - beta;
      gamma = 1 / (beta * (beta - alpha));
    }
#pragma unroll
    for (int e = 0; e < Entries; ++e) v[e] = e * kLanes + lane == k ? top : v[e];
    for (int j0 = k + 1; j0 < n; j0 += groups) {
      const int j = j0 + group < n ? j0 + group : k;
      double x[Entries];
      load(a + j * ld, k, m, x);
      reflect(v, gamma, x);
#pragma unroll
      for (int e = 0; e < Entries; ++e) {
        const int i = e * kLanes + lane;
        if (j > k && i >= k && i < m) a[j * ld + i] = x[e];
      }
    }
    if (reflections != nullptr && group == 0) {
      double* own = reflections + k * (m + 1);
#pragma unroll
      for (int e = 0; e < Entries; ++e)
        if (e * kLanes + lane < m) own[e * kLanes + lane] = v[e];
      if (lane == 0) own[m] = gamma;
    }
    __syncthreads();
    if (threadIdx.x == 0) a[k * ld + k] = beta;
  }
  __syncthreads();
  for (int i = group; i < n; i += groups)
    for (int j = i + 1 + lane; j < round_up(n, kLanes); j += kLanes) {
      a[i * ld + j] = j < n ? a[j * ld + i] : 0.0;
      if (j < n) a[j * ld + i] = 0;
    }
  __syncthreads();
}

// (x, y) -> (c x - s y, s x + c y), as x - s (y + t x), y + s (x - t y) with t = s / (1 + c): small
// angles leave small errors.
struct Rotation {
  double s, t;
  bool turn;
};

// Of columns with these dots.
__device__ __forceinline__ Rotation rotation_of(double xx, double yy, double xy, double tolerance) {
  Rotation r{0, 0, false};
  if (!(xx * yy > 1e-280) || !(fabs(xy) > tolerance * sqrt(xx) * sqrt(yy))) return r;
  if (!(fabs(xy) <= 1.7976931348623157e308)) return r;
  r.turn = true;
  const double zeta = (yy - xx) / (2 * xy), size = fabs(zeta);
  const double tangent = size > 1e100 ? 0.5 / size : 1 / (size + sqrt(1 + zeta * zeta));
  const double c = 1 / sqrt(1 + tangent * tangent);
  r.s = zeta < 0 ? -c * tangent : c * tangent;
  r.t = r.s / (1 + c);
  return r;
}

__device__ __forceinline__ void turn(double* p, double* q, double x, double y, const Rotation& r) {
  *p = x - r.s * (y + r.t * x);
  *q = y + r.s * (x - r.t * y);
}

// a: L [n][ld], n <= 8 Entries. v: null, or [n][ldv], the identity before, padded alike; then J.
template <int Entries>
__device__ void jacobi(double* a, int n, int ld, double* v, int ldv) {
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int groups = blockDim.x / kLanes, players = n + n % 2, pairs = players / 2;
  constexpr double tolerance = (Entries / 2 + 4) * 2.220446049250313e-16;  // above a dot's rounding
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool turned = false;
    for (int round = 0; round < players - 1; ++round) {
      for (int k0 = 0; k0 < pairs; k0 += groups) {
        const int k = k0 + group;
        int p = k == 0 ? players - 1 : (round + k) % (players - 1);
        int q = (round - k + players - 1) % (players - 1);
        if (p > q) {
          const int larger = p;
          p = q, q = larger;
        }
        const bool there = k < pairs && q < n;
        double *ap = a + (there ? p : 0) * ld + lane, *aq = a + (there ? q : 0) * ld + lane;
        const int rows = there ? n : 0;  // others may be turning column 0
        double x[Entries], y[Entries], xx = 0, yy = 0, xy = 0;
#pragma unroll
        for (int e = 0; e < Entries; ++e) {
          const bool inside = e * kLanes < rows;
          x[e] = inside ? ap[e * kLanes] : 0.0;
          y[e] = inside ? aq[e * kLanes] : 0.0;
          xx += x[e] * x[e], yy += y[e] * y[e], xy += x[e] * y[e];
        }
        const Rotation r = rotation_of(pair_sum(xx), pair_sum(yy), pair_sum(xy), tolerance);
        if (!there || !r.turn) continue;
        turned = true;
#pragma unroll
        for (int e = 0; e < Entries; ++e)
          if (e * kLanes < rows) turn(ap + e * kLanes, aq + e * kLanes, x[e], y[e], r);
        if (v == nullptr) continue;
        double *vp = v + p * ldv + lane, *vq = v + q * ldv + lane;
#pragma unroll 4
        for (int e = 0; e < Entries; ++e) {
          const int i = e * kLanes;
          if (i < n) turn(vp + i, vq + i, vp[i], vq[i], r);
        }
      }
      __syncthreads();
    }
    if (__syncthreads_or(turned) == 0) break;
  }
}

// The columns' lengths into s and their places in descending order into place, n each; what is no
// number comes first.
__device__ __forceinline__ void lengths(const double* a, int n, int ld, double* s, int* place) {
  const int lane = threadIdx.x % kLanes, groups = blockDim.x / kLanes;
  for (int j0 = 0; j0 < n; j0 += groups) {
    const int j = j0 + threadIdx.x / kLanes;
    const double* column = a + (j < n ? j : 0) * ld;
    double most = 0, sum = 0;
    for (int i = lane; i < n; i += kLanes) most = fmax(most, fabs(column[i]));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      most = fmax(most, __shfl_xor_sync(~0u, most, offset));
    const int e = exponent_of(most);
    for (int i = lane; i < n; i += kLanes) {
      const double x = ldexp(column[i], -e);
      sum += x * x;
    }
    sum = pair_sum(sum);
    if (j < n && lane == 0) s[j] = ldexp(sqrt(sum), e);
  }
  __syncthreads();
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    int before = 0;
    const double own = s[j] == s[j] ? s[j] : HUGE_VAL;
    for (int i = 0; i < n; ++i) {
      const double other = s[i] == s[i] ? s[i] : HUGE_VAL;
      before += other > own || (other == own && i < j);
    }
    place[j] = before;
  }
  __syncthreads();
}

// The largest magnitude in a block's matrix [n][ld]; red: a number for each warp.
__device__ __forceinline__ double largest_of(const double* a, int m, int n, int ld, double* red) {
  double most = 0;
  for (int j = threadIdx.x / kLanes; j < n; j += blockDim.x / kLanes)
    for (int i = threadIdx.x % kLanes; i < m; i += kLanes) most = fmax(most, fabs(a[j * ld + i]));
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    most = fmax(most, __shfl_xor_sync(~0u, most, offset));
  if (threadIdx.x % kWarp == 0) red[threadIdx.x / kWarp] = most;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) most = fmax(most, red[w]);
  __syncthreads();
  return most;
}

// Times 2^-e, and zeros from row m to the next multiple of 8.
__device__ __forceinline__ void scale_down(double* a, int m, int n, int ld, int e) {
  for (int j = threadIdx.x / kLanes; j < n; j += blockDim.x / kLanes)
    for (int i = threadIdx.x % kLanes; i < round_up(m, 8); i += kLanes)
      a[j * ld + i] = i < m ? ldexp(a[j * ld + i], -e) : 0.0;
  __syncthreads();
}

// Threads for matrices of at most n columns.
inline int jacobi_threads(int n) {
  const int threads = round_up((n + 1) / 2 * kLanes, kWarp);
  return threads < 512 ? threads : 512;
}

}  // namespace
}  // namespace htf::gpu
