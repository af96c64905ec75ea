// Large blocks of memory that are used again.
//
// A training step asks for the same buffers every time. Fresh pages from the operating system are
// zeroed and mapped one by one, which for a buffer costs more than computing what goes into it (64
// MB: 35 ms, against 3 ms to write them); so blocks that are given back are kept for the next call,
// and new ones are asked for in huge pages.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <utility>

namespace htf {

// Of so many elements; throws std::bad_alloc where no memory has as many.
std::size_t bytes_of(int64_t count, std::size_t each);

// Uninitialised, on a cache line's boundary; throws std::bad_alloc.
void* acquire(std::size_t bytes);
void release(void* block) noexcept;

// Gives the blocks that nobody uses back to the operating system; returns their bytes.
std::size_t release_unused();

// An uninitialised tensor with its memory from here where it is large.
torch::stable::Tensor new_tensor(const torch::stable::Tensor& like,
                                 std::initializer_list<int64_t> sizes,
                                 torch::headeronly::ScalarType dtype);

// Uninitialised memory on a cache line's boundary.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) {
    if (size > 0) data_ = static_cast<T*>(acquire(bytes_of(size, sizeof(T))));
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) release(data_);
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace htf
