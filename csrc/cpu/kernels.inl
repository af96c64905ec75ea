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
void transpose(int64_t rows, int64_t cols, const T* x, int64_t ldx, T* out, int64_t ldo) {
  constexpr int64_t S = 16;
  for (int64_t j0 = 0; j0 < cols; j0 += S) {
    const int64_t j1 = j0 + S < cols ? j0 + S : cols;
    for (int64_t i0 = 0; i0 < rows; i0 += S) {
      const int64_t i1 = i0 + S < rows ? i0 + S : rows;
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = i0; i < i1; ++i) out[j * ldo + i] = x[i * ldx + j];
    }
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t i = rows; i < ldo; ++i) out[j * ldo + i] = T(0);
  }
}

template <class T>
constexpr Kernels<T> table(const char* name) {
  return {name, &gemm<T>, &product<T>, &transpose<T>};
}

}  // namespace
}  // namespace htf
