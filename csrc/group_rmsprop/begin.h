// What blocks that move parameters need of the state before a step. They all need it, and one of
// them writes the new state: so a launch before theirs copies it, and none has to wait for another.
#pragma once

#include <cmath>

#include "cuda/device.h"

namespace htf::gpu {

// begun = [alpha v, 1 - alpha^t, t], t the count with this step.
struct Begin {
  const void* average = nullptr;  // v: float64 where wide, else float32
  const double* count = nullptr;
  double* begun = nullptr;  // null: there is nothing to copy
  double alpha = 0, log_alpha = 0;
  bool wide = false;
};

// For one thread.
__device__ __forceinline__ void begin_step(const Begin& b) {
  const double average = b.wide ? *static_cast<const double*>(b.average)
                                : static_cast<double>(*static_cast<const float*>(b.average));
  const double count = *b.count + 1;
  b.begun[0] = b.alpha * average;
  b.begun[1] = -expm1(count * b.log_alpha);
  b.begun[2] = count;
}

}  // namespace htf::gpu
