// Numbers of the caller's, of whatever type they are: read into rows of T, which is computed in,
// and written from them. What computes is compiled for each T alone.
#pragma once

#include "cpu/support.h"

namespace htf {

template <class Byte>
struct BasicNumbers {
  Byte* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  explicit operator bool() const { return data != nullptr; }
  int64_t bytes(int64_t n) const {
    return n * (dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2);
  }
  BasicNumbers operator+(int64_t n) const { return {data + bytes(n), dtype}; }
};
using Numbers = BasicNumbers<const char>;
using Results = BasicNumbers<char>;

inline Numbers numbers_of(const Tensor& t) {
  return {static_cast<const char*>(t.const_data_ptr()), t.scalar_type()};
}
inline Results results_of(const Tensor& t) {
  return {static_cast<char*>(t.mutable_data_ptr()), t.scalar_type()};
}

// As they lie, where they are of type T; else null.
template <class T>
const T* in_place(Numbers x) {
  constexpr ScalarType own = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  return x.dtype == own ? reinterpret_cast<const T*>(x.data) : nullptr;
}
template <class T>
T* in_place(Results x) {
  return const_cast<T*>(in_place<T>(Numbers{x.data, x.dtype}));
}

// Copies and converts rows, padding them with zeros.
template <class T>
void pack_rows(int64_t rows, int64_t cols, Numbers x, int64_t ldx, T* out, int64_t ldo);
template <class T>
void unpack_rows(int64_t rows, int64_t cols, const T* x, int64_t ldx, Results out, int64_t ldo);

// So many numbers one after the other: the caller's memory, or a copy.
template <class T>
class Widened {
 public:
  Widened(Numbers x, int64_t count) : data_(in_place<T>(x)) {
    if (data_ != nullptr) return;
    copy_ = Buffer<T>(count);
    pack_rows(1, count, x, count, copy_.get(), count);
    data_ = copy_.get();
  }
  const T* get() const { return data_; }

 private:
  Buffer<T> copy_;
  const T* data_;
};

}  // namespace htf
