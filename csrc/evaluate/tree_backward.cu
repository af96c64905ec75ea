#include "evaluate/tree_backward.cuh"

#include "evaluate/tree.h"

namespace htf::gpu::tree {
namespace {

// A gradient from the partials of the splits and of the nodes that share the weight, in their
// order; a row of blocks for each group, as many as the largest has 256 numbers. Loads of many
// splits are under way together. A group's numbers and a block's of threads past them are below
// 2^31: why_not of htfkernels/cuda/whole_tree/tree.py.
template <class Stored>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const ValueOf<Stored>* partials, const int* sums, Stored* out, long long numbers,
                 int splits) {
  constexpr int kAtATime = 16;
  const int* row = sums + 4 * blockIdx.y;
  const int size = row[1], copies = row[3];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  ValueOf<Stored> sum = 0;
  for (int c = 0; c < copies; ++c) {
    const ValueOf<Stored>* from = partials + row[2] + static_cast<long long>(c) * size + i;
    for (int s = 0; s < splits; s += kAtATime) {
      ValueOf<Stored> part[kAtATime];
#pragma unroll
      for (int j = 0; j < kAtATime; ++j)
        part[j] = s + j < splits ? from[(s + j) * numbers] : ValueOf<Stored>(0);
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) sum += part[j];
    }
  }
  out[row[0] + i] = static_cast<Stored>(sum);
}

// sizes: of tree.h, then: splits, numbers of a split's partials (0: gradients are written where
// they belong), numbers of all gradients, whether x has one, the size of the largest group.
std::vector<Tensor> tree_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                  const Tensor& x, const Tensor& messages, const Tensor& table,
                                  const Tensor& sums, const std::vector<int64_t>& sizes) {
  const char* op = "tree_backward";
  check_arguments(op, weights, x, table);
  const Given g = given(op, sizes, 5);
  const int64_t* own = sizes.data() + Given::kCount;
  const int splits = static_cast<int>(own[0]);
  const int64_t numbers = own[1], gradients = own[2], wants_x = own[3], largest = own[4];
  const ScalarType dtype = weights[0].scalar_type(), value = value_type(dtype);
  check(on_device(grad) && grad.is_contiguous() && grad.scalar_type() == dtype &&
            grad.numel() == x.size(0) * g.outputs,
        op, ": grad must be contiguous [B, ", g.outputs, "] on the device, got ", describe(grad));
  check(on_device(messages) && messages.scalar_type() == value && messages.is_contiguous(), op,
        ": the messages must be those of tree_forward, got ", describe(messages));
  check(on_device(sums) && sums.scalar_type() == ScalarType::Int && sums.is_contiguous(), op,
        ": sums must be int32 on the device, got ", describe(sums));
  const Current current(x);
  const bool empty = x.size(0) == 0;
  Tensor found = empty ? device_zeros(current, x, {gradients}, dtype)
                       : device_tensor(current, x, {gradients}, dtype);
  Tensor grad_x = device_tensor(current, x, {wants_x != 0 ? x.size(0) : 0, x.size(1)}, dtype);
  if (empty) return {found, grad_x};
  const Tensor partials = device_tensor(current, x, {splits * numbers}, value);
  compiled_for(op, dtype, g.math, g.rows, [&]<Math M, class Stored, int Rows>() {
    Backward p{};
    p.sizes = sizes_of<M, Stored>(g, x);
    p.table = table.const_data_ptr<int>();
    p.grad = grad.const_data_ptr();
    p.x = x.const_data_ptr();
    p.indices = indices_of(x);
    p.messages = messages.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_weights = found.mutable_data_ptr();
    p.partials = numbers > 0 ? partials.mutable_data_ptr() : nullptr;
    p.numbers = numbers;
    p.splits = splits;
    p.outputs = g.outputs;
    p.weights = pointers(weights);
    launch<backward_kernel<M, Stored, Rows>>(
        op, current, p.sizes.tasks * splits, kThreads,
        shared_bytes<M, Stored, Rows>(p.sizes, kStages<Stored, false>), p);
    if (numbers == 0 || gradients == 0) return;
    const dim3 grid(static_cast<unsigned>((largest + kThreads - 1) / kThreads),
                    static_cast<unsigned>(sums.numel() / 4));
    launch<sum_partials<Stored>>(
        "sum_partials", current, grid, kThreads, 0,
        static_cast<const ValueOf<Stored>*>(partials.const_data_ptr()), sums.const_data_ptr<int>(),
        static_cast<Stored*>(found.mutable_data_ptr()), static_cast<long long>(numbers), splits);
  });
  return {found, grad_x};
}

int64_t tree_shared_bytes(const Tensor& like, bool forward, const std::vector<int64_t>& sizes) {
  const char* op = "tree_shared_bytes";
  const Given g = given(op, sizes, 0);
  return compiled_for(op, like.scalar_type(), g.math, g.rows,
                      [&]<Math M, class Stored, int Rows>() -> int64_t {
                        Sizes s{};
                        s.part = g.part, s.slots = g.slots;
                        set_widths<M, Stored>(s, g.width, g.vectors);
                        const int stages = forward ? kStages<Stored, true> : kStages<Stored, false>;
                        return static_cast<int64_t>(shared_bytes<M, Stored, Rows>(s, stages));
                      });
}

}  // namespace
}  // namespace htf::gpu::tree

HTF_CUDA_LIBRARY(m) {
  m.def(
      "tree_backward(Tensor grad, Tensor[] weights, Tensor x, Tensor messages, Tensor table, "
      "Tensor sums, int[] sizes) -> Tensor[]");
  m.def("tree_shared_bytes(Tensor like, bool forward, int[] sizes) -> int");
}
HTF_CUDA_KERNELS(m) {
  m.impl("tree_backward", TORCH_BOX(&htf::gpu::tree::tree_backward));
  m.impl("tree_shared_bytes", TORCH_BOX(&htf::gpu::tree::tree_shared_bytes));
}
