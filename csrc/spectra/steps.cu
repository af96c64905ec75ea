// spectra_factors: frames and environments of a tree's nodes, level by level.
//
//   weights   float64, all weights one after the other
//   table     int64 [tasks, kTaskFields], see steps.cuh
//   launches  for each launch, in their order: kind (0 triangles, 1 Gram matrices, 2 products with
//             weights), first task, tasks, blocks for each task, and the sizes of SpectraLaunch
//   sizes     elements of memory, of exponents
//   result    memory float64 and exponents int64, as the tasks fill them
//
// The table says where a task reads and writes; only the caller can know whether that is inside the
// memory. On the way up a level is three launches: the children's Khatri-Rao products, their
// products with the weights, what these come down to. On the way down the same, in the other order.
// Nothing waits for the device.
#include <algorithm>

#include "spectra/steps.cuh"

namespace htf::gpu {
namespace {

constexpr const char* kOp = "spectra_factors";
constexpr std::size_t kLaunchFields = 7;

std::vector<Tensor> spectra_factors(const Tensor& weights, const Tensor& table,
                                    const std::vector<int64_t>& launches,
                                    const std::vector<int64_t>& sizes) {
  check(on_device(weights) && weights.scalar_type() == ScalarType::Double && weights.dim() == 1 &&
            weights.is_contiguous(),
        kOp, ": weights must be flat float64, got ", describe(weights));
  check(on_device(table) && table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
            table.size(1) == kTaskFields && table.is_contiguous(),
        kOp, ": table must be int64 [tasks, ", kTaskFields, "], got ", describe(table));
  check(sizes.size() == 2 && launches.size() % kLaunchFields == 0, kOp,
        ": sizes must be two numbers and launches ", kLaunchFields, " for each launch");
  const Current current(weights);
  const auto launch_at = [&](std::size_t i) {
    const int64_t* l = launches.data() + i;
    return SpectraLaunch{l[1], l[2], l[3], l[4], l[5], l[6]};
  };
  int64_t parts = 0, tasks = 0;
  for (std::size_t i = 0; i < launches.size(); i += kLaunchFields) {
    const SpectraLaunch l = launch_at(i);
    check(launches[i] >= 0 && launches[i] <= 2 && l.first >= 0 && l.tasks >= 0 &&
              l.first + l.tasks <= table.size(0) && l.parts >= 1 && l.columns >= 1 &&
              (l.columns <= kWidest || launches[i] == 2) && l.columns <= l.widest && l.rows >= 1,
          kOp, ": launch ", i / kLaunchFields, " does not fit the table, or is wider than ",
          kWidest);
    parts = std::max(parts, triangle_parts(l));
    if (l.parts > 1) tasks = std::max(tasks, l.tasks);
  }
  const Tensor memory = device_tensor(current, weights, {sizes[0]}, ScalarType::Double);
  const Tensor exponents = device_tensor(current, weights, {sizes[1]}, ScalarType::Long);
  const Tensor triangles = device_tensor(current, weights, {parts}, ScalarType::Double);
  const Tensor arrived = device_zeros(current, weights, {tasks}, ScalarType::Int);
  const SpectraTask* first = static_cast<const SpectraTask*>(table.const_data_ptr());
  SpectraData data{first,
                   static_cast<double*>(memory.data_ptr()),
                   static_cast<int64_t*>(exponents.data_ptr()),
                   static_cast<const double*>(weights.const_data_ptr()),
                   static_cast<double*>(triangles.data_ptr()),
                   static_cast<int*>(arrived.data_ptr())};
  for (std::size_t i = 0; i < launches.size(); i += kLaunchFields) {
    const SpectraLaunch l = launch_at(i);
    data.task = first + l.first;
    if (launches[i] == 0)
      launch_triangles(current, data, l);
    else if (launches[i] == 1)
      launch_grams(current, data, l);
    else
      launch_multiply(current, data, l);
  }
  return {memory, exponents};
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def("spectra_factors(Tensor weights, Tensor table, int[] launches, int[] sizes) -> Tensor[]");
}
HTF_CUDA_KERNELS(m) { m.impl("spectra_factors", TORCH_BOX(&htf::gpu::spectra_factors)); }
