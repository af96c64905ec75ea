// Singular values and vectors of orthogonal.h, in GCC vector extensions. Included after
// orthogonal.inl, once per instruction set; everything here has internal linkage.

namespace htf {
namespace {

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
    worked(4 * m * m);
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
  constexpr int64_t kSweep = 1024;  // multiply-adds in the time of two rotations and their roots
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
    worked(kSweep * (most - least));
  }
  return false;
}

HTF_INLINE void rotate8(int64_t m, double* p, double* q, Eight c, Eight s) {
  for (int64_t i = 0; i < m; ++i, p += 8, q += 8) {
    const Eight x = load8(p), y = load8(q);
    put8(p, c * x - s * y);
    put8(q, s * x + c * y);
  }
}

bool jacobi(int64_t m, int64_t n, double* a, double* v) {
  constexpr double eps = 2.220446049250313e-16;
  constexpr int64_t L = Orthogonal::kLanes;
  Eight norm{};  // of the whole, squared: what is 1e-18 of it is zero
  for (int64_t i = 0; i < m * n; ++i) norm += load8(a + i * L) * load8(a + i * L);
  for (int sweep = 0; sweep < 40; ++sweep) {
    bool turned = false;
    for (int64_t p = 0; p + 1 < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        double *x = a + p * m * L, *y = a + q * m * L;
        Eight xx{}, yy{}, xy{};
        for (int64_t i = 0; i < m; ++i) {
          const Eight s = load8(x + i * L), t = load8(y + i * L);
          xx += s * s, yy += t * t, xy += s * t;
        }
        const Eight limit = eps * sqrt8(xx) * sqrt8(yy) * 4.0;
        const Mask8 turn = abs8(xy) > limit && xx > norm * 1e-36 && yy > norm * 1e-36;
        int64_t any = 0;
        for (int lane = 0; lane < L; ++lane) any |= turn[lane];
        if (any == 0) continue;
        turned = true;
        const Eight safe = turn ? xy : all8(1.0);
        const Eight zeta = (yy - xx) / (2.0 * safe);
        const Eight t =
            (zeta < 0 ? all8(-1.0) : all8(1.0)) / (abs8(zeta) + sqrt8(1.0 + zeta * zeta));
        const Eight c = 1.0 / sqrt8(1.0 + t * t);
        rotate8(m, x, y, turn ? c : all8(1.0), turn ? c * t : Eight{});
        rotate8(n, v + p * n * L, v + q * n * L, turn ? c : all8(1.0), turn ? c * t : Eight{});
      }
      worked((n - p) * (3 * m + 2 * n) * L);
    }
    if (!turned) return true;
  }
  return false;
}

constexpr Orthogonal orthogonal_table() {
  return {&row_maxima, &column_maxima,     &scale, &absorb, &cholesky,
          &bidiagonal, &bidiagonal_values, &jacobi};
}

}  // namespace
}  // namespace htf
