#include "cpu/walks.h"
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
  return with_computed(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const PairWeights pairs(program, weights, false, false);
    const PackedWeights<T> packed(weights, pairs.only());
    const Tree tree(program);
    const Rows<T> source(numbers_of(rows), rows.stride(0));
    Tensor kept = keep ? kept_tensor<T>(x, batch * kept_columns<T>(tree)) : out;
    T* messages = keep && kept.numel() > 0 ? kept.mutable_data_ptr<T>() : nullptr;
    walk(tree, weights_of(program, packed), source, pairs.steps(), batch, results_of(out),
         messages);
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
  return with_computed(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const PairWeights pairs(program, weights, false, true);
    const PackedWeights<T> packed(weights, pairs.only());
    const Tree tree(program);
    const Rows<T> source(numbers_of(rows), rows.stride(0));
    WeightGradients<T> dw(program, weights, needs);
    walk_back(tree, weights_of(program, packed), source, pairs.steps(), dw.steps(), batch,
              numbers_of(g), needs_x ? results_of(dx) : Results{}, program.x_width,
              kept_pointer<T>("evaluate_backward", kept, batch * kept_columns<T>(tree)));
    std::vector<Tensor> grads = dw.finish();
    grads.push_back(dx);
    return grads;
  });
}

}  // namespace htf
