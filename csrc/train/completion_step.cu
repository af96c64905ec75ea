// completion_step_: one step of a tensor completion, from the weights to the weights.
//
//   completion_step_(params, needs, schedule, lists, targets, which, average, count, arrived, lr,
//                    lr_at, weight_decay, alpha, eps) -> loss []
//
//   params, needs     the folded weights, one dtype: float32 or float64, and whether each is moved
//   schedule, lists   of the index plan and these needs, see evaluate_at/planned_cuda.h; int64 on
//                     the CPU, int32 on the device; out_features 1
//   targets           y [B]
//   which             the loss, see train/loss_cuda.h
//   arrived           int32 [1], 0 before and after
//   the others        as of group_rmsprop_ (group_rmsprop/group_rmsprop_cuda.cu), lists for all
//                     params
//
//   p = evaluate_at_planned(weights);  loss = mean f(p - y), before the step
//   g = gradients of the loss by the weights that are moved
//   GroupRMSprop's step by g
//
// The launches are those of the planned forward and backward pass (2 and 3 in the paper's setting),
// one for the loss between them and one for the optimizer after them: 7. The backward pass leaves
// sums of its gradients' squares, so that nothing else reads them for the norm; a weight decay,
// which changes what is squared, takes one more launch. Weights, gradients, frames and lists of the
// paper's setting (2.2, 2.2, 4.7 and 0.1 MB) stay in the L2 cache from launch to launch. There is
// one allocation, which a captured graph makes its own, and no word goes to the host.
#include <vector>

#include "evaluate_at/planned_cuda.h"
#include "group_rmsprop/group_rmsprop_cuda.h"
#include "train/loss_cuda.h"

namespace htf::gpu {
namespace {

constexpr const char* kCompletionStep = "completion_step_";

// Pieces of one allocation, each on 256 bytes.
class Arena {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = size_;
    size_ += (bytes + 255) / 256 * 256;
    return at;
  }
  void allocate(const Current& current, const Tensor& like) {
    memory_ = device_tensor(current, like, {size_}, ScalarType::Byte);
    begin_ = static_cast<char*>(memory_.mutable_data_ptr());
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(begin_ + offset);
  }

 private:
  int64_t size_ = 0;
  Tensor memory_;
  char* begin_ = nullptr;
};

Tensor completion_step(const std::vector<Tensor>& params, const std::vector<int64_t>& needs,
                       const Tensor& schedule, const Tensor& lists, const Tensor& targets,
                       int64_t which, const Tensor& average, const Tensor& count,
                       const Tensor& arrived, const std::vector<double>& lr,
                       const std::vector<Tensor>& lr_at, const std::vector<double>& weight_decay,
                       double alpha, double eps) {
  check(schedule.is_cpu() && schedule.scalar_type() == ScalarType::Long &&
            schedule.is_contiguous() && on_device(lists) &&
            lists.scalar_type() == ScalarType::Int && lists.is_contiguous(),
        kCompletionStep, ": schedule and lists must be those of an index plan");
  const auto* numbers = schedule.const_data_ptr<int64_t>();
  const PlannedSizes sizes = planned_sizes(numbers, schedule.numel());
  GroupRMSprop step = group_rmsprop_step(kCompletionStep, params, average, count, lr, lr_at,
                                         weight_decay, alpha, eps);
  const ScalarType dtype = step.dtype;
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, kCompletionStep,
        ": params must be float32 or float64, got ", toString(dtype));
  check(sizes.dtype == dtype && sizes.groups == static_cast<int64_t>(params.size()) &&
            needs.size() == params.size() && sizes.outputs == 1,
        kCompletionStep, ": the schedule is of other weights: ", sizes.groups, " of dtype ",
        toString(sizes.dtype), " and ", sizes.outputs, " outputs, got ", params.size(),
        " of dtype ", toString(dtype));
  check(on_device(targets) && targets.scalar_type() == dtype && targets.dim() == 1 &&
            targets.is_contiguous() && targets.numel() == sizes.batch && sizes.batch > 0,
        kCompletionStep, ": targets must be contiguous [", sizes.batch, "] of dtype ",
        toString(dtype), " on the device, got ", describe(targets));
  check(which >= 0 && which <= 2, kCompletionStep, ": which must be 0, 1 or 2, got ", which);
  check(on_device(arrived) && arrived.scalar_type() == ScalarType::Int && arrived.numel() == 1,
        kCompletionStep, ": arrived must be one Int on the device, got ", describe(arrived));

  const int64_t width = dtype == ScalarType::Double ? 8 : 4;
  Arena arena;
  const int64_t frames = arena.add(sizes.frame_elements * width);
  const int64_t workspace = arena.add(sizes.workspace_bytes);
  const int64_t values = arena.add(sizes.batch * width);
  const int64_t partials = arena.add(loss_partials(sizes.batch) * 8);
  const int64_t begun = arena.add(3 * 8);
  std::vector<int64_t> gradient(params.size(), -1);
  std::vector<Parameter> moved;
  bool decays = false;
  for (std::size_t i = 0; i < params.size(); ++i) {
    if (!needs[i]) continue;
    gradient[i] = arena.add(step.parameters[i].size * width);
    moved.push_back(step.parameters[i]);
    decays = decays || step.parameters[i].weight_decay != 0;
  }
  check(!moved.empty(), kCompletionStep, ": none of the weights is to be moved");
  std::vector<const void*> weights(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) weights[i] = step.parameters[i].values;
  step.parameters = moved;
  const int64_t parts = decays ? squares_count(step) : sizes.squares;
  const int64_t squares = arena.add(partials_room(parts) * 8);

  const Current current(params[0]);
  arena.allocate(current, params[0]);
  step.begun = arena.at<double>(begun);
  Tensor loss = device_tensor(current, params[0], {}, dtype);
  std::vector<void*> gradients(params.size(), nullptr);
  for (std::size_t i = 0, k = 0; i < params.size(); ++i) {
    if (!needs[i]) continue;
    gradients[i] = arena.at<void>(gradient[i]);
    step.parameters[k++].grad = gradients[i];
  }

  const PlannedCall call{numbers, weights.data(), lists.const_data_ptr<int32_t>(),
                         arena.at<void>(frames), arena.at<void>(workspace)};
  auto* predictions = arena.at<void>(values);
  auto* sums = arena.at<double>(squares);
  planned_forward(current, call, predictions);
  mean_loss(current, static_cast<Loss>(which), dtype, predictions, targets.const_data_ptr(),
            sizes.batch, predictions, loss.mutable_data_ptr(), arena.at<double>(partials),
            static_cast<int*>(arrived.mutable_data_ptr()), begin_of(step));
  planned_backward(current, call, predictions, gradients.data(), decays ? nullptr : sums);
  if (decays) sum_squares(current, step, sums);
  move_parameters(current, step, folded(current, sums, parts));
  return loss;
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def(
      "completion_step_(Tensor(a!)[] params, int[] needs, Tensor schedule, Tensor lists, Tensor "
      "targets, int which, Tensor(b!) average, Tensor(c!) count, Tensor(d!) arrived, float[] lr, "
      "Tensor[] lr_at, float[] weight_decay, float alpha, float eps) -> Tensor");
}
HTF_CUDA_KERNELS(m) { m.impl("completion_step_", TORCH_BOX(&htf::gpu::completion_step)); }
