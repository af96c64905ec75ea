#include "cpu/threads.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include "interrupt.inl"

namespace htf {
namespace {

std::atomic<bool> forked{false}, warned{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void warn_of_fork() {
  if (warned.exchange(true)) return;
  const Gil gil;
  if (PyErr_WarnEx(
          PyExc_RuntimeWarning,
          "htfkernels: this process was forked, and the threads of the one before are not in it: "
          "htfkernels computes on one thread, and PyTorch's own operations may wait for ever. Call "
          "torch.set_num_threads(1) in the new process, or start it by the method \"spawn\"",
          1) != 0)
    throw Raised();
}

}  // namespace

int64_t num_threads() {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || !forked.load(std::memory_order_relaxed)) return threads;
  warn_of_fork();
  return 1;
}

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
