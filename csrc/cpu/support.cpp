#include "cpu/support.h"

#include <atomic>

namespace htf {

// Allocates before the threads start: an exception inside PyTorch's parallel region would lose its
// message.
void run_items(int64_t items, int64_t work, int64_t scratch_size, std::size_t element,
               void (*f)(const void* context, int64_t item, void* scratch), const void* context) {
  const int64_t bytes = scratch_size * static_cast<int64_t>(element);
  const int64_t threads =
      work < kWorthThreads ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), items);
  if (threads <= 1) {
    Buffer<char> scratch(bytes);
    for (int64_t i = 0; i < items; ++i) f(context, i, scratch.get());
    return;
  }
  std::vector<Buffer<char>> scratch;
  for (int64_t t = 0; t < threads; ++t) scratch.emplace_back(bytes);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;)
        f(context, i, scratch[t].get());
  });
}

}  // namespace htf
