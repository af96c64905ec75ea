#include <array>
#include <map>
#include <numeric>

#include "cpu/finite.h"
#include "spectra/factors.h"
#include "spectra/spectra.h"

namespace htf {
namespace {

// One node's matrix F E^T, and the bidiagonal one with its singular values.
struct Matrix {
  FactorRow from;
  int64_t size = 0, at = 0;  // of the values
  int64_t exponent = 0;
  int64_t rest = 0;     // columns of the node's matrix
  int64_t source = -1;  // of the anchor's, where several nodes read one
  bool finite = true;
};

class Values {
 public:
  Values(const double* frames, const double* environments, const std::vector<FactorRow>& wanted)
      : frames_(frames), environments_(environments), k_(kernels<double>()), o_(orthogonal()) {
    for (const FactorRow& r : wanted) {
      Matrix m;
      m.from = r;
      m.rest = r.frame_rows / r.rows * r.environment_rows;
      m.size = std::min(r.rows, m.rest);
      m.at = total_;
      total_ += m.size;
      const auto [few, many] = std::minmax(r.frame_rows, r.environment_rows);
      product_ = std::max(product_, many * padded<double>(few));
      transposed_ = std::max(transposed_, r.cols * padded<double>(few));
      if (r.rows < r.frame_rows)
        dealt_ = std::max(dealt_, std::max(r.rows, m.rest) * padded<double>(m.size));
      most_ = std::max(most_, m.size);
      work_ += m.size * m.size * (m.size + r.ld + 64);
      matrix_.push_back(m);
    }
  }

  int64_t total() const { return total_; }

  void run(double* values, int64_t* exponents) {
    const int64_t count = static_cast<int64_t>(matrix_.size()), L = Orthogonal::kLanes;
    share();
    const Buffer<double> products(shared_size_);
    products_ = products.get();
    for_each_item<double>(static_cast<int64_t>(shared_.size()), work_, transposed_,
                          [&](int64_t i, double* memory) {
                            const FactorRow& r = matrix_[shared_[i]].from;
                            multiply(r, r.frame_rows >= r.environment_rows, memory,
                                     products_ + matrix_[shared_[i]].source);
                          });
    const Buffer<double> entries(2 * total_);
    diagonal_ = entries.get(), side_ = diagonal_ + total_;
    room_.add(padded<double>(most_));
    const int64_t shop_size = std::max(room_.elements(), Orthogonal::bidiagonal_work(room_.square));
    for_each_item<double>(count, work_, shop_size + product_ + spare_elements() + dealt_,
                          [&](int64_t i, double* memory) {
                            reduce(matrix_[i], memory, memory + shop_size);
                            exponents[i] = matrix_[i].exponent;
                          });
    // Matrices of like size share their sweeps.
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return matrix_[a].size != matrix_[b].size ? matrix_[a].size < matrix_[b].size : a < b;
    });
    const int64_t groups = (count + L - 1) / L;
    std::atomic<bool> converged{true};
    for_each_item<double>(groups, work_, 2 * L * most_, [&](int64_t g, double* memory) {
      const int64_t some = std::min(L, count - g * L);
      if (!diagonalise(order.data() + g * L, some, values, memory)) converged = false;
    });
    check(converged, "factor_values: the singular values did not converge");
  }

 private:
  // Matrices that several nodes' are parts of are made first, once.
  void share() {
    std::map<std::array<int64_t, 6>, std::vector<int64_t>> readers;
    for (std::size_t i = 0; i < matrix_.size(); ++i) {
      const FactorRow& r = matrix_[i].from;
      readers[{r.environment, r.environment_rows, r.frame, r.frame_rows, r.cols, r.ld}].push_back(
          static_cast<int64_t>(i));
    }
    for (const auto& [at, nodes] : readers) {
      if (nodes.size() < 2) continue;
      const FactorRow& r = matrix_[nodes[0]].from;
      shared_.push_back(nodes[0]);
      for (const int64_t i : nodes) matrix_[i].source = shared_size_;
      shared_size_ += std::max(r.frame_rows, r.environment_rows) *
                      padded<double>(std::min(r.frame_rows, r.environment_rows));
    }
  }

  // Of a transposed factor, and of the triangle.
  int64_t spare_elements() const { return std::max(transposed_, most_ * padded<double>(most_)); }

