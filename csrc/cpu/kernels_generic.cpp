#include "cpu/kernels.h"

#define HTF_VECTOR_BYTES 16
#define HTF_ROWS 4
#include "cpu/kernels.inl"

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

}  // namespace htf
