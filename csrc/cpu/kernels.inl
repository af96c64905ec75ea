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

// One register tile: ROWS x (VECS vectors). UNIT: consecutive rows of A lie side by side.
template <class T, int ROWS, int VECS, bool UNIT>
void tile(int64_t k, const T* a, int64_t row_stride, int64_t col_stride, const T* b, int64_t ldb,
          T* c, int64_t ldc, Store store) {
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

template <class T, int ROWS, int VECS>
HTF_INLINE void tile_of(int64_t k, const T* a, int64_t rs, int64_t cs, const T* b, int64_t ldb,
                        T* c, int64_t ldc, Store store) {
  if (rs == 1)
    tile<T, ROWS, VECS, true>(k, a, rs, cs, b, ldb, c, ldc, store);
  else
    tile<T, ROWS, VECS, false>(k, a, rs, cs, b, ldb, c, ldc, store);
}

template <class T, int VECS, int ROWS>
HTF_INLINE void remainder(int64_t m, int64_t k, const T* a, int64_t rs, int64_t cs, const T* b,
                          int64_t ldb, T* c, int64_t ldc, Store store) {
  if constexpr (ROWS > 0) {
    if (m == ROWS)
      tile_of<T, ROWS, VECS>(k, a, rs, cs, b, ldb, c, ldc, store);
    else
      remainder<T, VECS, ROWS - 1>(m, k, a, rs, cs, b, ldb, c, ldc, store);
  }
}

// A panel of VECS vectors of columns, all rows.
template <class T, int VECS>
void panel(int64_t m, int64_t k, const T* a, int64_t rs, int64_t cs, const T* b, int64_t ldb, T* c,
           int64_t ldc, Store store) {
  int64_t i = 0;
  for (; i + HTF_ROWS <= m; i += HTF_ROWS)
    tile_of<T, HTF_ROWS, VECS>(k, a + i * rs, rs, cs, b, ldb, c + i * ldc, ldc, store);
  remainder<T, VECS, HTF_ROWS - 1>(m - i, k, a + i * rs, rs, cs, b, ldb, c + i * ldc, ldc, store);
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t rs, int64_t cs, const T* b,
          int64_t ldb, T* c, int64_t ldc, Store store) {
  constexpr int64_t W = HTF_VECTOR_BYTES / sizeof(T);
  int64_t left = n / W, j = 0;
  while (left > 0) {
    // Three vectors wide keeps the FMA units busiest; four left over go as two and two.
    const int64_t take = left == 4 || left == 2 ? 2 : left >= 3 ? 3 : 1;
    if (take == 3)
      panel<T, 3>(m, k, a, rs, cs, b + j, ldb, c + j, ldc, store);
    else if (take == 2)
      panel<T, 2>(m, k, a, rs, cs, b + j, ldb, c + j, ldc, store);
    else
      panel<T, 1>(m, k, a, rs, cs, b + j, ldb, c + j, ldc, store);
    j += take * W;
    left -= take;
  }
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
  return {name,         &gemm<T>, &product<T>,  &gather<T>, &scatter<T>, &sum_products<T>,
          &sum_rows<T>, &dot<T>,  &transpose<T>};
}

}  // namespace
}  // namespace htf
