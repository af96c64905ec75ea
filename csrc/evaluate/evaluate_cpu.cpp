#include "cpu/walk_backward.h"
#include "evaluate/evaluate.h"

namespace htf {
namespace {

// Rows one after the other or apart, but each row in one piece.
Tensor with_dense_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace

Tensor evaluate_cpu(const Program& program, const std::vector<Tensor>& weights, const Tensor& x) {
  const Tensor rows = with_dense_rows(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), program.outputs});
  with_dtype(x.scalar_type(), "evaluate", [&](auto s) {
    using S = decltype(s);
    const DenseRows<S> source{rows.const_data_ptr<S>(), rows.stride(0)};
    Walk<S, DenseRows<S>>(program, weights, source).forward(x.size(0), out.mutable_data_ptr<S>());
  });
  return out;
}

std::vector<Tensor> evaluate_backward_cpu(const Program& program, const Tensor& grad,
                                          const std::vector<Tensor>& weights, const Tensor& x,
                                          const std::vector<int64_t>& needs) {
  const Tensor rows = with_dense_rows(x), g = torch::stable::contiguous(grad);
  const bool needs_x = needs.back() != 0;
  Tensor dx = needs_x ? torch::stable::new_empty(x, {x.size(0), program.x_width})
                      : torch::stable::new_empty(x, {0});
  return with_dtype(x.scalar_type(), "evaluate_backward", [&](auto s) {
    using S = decltype(s);
    const DenseRows<S> source{rows.const_data_ptr<S>(), rows.stride(0)};
    WeightGradients<S> dw(weights, needs);
    S* to = needs_x ? dx.mutable_data_ptr<S>() : nullptr;
    BackwardWalk<S, DenseRows<S>>(program, weights, source, x.size(0), g.const_data_ptr<S>(), dw,
                                  to)
        .run();
    std::vector<Tensor> grads = dw.finish();
    grads.push_back(dx);
    return grads;
  });
}

}  // namespace htf
