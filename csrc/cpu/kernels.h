// Dense building blocks of the CPU operations, compiled once per instruction set and chosen at run
// time.
//
// All matrices are row major. "Padded" means a multiple of kPad<T> columns (64 bytes): buffers of
// this library have padded rows whose extra columns hold zeros, so that no kernel has a column
// remainder.
#pragma once

#include <cstdint>
#include <utility>

namespace htf {

template <class T>
constexpr int64_t kPad = 64 / static_cast<int64_t>(sizeof(T));

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kPad<T> - 1) / kPad<T> * kPad<T>;
}

enum class Store { assign, add, multiply };

template <class T>
struct Kernels {
  const char* name;

  // C[m x n] (=, +=, *=) A[m x k] B[k x n]. Element (i, l) of A lies at a[i * row_stride + l *
  // col_stride]: a transposed operand costs nothing. n is padded; every element of C is one sum
  // over l = 0 .. k-1 in that order, so results do not depend on how the rows are split into tiles.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const T* a, int64_t row_stride, int64_t col_stride,
               const T* b, int64_t ldb, T* c, int64_t ldc, Store store);

  // out[m x n] (=, +=) x * y, elementwise; n is padded; out may be x or y. A stride of 0 repeats a
  // row.
  void (*product)(int64_t m, int64_t n, const T* x, int64_t ldx, const T* y, int64_t ldy, T* out,
                  int64_t ldo, Store store);

  // out[i] (=, *=) x[at[i]], rows of n elements; n is padded.
  void (*gather)(int64_t m, int64_t n, const int64_t* at, const T* x, int64_t ldx, T* out,
                 int64_t ldo, Store store);

  // out[at[i]] += x[i], in the order of i; n is padded.
  void (*scatter)(int64_t m, int64_t n, const int64_t* at, const T* x, int64_t ldx, T* out,
                  int64_t ldo);

  // out = sum over q = 0 .. count-1 of x[r] * y[at[r]], r = order[q] (q itself without an order),
  // elementwise over rows of n elements; n is padded.
  void (*sum_products)(int64_t n, int64_t count, const int32_t* order, const T* x, int64_t ldx,
                       const int32_t* at, const T* y, int64_t ldy, T* out);

  // The same with numbers x[r] instead of rows.
  void (*sum_rows)(int64_t n, int64_t count, const int32_t* order, const T* x, const int32_t* at,
                   const T* y, int64_t ldy, T* out);

  // sum of x[j] * y[j]; n is padded.
  T (*dot)(int64_t n, const T* x, const T* y);

  // out[cols x ldo] = the transpose of x[rows x cols], columns rows .. padded(rows)-1 set to
  // zero.
  void (*transpose)(int64_t rows, int64_t cols, const T* x, int64_t ldx, T* out, int64_t ldo);
};

// The best the processor can run; the environment variable HTF_CPU=generic|avx2|avx512 lowers it.
template <class T>
const Kernels<T>& kernels();

template <class T>
const Kernels<T>& kernels_generic();
template <class T>
const Kernels<T>& kernels_avx2();
template <class T>
const Kernels<T>& kernels_avx512();

}  // namespace htf
