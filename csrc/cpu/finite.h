// Whether numbers are finite, which what chooses by comparison may lose sight of.
#pragma once

#include <cstring>

#include "cpu/support.h"

namespace htf {

// Exponents of infinite numbers, and of what is none, have all bits set. Bits: as wide as a number.
template <class Bits, int kMantissa>
bool all_finite(int64_t n, const void* numbers) {
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1), kLeast = Bits{1} << kMantissa;
  constexpr Bits kExponent = kSign - kLeast;
  const char* x = static_cast<const char*>(numbers);
  Bits seen = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    seen |= static_cast<Bits>((bits & kExponent) + kLeast);  // all bits set: carried into the sign
  }
  return (seen & kSign) == 0;
}
inline bool all_finite(int64_t n, const double* x) { return all_finite<uint64_t, 52>(n, x); }

// Of a tensor in one piece, float32, float64 or bfloat16.
inline bool all_finite(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return all_finite<uint64_t, 52>(t.numel(), t.const_data_ptr());
    case ScalarType::Float:
      return all_finite<uint32_t, 23>(t.numel(), t.const_data_ptr());
    default:
      return all_finite<uint16_t, 7>(t.numel(), t.const_data_ptr());
  }
}

}  // namespace htf
