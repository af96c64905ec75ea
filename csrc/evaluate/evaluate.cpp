#include "evaluate/evaluate.h"

namespace htf {
namespace {

void check_x(const char* op, const Program& program, const std::vector<Tensor>& weights,
             const Tensor& x) {
  check(x.is_cpu() && x.scalar_type() == weights[0].scalar_type(), op,
        ": x must be a CPU tensor of the weights' dtype ", toString(weights[0].scalar_type()),
        ", got ", toString(x.scalar_type()));
  check(x.dim() == 2 && x.size(1) == program.x_width, op, ": x must be [B, ", program.x_width,
        "], got ", x.dim(), " dimensions and ", x.dim() > 0 ? x.size(x.dim() - 1) : 0, " columns");
}

Tensor evaluate(const std::vector<Tensor>& weights, const Tensor& x, const Tensor& program,
                int64_t out_features) {
  const Program p("evaluate", program, weights, out_features);
  check_x("evaluate", p, weights, x);
  return evaluate_cpu(p, weights, x);
}

std::vector<Tensor> evaluate_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                      const Tensor& x, const Tensor& program,
                                      const std::vector<int64_t>& needs) {
  const Program p("evaluate_backward", program, weights, grad.dim() == 2 ? grad.size(1) : -1);
  check_x("evaluate_backward", p, weights, x);
  check(grad.is_cpu() && grad.scalar_type() == x.scalar_type() && grad.size(0) == x.size(0),
        "evaluate_backward: grad must be [", x.size(0), ", ", p.outputs, "] of the weights' dtype");
  check(needs.size() == weights.size() + 1, "evaluate_backward: needs must have ",
        weights.size() + 1, " entries, got ", needs.size());
  return evaluate_backward_cpu(p, grad, weights, x, needs);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def("evaluate(Tensor[] weights, Tensor x, Tensor program, int out_features) -> Tensor");
  m.def(
      "evaluate_backward(Tensor grad, Tensor[] weights, Tensor x, Tensor program, int[] needs) -> "
      "Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("evaluate", TORCH_BOX(&htf::evaluate));
  m.impl("evaluate_backward", TORCH_BOX(&htf::evaluate_backward));
}
