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

void check_vectors(const char* op, const char* name, const std::vector<Tensor>& tensors,
                   std::size_t i, ScalarType dtype, std::initializer_list<int64_t> shape) {
  const Tensor& t = tensors[i];
  bool fits =
      t.is_cpu() && t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream expected;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    const int64_t size = shape.begin()[d];
    fits = fits && t.size(static_cast<int64_t>(d)) == size;
    expected << (d > 0 ? ", " : "") << size;
  }
  check(fits, op, ": ", name, "[", i, "] must be a CPU tensor [", expected.str(), "] of dtype ",
        toString(dtype), ", got ", describe(t));
}

std::vector<Tensor> matricization_pullback(
    const std::vector<Tensor>& weights, const Tensor& program, const std::vector<int64_t>& wanted,
    const std::vector<Tensor>& left, const std::vector<Tensor>& right,
    const std::vector<Tensor>& weight, const std::vector<Tensor>& exponents,
    const std::vector<int64_t>& scales) {
  const char* op = "matricization_pullback";
  const Program p(op, program, weights);
  check_wanted(op, p, wanted);
  const std::size_t count = wanted.size();
  check(left.size() == count && right.size() == count && weight.size() == count &&
            exponents.size() == count && scales.size() == count,
        op, ": left, right, weight, exponents and scales must have an entry for each of the ",
        count, " nodes");
  std::vector<int64_t> cols(p.steps);
  for (int64_t s = 0; s < p.steps; ++s) cols[p.step[s].node] = p.step[s].cols;
  for (std::size_t i = 0; i < count; ++i) {
    const int64_t n = cols[wanted[i]];
    check(weight[i].dim() == 1 && weight[i].size(0) <= n, op, ": weight[", i,
          "] must be [K], K at most ", n, ", got ", describe(weight[i]));
    const int64_t k = weight[i].size(0);
    check_vectors(op, "weight", weight, i, ScalarType::Double, {k});
    check_vectors(op, "left", left, i, ScalarType::Double, {n, k});
    check_vectors(op, "right", right, i, ScalarType::Double, {n, k});
    check_vectors(op, "exponents", exponents, i, ScalarType::Long, {n});
  }
  return matricization_pullback_cpu(p, weights, wanted, left, right, weight, exponents, scales);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def("trace_ranks(Tensor[] weights, Tensor program, int[] wanted, int stable) -> Tensor[]");
  m.def(
      "trace_ranks_backward(Tensor grad, Tensor[] weights, Tensor program, int[] wanted, Tensor "
      "numbers, Tensor exponents, int stable) -> Tensor[]");
  m.def(
      "matricization_pullback(Tensor[] weights, Tensor program, int[] wanted, Tensor[] left, "
      "Tensor[] right, Tensor[] weight, Tensor[] exponents, int[] scales) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("trace_ranks", TORCH_BOX(&htf::trace_ranks));
  m.impl("trace_ranks_backward", TORCH_BOX(&htf::trace_ranks_backward));
  m.impl("matricization_pullback", TORCH_BOX(&htf::matricization_pullback));
}
