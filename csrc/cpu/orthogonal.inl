// The kernels of orthogonal.h in GCC vector extensions. Included after kernels.inl, once per
// instruction set; everything here has internal linkage.

// Vectors wider than the baseline's registers are passed to inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace htf {
namespace {

// Eight numbers; the compiler makes two or four of narrower registers where there is no wider one.
typedef double Eight __attribute__((vector_size(64)));
typedef double EightMem __attribute__((vector_size(64), aligned(8), may_alias));
typedef int64_t Mask8 __attribute__((vector_size(64)));

HTF_INLINE Eight load8(const double* p) { return *reinterpret_cast<const EightMem*>(p); }
HTF_INLINE void put8(double* p, Eight v) { *reinterpret_cast<EightMem*>(p) = v; }
HTF_INLINE Eight all8(double x) { return Eight{x, x, x, x, x, x, x, x}; }

// There is no portable spelling that GCC makes vector instructions of.
HTF_INLINE Eight sqrt8(Eight x) {
#if defined(__clang__)
  return __builtin_elementwise_sqrt(x);
#elif HTF_VECTOR_BYTES == 64
  return (Eight)_mm512_maskz_sqrt_pd(255, (__m512d)x);
#elif HTF_VECTOR_BYTES == 32
  const __m256d a = (__m256d)__builtin_shufflevector(x, x, 0, 1, 2, 3);
  const __m256d b = (__m256d)__builtin_shufflevector(x, x, 4, 5, 6, 7);
  typedef double Four __attribute__((vector_size(32)));
  const Four r = (Four)_mm256_sqrt_pd(a), s = (Four)_mm256_sqrt_pd(b);
  return __builtin_shufflevector(r, s, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  Eight r;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = __builtin_sqrt(x[i]);
  return r;
#endif
}

HTF_INLINE Eight abs8(Eight x) { return (Eight)((Mask8)x & ~(Mask8)all8(-0.0)); }

HTF_INLINE double sum8(Eight v) {
  typedef double Four __attribute__((vector_size(32)));
  typedef double Two __attribute__((vector_size(16)));
  const Four f =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const Two t = __builtin_shufflevector(f, f, 0, 1) + __builtin_shufflevector(f, f, 2, 3);
  return t[0] + t[1];
}

// Element K of v in all places.
template <int K>
HTF_INLINE Eight spread(Eight v) {
  return __builtin_shufflevector(v, v, K, K, K, K, K, K, K, K);
}

// -- scale ----------------------------------------------------------------------------------------

HTF_INLINE Eight larger8(Eight a, Eight b) { return a < b ? b : a; }

void row_maxima(int64_t m, int64_t n, const double* x, int64_t ldx, double* out) {
  for (int64_t i = 0; i < m; ++i, x += ldx) {
    Eight most{};
    for (int64_t j = 0; j < n; j += 8) most = larger8(most, abs8(load8(x + j)));
    double largest = 0;
    for (int k = 0; k < 8; ++k) largest = largest < most[k] ? most[k] : largest;
    out[i] = largest;
  }
}

void column_maxima(int64_t m, int64_t n, const double* x, int64_t ldx, double* out) {
  for (int64_t j = 0; j < n; j += 8) put8(out + j, Eight{});
  for (int64_t i = 0; i < m; ++i, x += ldx)
    for (int64_t j = 0; j < n; j += 8) put8(out + j, larger8(load8(out + j), abs8(load8(x + j))));
}

void scale(int64_t m, int64_t n, double* x, int64_t ldx, const double* by_row,
           const double* by_column) {
  for (int64_t i = 0; i < m; ++i, x += ldx) {
    const double f = by_row != nullptr ? by_row[i] : 1;
    if (by_column != nullptr)
      for (int64_t j = 0; j < n; j += 8) put8(x + j, load8(x + j) * f * load8(by_column + j));
    else
      for (int64_t j = 0; j < n; j += 8) put8(x + j, load8(x + j) * f);
  }
}

// -- absorb ---------------------------------------------------------------------------------------

constexpr int kS = Orthogonal::kStrip;
static_assert(kS == 8);

// A reflection I - gamma v v^T with v = (alpha - beta, x), which sends (alpha, x) to (beta, 0).
struct Reflection {
  double beta, top, gamma;
};
HTF_INLINE Reflection reflection(double alpha, double squares_of_x) {
  // Squares of what is negligible beside the matrix, whose largest entries are near 1, may
  // underflow.
  if (squares_of_x <= 1e-280) return {alpha, 0, 0};
  const double length = __builtin_sqrt(alpha * alpha + squares_of_x);
  const double beta = alpha > 0 ? -length : length;
  return {beta, alpha - beta, 1 / (beta * (beta - alpha))};
}

// Reflections of one strip of columns: each row of a is one vector. Afterwards column K of a holds
// its reflection's vector, t its rows, and reflect[k] = Tf[0..k, k] of I - V Tf^T V^T.
struct Strip {
  double top[kS];
  double tf[kS][kS];  // tf[k][j] = Tf[j][k], j <= k
};

// dots: of column K with all columns of the strip.
template <int K>
HTF_INLINE void strip_column(int64_t m, double* t, int64_t ldt, double* a, int64_t lda, Eight dots,
                             Strip& s) {
  double* row = t + K * ldt;
  const Reflection r = reflection(row[K], dots[K]);
  s.top[K] = r.top;
  s.tf[K][K] = r.gamma;
  for (int j = 0; j < K; ++j) {
    double sum = 0;
    for (int l = j; l < K; ++l) sum += s.tf[l][j] * dots[l];
    s.tf[K][j] = -r.gamma * sum;
  }
  const Eight old = load8(row);
  Eight z = r.gamma * (r.top * old + dots);
  const Mask8 place = {0, 1, 2, 3, 4, 5, 6, 7};
  z = place > K ? z : Eight{};
  Eight fresh = old - r.top * z;
  fresh[K] = r.beta;
  put8(row, fresh);
  if constexpr (K + 1 < kS) {
    Eight sum[4] = {};
    int64_t i = 0;
    for (; i + 4 <= m; i += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        double* p = a + (i + u) * lda;
        Eight x = load8(p);
        x -= spread<K>(x) * z;
        put8(p, x);
        sum[u] += spread<K + 1>(x) * x;
      }
    for (; i < m; ++i) {
      double* p = a + i * lda;
      Eight x = load8(p);
      x -= spread<K>(x) * z;
      put8(p, x);
      sum[0] += spread<K + 1>(x) * x;
    }
    strip_column<K + 1>(m, t, ldt, a, lda, (sum[0] + sum[1]) + (sum[2] + sum[3]), s);
  }
}

void absorb(int64_t m, int64_t n, int64_t first, double* t, int64_t ldt, double* a, int64_t lda,
            double* work) {
  if (m == 0) return;
  Strip s;
  for (int64_t c = first; c < n; c += kS) {
    double *strip = a + c, *diagonal = t + c * ldt + c;
    Eight sum[2] = {};
    int64_t i = 0;
    for (; i + 2 <= m; i += 2)
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const Eight x = load8(strip + (i + u) * lda);
        sum[u] += spread<0>(x) * x;
      }
    if (i < m) {
      const Eight x = load8(strip + i * lda);
      sum[0] += spread<0>(x) * x;
    }
    strip_column<0>(m, diagonal, ldt, strip, lda, sum[0] + sum[1], s);
    const int64_t rest = n - c - kS;
    if (rest == 0) break;
    // Y = V^T [T; A], Z = Tf^T Y, [T; A] -= V Z.
    gemm<double>(kS, rest, m, strip, 1, lda, strip + kS, lda, work, rest, Store::assign, {});
    for (int64_t j = 0; j < rest; j += kS) {
      Eight y[kS];
      double* row = diagonal + kS + j;
#pragma GCC unroll 8
      for (int k = 0; k < kS; ++k)
        y[k] = load8(work + k * rest + j) + s.top[k] * load8(row + k * ldt);
#pragma GCC unroll 8
      for (int k = 0; k < kS; ++k) {
        Eight z = s.tf[k][0] * y[0];
        for (int l = 1; l <= k; ++l) z += s.tf[k][l] * y[l];
        put8(row + k * ldt, load8(row + k * ldt) - s.top[k] * z);
        put8(work + k * rest + j, -z);
      }
    }
    gemm<double>(m, rest, kS, strip, lda, 1, work, rest, strip + kS, lda, Store::add, {});
    worked(2 * m * rest * kS);
  }
}

// -- cholesky -------------------------------------------------------------------------------------

void cholesky(int64_t n, const double* g, int64_t ldg, double* t, int64_t ldt, double* work) {
  const int64_t ld = padded<double>(n);
  double *scale = work, *left = work + ld, *row = work + 2 * ld;
  for (int64_t j = 0; j < ld; ++j) {
    const double square = j < n ? g[j * ldg + j] : 0;
    scale[j] = square > 0 ? 1 / __builtin_sqrt(square) : 0;
    left[j] = square > 0 ? 1 : 0;
  }
  // What is left of a unit column after this is rounding.
  const double least = 4 * 2.220446049250313e-16;
  int64_t rank = 0;
  for (; rank < n; ++rank) {
    int64_t pivot = 0;
    for (int64_t j = 1; j < n; ++j)
      if (left[j] > left[pivot]) pivot = j;
    if (!(left[pivot] > least)) break;
    const double length = __builtin_sqrt(left[pivot]), inverse = 1 / length;
    double* out = t + rank * ldt;
    const double* from = g + pivot * ldg;
    for (int64_t j = 0; j < ld; j += 8)
      put8(row + j, scale[pivot] * load8(from + j) * load8(scale + j));
    int64_t j = 0;
    for (; j + 32 <= ld; j += 32) {
      Eight x[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) x[v] = load8(row + j + 8 * v);
      for (int64_t l = 0; l < rank; ++l) {
        const double f = t[l * ldt + pivot];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) x[v] -= f * load8(t + l * ldt + j + 8 * v);
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) put8(out + j + 8 * v, x[v]);
    }
    for (; j < ld; j += 8) {
      Eight x = load8(row + j);
      for (int64_t l = 0; l < rank; ++l) x -= t[l * ldt + pivot] * load8(t + l * ldt + j);
      put8(out + j, x);
    }
    for (j = 0; j < ld; j += 8) {
      const Eight rest = load8(left + j);
      const Eight x = rest > 0 ? load8(out + j) * inverse : Eight{};
      put8(out + j, x);
      put8(left + j, rest - x * x);
    }
    out[pivot] = length;
    left[pivot] = -1;
    worked(rank * ld);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < ld; j += 8)
      put8(t + i * ldt + j, i < rank ? load8(t + i * ldt + j) *
                                           (load8(scale + j) != 0 ? 1 / load8(scale + j) : Eight{})
                                     : Eight{});
}

}  // namespace
}  // namespace htf
