#include "evaluate/tree_forward.cuh"

#include "evaluate/tree.h"

namespace htf::gpu::tree {
namespace {

// sizes: of tree.h, then the columns of all messages.
std::vector<Tensor> tree_forward(const std::vector<Tensor>& weights, const Tensor& x,
                                 const Tensor& table, const Tensor& counters,
                                 const std::vector<int64_t>& sizes) {
  const char* op = "tree_forward";
  check_arguments(op, weights, x, table);
  const Given g = given(op, sizes, 1);
  check(on_device(counters) && counters.scalar_type() == ScalarType::Int, op,
        ": the counters must be int32 on the device, got ", describe(counters));
  const Current current(x);
  const ScalarType dtype = weights[0].scalar_type();
  Tensor result = device_tensor(current, x, {x.size(0), g.outputs}, dtype);
  Tensor messages =
      device_tensor(current, x, {sizes[Given::kCount] * x.size(0)}, value_type(dtype));
  compiled_for(op, dtype, g.math, g.rows, [&]<Math M, class Stored, int Rows>() {
    Forward p{};
    p.sizes = sizes_of<M, Stored>(g, x);
    p.table = table.const_data_ptr<int>();
    p.x = x.const_data_ptr();
    p.indices = indices_of(x);
    p.result = result.mutable_data_ptr();
    p.messages = messages.mutable_data_ptr();
    p.counters = static_cast<int*>(counters.mutable_data_ptr());
    p.weights = pointers(weights);
    launch<forward_kernel<M, Stored, Rows>>(
        op, current, p.sizes.tasks * p.sizes.tiles, kThreads,
        shared_bytes<M, Stored, Rows>(p.sizes, kStages<Stored, true>), p);
  });
  return {result, messages};
}

}  // namespace
}  // namespace htf::gpu::tree

HTF_CUDA_LIBRARY(m) {
  m.def(
      "tree_forward(Tensor[] weights, Tensor x, Tensor table, Tensor counters, int[] sizes) -> "
      "Tensor[]");
}
HTF_CUDA_KERNELS(m) { m.impl("tree_forward", TORCH_BOX(&htf::gpu::tree::tree_forward)); }
