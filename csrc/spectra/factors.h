// Small matrices of the spectra: scaled weights, Khatri-Rao products and what they shrink to.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/numbers.h"
#include "cpu/orthogonal.h"

namespace htf {

// 2^x as two factors, since x may be twice what one number holds.
struct PowerOfTwo {
  double half, rest;
  explicit PowerOfTwo(int64_t x) {
    x = std::min<int64_t>(std::max<int64_t>(x, -2200), 2000);
    half = std::ldexp(1.0, static_cast<int>(x / 2));
    rest = std::ldexp(1.0, static_cast<int>(x - x / 2));
  }
  double operator()(double v) const { return v * half * rest; }
};

// The k with 2^(k-1) <= v < 2^k; a number far below all others for 0.
constexpr int64_t kNothing = std::numeric_limits<int64_t>::min() / 4;
inline int64_t exponent_of(double v) {
  if (!(v > 0)) return kNothing;
  int k = 0;
  std::frexp(v, &k);
  return k;
}

// A factor: rows of `cols` numbers, padded. Triangular: rows == cols and zero below the diagonal.
struct Factor {
  const double* data = nullptr;
  int64_t rows = 0;
  bool triangular = false;
  const double* gram = nullptr;  // [cols x ld], where Gram matrices are used
};

// What one thread works with; sizes in elements, ld the widest padded row of the tree.
class Workshop {
 public:
  static constexpr int64_t kBlock = 64;  // rows taken into a triangular factor at a time

  static int64_t size(int64_t ld) {
    return ld * ld + kBlock * ld + Orthogonal::absorb_work(ld) + std::max(ld, kBlock) * ld +
           Orthogonal::cholesky_work(ld);
  }
  Workshop(double* memory, int64_t ld)
      : k_(kernels<double>()),
        o_(orthogonal()),
        t_(memory),
        block_(t_ + ld * ld),
        work_(block_ + kBlock * ld),
        gram_(work_ + Orthogonal::absorb_work(ld)),
        cholesky_(gram_ + std::max(ld, kBlock) * ld) {}

  const Kernels<double>& kernel() const { return k_; }
  double* block() const { return block_; }  // [kBlock x ld]

  // out[n x ld] = a triangular factor of x[rows x ld], rows >= n.
  void triangle(int64_t rows, int64_t n, const double* x, double* out) {
    const int64_t ld = padded<double>(n);
    std::fill_n(t_, ld * ld, 0.0);
    for (int64_t i = 0; i < rows; i += kBlock) {
      const int64_t m = std::min(kBlock, rows - i);
      std::copy_n(x + i * ld, m * ld, block_);
      o_.absorb(m, ld, 0, t_, ld, block_, ld, work_);
    }
    std::copy_n(t_, n * ld, out);
  }

  // out = the Khatri-Rao product of x and y, of n columns, where that has at most n rows; else n
  // rows with the same Gram matrix. Returns whether it was shrunk.
  bool khatri_rao(int64_t n, const Factor& x, const Factor& y, bool gram, double* out) {
    const int64_t ld = padded<double>(n);
    if (x.rows * y.rows <= n) {
      for (int64_t i = 0; i < x.rows; ++i)
        k_.product(y.rows, ld, x.data + i * ld, 0, y.data, ld, out + i * y.rows * ld, ld,
                   Store::assign);
    } else if (gram) {
      k_.product(n, ld, x.gram, ld, y.gram, ld, gram_, ld, Store::assign);
      o_.cholesky(n, gram_, ld, out, ld, cholesky_);
    } else {
      shrink(n, ld, x, y);
      std::copy_n(t_, n * ld, out);
    }
    return x.rows * y.rows > n;
  }

  // out[m x ldm] = a triangular factor of the Khatri-Rao product of x and y, of n columns, times
  // w[n x ldm]; the product has more than m rows.
  void khatri_rao_through(int64_t n, const Factor& x, const Factor& y, const double* w, int64_t m,
                          double* out) {
    const int64_t ld = padded<double>(n), ldm = padded<double>(m);
    double* product = gram_;  // [kBlock x ld]; not used otherwise meanwhile
    std::fill_n(t_, ldm * ldm, 0.0);
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t j = 0; j < y.rows; j += kBlock) {
        const int64_t rows = std::min(kBlock, y.rows - j);
        k_.product(rows, ld, x.data + i * ld, 0, y.data + j * ld, ld, product, ld, Store::assign);
        k_.gemm(rows, ldm, n, product, ld, 1, w, ldm, block_, ldm, Store::assign);
        o_.absorb(rows, ldm, 0, t_, ldm, block_, ldm, work_);
      }
    std::copy_n(t_, m * ldm, out);
  }

  void gram_of(int64_t n, const double* x, int64_t rows, double* out) {
    const int64_t ld = padded<double>(n);
    k_.gemm(n, ld, rows, x, 1, ld, x, ld, out, ld, Store::assign);
  }

