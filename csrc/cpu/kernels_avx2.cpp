#include "cpu/kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define HTF_VECTOR_BYTES 32
#define HTF_ROWS 4
#include "cpu/kernels.inl"
#pragma GCC pop_options

namespace htf {

template <>
const Kernels<float>& kernels_avx2<float>() {
  static const Kernels<float> k = table<float>("avx2");
  return k;
}
template <>
const Kernels<double>& kernels_avx2<double>() {
  static const Kernels<double> k = table<double>("avx2");
  return k;
}

}  // namespace htf
#endif
