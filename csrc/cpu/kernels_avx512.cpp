#include "cpu/kernels.h"
#include "cpu/orthogonal.h"
#include "interrupt.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512")
#define HTF_VECTOR_BYTES 64
#define HTF_ROWS 8
#include "cpu/kernels.inl"
#include "cpu/orthogonal.inl"
#include "cpu/singular.inl"
#pragma GCC pop_options

namespace htf {

template <>
const Kernels<float>& kernels_avx512<float>() {
  static const Kernels<float> k = table<float>("avx512");
  return k;
}
template <>
const Kernels<double>& kernels_avx512<double>() {
  static const Kernels<double> k = table<double>("avx512");
  return k;
}

const Orthogonal& orthogonal_avx512() {
  static const Orthogonal o = orthogonal_table();
  return o;
}

}  // namespace htf
#endif
