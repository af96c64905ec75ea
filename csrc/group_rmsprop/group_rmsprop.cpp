#include "group_rmsprop/group_rmsprop.h"

namespace htf {
namespace {

constexpr const char* kOp = "group_rmsprop_";

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

void check_tensor(const Tensor& t, const char* name, std::size_t i, ScalarType dtype) {
  check(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous(), kOp, ": ", name, "[", i,
        "] must be a contiguous CPU tensor of dtype ", toString(dtype), ", got ", describe(t));
}

void check_step(const GroupStep& s, const Tensor& average) {
  const std::size_t count = s.params.size();
  check(count > 0, kOp, ": there are no params");
  check(s.grads.size() == count && s.lr.size() == count && s.weight_decay.size() == count, kOp,
        ": grads, lr and weight_decay must have an entry for each of the ", count, " params, got ",
        s.grads.size(), ", ", s.lr.size(), " and ", s.weight_decay.size());
  const ScalarType dtype = s.params[0].scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
        kOp, ": params must be float32, float64 or bfloat16, got ", toString(dtype));
  for (std::size_t i = 0; i < count; ++i) {
    check_tensor(s.params[i], "params", i, dtype);
    check_tensor(s.grads[i], "grads", i, dtype);
    check(same_shape(s.params[i], s.grads[i]), kOp, ": grads[", i, "] must be of the shape of its ",
          "parameter ", describe(s.params[i]), ", got ", describe(s.grads[i]));
  }
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  check(average.is_cpu() && average.dim() == 0 && average.scalar_type() == wide, kOp,
        ": average must be a number of dtype ", toString(wide), " on the CPU, got ",
        describe(average));
  check(s.alpha >= 0 && s.alpha < 1, kOp, ": alpha must be in [0, 1), got ", s.alpha);
  check(s.step >= 1, kOp, ": step must be positive, got ", s.step);
}

Tensor group_rmsprop(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                     const Tensor& average, const std::vector<double>& lr,
                     const std::vector<double>& weight_decay, double alpha, double eps,
                     int64_t step) {
  const GroupStep s{params, grads, lr, weight_decay, alpha, eps, step};
  check_step(s, average);
  return group_rmsprop_cpu(s, average);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def(
      "group_rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor average, float[] lr, float[] "
      "weight_decay, float alpha, float eps, int step) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("group_rmsprop_", TORCH_BOX(&htf::group_rmsprop));
}
