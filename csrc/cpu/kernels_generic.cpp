#include "cpu/kernels.h"
#include "cpu/orthogonal.h"
#include "interrupt.h"

#define HTF_VECTOR_BYTES 16
#define HTF_ROWS 4
#include "cpu/kernels.inl"
#include "cpu/orthogonal.inl"
#include "cpu/singular.inl"

namespace htf {

template <>
const Kernels<float>& kernels_generic<float>() {
  static const Kernels<float> k = table<float>("generic");
  return k;
}
template <>
const Kernels<double>& kernels_generic<double>() {
  static const Kernels<double> k = table<double>("generic");
  return k;
}

const Orthogonal& orthogonal_generic() {
  static const Orthogonal o = orthogonal_table();
  return o;
}

}  // namespace htf