  // To a square matrix, with a triangle of the longer side's rows; that to a bidiagonal one.
  void reduce(Matrix& m, double* memory, double* scratch) {
    const FactorRow& r = m.from;
    Workshop shop(memory, room_);
    double *x = scratch, *spare = scratch + product_, *dealt = spare + spare_elements();
    const int64_t n = m.size, ld = padded<double>(n), longer = std::max(r.rows, m.rest);
    const double* product = x;
    if (m.source >= 0)
      product = products_ + m.source;
    else
      multiply(r, r.frame_rows >= r.environment_rows, spare, x);
    if (r.rows < r.frame_rows) {
      deal_out(m, product, ld, dealt);
      x = dealt;
    } else if (m.source >= 0) {
      std::copy_n(product, longer * ld, x);
    }
    m.finite = all_finite(longer * ld, x);
    if (!m.finite) {
      std::fill_n(diagonal_ + m.at, n, 0.0);
      std::fill_n(side_ + m.at, n, 0.0);
      return;
    }
    std::vector<double> largest(longer);
    o_.row_maxima(longer, ld, x, ld, largest.data());
    const int64_t k = exponent_of(*std::max_element(largest.begin(), largest.end()));
    m.exponent = r.scale + (k == kNothing ? 0 : k);
    const std::vector<int64_t> by(longer, k == kNothing ? 0 : -k);
    scale_by_powers(longer, n, x, ld, by.data(), nullptr);
    if (longer > n) {
      shop.triangle(longer, n, x, spare);
      x = spare;
    }
    side_[m.at + n - 1] = 0;
    o_.bidiagonal(n, x, ld, diagonal_ + m.at, side_ + m.at, memory);
  }

  // out = F E^T, or E F^T: the longer side's rows first.
  void multiply(const FactorRow& r, bool frame_first, double* transposed, double* out) const {
    const double *first = frames_ + r.frame, *second = environments_ + r.environment;
    int64_t rows = r.frame_rows, columns = r.environment_rows;
    if (!frame_first) std::swap(first, second), std::swap(rows, columns);
    const int64_t ld = padded<double>(columns);
    k_.transpose(columns, r.cols, second, r.ld, transposed, ld);
    k_.gemm(rows, ld, r.cols, first, r.ld, 1, transposed, ld, out, ld, Store::assign);
  }

  // out[max(rows, rest) x ld]: the node's own matrix or its transpose, from the anchor's.
  void deal_out(const Matrix& m, const double* x, int64_t ld, double* out) const {
    const FactorRow& r = m.from;
    const bool frame_first = r.frame_rows >= r.environment_rows, tall = r.rows > m.rest;
    const int64_t ldx = padded<double>(std::min(r.frame_rows, r.environment_rows));
    std::fill_n(out, std::max(r.rows, m.rest) * ld, 0.0);
    for (int64_t row = 0; row < r.frame_rows; ++row) {
      const int64_t i = row / r.after % r.rows, b = row / r.after / r.rows, a = row % r.after;
      for (int64_t j = 0; j < r.environment_rows; ++j) {
        const int64_t column = (b * r.after + a) * r.environment_rows + j;
        out[tall ? i * ld + column : column * ld + i] =
            frame_first ? x[row * ldx + j] : x[j * ldx + row];
      }
    }
  }

  bool diagonalise(const int64_t* which, int64_t count, double* values, double* memory) {
    constexpr int64_t L = Orthogonal::kLanes;
    int64_t n = 0;
    for (int64_t l = 0; l < count; ++l) n = std::max(n, matrix_[which[l]].size);
    double *d = memory, *e = memory + n * L;
    std::fill_n(memory, 2 * n * L, 0.0);
    for (int64_t l = 0; l < count; ++l) {
      const Matrix& m = matrix_[which[l]];
      for (int64_t i = 0; i < m.size; ++i) {
        d[i * L + l] = diagonal_[m.at + i];
        e[i * L + l] = side_[m.at + i];
      }
    }
    const bool converged = o_.bidiagonal_values(n, d, e);
    for (int64_t l = 0; l < count; ++l) {
      const Matrix& m = matrix_[which[l]];
      double* out = values + m.at;
      if (!m.finite) {
        std::fill_n(out, m.size, std::numeric_limits<double>::quiet_NaN());
        continue;
      }
      for (int64_t i = 0; i < m.size; ++i) out[i] = std::abs(d[i * L + l]);
      std::sort(out, out + m.size, std::greater<double>());
    }
    return converged;
  }

  const double *frames_, *environments_;
  const Kernels<double>& k_;
  const Orthogonal& o_;
  std::vector<Matrix> matrix_;
  int64_t total_ = 0, work_ = 0;
  // Elements of the largest product, of a factor transposed for one, of one dealt out; values of
  // the largest one.
  int64_t product_ = 0, transposed_ = 0, dealt_ = 0, most_ = 0;
  Workshop::Room room_;
  std::vector<int64_t> shared_;
  int64_t shared_size_ = 0;
  double *diagonal_ = nullptr, *side_ = nullptr, *products_ = nullptr;
};

}  // namespace

std::vector<Tensor> factor_values_cpu(const Tensor& frames, const Tensor& environments,
                                      const std::vector<FactorRow>& wanted) {
  Values all(static_cast<const double*>(frames.const_data_ptr()),
             static_cast<const double*>(environments.const_data_ptr()), wanted);
  const Tensor values = new_tensor(frames, {all.total()}, ScalarType::Double);
  const Tensor exponents =
      new_tensor(frames, {static_cast<int64_t>(wanted.size())}, ScalarType::Long);
  all.run(static_cast<double*>(values.data_ptr()), static_cast<int64_t*>(exponents.data_ptr()));
  return {values, exponents};
}

}  // namespace htf
