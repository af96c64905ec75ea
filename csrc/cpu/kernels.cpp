#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

#include "cpu/orthogonal.h"

namespace htf {
namespace {

#if defined(__x86_64__)
int best_level() {
  __builtin_cpu_init();
  int level = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    level = 2;
#if defined(HTF_PAIRS)
  if (level == 2 && __builtin_cpu_supports("avx512bf16")) level = 3;
#endif
  if (const char* wish = std::getenv("HTF_CPU")) {
    const int asked = !std::strcmp(wish, "generic")  ? 0
                      : !std::strcmp(wish, "avx2")   ? 1
                      : !std::strcmp(wish, "avx512") ? 2
                                                     : 3;
    if (asked < level) level = asked;
  }
  return level;
}

int level() {
  static const int best = best_level();
  return best;
}
#endif

template <class T>
const Kernels<T>& choose() {
#if defined(__x86_64__)
  if (level() >= 2) return kernels_avx512<T>();
  if (level() == 1) return kernels_avx2<T>();
#endif
  return kernels_generic<T>();
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return choose<float>();
}
template <>
const Kernels<double>& kernels<double>() {
  return choose<double>();
}

const Orthogonal& orthogonal() {
#if defined(__x86_64__)
  if (level() >= 2) return orthogonal_avx512();
  if (level() == 1) return orthogonal_avx2();
#endif
  return orthogonal_generic();
}

const PairKernels* pair_kernels() {
#if defined(HTF_PAIRS)
  if (level() >= 3) return &pair_kernels_avx512bf16();
#endif
  return nullptr;
}

}  // namespace htf
