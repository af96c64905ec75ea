#include "cpu/walk_backward.h"
#include "evaluate_at/evaluate_at.h"

namespace htf {

Tensor evaluate_at_cpu(const Program& program, const std::vector<Tensor>& weights,
                       const Tensor& indices) {
  const Tensor at = torch::stable::contiguous(indices);
  Tensor out = torch::stable::new_empty(weights[0], {at.size(0), program.outputs});
  with_dtype(weights[0].scalar_type(), "evaluate_at", [&](auto s) {
    using S = decltype(s);
    const IndexRows<S> source{at.const_data_ptr<int64_t>(), program.order};
    Walk<S, IndexRows<S>>(program, weights, source).forward(at.size(0), out.mutable_data_ptr<S>());
  });
  return out;
}

std::vector<Tensor> evaluate_at_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const Tensor& indices,
                                             const std::vector<int64_t>& needs) {
  const Tensor at = torch::stable::contiguous(indices), g = torch::stable::contiguous(grad);
  return with_dtype(weights[0].scalar_type(), "evaluate_at_backward", [&](auto s) {
    using S = decltype(s);
    const IndexRows<S> source{at.const_data_ptr<int64_t>(), program.order};
    WeightGradients<S> dw(weights, needs);
    BackwardWalk<S, IndexRows<S>>(program, weights, source, at.size(0), g.const_data_ptr<S>(), dw,
                                  nullptr)
        .run();
    return dw.finish();
  });
}

}  // namespace htf
