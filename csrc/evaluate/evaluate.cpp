#include "evaluate/evaluate.h"

namespace htf {
namespace {

void check_x(const char* op, const Program& program, const std::vector<Tensor>& weights,
             const Tensor& x) {
  const ScalarType dtype = weights[0].scalar_type();
  check(x.is_cpu() && x.scalar_type() == dtype && x.dim() == 2 && x.size(1) == program.x_width, op,
        ": x must be a CPU tensor [B, ", program.x_width, "] of dtype ", toString(dtype), ", got ",
        describe(x));
}

Tensor evaluate(const std::vector<Tensor>& weights, const Tensor& x, const Tensor& program,
                int64_t out_features) {
  const Program p("evaluate", program, weights);
  p.check_outputs("evaluate", out_features);
  check_x("evaluate", p, weights, x);
  return evaluate_cpu(p, weights, x, false)[0];
}

std::vector<Tensor> evaluate_keeping(const std::vector<Tensor>& weights, const Tensor& x,
                                     const Tensor& program, int64_t out_features) {
  const char* op = "evaluate_keeping";
  const Program p(op, program, weights);
  p.check_outputs(op, out_features);
  check_x(op, p, weights, x);
  return evaluate_cpu(p, weights, x, true);
}

std::vector<Tensor> evaluate_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                      const Tensor& x, const Tensor& kept, const Tensor& program,
                                      const std::vector<int64_t>& needs) {
  const char* op = "evaluate_backward";
  const Program p(op, program, weights);
  check_x(op, p, weights, x);
  p.check_grad(op, grad, x.size(0), x.scalar_type());
  p.check_needs(op, needs, weights.size() + 1);
  return evaluate_backward_cpu(p, grad, weights, x, kept, needs);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def("evaluate(Tensor[] weights, Tensor x, Tensor program, int out_features) -> Tensor");
  m.def(
      "evaluate_keeping(Tensor[] weights, Tensor x, Tensor program, int out_features) -> "
      "Tensor[]");
  m.def(
      "evaluate_backward(Tensor grad, Tensor[] weights, Tensor x, Tensor kept, Tensor program, "
      "int[] needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("evaluate", TORCH_BOX(&htf::evaluate));
  m.impl("evaluate_keeping", TORCH_BOX(&htf::evaluate_keeping));
  m.impl("evaluate_backward", TORCH_BOX(&htf::evaluate_backward));
}
