// The kernels of kernels.h in GCC vector extensions. Included once per instruction set, with
// HTF_VECTOR_BYTES and HTF_ROWS (rows of a register tile) set and the target pragma in force;
// everything here has internal linkage, so that no instruction of one set leaks into another's
// code.

namespace htf {
namespace {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Reg __attribute__((vector_size(HTF_VECTOR_BYTES)));
  typedef float Mem __attribute__((vector_size(HTF_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double Reg __attribute__((vector_size(HTF_VECTOR_BYTES)));
  typedef double Mem __attribute__((vector_size(HTF_VECTOR_BYTES), aligned(8), may_alias));
};

#define HTF_INLINE inline __attribute__((always_inline))

template <class T>
HTF_INLINE typename VectorOf<T>::Reg load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::Mem*>(p);
}
template <class T>
HTF_INLINE void put(T* p, typename VectorOf<T>::Reg v) {
  *reinterpret_cast<typename VectorOf<T>::Mem*>(p) = v;
}

// What becomes of a register tile: it is stored, added or multiplied into C.
template <class T>
struct IntoC {
  T* c;
  int64_t ldc;
  Store store;

  IntoC at(int64_t row, int64_t col) const { return {c + row * ldc + col, ldc, store}; }

  template <int ROWS, int VECS, class Reg>
  HTF_INLINE void operator()(Reg (&acc)[ROWS][VECS]) const {
    constexpr int W = HTF_VECTOR_BYTES / sizeof(T);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) {
        T* p = c + i * ldc + j * W;
        Reg v = acc[i][j];
        if (store == Store::add) v += load<T>(p);
        if (store == Store::multiply) v *= load<T>(p);
        put<T>(p, v);
      }
  }
};

template <class T>
struct IntoProducts {
  const Products<T>& to;
  int64_t first = 0;  // element of each matrix

  IntoProducts at(int64_t row, int64_t col) const { return {to, first + row * to.ld + col}; }

  template <int ROWS, int VECS, class Reg>
  HTF_INLINE void operator()(Reg (&acc)[ROWS][VECS]) const {
    constexpr int W = HTF_VECTOR_BYTES / sizeof(T);
    const int64_t ld = to.ld;
    if (to.cy != nullptr && to.cx != nullptr && to.xy != nullptr && to.c == nullptr) {
      const T *x = to.x + first, *y = to.y + first;
      T *cx = to.cx + first, *cy = to.cy + first, *xy = to.xy + first;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) {
          const Reg u = load<T>(x + i * ld + j * W), v = load<T>(y + i * ld + j * W);
          put<T>(cx + i * ld + j * W, acc[i][j] * u);
          put<T>(cy + i * ld + j * W, acc[i][j] * v);
          put<T>(xy + i * ld + j * W, u * v);
        }
      return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) {
        const int64_t p = first + i * ld + j * W;
        const Reg u = to.x != nullptr ? load<T>(to.x + p) : Reg{};
        const Reg v = to.y != nullptr ? load<T>(to.y + p) : Reg{};
        if (to.c != nullptr) put<T>(to.c + p, acc[i][j]);
        if (to.cx != nullptr) put<T>(to.cx + p, acc[i][j] * u);
        if (to.cy != nullptr) put<T>(to.cy + p, acc[i][j] * v);
        if (to.xy != nullptr) put<T>(to.xy + p, u * v);
      }
  }
};

// One register tile: ROWS x (VECS vectors). UNIT: consecutive rows of A lie side by side.
template <class T, int ROWS, int VECS, bool UNIT, class Into>
__attribute__((noinline)) void tile(int64_t k, const T* a, int64_t row_stride, int64_t col_stride,
                                    const T* b, int64_t ldb, Into into) {
  using Reg = typename VectorOf<T>::Reg;
  constexpr int W = HTF_VECTOR_BYTES / sizeof(T);
  const int64_t rs = UNIT ? 1 : row_stride;
  Reg acc[ROWS][VECS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) acc[i][j] = Reg{};
  for (int64_t l = 0; l < k; ++l, a += col_stride, b += ldb) {
    Reg bv[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) bv[j] = load<T>(b + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const T s = a[i * rs];
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[i][j] += s * bv[j];
    }
  }
  into(acc);
}

template <class T, int VECS, bool UNIT, int ROWS, class Into>
HTF_INLINE void remainder(int64_t m, int64_t k, const T* a, int64_t rs, int64_t cs, const T* b,
                          int64_t ldb, const Into& into) {
  if constexpr (ROWS > 0) {
    if (m == ROWS)
      tile<T, ROWS, VECS, UNIT>(k, a, rs, cs, b, ldb, into);
    else
      remainder<T, VECS, UNIT, ROWS - 1>(m, k, a, rs, cs, b, ldb, into);
  }
}

// Fetches lines of what comes later, some with each register tile.
struct Fetch {
  const char* next = nullptr;
  const char* end = nullptr;
  int64_t bytes = 0;  // with each tile

