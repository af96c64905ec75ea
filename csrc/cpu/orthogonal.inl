// The kernels of orthogonal.h in GCC vector extensions. Included after kernels.inl, once per
// instruction set; everything here has internal linkage.

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
#if HTF_VECTOR_BYTES == 64
  return (Eight)_mm512_sqrt_pd((__m512d)x);
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
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < ld; j += 8)
      put8(t + i * ldt + j, i < rank ? load8(t + i * ldt + j) *
                                           (load8(scale + j) != 0 ? 1 / load8(scale + j) : Eight{})
                                     : Eight{});
}

// -- singular values ------------------------------------------------------------------------------

// Rows of at most this many vectors keep two vectors of their length in registers.
#if HTF_VECTOR_BYTES == 64
constexpr int kMost = 8;
#else
constexpr int kMost = 1;
#endif

// a_i -= v_i z, s_i += a_i u.
template <int N>
void update_and_dot(int64_t m, double* a, int64_t lda, const double* v, const double* z,
                    const double* u, double* s) {
  Eight zr[N], ur[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) zr[j] = load8(z + 8 * j), ur[j] = load8(u + 8 * j);
  for (int64_t i = 0; i < m; ++i, a += lda) {
    const Eight f = all8(v[i]);
    Eight sum{};
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Eight x = load8(a + 8 * j) - f * zr[j];
      put8(a + 8 * j, x);
      sum += x * ur[j];
    }
    s[i] += sum8(sum);
  }
}

// a_i -= f_i u, w += x_i a_i.
template <int N>
void update_and_sum(int64_t m, double* a, int64_t lda, const double* f, const double* u,
                    const double* x, double* w) {
  Eight ur[N], wr[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) ur[j] = load8(u + 8 * j), wr[j] = load8(w + 8 * j);
  for (int64_t i = 0; i < m; ++i, a += lda) {
    const Eight fi = all8(f[i]), xi = all8(x[i]);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Eight y = load8(a + 8 * j) - fi * ur[j];
      put8(a + 8 * j, y);
      wr[j] += xi * y;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) put8(w + 8 * j, wr[j]);
}

template <int N>
HTF_INLINE void rows_dot(int64_t vectors, int64_t m, double* a, int64_t lda, const double* v,
                         const double* z, const double* u, double* s) {
  if constexpr (N > 0) {
    if (vectors == N)
      update_and_dot<N>(m, a, lda, v, z, u, s);
    else
      rows_dot<N - 1>(vectors, m, a, lda, v, z, u, s);
  }
}
template <int N>
HTF_INLINE void rows_sum(int64_t vectors, int64_t m, double* a, int64_t lda, const double* f,
                         const double* u, const double* x, double* w) {
  if constexpr (N > 0) {
    if (vectors == N)
      update_and_sum<N>(m, a, lda, f, u, x, w);
    else
      rows_sum<N - 1>(vectors, m, a, lda, f, u, x, w);
  }
}

