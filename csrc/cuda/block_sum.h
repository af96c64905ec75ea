// The sum over a block of Threads threads (all along x), always in the same order.
#pragma once

#include "cuda/device.h"

namespace htf::gpu {

// In thread 0; what the others return is of no use. For all threads together; `shared` has a number
// for each warp and may be used again after a __syncthreads().
template <int Threads>
__device__ __forceinline__ double block_sum(double x, double* shared) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < Threads / kWarp; ++w) sum += shared[w];
  return sum;
}

}  // namespace htf::gpu
