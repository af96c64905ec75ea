// One-sided Jacobi in shared memory: a block turns the columns of a matrix until all are
// orthogonal.
//
//   A [m, n], n <= m <= 128, its largest entry near 1  ->  A V = U diag(s), and V where asked for
//
// Columns lie one after the other, `ld` apart (8 modulo 16: neighbouring pairs are read without
// bank conflicts). Eight lanes take a pair of columns, hold both in registers (2 * Entries each),
// sum up the three dots by shuffles and turn. A round of n / 2 disjoint pairs is done by all lanes
// at once and ends with a barrier; n - 1 rounds, in the order of a round-robin tournament, are a
// sweep. The longer column of a turned pair goes to the left, so that they come out sorted, nearly,
// and steep matrices converge faster. It ends when a sweep has turned no pair, or after 40.
//
// At n = 64 a round is 64^2 * 12 flops and about 0.3 us, a matrix 8 sweeps or 150 us, with two
// blocks on a multiprocessor. Small singular values keep their digits where the columns do. Columns
// whose lengths' product is below 1e-140 of the largest are not turned; nor is what is no number.
#pragma once

#include "spectra/steps.cuh"

namespace htf::gpu {
namespace {

constexpr int kLanes = 8;  // of a pair
constexpr int kSweeps = 40;

__host__ __device__ __forceinline__ int jacobi_ld(int m) { return (m + 7) / 16 * 16 + 8; }

__device__ __forceinline__ double pair_sum(double x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// (x, y) -> (c x - s y, s x + c y), as x - s (y + t x), y + s (x - t y) with t = s / (1 + c): small
// angles leave small errors.
struct Rotation {
  double s, t;
  bool turn, swap;
};

// Of columns with these dots, the second the shorter one after a swap.
__device__ __forceinline__ Rotation rotation_of(double xx, double yy, double xy, double tolerance) {
  Rotation r{0, 0, false, xx < yy};
  if (!(xx * yy > 1e-280) || !(fabs(xy) > tolerance * sqrt(xx) * sqrt(yy))) return r;
  if (!(fabs(xy) <= 1.7976931348623157e308)) return r;
  r.turn = true;
  const double zeta = (r.swap ? xx - yy : yy - xx) / (2 * xy), size = fabs(zeta);
  const double tangent = size > 1e100 ? 0.5 / size : 1 / (size + sqrt(1 + zeta * zeta));
  const double c = 1 / sqrt(1 + tangent * tangent);
  r.s = zeta < 0 ? -c * tangent : c * tangent;
  r.t = r.s / (1 + c);
  return r;
}

// Turns a pair of columns of `rows` entries.
template <int Entries>
__device__ __forceinline__ void turn(double* p, double* q, int rows, const Rotation& r) {
#pragma unroll
  for (int e = 0; e < Entries; ++e) {
    const int i = e * kLanes;
    if (i >= rows) break;
    const double x = r.swap ? q[i] : p[i], y = r.swap ? p[i] : q[i];
    p[i] = x - r.s * (y + r.t * x);
    q[i] = y + r.s * (x - r.t * y);
  }
}

// m <= 8 Entries; columns from m to the next multiple of 8 are zero. v: null, or [n][ldv], the
// identity before, padded alike.
template <int Entries>
__device__ void jacobi(double* a, int m, int n, int ld, double* v, int ldv) {
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int groups = blockDim.x / kLanes, players = n + n % 2, pairs = players / 2;
  const double tolerance = (m > 16 ? sqrt(static_cast<double>(m)) : 4.0) * 2.220446049250313e-16;
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
        double x[Entries], y[Entries], xx = 0, yy = 0, xy = 0;
#pragma unroll
        for (int e = 0; e < Entries; ++e) {
          const bool inside = e * kLanes < m;
          x[e] = inside ? ap[e * kLanes] : 0.0;
          y[e] = inside ? aq[e * kLanes] : 0.0;
          xx += x[e] * x[e], yy += y[e] * y[e], xy += x[e] * y[e];
        }
        const Rotation r = rotation_of(pair_sum(xx), pair_sum(yy), pair_sum(xy), tolerance);
        if (!there || !r.turn) continue;
        turned = true;
#pragma unroll
        for (int e = 0; e < Entries; ++e) {
          if (e * kLanes >= m) break;
          const double longer = r.swap ? y[e] : x[e], shorter = r.swap ? x[e] : y[e];
          ap[e * kLanes] = longer - r.s * (shorter + r.t * longer);
          aq[e * kLanes] = shorter + r.s * (longer - r.t * shorter);
        }
        if (v != nullptr) turn<Entries>(v + p * ldv + lane, v + q * ldv + lane, n, r);
      }
      __syncthreads();
    }
    if (__syncthreads_or(turned) == 0) break;
  }
}

// The columns' lengths into s and their places in descending order into place, n each; what is no
// number comes first.
__device__ __forceinline__ void lengths(const double* a, int m, int n, int ld, double* s,
                                        int* place) {
  const int lane = threadIdx.x % kLanes, groups = blockDim.x / kLanes;
  for (int j0 = 0; j0 < n; j0 += groups) {
    const int j = j0 + threadIdx.x / kLanes;
    const double* column = a + (j < n ? j : 0) * ld;
    double most = 0, sum = 0;
    for (int i = lane; i < m; i += kLanes) most = fmax(most, fabs(column[i]));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      most = fmax(most, __shfl_xor_sync(~0u, most, offset));
    const int e = exponent_of(most);
    for (int i = lane; i < m; i += kLanes) {
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