// Golub and Kahan: a reflection of the rows below k, then one of the columns right of it. Each step
// passes over the matrix twice: the rows' update with the dots of the columns' reflection, and the
// columns' update with the dots of the next rows' reflection.
void bidiagonal(int64_t n, double* a, int64_t lda, double* d, double* e, double* work) {
  const int64_t ld = padded<double>(n), vectors = ld / 8;
  double *z = work, *u = work + ld, *w = work + 2 * ld, *v = work + 3 * ld, *s = work + 4 * ld;
  for (int64_t j = 0; j < ld; ++j) z[j] = u[j] = w[j] = 0;
  for (int64_t i = 0; i < n; ++i) v[i] = a[i * lda], s[i] = 0;
  for (int64_t j = 0; j < vectors; j += kMost)
    rows_sum<kMost>(vectors - j < kMost ? vectors - j : kMost, n, a + 8 * j, lda, s, u + 8 * j, v,
                    w + 8 * j);
  for (int64_t k = 0; k < n; ++k) {
    // v: column k from row k on; w: its dots with all columns.
    double* row = a + k * lda;
    const double alpha = v[0];
    double below = 0;
    for (int64_t i = 1; i < n - k; ++i) below += v[i] * v[i];
    const Reflection left = reflection(alpha, below);
    d[k] = left.beta;
    if (k + 1 == n) break;
    const int64_t from = (k + 1) / 8;  // first vector of the columns right of k
    double squares = 0;
    for (int64_t j = 8 * from; j < ld; j += 8) {
      // v^T a = w - beta * row, for the reflection's vector (alpha - beta, below).
      Eight y = left.gamma * (load8(w + j) - left.beta * load8(row + j));
      if (left.gamma == 0) y = Eight{};
      put8(z + j, y);
      put8(row + j, load8(row + j) - left.top * y);
    }
    for (int64_t j = 8 * from; j <= k; ++j) z[j] = 0;
    for (int64_t j = k + 2; j < n; ++j) squares += row[j] * row[j];
    const Reflection right = reflection(row[k + 1], squares);
    e[k] = right.beta;
    for (int64_t j = 8 * from; j < ld; j += 8) put8(u + j, load8(row + j)), put8(w + j, Eight{});
    for (int64_t j = 8 * from; j <= k; ++j) u[j] = 0;
    u[k + 1] = right.top;
    const int64_t m = n - k - 1;
    for (int64_t i = 0; i < m; ++i) s[i] = 0;
    for (int64_t j = from; j < vectors; j += kMost)
      rows_dot<kMost>(vectors - j < kMost ? vectors - j : kMost, m, row + lda + 8 * j, lda, v + 1,
                      z + 8 * j, u + 8 * j, s);
    for (int64_t i = 0; i < m; ++i) {
      s[i] *= right.gamma;
      v[i] = row[(i + 1) * lda + k + 1] - s[i] * right.top;
    }
    for (int64_t j = from; j < vectors; j += kMost)
      rows_sum<kMost>(vectors - j < kMost ? vectors - j : kMost, m, row + lda + 8 * j, lda, s,
                      u + 8 * j, v, w + 8 * j);
  }
}

struct Rotation8 {
  Eight c, s, r;
};
// c f + s g = r, c g - s f = 0. Of numbers whose squares underflow the second is dropped.
HTF_INLINE Rotation8 rotation8(Eight f, Eight g) {
  const Eight square = f * f + g * g;
  const Mask8 some = square > 1e-290;
  const Eight r = sqrt8(some ? square : all8(1.0)), inverse = 1.0 / r;
  return {some ? f * inverse : all8(1.0), some ? g * inverse : Eight{}, some ? r : f};
}

// The smaller singular value of [f g; 0 h].
HTF_INLINE Eight smaller8(Eight f, Eight g, Eight h) {
  f = abs8(f), g = abs8(g), h = abs8(h);
  const Eight low = f < h ? f : h, high = f < h ? h : f;
  const Mask8 some = low > 1e-290;
  const Eight inverse = 1.0 / (some ? high : all8(1.0));
  const Eight sum = 1.0 + low * inverse, gap = (high - low) * inverse, side = g * inverse;
  const Eight c = sqrt8(sum * sum + side * side) + sqrt8(gap * gap + side * side);
  return some ? 2.0 * low / c : Eight{};
}

