#include "cpu/kernels.h"

#if defined(HTF_PAIRS)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma,prefer-vector-width=512")
#define HTF_VECTOR_BYTES 64
#define HTF_ROWS 8
#include "cpu/kernels.inl"

namespace htf {
namespace {

constexpr int64_t kTogether = 16;  // pairs of a vector

// Rows of A in pairs, zeros behind them up to whole vectors.
HTF_INLINE void round_rows(int64_t m, int64_t k, const float* a, int64_t lda, Pair* out,
                           int64_t ldo) {
  const int64_t full = k / 32 * 32, rest = k - full;
  const auto low = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1 << rest) - 1);
  const auto high = static_cast<__mmask16>(rest > 16 ? (1 << (rest - 16)) - 1 : 0);
  for (int64_t i = 0; i < m; ++i, a += lda, out += ldo) {
    for (int64_t l = 0; l < full; l += 32)
      _mm512_storeu_si512(out + l / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
                                           _mm512_loadu_ps(a + l + 16), _mm512_loadu_ps(a + l))));
    if (rest > 0)
      _mm512_storeu_si512(out + full / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
                                              _mm512_maskz_loadu_ps(high, a + full + 16),
                                              _mm512_maskz_loadu_ps(low, a + full))));
  }
}

// One register tile: ROWS x (VECS vectors).
template <int ROWS, int VECS, class Into>
__attribute__((noinline)) void pair_tile(int64_t depth, const Pair* a, int64_t lda, const Pair* b,
                                         int64_t ldb, Into into) {
  __m512 acc[ROWS][VECS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int64_t l = 0; l < depth; ++l, ++a, b += ldb) {
    __m512bh bv[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j)
      bv[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + j * kTogether));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const auto s = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[i * lda])));
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], s, bv[j]);
    }
  }
  into(acc);
}

template <int VECS, int ROWS, class Into>
HTF_INLINE void pair_remainder(int64_t m, int64_t depth, const Pair* a, int64_t lda, const Pair* b,
                               int64_t ldb, const Into& into) {
  if constexpr (ROWS > 0) {
    if (m == ROWS)
      pair_tile<ROWS, VECS>(depth, a, lda, b, ldb, into);
    else
      pair_remainder<VECS, ROWS - 1>(m, depth, a, lda, b, ldb, into);
  }
}

template <int VECS, class Into>
HTF_INLINE void pair_panel(int64_t m, int64_t depth, const Pair* a, int64_t lda, const Pair* b,
                           int64_t ldb, const Into& into, int64_t row, int64_t col, Fetch& fetch) {
  int64_t i = 0;
  for (; i + HTF_ROWS <= m; i += HTF_ROWS) {
    fetch.some();
    pair_tile<HTF_ROWS, VECS>(depth, a + i * lda, lda, b + col, ldb, into.at(row + i, col));
  }
  pair_remainder<VECS, HTF_ROWS - 1>(m - i, depth, a + i * lda, lda, b + col, ldb,
                                     into.at(row + i, col));
}

// As many rows at a time as fit on the stack in pairs.
template <class Into>
HTF_INLINE void pair_panels(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                            const Pair* b, int64_t ldb, const Into& into, const Ahead& ahead) {
  constexpr int64_t kSpace = PairKernels::kMostDepth / 2 * HTF_ROWS;
  alignas(64) Pair rows[kSpace];
  const int64_t depth = pair_rows(k), ldr = (depth + kTogether - 1) / kTogether * kTogether;
  const int64_t most = kSpace / ldr / HTF_ROWS * HTF_ROWS;
  Fetch fetch(ahead, m, n / kTogether);
  for (int64_t i = 0; i < m; i += most) {
    const int64_t count = m - i < most ? m - i : most;
    round_rows(count, k, a + i * lda, lda, rows, ldr);
    int64_t left = n / kTogether, j = 0;
    while (left > 0) {
      const int64_t take = panel_vectors(left);
      if (take == 3)
        pair_panel<3>(count, depth, rows, ldr, b, ldb, into, i, j, fetch);
      else if (take == 2)
        pair_panel<2>(count, depth, rows, ldr, b, ldb, into, i, j, fetch);
      else
        pair_panel<1>(count, depth, rows, ldr, b, ldb, into, i, j, fetch);
      j += take * kTogether;
      left -= take;
    }
  }
}

void pair_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const Pair* b,
               int64_t ldb, float* c, int64_t ldc, Store store, Ahead ahead) {
  pair_panels(m, n, k, a, lda, b, ldb, IntoC<float>{c, ldc, store}, ahead);
}

void pair_gemm_products(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const Pair* b,
                        int64_t ldb, const Products<float>& to, Ahead ahead) {
  pair_panels(m, n, k, a, lda, b, ldb, IntoProducts<float>{to, 0}, ahead);
}

}  // namespace
}  // namespace htf
#pragma GCC pop_options

namespace htf {

const PairKernels& pair_kernels_avx512bf16() {
  static const PairKernels k{&pair_gemm, &pair_gemm_products};
  return k;
}

}  // namespace htf
#endif
