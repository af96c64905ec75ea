#include "cpu/walk_backward.h"
#include "evaluate_at/evaluate_at.h"

namespace htf {
namespace {

using Source = IndexRows<int64_t>;

Source source_of(const Tensor& indices) {
  return {indices.const_data_ptr<int64_t>(), indices.stride(0), indices.stride(1)};
}

}  // namespace

std::vector<Tensor> evaluate_at_cpu(const Program& program, const std::vector<Tensor>& weights,
                                    const Tensor& indices, bool keep) {
  const int64_t batch = indices.size(0);
  Tensor out = program.new_result(weights[0], batch, weights[0].scalar_type());
  return with_dtype(weights[0].scalar_type(), "evaluate_at", [&](auto s) {
    using S = decltype(s);
    using T = typename ComputeOf<S>::type;
    const PairWeights<S> pairs(program, weights, true, false);
    const PackedWeights<S> packed(weights, pairs.only());
    const Tree tree(program);
    Walk<S, Source> walk(tree, weights_of(program, packed), source_of(indices), pairs.steps());
    Tensor kept = keep ? kept_tensor<T>(out, batch * walk.kept_columns()) : out;
    T* messages = keep && kept.numel() > 0 ? kept.mutable_data_ptr<T>() : nullptr;
    walk.forward(batch, out.mutable_data_ptr<S>(), messages);
    return keep ? std::vector<Tensor>{out, kept} : std::vector<Tensor>{out};
  });
}

std::vector<Tensor> evaluate_at_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const Tensor& indices, const Tensor& kept,
                                             const std::vector<int64_t>& needs) {
  const Tensor g = in_one_piece(grad);
  const int64_t batch = indices.size(0);
  return with_dtype(weights[0].scalar_type(), "evaluate_at_backward", [&](auto s) {
    using S = decltype(s);
    using T = typename ComputeOf<S>::type;
    const PairWeights<S> pairs(program, weights, true, true);
    const PackedWeights<S> packed(weights, pairs.only());
    const Tree tree(program);
    WeightGradients<S> dw(program, weights, needs);
    BackwardWalk<S, Source> walk(tree, weights_of(program, packed), source_of(indices), dw.steps(),
                                 batch, g.const_data_ptr<S>(), nullptr, 0, pairs.steps());
    walk.run(kept_pointer<T>("evaluate_at_backward", kept, batch * walk.kept_columns()));
    return dw.finish();
  });
}

}  // namespace htf
