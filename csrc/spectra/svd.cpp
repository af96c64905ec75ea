// small_svd: singular values and vectors of many small matrices.
//
//   matrices  float64 [F, p, q]
//   result    u [F, p, k], s [F, k] descending, v [F, q, k], k = min(p, q): matrices = u diag(s)
//   v^T
//
// One-sided Jacobi on eight matrices at a time: vectors of small singular values are as good as
// those of large ones. A column of u or v whose singular value is zero may be zero too. Of a matrix
// that is not finite, all are NaN.
#include <limits>
#include <numeric>

#include "cpu/finite.h"
#include "cpu/orthogonal.h"

namespace htf {
namespace {

constexpr const char* kOp = "small_svd";
constexpr int64_t L = Orthogonal::kLanes;

struct Shape {
  int64_t p, q, k, longer;
};

// Matrices first .. first + count - 1, in the lanes; the longer side's rows.
bool decompose(const Shape& shape, int64_t first, int64_t count, const double* x, double* u,
               double* s, double* v, double* memory) {
  const int64_t n = shape.k, m = shape.longer;
  double *a = memory, *w = memory + m * n * L;
  std::fill_n(a, m * n * L, 0.0);
  std::fill_n(w, n * n * L, 0.0);
  const bool tall = shape.p >= shape.q;
  for (int64_t l = 0; l < count; ++l) {
    const double* from = x + (first + l) * shape.p * shape.q;
    if (!all_finite(shape.p * shape.q, from)) continue;
    double largest = 0;
    for (int64_t i = 0; i < shape.p * shape.q; ++i) largest = std::max(largest, std::abs(from[i]));
    for (int64_t i = 0; i < shape.p; ++i)
      for (int64_t j = 0; j < shape.q; ++j)
        a[(tall ? j * m + i : i * m + j) * L + l] =
            largest > 0 ? from[i * shape.q + j] / largest : from[i * shape.q + j];
    for (int64_t j = 0; j < n; ++j) w[(j * n + j) * L + l] = 1;
  }
  const bool converged = orthogonal().jacobi(m, n, a, w);
  std::vector<double> size(n);
  std::vector<int64_t> order(n);
  for (int64_t l = 0; l < count; ++l) {
    const double* from = x + (first + l) * shape.p * shape.q;
    double* longer = (tall ? u : v) + (first + l) * m * n;
    double* shorter = (tall ? v : u) + (first + l) * n * n;
    if (!all_finite(shape.p * shape.q, from)) {
      constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(s + (first + l) * n, n, kNone);
      std::fill_n(longer, m * n, kNone);
      std::fill_n(shorter, n * n, kNone);
      continue;
    }
    double largest = 0;
    for (int64_t i = 0; i < shape.p * shape.q; ++i) largest = std::max(largest, std::abs(from[i]));
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < m; ++i) {
        const double each = a[(j * m + i) * L + l];
        sum += each * each;
      }
      size[j] = std::sqrt(sum);
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return size[i] > size[j]; });
    for (int64_t r = 0; r < n; ++r) {
      const int64_t j = order[r];
      s[(first + l) * n + r] = largest > 0 ? size[j] * largest : size[j];
      const double inverse = size[j] > 0 ? 1 / size[j] : 0;
      for (int64_t i = 0; i < m; ++i) longer[i * n + r] = a[(j * m + i) * L + l] * inverse;
      for (int64_t i = 0; i < n; ++i) shorter[i * n + r] = w[(j * n + i) * L + l];
    }
  }
  return converged;
}

std::vector<Tensor> small_svd_cpu(const Tensor& matrices) {
  check(matrices.is_cpu() && matrices.scalar_type() == ScalarType::Double && matrices.dim() == 3 &&
            matrices.size(1) >= 1 && matrices.size(2) >= 1,
        kOp, ": matrices must be a float64 CPU tensor [F, p, q], got ", describe(matrices));
  const Tensor dense = in_one_piece(matrices);
  const int64_t count = dense.size(0);
  Shape shape{dense.size(1), dense.size(2), 0, 0};
  shape.k = std::min(shape.p, shape.q), shape.longer = std::max(shape.p, shape.q);
  const Tensor u = new_tensor(dense, {count, shape.p, shape.k}, ScalarType::Double);
  const Tensor s = new_tensor(dense, {count, shape.k}, ScalarType::Double);
  const Tensor v = new_tensor(dense, {count, shape.q, shape.k}, ScalarType::Double);
  std::atomic<bool> converged{true};
  const int64_t groups = (count + L - 1) / L;
  for_each_item<double>(
      groups, 20 * count * shape.longer * shape.k * shape.k, (shape.longer + shape.k) * shape.k * L,
      [&](int64_t g, double* memory) {
        if (!decompose(shape, g * L, std::min(L, count - g * L),
                       static_cast<const double*>(dense.const_data_ptr()),
                       static_cast<double*>(u.data_ptr()), static_cast<double*>(s.data_ptr()),
                       static_cast<double*>(v.data_ptr()), memory))
          converged = false;
      });
  check(converged, kOp, ": did not converge");
  return {u, s, v};
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) { m.def("small_svd(Tensor matrices) -> Tensor[]"); }

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("small_svd", TORCH_BOX(&htf::small_svd_cpu));
}
