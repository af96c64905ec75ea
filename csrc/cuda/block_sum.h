// The sum over a block of Threads threads (all along x), always in the same order.
#pragma once

#include "cuda/device.h"

namespace htf::gpu {

// In the first warp; what the others return is of no use. For all threads together; `shared` has a
// number for each warp and may be used again after a __syncthreads().
template <int Threads>
__device__ __forceinline__ double block_sum(double x, double* shared) {
  constexpr int kWarps = Threads / kWarp;
  static_assert(Threads % kWarp == 0 && kWarps <= kWarp);
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x >= kWarp) return 0;
  return warp_sum(threadIdx.x < kWarps ? shared[threadIdx.x] : 0.0);
}

}  // namespace htf::gpu
