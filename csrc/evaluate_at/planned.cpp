#include "evaluate_at/planned.h"

namespace htf {

IndexPlan::IndexPlan(const char* op, const Program& p, const Tensor& table, const Tensor& all) {
  constexpr int64_t kHeaderFields = 8;
  const auto broken = [&](bool ok) {
    check(ok, op, ": the plan does not fit the tree; use one made by IndexPlan.make");
  };
  broken(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.dim() == 1 &&
         table.is_contiguous() && table.numel() >= kHeaderFields);
  broken(all.is_cpu() && all.scalar_type() == ScalarType::Int && all.dim() == 1 &&
         all.is_contiguous());
  const int64_t* h = table.const_data_ptr<int64_t>();
  const int64_t framed = h[2], cut = h[3], length = h[5];
  broken(h[0] == 1 && h[1] >= 0 && framed >= 0 && framed < table.numel() && cut >= 1 &&
         cut < table.numel() && h[4] >= kWalk && h[4] <= kFramedRoot && length == all.numel() &&
         h[6] == p.order && h[7] == p.steps &&
         table.numel() == kHeaderFields + framed * kFrameFields + cut * kCutFields);
  batch = h[1], form = h[4];
  lists = all.const_data_ptr<int32_t>();
  const auto* row = reinterpret_cast<const FrameRow*>(h + kHeaderFields);
  rows.assign(row, row + framed);
  const auto* last = reinterpret_cast<const CutRow*>(row + framed);
  cuts.assign(last, last + cut);

  const auto list = [&](int64_t at, int64_t n) {
    broken(at >= 0 && n >= 0 && n <= length && at <= length - n);
  };
  std::vector<int64_t> cols(framed), used(framed, 0);
  const auto operand = [&](int64_t x, int64_t before, int64_t& count) {
    broken(x < before && x >= -p.steps && (x >= 0 || p.is_leaf(-(x + 1))));
    if (x >= 0) broken(used[x]++ == 0);
    count = x >= 0 ? rows[x].rows : p.step[-(x + 1)].rows;
    return x >= 0 ? cols[x] : p.step[-(x + 1)].cols;
  };
  for (int64_t k = 0; k < framed; ++k) {
    const FrameRow& f = rows[k];
    int64_t n_left = 0, n_right = 0;
    const int64_t width = operand(f.left, k, n_left);
    broken(f.step >= -1 && f.step < p.steps && (f.step < 0 || !p.is_leaf(f.step)) && f.rows >= 0);
    if (f.step >= 0) broken(p.step[f.step].rows == width);
    cols[k] = f.step >= 0 ? p.step[f.step].cols : width;
    const auto level = [&](int64_t x) { return x < 0 ? 0 : rows[x].level; };
    broken(f.level > level(f.left) && f.level <= framed);
    if (f.right == kNoOperand) {
      broken(f.rows == n_left && f.step >= 0);
      continue;
    }
    broken(operand(f.right, k, n_right) == width && f.level > level(f.right));
    list(f.left_ids, f.rows), list(f.right_ids, f.rows), list(f.right_order, f.rows);
    list(f.left_start, n_left + 1), list(f.right_start, n_right + 1);
  }
  for (const CutRow& c : cuts) {
    int64_t count = 0;
    const int64_t width = operand(c.operand, framed, count);
    broken(c.rows == count);
    list(c.ids, batch);
    if (form != kWalk) list(c.start, c.rows + 1), list(c.order, batch);
    if (form == kFramedRoot)
      broken(c.operand >= 0 && rows[c.operand].step == p.steps - 1 && cut == 1);
    else
      broken(c.parent >= 0 && c.parent < p.steps && !p.is_leaf(c.parent) &&
             p.step[c.parent].rows == width);
    if (form == kBilinear) broken(cut == 2 && c.parent == p.steps - 1 && p.outputs == 1);
  }
}

namespace {

Tensor planned(const std::vector<Tensor>& weights, const Tensor& program, const Tensor& table,
               const Tensor& lists, int64_t batch, int64_t out_features) {
  const char* op = "evaluate_at_planned";
  const Program p(op, program, weights);
  p.check_outputs(op, out_features);
  const IndexPlan plan(op, p, table, lists);
  plan.check_batch(op, batch);
  return evaluate_at_planned_cpu(p, plan, weights, false)[0];
}

std::vector<Tensor> planned_keeping(const std::vector<Tensor>& weights, const Tensor& program,
                                    const Tensor& table, const Tensor& lists, int64_t batch,
                                    int64_t out_features) {
  const char* op = "evaluate_at_planned_keeping";
  const Program p(op, program, weights);
  p.check_outputs(op, out_features);
  const IndexPlan plan(op, p, table, lists);
  plan.check_batch(op, batch);
  return evaluate_at_planned_cpu(p, plan, weights, true);
}

std::vector<Tensor> planned_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                     const Tensor& kept, const Tensor& program, const Tensor& table,
                                     const Tensor& lists, const std::vector<int64_t>& needs) {
  const char* op = "evaluate_at_planned_backward";
  const Program p(op, program, weights);
  const IndexPlan plan(op, p, table, lists);
  p.check_grad(op, grad, plan.batch, weights[0].scalar_type());
  p.check_needs(op, needs, weights.size());
  return evaluate_at_planned_backward_cpu(p, plan, grad, weights, kept, needs);
}

}  // namespace
}  // namespace htf

STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels, m) {
  m.def(
      "evaluate_at_planned(Tensor[] weights, Tensor program, Tensor table, Tensor lists, int "
      "batch, "
      "int out_features) -> Tensor");
  m.def(
      "evaluate_at_planned_keeping(Tensor[] weights, Tensor program, Tensor table, Tensor lists, "
      "int batch, int out_features) -> Tensor[]");
  m.def(
      "evaluate_at_planned_backward(Tensor grad, Tensor[] weights, Tensor kept, Tensor program, "
      "Tensor table, Tensor lists, int[] needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(htfkernels, CPU, m) {
  m.impl("evaluate_at_planned", TORCH_BOX(&htf::planned));
  m.impl("evaluate_at_planned_keeping", TORCH_BOX(&htf::planned_keeping));
  m.impl("evaluate_at_planned_backward", TORCH_BOX(&htf::planned_backward));
}
