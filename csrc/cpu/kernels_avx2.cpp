#include "cpu/kernels.h"
#include "cpu/orthogonal.h"
#include "interrupt.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define HTF_VECTOR_BYTES 32
#define HTF_ROWS 4
#include "cpu/kernels.inl"
#include "cpu/orthogonal.inl"
#include "cpu/singular.inl"
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

const Orthogonal& orthogonal_avx2() {
  static const Orthogonal o = orthogonal_table();
  return o;
}

}  // namespace htf
#endif
