#include "evaluate_at/evaluate_at.h"

namespace htf {
namespace {

void check_indices(const char* op, const Program& program, const Tensor& indices) {
  check(indices.is_cpu() && indices.scalar_type() == ScalarType::Long && indices.dim() == 2 &&
            indices.size(1) == program.order,
        op, ": indices must be an int64 CPU tensor [B, ", program.order, "]");
  const int64_t* at = indices.const_data_ptr<int64_t>();
  const int64_t batch = indices.size(0), down = indices.stride(0), across = indices.stride(1);
  for (int64_t s = 0; s < program.steps; ++s) {
    if (!program.is_leaf(s)) continue;
    const Step& leaf = program.step[s];
    const int64_t* column = at + leaf.mode * across;
    for (int64_t b = 0; b < batch; ++b)
      check(column[b * down] >= 0 && column[b * down] < leaf.rows, op, ": index ", column[b * down],
            " of mode ", leaf.mode, " is out of range, its dimension is ", leaf.rows);
  }
}

Tensor evaluate_at(const std::vector<Tensor>& weights, const Tensor& indices, const Tensor& program,
                   int64_t out_features) {
  const Program p("evaluate_at", program, weights);
  p.check_outputs("evaluate_at", out_features);
  check_indices("evaluate_at", p, indices);
  return evaluate_at_cpu(p, weights, indices, false)[0];
}

std::vector<Tensor> evaluate_at_keeping(const std::vector<Tensor>& weights, const Tensor& indices,
                                        const Tensor& program, int64_t out_features) {
  const char* op = "evaluate_at_keeping";
  const Program p(op, program, weights);
  p.check_outputs(op, out_features);
  check_indices(op, p, indices);
  return evaluate_at_cpu(p, weights, indices, true);
}

std::vector<Tensor> evaluate_at_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                         const Tensor& indices, const Tensor& kept,
                                         const Tensor& program, const std::vector<int64_t>& needs) {
  const char* op = "evaluate_at_backward";
  const Program p(op, program, weights);
  check_indices(op, p, indices);
  p.check_grad(op, grad, indices.size(0), weights[0].scalar_type());
  p.check_needs(op, needs, weights.size());
  return evaluate_at_backward_cpu(p, grad, weights, indices, kept, needs);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def(
      "evaluate_at(Tensor[] weights, Tensor indices, Tensor program, int out_features) -> Tensor");
  m.def(
      "evaluate_at_keeping(Tensor[] weights, Tensor indices, Tensor program, int out_features) -> "
      "Tensor[]");
  m.def(
      "evaluate_at_backward(Tensor grad, Tensor[] weights, Tensor indices, Tensor kept, Tensor "
      "program, int[] needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("evaluate_at", TORCH_BOX(&htf::evaluate_at));
  m.impl("evaluate_at_keeping", TORCH_BOX(&htf::evaluate_at_keeping));
  m.impl("evaluate_at_backward", TORCH_BOX(&htf::evaluate_at_backward));
}
