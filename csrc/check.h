// Errors as sentences, for operations on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace htf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK would put a source position in front of the sentence.
template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

template <class... Args>
void check(bool condition, const Args&... args) {
  if (!condition) fail(args...);
}

// "Float [3, 4]", put together only where a sentence is printed.
struct Described {
  const Tensor& tensor;
};
inline Described describe(const Tensor& t) { return {t}; }
inline std::ostream& operator<<(std::ostream& text, const Described& d) {
  text << toString(d.tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < d.tensor.dim(); ++i) text << (i > 0 ? ", " : "") << d.tensor.size(i);
  return text << "]";
}

}  // namespace htf
