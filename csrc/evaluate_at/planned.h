// evaluate_at_planned: entries of a tree's end tensor at a fixed set of indices, each node once per
// distinct sub-index where a plan says so.
//
//   weights  one [F, R_in, R_out] per group      float32, float64 or bfloat16
//   program  the tree, see cpu/program.h
//   table    int64, lists  int32                 the plan, see htfkernels/schedule/index_plan.py
//   result   [B, out_features], or [B] where that is 1
//
// The plan's table is checked at each call; the contents of its lists are not.
#pragma once

#include "cpu/frames.h"

namespace htf {

struct CutRow {
  int64_t operand, parent, ids, start, order, rows;
};
constexpr int64_t kCutFields = 6;
static_assert(sizeof(CutRow) == kCutFields * sizeof(int64_t));

struct IndexPlan {
  enum Form { kWalk, kBilinear, kFramedRoot };
  int64_t batch = 0, form = 0;
  std::vector<FrameRow> rows;
  std::vector<CutRow> cuts;
  const int32_t* lists = nullptr;

  IndexPlan(const char* op, const Program& program, const Tensor& table, const Tensor& lists);
  void check_batch(const char* op, int64_t expected) const {
    check(batch == expected, op, ": batch must be ", batch, ", got ", expected);
  }
};

std::vector<Tensor> evaluate_at_planned_cpu(const Program& program, const IndexPlan& plan,
                                            const std::vector<Tensor>& weights, bool keep);
std::vector<Tensor> evaluate_at_planned_backward_cpu(const Program& program, const IndexPlan& plan,
                                                     const Tensor& grad,
                                                     const std::vector<Tensor>& weights,
                                                     const Tensor& kept,
                                                     const std::vector<int64_t>& needs);

}  // namespace htf
