#include "cpu/walk_backward.h"
#include "evaluate/evaluate.h"

namespace htf {
namespace {

// Rows one after the other or apart, but each row in one piece.
Tensor with_dense_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : in_one_piece(x);
}

}  // namespace

std::vector<Tensor> evaluate_cpu(const Program& program, const std::vector<Tensor>& weights,
                                 const Tensor& x, bool keep) {
  const Tensor rows = with_dense_rows(x);
  const int64_t batch = x.size(0);
  Tensor out = program.new_result(x, batch, x.scalar_type());
  return with_dtype(x.scalar_type(), "evaluate", [&](auto s) {
    using S = decltype(s);
    using T = typename ComputeOf<S>::type;
    const PairWeights<S> pairs(program, weights, false, false);
    const PackedWeights<S> packed(weights, pairs.only());
    const Tree tree(program);
    const DenseRows<S> source(rows.const_data_ptr<S>(), rows.stride(0));
    Walk<S, DenseRows<S>> walk(tree, weights_of(program, packed), source, pairs.steps());
    Tensor kept = keep ? kept_tensor<T>(x, batch * walk.kept_columns()) : out;
    T* messages = keep && kept.numel() > 0 ? kept.mutable_data_ptr<T>() : nullptr;
    walk.forward(batch, out.mutable_data_ptr<S>(), messages);
    return keep ? std::vector<Tensor>{out, kept} : std::vector<Tensor>{out};
  });
}

std::vector<Tensor> evaluate_backward_cpu(const Program& program, const Tensor& grad,
                                          const std::vector<Tensor>& weights, const Tensor& x,
                                          const Tensor& kept, const std::vector<int64_t>& needs) {
  const Tensor rows = with_dense_rows(x), g = in_one_piece(grad);
  const int64_t batch = x.size(0);
  const bool needs_x = needs.back() != 0;
  Tensor dx = needs_x ? new_tensor(x, {batch, program.x_width}, x.scalar_type())
                      : torch::stable::new_empty(x, {0});
  return with_dtype(x.scalar_type(), "evaluate_backward", [&](auto s) {
    using S = decltype(s);
    using T = typename ComputeOf<S>::type;
    const PairWeights<S> pairs(program, weights, false, true);
    const PackedWeights<S> packed(weights, pairs.only());
    const Tree tree(program);
    const DenseRows<S> source(rows.const_data_ptr<S>(), rows.stride(0));
    WeightGradients<S> dw(program, weights, needs);
    BackwardWalk<S, DenseRows<S>> walk(
        tree, weights_of(program, packed), source, dw.steps(), batch, g.const_data_ptr<S>(),
        needs_x ? dx.mutable_data_ptr<S>() : nullptr, program.x_width, pairs.steps());
    walk.run(kept_pointer<T>("evaluate_backward", kept, batch * walk.kept_columns()));
    std::vector<Tensor> grads = dw.finish();
    grads.push_back(dx);
    return grads;
  });
}

}  // namespace htf
