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

  // What an operand stands for: children of a step with all that is below them.
  struct Operand {
    int64_t rows, cols, level, parent, children;
  };
  std::vector<Operand> made;
  std::vector<char> used(framed + p.steps, 0);  // rows, then leaves
  const auto operand = [&](int64_t x, int64_t before) -> Operand {
    broken(x < before && x >= -p.steps && (x >= 0 || p.is_leaf(-(x + 1))));
    char& mine = used[x >= 0 ? x : framed - (x + 1)];
    broken(mine == 0);
    mine = 1;
    if (x >= 0) return made[x];
    const Step& leaf = p.step[-(x + 1)];
    return {leaf.rows, leaf.cols, 0, leaf.parent, 1};
  };
  // The lists of a row, or of a cut, follow each other. What is in them is not looked at.
  struct List {
    int64_t at, size;
  };
  struct Span {
    int64_t begin, end;
  };
  std::vector<Span> of_rows, of_cuts;
  const auto span = [&](std::initializer_list<List> all_of_it) -> Span {
    const int64_t begin = all_of_it.begin()->at;
    int64_t at = begin;
    for (const List& list : all_of_it) {
      broken(list.at == at && at >= 0 && at <= length && list.size >= 0 &&
             list.size <= length - at);
      at += list.size;
    }
    return {begin, at};
  };
  for (int64_t k = 0; k < framed; ++k) {
    const FrameRow& f = rows[k];
    const Operand left = operand(f.left, k);
    broken(f.step >= -1 && f.step < p.steps && f.rows >= 0);
    Operand product{f.rows, left.cols, left.level, left.parent, left.children};
    if (f.right == kNoOperand) {
      broken(f.rows == left.rows && f.step >= 0);
    } else {
      const Operand right = operand(f.right, k);
      broken(right.cols == left.cols && right.parent == left.parent);
      product.level = std::max(left.level, right.level);
      product.children += right.children;
      of_rows.push_back(span({{f.left_ids, f.rows},
                              {f.right_ids, f.rows},
                              {f.left_start, left.rows + 1},
                              {f.right_start, right.rows + 1},
                              {f.right_order, f.rows}}));
    }
    broken(f.level > product.level && f.level <= framed);
    product.level = f.level;
    if (f.step >= 0) {
      const Step& st = p.step[f.step];
      broken(product.parent == f.step && product.children == st.children);
      product = {f.rows, st.cols, f.level, st.parent, 1};
    }
    made.push_back(product);
  }
  std::vector<int64_t> covered(p.steps, 0);  // children of a step that cuts stand for
  for (const CutRow& c : cuts) {
    const Operand whole = operand(c.operand, framed);
    broken(c.rows == whole.rows);
    of_cuts.push_back(form == kWalk
                          ? span({{c.ids, batch}})
                          : span({{c.start, c.rows + 1}, {c.order, batch}, {c.ids, batch}}));
    if (form == kFramedRoot) {
      broken(whole.parent == -1 && cut == 1);
    } else {
      broken(whole.parent >= 0 && c.parent == whole.parent);
      covered[c.parent] += whole.children;
    }
    if (form == kBilinear) broken(cut == 2 && c.parent == p.steps - 1 && p.outputs == 1);
  }
  for (int64_t k = 0; k < framed; ++k) broken(used[k] != 0);
  if (form != kFramedRoot)
    for (int64_t s = 0; s < p.steps; ++s) {
      if (covered[s] == 0) continue;
      broken(covered[s] == p.step[s].children);
      if (p.step[s].parent >= 0) ++covered[p.step[s].parent];
    }
  // Rows in their order and cuts in theirs, and nothing between or behind them.
  std::size_t r = 0, c = 0;
  int64_t at = 0;
  while (r + c < of_rows.size() + of_cuts.size()) {
    const bool is_row = r < of_rows.size() && of_rows[r].begin == at;
    broken(is_row || (c < of_cuts.size() && of_cuts[c].begin == at));
    at = is_row ? of_rows[r++].end : of_cuts[c++].end;
  }
  broken(at == length);
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