  HTF_INLINE Fetch(const Ahead& ahead, int64_t m, int64_t vectors) {
    if (ahead.bytes <= 0) return;
    const int64_t tiles = (vectors + 2) / 3 * (m / HTF_ROWS) + 1;
    next = static_cast<const char*>(ahead.from);
    end = next + ahead.bytes;
    bytes = (ahead.bytes / tiles + 64) / 64 * 64;
  }

  HTF_INLINE void some() {
    if (next == end) return;
    const char* stop = end - next > bytes ? next + bytes : end;
    for (; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
    next = stop;
  }
};

constexpr int64_t kLongPanel = 1 << 18;  // rows times depth

// Three vectors wide keeps the FMA units busiest; four left over go as two and two.
HTF_INLINE int64_t panel_vectors(int64_t left) {
  return left == 4 || left == 2 ? 2 : left >= 3 ? 3 : 1;
}

// A panel of VECS vectors of columns, all rows. One that takes longer than a moment says what it
// has worked: there are matrices that are multiplied in one call.
template <class T, int VECS, bool UNIT, class Into>
HTF_INLINE void panel(int64_t m, int64_t k, const T* a, int64_t rs, int64_t cs, const T* b,
                      int64_t ldb, const Into& into, int64_t col, Fetch& fetch) {
  const bool is_long = m * k >= kLongPanel;
  int64_t i = 0;
  for (; i + HTF_ROWS <= m; i += HTF_ROWS) {
    fetch.some();
    tile<T, HTF_ROWS, VECS, UNIT>(k, a + i * rs, rs, cs, b, ldb, into.at(i, col));
    if (is_long) worked(HTF_ROWS * VECS * (HTF_VECTOR_BYTES / static_cast<int64_t>(sizeof(T))) * k);
  }
  remainder<T, VECS, UNIT, HTF_ROWS - 1>(m - i, k, a + i * rs, rs, cs, b, ldb, into.at(i, col));
}

template <class T, bool UNIT, class Into>
HTF_INLINE void panels(int64_t m, int64_t n, int64_t k, const T* a, int64_t rs, int64_t cs,
                       const T* b, int64_t ldb, const Into& into, const Ahead& ahead) {
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  int64_t left = n / W, j = 0;
  Fetch fetch(ahead, m, left);
  while (left > 0) {
    const int64_t take = panel_vectors(left);
    if (take == 3)
      panel<T, 3, UNIT>(m, k, a, rs, cs, b + j, ldb, into, j, fetch);
    else if (take == 2)
      panel<T, 2, UNIT>(m, k, a, rs, cs, b + j, ldb, into, j, fetch);
    else
      panel<T, 1, UNIT>(m, k, a, rs, cs, b + j, ldb, into, j, fetch);
    j += take * W;
    left -= take;
  }
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t rs, int64_t cs, const T* b,
          int64_t ldb, T* c, int64_t ldc, Store store, Ahead ahead) {
  const IntoC<T> into{c, ldc, store};
  if (rs == 1)
    panels<T, true>(m, n, k, a, rs, cs, b, ldb, into, ahead);
  else
    panels<T, false>(m, n, k, a, rs, cs, b, ldb, into, ahead);
}

template <class T>
void gemm_products(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                   int64_t ldb, const Products<T>& to, Ahead ahead) {
  panels<T, false>(m, n, k, a, lda, 1, b, ldb, IntoProducts<T>{to, 0}, ahead);
}

// A vector of S elements, for rows shorter than the widest one.
template <class T, int S>
struct Short {
  typedef T Type __attribute__((vector_size(S * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T, int S>
HTF_INLINE void copy_piece(const T* x, T* out) {
  *reinterpret_cast<typename Short<T, S>::Type*>(out) =
      *reinterpret_cast<const typename Short<T, S>::Type*>(x);
}
// n >= S: whole pieces, the last one reaching back over what is there already.
template <class T, int S>
HTF_INLINE void copy_rows(int64_t m, int64_t n, const T* x, int64_t ldx, T* out, int64_t ldo) {
  for (int64_t i = 0; i < m; ++i, x += ldx, out += ldo) {
    for (int64_t j = 0; j + S < n; j += S) copy_piece<T, S>(x + j, out + j);
    copy_piece<T, S>(x + n - S, out + n - S);
  }
}
template <class T>
void copy(int64_t m, int64_t n, const T* x, int64_t ldx, T* out, int64_t ldo) {
  constexpr int W = HTF_VECTOR_BYTES / sizeof(T);
  if (n >= W)
    copy_rows<T, W>(m, n, x, ldx, out, ldo);
  else if (n >= 8)
    copy_rows<T, 8>(m, n, x, ldx, out, ldo);
  else if (n >= 4)
    copy_rows<T, 4>(m, n, x, ldx, out, ldo);
  else if (n >= 2)
    copy_rows<T, 2>(m, n, x, ldx, out, ldo);
  else
    for (int64_t i = 0; i < m * n; ++i) out[i * ldo] = x[i * ldx];
}

template <class T>
void product(int64_t m, int64_t n, const T* x, int64_t ldx, const T* y, int64_t ldy, T* out,
             int64_t ldo, Store store) {
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  const bool add = store == Store::add;
  for (int64_t i = 0; i < m; ++i, x += ldx, y += ldy, out += ldo)
    for (int64_t j = 0; j < n; j += W) {
      auto v = load<T>(x + j) * load<T>(y + j);
      if (add) v += load<T>(out + j);
      put<T>(out + j, v);
    }
}

template <class T>
void gather(int64_t m, int64_t n, const int64_t* at, const T* x, int64_t ldx, T* out, int64_t ldo,
            Store store) {
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  const bool multiply = store == Store::multiply;
  for (int64_t i = 0; i < m; ++i, out += ldo) {
    const T* from = x + at[i] * ldx;
    for (int64_t j = 0; j < n; j += W) {
      auto v = load<T>(from + j);
      if (multiply) v *= load<T>(out + j);
      put<T>(out + j, v);
    }
  }
}

template <class T>
void scatter(int64_t m, int64_t n, const int64_t* at, const T* x, int64_t ldx, T* out,
             int64_t ldo) {
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  for (int64_t i = 0; i < m; ++i, x += ldx) {
    T* to = out + at[i] * ldo;
    for (int64_t j = 0; j < n; j += W) put<T>(to + j, load<T>(to + j) + load<T>(x + j));
  }
}

// Columns in blocks of VECS vectors, whose sums stay in registers. ROWS: x has rows, not numbers.
template <class T, int VECS, bool ROWS>
void sum_block(int64_t count, const int32_t* order, const T* x, int64_t ldx, const int32_t* at,
               const T* y, int64_t ldy, T* out) {
  using Reg = typename VectorOf<T>::Reg;
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  Reg sum[VECS];
#pragma GCC unroll 8
  for (int v = 0; v < VECS; ++v) sum[v] = Reg{};
  for (int64_t q = 0; q < count; ++q) {
    const int64_t r = order != nullptr ? order[q] : q;
    const T* row = y + at[r] * ldy;
    if constexpr (ROWS) {
      const T* other = x + r * ldx;
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) sum[v] += load<T>(other + v * W) * load<T>(row + v * W);
    } else {
      const T s = x[r];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) sum[v] += s * load<T>(row + v * W);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECS; ++v) put<T>(out + v * W, sum[v]);
}

template <class T, bool ROWS>
HTF_INLINE void sum_columns(int64_t n, int64_t count, const int32_t* order, const T* x, int64_t ldx,
                            const int32_t* at, const T* y, int64_t ldy, T* out) {
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  int64_t j = 0;
  for (; j + 8 * W <= n; j += 8 * W)
    sum_block<T, 8, ROWS>(count, order, ROWS ? x + j : x, ldx, at, y + j, ldy, out + j);
  for (; j + 2 * W <= n; j += 2 * W)
    sum_block<T, 2, ROWS>(count, order, ROWS ? x + j : x, ldx, at, y + j, ldy, out + j);
  for (; j < n; j += W)
    sum_block<T, 1, ROWS>(count, order, ROWS ? x + j : x, ldx, at, y + j, ldy, out + j);
}

template <class T>
void sum_products(int64_t n, int64_t count, const int32_t* order, const T* x, int64_t ldx,
                  const int32_t* at, const T* y, int64_t ldy, T* out) {
  sum_columns<T, true>(n, count, order, x, ldx, at, y, ldy, out);
}

template <class T>
void sum_rows(int64_t n, int64_t count, const int32_t* order, const T* x, const int32_t* at,
              const T* y, int64_t ldy, T* out) {
  sum_columns<T, false>(n, count, order, x, 0, at, y, ldy, out);
}

template <class T>
T dot(int64_t n, const T* x, const T* y) {
  using Reg = typename VectorOf<T>::Reg;
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  Reg sum[4] = {};
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] += load<T>(x + j + v * W) * load<T>(y + j + v * W);
  for (; j < n; j += W) sum[0] += load<T>(x + j) * load<T>(y + j);
  const Reg all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T total = 0;
#pragma GCC unroll 16
  for (int64_t q = 0; q < W; ++q) total += all[q];
  return total;
}

// Element j of row i (and i + S) after rows i and i + S have exchanged their blocks of S columns.
template <int W, int S, bool UPPER, class Reg, int... J>
HTF_INLINE Reg exchange(Reg a, Reg b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b,
                                 (UPPER ? (J & S ? W + J : J + S) : (J & S ? W + J - S : J))...);
}

template <int W, int S, class Reg>
HTF_INLINE void exchange_all(Reg* r) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & S)) {
        const Reg a = r[i], b = r[i + S];
        r[i] = exchange<W, S, false>(a, b, std::make_integer_sequence<int, W>{});
        r[i + S] = exchange<W, S, true>(a, b, std::make_integer_sequence<int, W>{});
      }
    exchange_all<W, S * 2>(r);
  }
}

