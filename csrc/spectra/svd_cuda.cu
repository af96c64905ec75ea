// spectra_svd: singular values and vectors of many small matrices.
//
//   matrices  float64 [F, p, q], contiguous, p and q at most 128
//   result    u [F, p, k], s [F, k] descending, v [F, q, k], k = min(p, q): matrices = u diag(s)
//   v^T
//
// A block for each, Jacobi (jacobi.cuh): vectors of small singular values are as orthogonal as
// those of large ones. A column of u or v whose singular value is zero may be zero too. The
// rotations are collected in shared memory beside the matrix (74 KB at 64), and where that is too
// small for both (above 112 columns) in global memory, of which they stay in the cache.
#include <algorithm>

#include "spectra/jacobi.cuh"

namespace htf::gpu {
namespace {

constexpr const char* kSvd = "spectra_svd";

struct Matrices {
  const double* x;
  double *u, *s, *v;
  double* rotations;    // null: in shared memory
  double* reflections;  // [F, n, m + 1]
  int p, q;
};

template <int Entries>
__global__ void __launch_bounds__(kLanes * Entries * 4, 1) svd_kernel(Matrices all) {
  const bool tall = all.p >= all.q;
  const int m = tall ? all.p : all.q, n = tall ? all.q : all.p;
  const int ld = jacobi_ld(m), ldv = jacobi_ld(n);
  const int64_t at = blockIdx.x;
  double *s = shared_memory<double>(), *red = s + kWidest;
  int* place = reinterpret_cast<int*>(red + kWidest);
  double* a = red + 2 * kWidest;  // [n][ld]
  double* v = all.rotations == nullptr ? a + n * ld : all.rotations + at * n * ldv;
  const double* x = all.x + at * m * n;
  for (int i = threadIdx.x; i < m * n; i += blockDim.x)
    a[tall ? i % n * ld + i / n : i / m * ld + i % m] = x[i];
  for (int i = threadIdx.x; i < n * ldv; i += blockDim.x) v[i] = i / ldv == i % ldv ? 1.0 : 0.0;
  __syncthreads();
  const int exponent = exponent_of(largest_of(a, m, n, ld, red));
  scale_down(a, m, n, ld, exponent);
  if (threadIdx.x == 0) red[0] = exponent;  // registers are scarce until it is read again
  to_triangle<Entries>(a, m, n, ld, all.reflections + at * n * (m + 1));
  jacobi<Entries>(a, n, ld, v, ldv);
  lengths(a, n, ld, s, place);
  double* longer = (tall ? all.u : all.v) + at * m * n;
  double* shorter = (tall ? all.v : all.u) + at * n * n;
  for (int i = threadIdx.x; i < n * n; i += blockDim.x) {
    const int j = i % n, row = i / n;
    shorter[row * n + place[j]] = s[j] > 0 ? a[j * ld + row] / s[j] : s[j];
  }
  const double* reflections = all.reflections + at * n * (m + 1);
  const int lane = threadIdx.x % kLanes, groups = blockDim.x / kLanes;
  for (int j0 = 0; j0 < n; j0 += groups) {
    const int j = j0 + threadIdx.x / kLanes, own = j < n ? j : 0;
    double x[Entries];
    load(v + own * ldv, 0, n, x);
#pragma unroll 1
    for (int k = n - 1; k >= 0; --k) {
      double reflection[Entries];
      load(reflections + k * (m + 1), k, m, reflection);
      reflect(reflection, reflections[k * (m + 1) + m], x);
    }
#pragma unroll
    for (int e = 0; e < Entries; ++e) {
      const int i = e * kLanes + lane;
      if (j < n && i < m) longer[i * n + place[own]] = x[e];
    }
  }
  for (int j = threadIdx.x; j < n; j += blockDim.x)
    all.s[at * n + place[j]] = ldexp(s[j], static_cast<int>(red[0]));
}

template <int Entries>
void launch_svd(const Current& current, const Matrices& all, int64_t count, std::size_t bytes) {
  launch<svd_kernel<Entries>>("spectra's singular vectors", current, static_cast<unsigned>(count),
                              jacobi_threads(std::min(all.p, all.q)), bytes, all);
}

std::vector<Tensor> spectra_svd(const Tensor& matrices) {
  check(on_device(matrices) && matrices.scalar_type() == ScalarType::Double &&
            matrices.dim() == 3 && matrices.is_contiguous() && matrices.size(1) >= 1 &&
            matrices.size(2) >= 1 && std::max(matrices.size(1), matrices.size(2)) <= kWidest &&
            matrices.size(0) <= INT32_MAX,
        kSvd, ": matrices must be contiguous float64 [F, p, q], fewer than 2^31, p and q at most ",
        kWidest, ", got ", describe(matrices));
  const Current current(matrices);
  const int64_t count = matrices.size(0), p = matrices.size(1), q = matrices.size(2);
  const int m = static_cast<int>(std::max(p, q)), n = static_cast<int>(std::min(p, q));
  const Tensor u = device_tensor(current, matrices, {count, p, n}, ScalarType::Double);
  const Tensor s = device_tensor(current, matrices, {count, n}, ScalarType::Double);
  const Tensor v = device_tensor(current, matrices, {count, q, n}, ScalarType::Double);
  std::size_t bytes = (n * jacobi_ld(m) + 3 * kWidest) * sizeof(double);
  const std::size_t more = n * jacobi_ld(n) * sizeof(double);
  const bool fits = bytes + more <= static_cast<std::size_t>(current.device().shared_bytes);
  const Tensor rotations =
      device_tensor(current, matrices, {fits ? 0 : count * n * jacobi_ld(n)}, ScalarType::Double);
  if (fits) bytes += more;
  const Tensor reflections =
      device_tensor(current, matrices, {count * n * (m + 1)}, ScalarType::Double);
  const Matrices all{static_cast<const double*>(matrices.const_data_ptr()),
                     static_cast<double*>(u.data_ptr()),
                     static_cast<double*>(s.data_ptr()),
                     static_cast<double*>(v.data_ptr()),
                     fits ? nullptr : static_cast<double*>(rotations.data_ptr()),
                     static_cast<double*>(reflections.data_ptr()),
                     static_cast<int>(p),
                     static_cast<int>(q)};
  if (m <= 16)
    launch_svd<2>(current, all, count, bytes);
  else if (m <= 32)
    launch_svd<4>(current, all, count, bytes);
  else if (m <= 64)
    launch_svd<8>(current, all, count, bytes);
  else
    launch_svd<16>(current, all, count, bytes);
  return {u, s, v};
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) { m.def("spectra_svd(Tensor matrices) -> Tensor[]"); }
HTF_CUDA_KERNELS(m) { m.impl("spectra_svd", TORCH_BOX(&htf::gpu::spectra_svd)); }
