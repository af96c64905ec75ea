#include "cpu/numbers.h"

namespace htf {

template <class T>
void pack_rows(int64_t rows, int64_t cols, Numbers x, int64_t ldx, T* out, int64_t ldo) {
  with_dtype(x.dtype, "pack_rows", [&](auto s) {
    const auto* from = reinterpret_cast<const decltype(s)*>(x.data);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) out[i * ldo + j] = static_cast<T>(from[i * ldx + j]);
      for (int64_t j = cols; j < ldo; ++j) out[i * ldo + j] = T(0);
    }
  });
}

template <class T>
void unpack_rows(int64_t rows, int64_t cols, const T* x, int64_t ldx, Results out, int64_t ldo) {
  with_dtype(out.dtype, "unpack_rows", [&](auto s) {
    using S = decltype(s);
    auto* to = reinterpret_cast<S*>(out.data);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) to[i * ldo + j] = static_cast<S>(x[i * ldx + j]);
  });
}

template void pack_rows(int64_t, int64_t, Numbers, int64_t, float*, int64_t);
template void pack_rows(int64_t, int64_t, Numbers, int64_t, double*, int64_t);
template void unpack_rows(int64_t, int64_t, const float*, int64_t, Results, int64_t);
template void unpack_rows(int64_t, int64_t, const double*, int64_t, Results, int64_t);

}  // namespace htf