 private:
  // The rows (i, j) of the product begin with the later of both rows' first columns. Taken from the
  // back, by strips of first columns, none touches columns that are zero in it.
  void shrink(int64_t n, int64_t ld, const Factor& x, const Factor& y) {
    std::fill_n(t_, ld * ld, 0.0);
    for (int64_t first = (n - 1) / Orthogonal::kStrip * Orthogonal::kStrip; first >= 0;
         first -= Orthogonal::kStrip) {
      const int64_t x0 = begun(x, first), x1 = begun(x, first + Orthogonal::kStrip);
      const int64_t y0 = begun(y, first), y1 = begun(y, first + Orthogonal::kStrip);
      int64_t held = 0;
      for (int64_t i = 0; i < x1; ++i)
        for (int64_t j = i < x0 ? y0 : 0; j < y1;) {
          const int64_t m = std::min(kBlock - held, y1 - j);
          k_.product(m, ld - first, x.data + i * ld + first, 0, y.data + j * ld + first, ld,
                     block_ + held * ld + first, ld, Store::assign);
          held += m;
          j += m;
          if (held == kBlock) {
            o_.absorb(held, ld, first, t_, ld, block_, ld, work_);
            held = 0;
          }
        }
      o_.absorb(held, ld, first, t_, ld, block_, ld, work_);
    }
  }

  // Rows that begin before a column.
  static int64_t begun(const Factor& f, int64_t column) {
    return f.triangular ? std::min(f.rows, column) : column > 0 ? f.rows : 0;
  }

  const Kernels<double>& k_;
  const Orthogonal& o_;
  double *t_, *block_, *work_, *gram_, *cholesky_;
};

// x[i][j] *= 2^(rows[i] + columns[j]), either null for none; the padding stays zero. Twice a factor
// of half the power, where one number could not hold it.
inline void scale_by_powers(int64_t m, int64_t n, double* x, int64_t ld, const int64_t* rows,
                            const int64_t* columns) {
  std::vector<double> by_row(rows != nullptr ? 2 * m : 0),
      by_column(columns != nullptr ? 2 * ld : 0);
  bool twice = false;
  const auto fill = [&](std::vector<double>& by, const int64_t* k, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      const bool fits = k[i] >= -1000 && k[i] <= 1000;
      const PowerOfTwo p(k[i]);
      by[i] = fits ? p(1.0) : p.half;
      by[stride + i] = fits ? 1.0 : p.rest;
      twice |= !fits;
    }
  };
  if (rows != nullptr) fill(by_row, rows, m, m);
  if (columns != nullptr) fill(by_column, columns, n, ld);
  for (int64_t pass = 0; pass < (twice ? 2 : 1); ++pass)
    orthogonal().scale(m, ld, x, ld, rows != nullptr ? by_row.data() + pass * m : nullptr,
                       columns != nullptr ? by_column.data() + pass * ld : nullptr);
}

// out[rows x ld] = 2^row_exponents W 2^-exponents for a weight's [rows x cols], ones without one;
// the exponents of the columns are chosen such that no entry is above 1 and no column is lost to
// underflow.
inline void scaled_weight(int64_t rows, int64_t cols, Numbers w, const int64_t* row_exponents,
                          double* out, int64_t ld, int64_t* exponents) {
  const auto read = [&](int64_t i, int64_t j, int64_t m, int64_t n, double* to, int64_t ldo) {
    if (w)
      pack_rows(m, n, w + (i * cols + j), cols, to, ldo);
    else
      for (int64_t r = 0; r < m; ++r)
        std::fill_n(to + r * ldo, n, 1.0), std::fill_n(to + r * ldo + n, ldo - n, 0.0);
  };
  read(0, 0, rows, cols, out, ld);
  const auto exponent = [&](int64_t i) { return row_exponents != nullptr ? row_exponents[i] : 0; };
  std::vector<double> largest(std::max(rows, ld));
  orthogonal().row_maxima(rows, ld, out, ld, largest.data());
  int64_t most = kNothing;
  for (int64_t i = 0; i < rows; ++i)
    if (largest[i] > 0) most = std::max(most, exponent_of(largest[i]) + exponent(i));
  if (most == kNothing) most = 0;
  std::fill_n(exponents, cols, most);
  std::vector<int64_t> by(rows);
  for (int64_t i = 0; i < rows; ++i) by[i] = exponent(i) - most;
  scale_by_powers(rows, cols, out, ld, by.data(), nullptr);
  orthogonal().column_maxima(rows, ld, out, ld, largest.data());
  const auto entry = [&](int64_t i, int64_t j) {
    double x = 0;
    read(i, j, 1, 1, &x, 1);
    return x;
  };
  for (int64_t j = 0; j < cols; ++j) {
    // 2^-300: no column of an ordinary model is so far below the others, and sums of larger numbers
    // are far from where they would lose digits.
    if (largest[j] > 4.9e-91) continue;
    int64_t own = kNothing;
    for (int64_t i = 0; i < rows; ++i)
      if (entry(i, j) != 0) own = std::max(own, exponent_of(std::abs(entry(i, j))) + exponent(i));
    if (own == kNothing) continue;
    exponents[j] = own;
    for (int64_t i = 0; i < rows; ++i) {
      int k = 0;
      const double mantissa = std::frexp(entry(i, j), &k);
      out[i * ld + j] = PowerOfTwo(k + exponent(i) - own)(mantissa);
    }
  }
}

}  // namespace htf
