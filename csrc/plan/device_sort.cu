#include "plan/device_sort.h"

#ifdef HTF_EMULATE
#include <algorithm>
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace htf::gpu {

template <class Key>
void sort_pairs(const Current& current, const Tensor& like, Sortable<Key>& sortable, int64_t n,
                int bits) {
  if (n < 2 || bits == 0) return;
#ifdef HTF_EMULATE
  (void)like;
  Key *from = sortable.keys(), *to = sortable.keys(1);
  int32_t *values = sortable.values(), *to_values = sortable.values(1);
  const Key mask = bits < 8 * static_cast<int>(sizeof(Key)) ? (Key{1} << bits) - 1 : ~Key{0};
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return (from[a] & mask) < (from[b] & mask); });
  for (int64_t i = 0; i < n; ++i) {
    to[i] = from[order[i]];
    to_values[i] = values[order[i]];
  }
  set_bytes(current, from, 0xff, n * sizeof(Key));
  set_bytes(current, values, 0xff, n * sizeof(int32_t));
  sortable.swap_halves();
#else
  cub::DoubleBuffer<Key> keys(sortable.keys(), sortable.keys(1));
  cub::DoubleBuffer<int32_t> values(sortable.values(), sortable.values(1));
  const auto sort = [&](void* scratch, std::size_t& bytes) {
    check_cuda(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, values, static_cast<int>(n), 0,
                                               bits, current.stream()),
               "sorting");
  };
  std::size_t bytes = 0;
  sort(nullptr, bytes);
  const Tensor scratch =
      device_tensor(current, like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  sort(scratch.mutable_data_ptr(), bytes);
  if (keys.Current() != sortable.keys()) sortable.swap_halves();
#endif
}

template void sort_pairs(const Current&, const Tensor&, Sortable<uint32_t>&, int64_t, int);
template void sort_pairs(const Current&, const Tensor&, Sortable<uint64_t>&, int64_t, int);

}  // namespace htf::gpu
