// Stable sorting of keys with values on the device: CUB's radix sort, in an emulation the standard
// library's. The only file that is compiled with CUB is device_sort.cu, for two types of keys.
#pragma once

#include <cstdint>
#include <utility>

#include "cuda/launch.h"

namespace htf::gpu {

// Room for n keys and values twice over: each pass of a radix sort writes the other half.
template <class Key>
class Sortable {
 public:
  Sortable(const Current& current, const Tensor& like, int64_t n)
      : keys_{tensor(current, like, n), tensor(current, like, n)},
        values_{device_tensor(current, like, {n}, ScalarType::Int),
                device_tensor(current, like, {n}, ScalarType::Int)} {}

  Key* keys(int half = 0) const {
    return static_cast<Key*>(keys_[(at_ + half) % 2].mutable_data_ptr());
  }
  int32_t* values(int half = 0) const {
    return static_cast<int32_t*>(values_[(at_ + half) % 2].mutable_data_ptr());
  }
  Tensor values_tensor() const { return values_[at_]; }
  void swap_halves() { at_ = 1 - at_; }

 private:
  static Tensor tensor(const Current& current, const Tensor& like, int64_t n) {
    return device_tensor(current, like, {n}, sizeof(Key) == 8 ? ScalarType::Long : ScalarType::Int);
  }
  Tensor keys_[2], values_[2];
  int at_ = 0;
};

// Sorts the n < 2^31 keys() with their values() by the lowest `bits` bits, in about bits / 8 passes
// that each read and write everything once. The higher bits must be equal in all keys. Both are in
// keys() and values() again afterwards; where these point may have changed.
template <class Key>
void sort_pairs(const Current& current, const Tensor& like, Sortable<Key>& sortable, int64_t n,
                int bits);

extern template void sort_pairs(const Current&, const Tensor&, Sortable<uint32_t>&, int64_t, int);
extern template void sort_pairs(const Current&, const Tensor&, Sortable<uint64_t>&, int64_t, int);

}  // namespace htf::gpu
