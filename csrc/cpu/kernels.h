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

// Memory that a later call will read: fetched into the cache little by little meanwhile.
struct Ahead {
  const void* from = nullptr;
  int64_t bytes = 0;
};

// What becomes of C = A B where C takes part in products with two other matrices, all [m x n] with
// rows ld apart: whichever of these pointers is not null is written. x and y may be null where no
// product with them is asked for.
template <class T>
struct Products {
  int64_t ld;
  const T *x, *y;
  T* c;   // C
  T* cx;  // C * x, elementwise; may be x itself
  T* cy;  // C * y
  T* xy;  // x * y
};

template <class T>
struct Kernels {
  const char* name;

  // C[m x n] (=, +=, *=) A[m x k] B[k x n]. Element (i, l) of A lies at a[i * row_stride + l *
  // col_stride]: a transposed operand costs nothing. n is padded; every element of C is one sum
  // over l = 0 .. k-1 in that order, so results do not depend on how the rows are split into tiles.
  void (*gemm_)(int64_t m, int64_t n, int64_t k, const T* a, int64_t row_stride, int64_t col_stride,
                const T* b, int64_t ldb, T* c, int64_t ldc, Store store, Ahead ahead);
  void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t row_stride, int64_t col_stride,
            const T* b, int64_t ldb, T* c, int64_t ldc, Store store, Ahead ahead = {}) const {
    gemm_(m, n, k, a, row_stride, col_stride, b, ldb, c, ldc, store, ahead);
  }

  // The same product with rows of A side by side, and what is made of it.
  void (*gemm_products_)(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                         int64_t ldb, const Products<T>& to, Ahead ahead);
  void gemm_products(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                     int64_t ldb, const Products<T>& to, Ahead ahead = {}) const {
    gemm_products_(m, n, k, a, lda, b, ldb, to, ahead);
  }

  // out[m x n] = x[m x n], rows of any length.
  void (*copy)(int64_t m, int64_t n, const T* x, int64_t ldx, T* out, int64_t ldo);

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

// Two bfloat16 numbers, the first one in the lower half.
using Pair = uint32_t;

constexpr int64_t pair_rows(int64_t n) { return (n + 1) / 2; }

// Products with a bfloat16 matrix on processors that multiply such numbers two at a time. B is
// given as pairs of its rows, [pair_rows(k) x n], the last one's second half zero where k is odd;
// elements of A are rounded to bfloat16, sums and results are float32. As in Kernels<float>, n is
// padded, and every element of C is one sum in the order of B's rows. The processor takes numbers
// below 2^-126 for zero here.
struct PairKernels {
  static constexpr int64_t kMostDepth = 4096;  // of k, where B is in pairs

  void (*gemm_)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const Pair* b,
                int64_t ldb, float* c, int64_t ldc, Store store, Ahead ahead);
  void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const Pair* b,
            int64_t ldb, float* c, int64_t ldc, Store store, Ahead ahead = {}) const {
    gemm_(m, n, k, a, lda, b, ldb, c, ldc, store, ahead);
  }

  void (*gemm_products_)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                         const Pair* b, int64_t ldb, const Products<float>& to, Ahead ahead);
  void gemm_products(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const Pair* b,
                     int64_t ldb, const Products<float>& to, Ahead ahead = {}) const {
    gemm_products_(m, n, k, a, lda, b, ldb, to, ahead);
  }

  // C[m x n] (=, +=) A^T B, A [k x m] and B [k x n] both float32 and rounded; any k. A sum of more
  // than 256 terms is one of sums of 256.
  void (*gemm_transposed_)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                           const float* b, int64_t ldb, float* c, int64_t ldc, Store store,
                           Ahead ahead);
  void gemm_transposed(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                       int64_t ldb, float* c, int64_t ldc, Store store, Ahead ahead = {}) const {
    gemm_transposed_(m, n, k, a, lda, b, ldb, c, ldc, store, ahead);
  }
};

// The best the processor can run; the environment variable
// HTF_CPU=generic|avx2|avx512|avx512bf16 lowers it.
template <class T>
const Kernels<T>& kernels();
const PairKernels* pair_kernels();  // null where there are none

template <class T>
const Kernels<T>& kernels_generic();
template <class T>
const Kernels<T>& kernels_avx2();
template <class T>
const Kernels<T>& kernels_avx512();

// Their instructions are reached by GCC's target pragma, which Clang does not know.
#if defined(__x86_64__) && !defined(__clang__)
#define HTF_PAIRS 1
const PairKernels& pair_kernels_avx512bf16();
#endif

}  // namespace htf
