#include "cpu/walks.h"
#include "evaluate_at/evaluate_at.h"

namespace htf {
namespace {

template <class T>
Rows<T> source_of(const Tensor& indices) {
  return {indices.const_data_ptr<int64_t>(), indices.stride(0), indices.stride(1)};
}

}  // namespace

std::vector<Tensor> evaluate_at_cpu(const Program& program, const std::vector<Tensor>& weights,
                                    const Tensor& indices, bool keep) {
  const int64_t batch = indices.size(0);
  Tensor out = program.new_result(weights[0], batch, weights[0].scalar_type());
  return with_computed(weights[0].scalar_type(), [&](auto t) {
    using T = decltype(t);
    const PairWeights pairs(program, weights, true, false);
    const PackedWeights<T> packed(weights, pairs.only());
    const Tree tree(program);
    Tensor kept = keep ? kept_tensor<T>(out, batch * kept_columns<T>(tree)) : out;
    T* messages = keep && kept.numel() > 0 ? kept.mutable_data_ptr<T>() : nullptr;
    walk(tree, weights_of(program, packed), source_of<T>(indices), pairs.steps(), batch,
         results_of(out), messages);
    return keep ? std::vector<Tensor>{out, kept} : std::vector<Tensor>{out};
  });
}

std::vector<Tensor> evaluate_at_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const Tensor& indices, const Tensor& kept,
                                             const std::vector<int64_t>& needs) {
  const Tensor g = in_one_piece(grad);
  const int64_t batch = indices.size(0);
  return with_computed(weights[0].scalar_type(), [&](auto t) {
    using T = decltype(t);
    const PairWeights pairs(program, weights, true, true);
    const PackedWeights<T> packed(weights, pairs.only());
    const Tree tree(program);
    WeightGradients<T> dw(program, weights, needs);
    walk_back(tree, weights_of(program, packed), source_of<T>(indices), pairs.steps(), dw.steps(),
              batch, numbers_of(g), Results{}, 0,
              kept_pointer<T>("evaluate_at_backward", kept, batch * kept_columns<T>(tree)));
    return dw.finish();
  });
}

}  // namespace htf
