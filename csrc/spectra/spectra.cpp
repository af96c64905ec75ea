#include "spectra/spectra.h"

namespace htf {
namespace {

constexpr const char* kFactors = "spectral_factors";
constexpr const char* kValues = "factor_values";

std::vector<Tensor> spectral_factors(const std::vector<Tensor>& weights, const Tensor& program,
                                     const std::vector<int64_t>& wanted, int64_t gram,
                                     int64_t keep) {
  const Program p(kFactors, program, weights);
  std::vector<char> marked(p.steps, 0);
  for (const int64_t node : wanted) {
    check(node >= 0 && node < p.steps, kFactors, ": wanted must be nodes, 0 to ", p.steps - 1,
          ", got ", node);
    marked[node] = 1;
  }
  return spectral_factors_cpu(p, weights, marked, gram != 0, keep != 0);
}

void check_flat(const Tensor& t, const char* name, ScalarType dtype, int64_t dim) {
  check(t.is_cpu() && t.scalar_type() == dtype && t.dim() == dim && t.is_contiguous(), kValues,
        ": ", name, " must be what spectral_factors returned, got ", describe(t));
}

std::vector<Tensor> factor_values(const Tensor& frames, const Tensor& environments,
                                  const Tensor& table, const std::vector<int64_t>& wanted) {
  check_flat(frames, "frames", ScalarType::Double, 1);
  check_flat(environments, "environments", ScalarType::Double, 1);
  check_flat(table, "table", ScalarType::Long, 2);
  const FactorRow* row = reinterpret_cast<const FactorRow*>(table.const_data_ptr<int64_t>());
  check(table.size(1) == kFactorFields, kValues, ": table must have ", kFactorFields, " columns");
  std::vector<FactorRow> rows;
  for (const int64_t node : wanted) {
    check(node >= 0 && node < table.size(0), kValues, ": wanted must be nodes, 0 to ",
          table.size(0) - 1, ", got ", node);
    const FactorRow& r = row[node];
    const auto inside = [&](int64_t at, int64_t count, const Tensor& in) {
      return at >= 0 && count >= 1 && at <= in.numel() && count <= (in.numel() - at) / r.ld;
    };
    constexpr int64_t kFar = int64_t{1} << 60;
    check(r.ld >= 1 && inside(r.frame, r.frame_rows, frames) &&
              inside(r.environment, r.environment_rows, environments) && r.cols >= 1 &&
              r.cols <= r.ld && r.ld == padded<double>(r.cols) && r.rows >= 1 &&
              r.frame_rows % r.rows == 0 && r.after >= 1 && r.frame_rows / r.rows % r.after == 0 &&
              r.scale >= -kFar && r.scale <= kFar,
          kValues, ": node ", node, " has no environment in this table");
    rows.push_back(r);
  }
  return factor_values_cpu(frames, environments, rows);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def(
      "spectral_factors(Tensor[] weights, Tensor program, int[] wanted, int gram, int keep) -> "
      "Tensor[]");
  m.def(
      "factor_values(Tensor frames, Tensor environments, Tensor table, int[] wanted) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("spectral_factors", TORCH_BOX(&htf::spectral_factors));
  m.impl("factor_values", TORCH_BOX(&htf::factor_values));
}
