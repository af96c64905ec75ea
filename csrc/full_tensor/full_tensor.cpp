#include "full_tensor/full_tensor.h"

namespace htf {
namespace {

int64_t entries_of(const Program& program) {
  int64_t entries = 1;
  for (int64_t s = 0; s < program.steps; ++s)
    if (program.is_leaf(s)) {
      check(entries <= (int64_t{1} << 40) / program.step[s].rows,
            "full_tensor: the tensor has more than 2^40 entries");
      entries *= program.step[s].rows;
    }
  return entries;
}

Tensor full_tensor(const std::vector<Tensor>& weights, const Tensor& program, int64_t entries,
                   int64_t out_features) {
  const Program p("full_tensor", program, weights);
  p.check_outputs("full_tensor", out_features);
  check(entries == entries_of(p), "full_tensor: entries must be ", entries_of(p), ", got ",
        entries);
  return full_tensor_cpu(p, weights, entries);
}

std::vector<Tensor> full_tensor_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                         const Tensor& program, const std::vector<int64_t>& needs) {
  const char* op = "full_tensor_backward";
  const Program p(op, program, weights);
  p.check_grad(op, grad, entries_of(p), weights[0].scalar_type());
  p.check_needs(op, needs, weights.size());
  return full_tensor_backward_cpu(p, grad, weights, needs);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def("full_tensor(Tensor[] weights, Tensor program, int entries, int out_features) -> Tensor");
  m.def(
      "full_tensor_backward(Tensor grad, Tensor[] weights, Tensor program, int[] needs) -> "
      "Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("full_tensor", TORCH_BOX(&htf::full_tensor));
  m.impl("full_tensor_backward", TORCH_BOX(&htf::full_tensor_backward));
}
