// How many threads an operation has, and how it runs them.
#pragma once

#include <cstdint>

#include "interrupt.h"

namespace htf {

// PyTorch's number; one in a process that was forked. OpenMP's threads are not there, and whoever
// waits for them waits for ever.
int64_t num_threads();

// Runs run(context, t) for t = 0 .. threads-1, each in a thread of its own. What one of them throws
// is thrown here, when all are done.
void in_threads(int64_t threads, void (*run)(const void* context, int64_t t), const void* context);
template <class F>
void in_threads(int64_t threads, const F& f) {
  in_threads(
      threads, [](const void* context, int64_t t) { (*static_cast<const F*>(context))(t); }, &f);
}

}  // namespace htf
