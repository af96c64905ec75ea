#include "spectra/traces.h"

namespace htf {
namespace {

void check_wanted(const char* op, const Program& p, const std::vector<int64_t>& wanted) {
  std::vector<char> seen(p.steps, 0);
  for (const int64_t node : wanted) {
    check(node >= 0 && node < p.steps && !seen[node], op, ": wanted must be distinct nodes, 0 to ",
          p.steps - 1, ", got ", node);
    seen[node] = 1;
  }
}

std::vector<Tensor> trace_ranks(const std::vector<Tensor>& weights, const Tensor& program,
                                const std::vector<int64_t>& wanted, int64_t stable) {
  const Program p("trace_ranks", program, weights);
  check_wanted("trace_ranks", p, wanted);
  return trace_ranks_cpu(p, weights, wanted, stable != 0);
}

std::vector<Tensor> trace_ranks_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                         const Tensor& program, const std::vector<int64_t>& wanted,
                                         const Tensor& numbers, const Tensor& exponents,
                                         int64_t stable) {
  const char* op = "trace_ranks_backward";
  const Program p(op, program, weights);
  check_wanted(op, p, wanted);
  check(grad.is_cpu() && grad.scalar_type() == ScalarType::Double && grad.dim() == 1 &&
            grad.size(0) == static_cast<int64_t>(wanted.size()),
        op, ": grad must be float64 [", wanted.size(), "] on the CPU, got ", describe(grad));
  check(numbers.is_cpu() && numbers.scalar_type() == ScalarType::Double &&
            numbers.is_contiguous() && exponents.is_cpu() &&
            exponents.scalar_type() == ScalarType::Long && exponents.is_contiguous(),
        op, ": numbers and exponents must be what trace_ranks returned, got ", describe(numbers),
        " and ", describe(exponents));
  return trace_ranks_backward_cpu(p, grad, weights, wanted, numbers, exponents, stable != 0);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def("trace_ranks(Tensor[] weights, Tensor program, int[] wanted, int stable) -> Tensor[]");
  m.def(
      "trace_ranks_backward(Tensor grad, Tensor[] weights, Tensor program, int[] wanted, Tensor "
      "numbers, Tensor exponents, int stable) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("trace_ranks", TORCH_BOX(&htf::trace_ranks));
  m.impl("trace_ranks_backward", TORCH_BOX(&htf::trace_ranks_backward));
}