template <class T>
void transpose(int64_t rows, int64_t cols, const T* x, int64_t ldx, T* out, int64_t ldo) {
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  const int64_t full_rows = rows / W * W, full_cols = cols / W * W;
  for (int64_t j = 0; j < full_cols; j += W)
    for (int64_t i = 0; i < full_rows; i += W) {
      typename VectorOf<T>::Reg r[W];
#pragma GCC unroll 16
      for (int q = 0; q < W; ++q) r[q] = load<T>(x + (i + q) * ldx + j);
      exchange_all<W, 1>(r);
#pragma GCC unroll 16
      for (int q = 0; q < W; ++q) put<T>(out + (j + q) * ldo + i, r[q]);
    }
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = j < full_cols ? full_rows : 0; i < rows; ++i)
      out[j * ldo + i] = x[i * ldx + j];
    for (int64_t i = rows; i < padded<T>(rows); ++i) out[j * ldo + i] = T(0);
  }
}

template <class T>
constexpr Kernels<T> table(const char* name) {
  return {name,        &gemm<T>,         &gemm_products<T>, &copy<T>, &product<T>,  &gather<T>,
          &scatter<T>, &sum_products<T>, &sum_rows<T>,      &dot<T>,  &transpose<T>};
}

}  // namespace
}  // namespace htf
