// Orthogonal reductions of small matrices in float64: triangular factors, Cholesky factors with
// pivots, singular values. Compiled once per instruction set like kernels.h, whose conventions
// hold: matrices are row major with rows of a padded length ld, extra columns are zero.
//
// The sizes here, 8 to a few hundred, are those where a LAPACK call spends its time in overhead and
// in the latency of one square root after another.
#pragma once

#include <cstdint>

namespace htf {

struct Orthogonal {
  // Householder vectors are made eight columns at a time; each such strip of a row is one vector.
  static constexpr int64_t kStrip = 8;

  // Largest magnitudes of x[m x n], n padded: of each row, of each column.
  void (*row_maxima)(int64_t m, int64_t n, const double* x, int64_t ldx, double* out);
  void (*column_maxima)(int64_t m, int64_t n, const double* x, int64_t ldx, double* out);
  // x[i][j] *= by_row[i] * by_column[j]; either may be null.
  void (*scale)(int64_t m, int64_t n, double* x, int64_t ldx, const double* by_row,
                const double* by_column);

  // Turns an upper triangular t[n x n] into the one with t^T t = (t^T t) + (a^T a), n a multiple of
  // kStrip. Columns of a before `first` (a multiple of kStrip) are zero and are not looked at.
  // Destroys a[m x n]. Backward stable column by column: columns may differ in size by any factor
  // whose square is in range. work: absorb_work(n) elements.
  void (*absorb)(int64_t m, int64_t n, int64_t first, double* t, int64_t ldt, double* a,
                 int64_t lda, double* work);
  static constexpr int64_t absorb_work(int64_t n) { return kStrip * n; }

  // t[n x n] with t^T t = g to rounding, for a positive semidefinite g[n x n]; its rows follow the
  // pivots, those past the numerical rank are zero. The columns are scaled to unit length first, so
  // that they too may differ in size by any factor whose square is in range. work:
  // cholesky_work(ld).
  void (*cholesky)(int64_t n, const double* g, int64_t ldg, double* t, int64_t ldt, double* work);
  static constexpr int64_t cholesky_work(int64_t ld) { return 4 * ld; }

  // Diagonal d[n] and superdiagonal e[n - 1] of an upper bidiagonal matrix with the singular values
  // of a[n x n], whose largest entry is about 1. Destroys a. work: bidiagonal_work(ld).
  void (*bidiagonal)(int64_t n, double* a, int64_t lda, double* d, double* e, double* work);
  static constexpr int64_t bidiagonal_work(int64_t ld) { return 6 * ld; }

  // Singular values of kLanes bidiagonal matrices side by side: d[i * kLanes + lane], e likewise,
  // all [n x n] (smaller ones continued with zeros). d becomes the values, neither sorted nor
  // positive; e is destroyed. Returns false where one did not converge.
  static constexpr int64_t kLanes = 8;
  bool (*bidiagonal_values)(int64_t n, double* d, double* e);

  // One-sided Jacobi on kLanes matrices side by side: a is [n columns x m rows x kLanes], v [n x n
  // x kLanes] likewise; rotates a's columns until they are orthogonal, and v's with them. Returns
  // false where one did not get there.
  bool (*jacobi)(int64_t m, int64_t n, double* a, double* v);
};

const Orthogonal& orthogonal();

const Orthogonal& orthogonal_generic();
const Orthogonal& orthogonal_avx2();
const Orthogonal& orthogonal_avx512();

}  // namespace htf
