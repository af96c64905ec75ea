#include "cpu/kernels.h"
#include "interrupt.h"

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

// Pairs of rows of x, at most 16 columns.
HTF_INLINE void round_columns(int64_t k, int64_t cols, const float* x, int64_t ldx, Pair* out,
                              int64_t ldo) {
  // Columns of the first row lie in front of those of the second one, and are to lie between them.
  const __m512i between =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto some = static_cast<__mmask16>((1 << cols) - 1);
  for (int64_t l = 0; l < k; l += 2, x += 2 * ldx, out += ldo) {
    const __m512 first = _mm512_maskz_loadu_ps(some, x);
    const __m512 second = l + 1 < k ? _mm512_maskz_loadu_ps(some, x + ldx) : _mm512_setzero_ps();
    const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(between, both));
  }
}

// One register tile: ROWS x (VECS vectors). UNIT: consecutive rows of A lie side by side.
template <int ROWS, int VECS, bool UNIT, class Into>
__attribute__((noinline)) void pair_tile(int64_t depth, const Pair* a, int64_t lda, const Pair* b,
                                         int64_t ldb, Into into) {
  const int64_t rs = UNIT ? 1 : lda, cs = UNIT ? lda : 1;
  __m512 acc[ROWS][VECS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int64_t l = 0; l < depth; ++l, a += cs, b += ldb) {
    __m512bh bv[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j)
      bv[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + j * kTogether));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const auto s = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[i * rs])));
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], s, bv[j]);
    }
  }
  into(acc);
}

template <int VECS, bool UNIT, int ROWS, class Into>
HTF_INLINE void pair_remainder(int64_t m, int64_t depth, const Pair* a, int64_t lda, const Pair* b,
                               int64_t ldb, const Into& into) {
  if constexpr (ROWS > 0) {
    if (m == ROWS)
      pair_tile<ROWS, VECS, UNIT>(depth, a, lda, b, ldb, into);
    else
      pair_remainder<VECS, UNIT, ROWS - 1>(m, depth, a, lda, b, ldb, into);
  }
}

template <int VECS, bool UNIT, class Into>
HTF_INLINE void pair_panel(int64_t m, int64_t depth, const Pair* a, int64_t lda, const Pair* b,
                           int64_t ldb, const Into& into, Fetch& fetch) {
  const int64_t rs = UNIT ? 1 : lda;
  int64_t i = 0;
  for (; i + HTF_ROWS <= m; i += HTF_ROWS) {
    fetch.some();
    pair_tile<HTF_ROWS, VECS, UNIT>(depth, a + i * rs, lda, b, ldb, into.at(i, 0));
  }
  pair_remainder<VECS, UNIT, HTF_ROWS - 1>(m - i, depth, a + i * rs, lda, b, ldb, into.at(i, 0));
}

// A panel as wide as panel_vectors says.
template <bool UNIT, class Into>
HTF_INLINE void pair_panel(int64_t vectors, int64_t m, int64_t depth, const Pair* a, int64_t lda,
                           const Pair* b, int64_t ldb, const Into& into, Fetch& fetch) {
  if (vectors == 3)
    pair_panel<3, UNIT>(m, depth, a, lda, b, ldb, into, fetch);
  else if (vectors == 2)
    pair_panel<2, UNIT>(m, depth, a, lda, b, ldb, into, fetch);
  else
    pair_panel<1, UNIT>(m, depth, a, lda, b, ldb, into, fetch);
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
      pair_panel<false>(take, count, depth, rows, ldr, b + j, ldb, into.at(i, j), fetch);
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

// A block of A's columns at a time, and of B's the panel: both in pairs on the stack.
void pair_gemm_transposed(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                          const float* b, int64_t ldb, float* c, int64_t ldc, Store store,
                          Ahead ahead) {
  constexpr int64_t kDepth = 128, kRows = 128, kCols = 3 * kTogether;
  alignas(64) Pair columns[kDepth * kRows];
  alignas(64) Pair panel[kDepth * kCols];
  Fetch fetch(ahead, m, n / kTogether);
  for (int64_t l = 0; l < k; l += 2 * kDepth, store = Store::add) {
    const int64_t terms = k - l < 2 * kDepth ? k - l : 2 * kDepth, depth = pair_rows(terms);
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t count = m - i < kRows ? m - i : kRows;
      for (int64_t q = 0; q < count; q += kTogether)
        round_columns(terms, count - q < kTogether ? count - q : kTogether, a + l * lda + i + q,
                      lda, columns + q, kRows);
      int64_t left = n / kTogether, j = 0;
      while (left > 0) {
        const int64_t take = panel_vectors(left);
        for (int64_t v = 0; v < take * kTogether; v += kTogether)
          round_columns(terms, kTogether, b + l * ldb + j + v, ldb, panel + v, kCols);
        pair_panel<true>(take, count, depth, columns, kRows, panel, kCols,
                         IntoC<float>{c, ldc, store}.at(i, j), fetch);
        j += take * kTogether;
        left -= take;
      }
    }
  }
}

}  // namespace
}  // namespace htf
#pragma GCC pop_options

namespace htf {

const PairKernels& pair_kernels_avx512bf16() {
  static const PairKernels k{&pair_gemm, &pair_gemm_products, &pair_gemm_transposed};
  return k;
}

}  // namespace htf
#endif