// Implicit QR with the shift of Demmel and Kahan (1990), all lanes in step: each has its own
// unreduced block [low, high] and shift; a sweep goes over all their blocks, and a lane takes part
// where it is inside its own.
bool bidiagonal_values(int64_t n, double* d, double* e) {
  constexpr double eps = 2.220446049250313e-16;
  constexpr int64_t L = Orthogonal::kLanes;
  if (n < 2) return true;
  Eight norm{};
  for (int64_t i = 0; i < n; ++i) {
    const Eight x = abs8(load8(d + i * L));
    norm = norm < x ? x : norm;
    if (i + 1 < n) {
      const Eight y = abs8(load8(e + i * L));
      norm = norm < y ? y : norm;
    }
  }
  // A superdiagonal of this size moves no singular value by more. Where values coincide rounding
  // may keep one just above it: it grows, to 32 eps at most, if that takes long.
  Eight tiny = norm * (4 * eps);
  Mask8 top = Mask8{} + (n - 1);  // values above it are found
  for (int64_t sweep = 0; sweep < 16 * (n + 1); ++sweep) {
    if (sweep > 0 && sweep % (4 * (n + 1)) == 0) tiny *= 2.0;
    // Blocks: from the bottom up, the first run of superdiagonals that are not negligible.
    Mask8 high{}, low{}, open{}, closed{};
    int64_t most = 0, least = n;
    int64_t last = 0;
    for (int lane = 0; lane < L; ++lane) last = top[lane] > last ? top[lane] : last;
    Eight smallest{};
    for (int64_t i = last - 1; i >= 0; --i) {
      const Eight x = load8(e + i * L), a = abs8(load8(d + i * L)), b = abs8(load8(d + i * L + L));
      const Mask8 zero = abs8(x) <= eps * (a + b) || abs8(x) <= tiny;
      put8(e + i * L, zero ? Eight{} : x);
      const Mask8 start = ~zero & ~open & ~closed & (top > i);
      high = start ? Mask8{} + (i + 1) : high;
      smallest = start ? b : smallest;
      open |= start;
      const Mask8 inside = open & ~closed & ~zero;
      low = inside ? Mask8{} + i : low;
      smallest = inside && a < smallest ? a : smallest;
      closed |= open & zero;
    }
    top = open ? high : Mask8{};
    for (int lane = 0; lane < L; ++lane)
      if (open[lane]) {
        most = high[lane] > most ? high[lane] : most;
        least = low[lane] < least ? low[lane] : least;
      }
    if (most == 0) return true;
    // The shift; none where a diagonal entry is negligible, which a sweep without one carries to
    // the bottom, or where it would change nothing.
    Eight first{}, second{}, bottom{}, side{};
    for (int lane = 0; lane < L; ++lane)
      if (open[lane]) {
        first[lane] = d[low[lane] * L + lane];
        second[lane] = e[low[lane] * L + lane];
        bottom[lane] = d[high[lane] * L + lane];
        side[lane] = e[(high[lane] - 1) * L + lane];
      }
    Eight before{};
    for (int lane = 0; lane < L; ++lane)
      if (open[lane]) before[lane] = d[(high[lane] - 1) * L + lane];
    Eight shift = smaller8(before, side, bottom);
    const Eight size = abs8(first);
    const Eight safe = size > 0 ? first : all8(1.0);
    const Eight ratio = shift / safe;
    shift = smallest <= tiny || ratio * ratio <= eps ? Eight{} : shift;
    const Eight sign = first < 0 ? all8(-1.0) : all8(1.0);
    Eight f = (size - shift) * (sign + shift / safe), g = second;
    // Without a shift f is d[low] whatever its size.
    f = shift == 0 ? first : f;
    for (int64_t i = least; i < most; ++i) {
      const Mask8 in = open & (low <= i) & (high > i);
      const Mask8 begun = in & (low < i), more = in & (high > i + 1);
      const Eight di = load8(d + i * L), ei = load8(e + i * L), dn = load8(d + i * L + L);
      const Rotation8 right = rotation8(f, g);
      if (i > least) {
        const Eight old = load8(e + i * L - L);
        put8(e + i * L - L, begun ? right.r : old);
      }
      const Eight f1 = right.c * di + right.s * ei, e1 = right.c * ei - right.s * di;
      const Eight g1 = right.s * dn, d1 = right.c * dn;
      const Rotation8 left = rotation8(f1, g1);
      const Eight f2 = left.c * e1 + left.s * d1, d2 = left.c * d1 - left.s * e1;
      put8(d + i * L, in ? left.r : di);
      put8(d + i * L + L, in ? d2 : dn);
      const Mask8 done = in & ~more;
      put8(e + i * L, done ? f2 : ei);
      if (i + 1 < n - 1) {
        const Eight en = load8(e + i * L + L);
        g = more ? left.s * en : g;
        put8(e + i * L + L, more ? left.c * en : en);
      }
      f = in ? f2 : f;
    }
  }
  return false;
}

constexpr Orthogonal orthogonal_table() {
  return {&row_maxima, &column_maxima, &scale, &absorb, &cholesky, &bidiagonal, &bidiagonal_values};
}

}  // namespace
}  // namespace htf
