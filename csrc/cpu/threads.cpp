#include "cpu/threads.h"

#include <torch/csrc/stable/ops.h>

#include "interrupt.inl"

namespace htf {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void in_threads(int64_t threads, void (*run)(const void* context, int64_t t), const void* context) {
  Crew crew;
  const Worker* const caller = &worker;
  // An exception that left PyTorch's parallel region would lose its type and its message.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    crew.run(&worker == caller, [&] {
      for (int64_t t = begin; t < end; ++t) run(context, t);
    });
  });
  crew.finish();
}

}  // namespace htf
