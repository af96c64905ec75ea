// The tree as the operations read it: htfkernels/tree/program.py writes it as one int64 tensor, a
// header and then a row for each node, children before parents, in the order that needs the fewest
// buffers.
#pragma once

#include <vector>

#include "cpu/support.h"

namespace htf {

struct Step {
  int64_t group, slot;   // its weight; group -1: the root of a "sum"
  int64_t rows, cols;    // shape of the weight
  int64_t mode, offset;  // leaf: its mode and first column in the packed vectors; else -1
  int64_t parent;        // step of the parent, -1 for the root
  int64_t first;         // whether it is the first child to send its message
  int64_t buffer;        // interior: which buffer holds its product
  int64_t children;      // number of children
  int64_t node;          // index in tree.nodes
};
constexpr int64_t kHeader = 8;
constexpr int64_t kFields = 11;
static_assert(sizeof(Step) == kFields * sizeof(int64_t));

struct Program {
  int64_t steps, groups, buffers, outputs, x_width, order;
  bool sum_root;
  const Step* step;  // points into the tensor

  // Reads and checks a program against the weights: the one place where the operations' arguments
  // are looked at. Everything behind it trusts every field.
  Program(const char* op, const Tensor& program, const std::vector<Tensor>& weights) {
    check(program.is_cpu() && program.scalar_type() == ScalarType::Long && program.dim() == 1 &&
              program.is_contiguous() && program.numel() >= kHeader + kFields,
          op, ": program must be a contiguous int64 CPU tensor made by a layout");
    const int64_t* p = program.const_data_ptr<int64_t>();
    const int64_t rows = program.numel() - kHeader;
    check(p[0] == 1 && rows % kFields == 0 && p[1] == rows / kFields, op,
          ": program is not of this version of htfkernels");
    steps = p[1], groups = p[2], buffers = p[3], outputs = p[4], x_width = p[5], order = p[6];
    sum_root = p[7] != 0;
    step = reinterpret_cast<const Step*>(p + kHeader);
    check(static_cast<int64_t>(weights.size()) == groups, op, ": expected ", groups,
          " folded weights, got ", weights.size());
    check(groups >= 1 && buffers >= 1 && buffers <= steps && outputs >= 1 && x_width >= 1 &&
              order >= 1 && order < steps && (p[7] == 0 || p[7] == 1),
          op, kBroken);
    const ScalarType dtype = weights[0].scalar_type();
    check(
        dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
        op, ": weights must be float32, float64 or bfloat16, got ", toString(dtype));
    std::vector<Shape> shapes;
    for (int64_t g = 0; g < groups; ++g) {
      const Tensor& w = weights[g];
      check(w.is_cpu() && w.scalar_type() == dtype && w.dim() == 3, op, ": weights[", g,
            "] must be a 3-dimensional CPU tensor of the dtype of weights[0]");
      shapes.push_back({w.size(0), w.size(1), w.size(2)});
    }
    std::vector<Seen> seen(steps);
    for (int64_t s = 0; s < steps; ++s) check_step(op, weights, shapes, s, seen);
    check_modes(op, seen);
  }

  void check_outputs(const char* op, int64_t out_features) const {
    check(outputs == out_features, op, ": out_features must be ", outputs, ", got ", out_features);
  }
  void check_grad(const char* op, const Tensor& grad, int64_t rows, ScalarType dtype) const {
    const bool fits = outputs == 1
                          ? grad.dim() == 1 && grad.size(0) == rows
                          : grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == outputs;
    check(grad.is_cpu() && grad.scalar_type() == dtype && fits, op, ": grad must be a CPU tensor [",
          rows, outputs == 1 ? "" : ", F", "], F = ", outputs, ", of dtype ", toString(dtype),
          ", got ", describe(grad));
  }

  void check_needs(const char* op, const std::vector<int64_t>& needs, std::size_t expected) const {
    check(needs.size() == expected, op, ": needs must have ", expected, " entries, got ",
          needs.size());
  }

  bool is_leaf(int64_t s) const { return step[s].mode >= 0; }

  // Uninitialised, [rows], or [rows, outputs] where there are several.
  Tensor new_result(const Tensor& like, int64_t rows, ScalarType dtype) const {
    return outputs == 1 ? new_tensor(like, {rows}, dtype)
                        : new_tensor(like, {rows, outputs}, dtype);
  }

 private:
  static constexpr const char* kBroken = ": program is broken; use one made by a layout";

  struct Shape {
    int64_t count, rows, cols;
  };
  struct Seen {
    int64_t children = 0, below = 0, first = 0;  // of a step: steps below it, and the first of them
    int64_t leaf = -1;                           // of a mode: its step
    bool node = false;                           // of a node: whether a step has it
  };

  void check_step(const char* op, const std::vector<Tensor>& weights,
                  const std::vector<Shape>& shapes, int64_t s, std::vector<Seen>& seen) const {
    const Step& st = step[s];
    const Seen below = seen[s];
    const bool leaf = is_leaf(s);
    check(st.rows >= 1 && st.cols >= 1 && st.mode >= -1 && st.mode < order && st.node >= 0 &&
              st.node < steps && !seen[st.node].node && st.children == below.children,
          op, kBroken);
    seen[st.node].node = true;
    if (leaf) {
      check(st.children == 0 && st.buffer == -1 && st.group >= 0 && seen[st.mode].leaf < 0, op,
            kBroken);
      seen[st.mode].leaf = s;
    } else {
      // The steps below are those just before it, and no others.
      check(st.children >= 1 && s - below.first == below.below && st.offset == -1 &&
                st.buffer >= 0 && st.buffer < buffers,
            op, kBroken);
    }
    if (s == steps - 1) {
      check(!leaf && st.parent == -1 && st.first == 0 && st.cols == outputs, op, kBroken);
    } else {
      check(st.parent > s && st.parent < steps && !is_leaf(st.parent) &&
                step[st.parent].rows == st.cols,
            op, kBroken);
      Seen& up = seen[st.parent];
      check(st.first == (up.children == 0), op, kBroken);
      if (up.children++ == 0) up.first = leaf ? s : below.first;
      up.below += below.below + 1;
    }
    if (s == steps - 1 && sum_root) {
      check(st.group == -1 && outputs == 1, op, kBroken);
      return;
    }
    check(st.group >= 0 && st.group < groups && st.slot >= 0, op, kBroken);
    const Shape& w = shapes[st.group];
    check(st.slot < w.count && w.rows == st.rows && w.cols == st.cols, op, ": weights[", st.group,
          "] must be [F, ", st.rows, ", ", st.cols, "] with F > ", st.slot, ", got ",
          describe(weights[st.group]));
  }

  // Each mode has a leaf, and the packed vectors its columns, one mode after the other.
  void check_modes(const char* op, const std::vector<Seen>& seen) const {
    int64_t at = 0;
    for (int64_t mode = 0; mode < order; ++mode) {
      const int64_t leaf = seen[mode].leaf;
      check(leaf >= 0 && step[leaf].offset == at && step[leaf].rows <= x_width - at, op, kBroken);
      at += step[leaf].rows;
    }
    check(at == x_width, op, kBroken);
  }
};

// What a walk goes through: the steps of a program, or of its upper part where the lower one has
// been evaluated beforehand; children before parents, a node's subtree in one piece before it.
struct Tree {
  std::vector<Step> step;
  int64_t steps = 0, buffers = 0, outputs = 1;
  std::vector<int64_t> first;  // of a step's subtree
  std::vector<int64_t> child;  // of all steps, ascending; those of s: begin(s) .. end(s)-1
  std::vector<int64_t> begin_;

  explicit Tree(const Program& p) : Tree(std::vector<Step>(p.step, p.step + p.steps), p.outputs) {}

  Tree(std::vector<Step> in, int64_t outs)
      : step(std::move(in)), steps(static_cast<int64_t>(step.size())), outputs(outs) {
    first.assign(steps, 0);
    begin_.assign(steps + 1, 0);
    for (int64_t s = 0; s < steps; ++s) {
      first[s] = s;
      if (step[s].parent >= 0) ++begin_[step[s].parent + 1];
    }
    for (int64_t s = 0; s < steps; ++s) begin_[s + 1] += begin_[s];
    child.resize(begin_[steps]);
    std::vector<int64_t> at(begin_.begin(), begin_.end() - 1);
    for (int64_t s = 0; s + 1 < steps; ++s) {
      const int64_t up = step[s].parent;
      child[at[up]++] = s;
      first[up] = std::min(first[up], first[s]);
    }
    set_buffers();
  }

  bool is_leaf(int64_t s) const { return step[s].mode >= 0; }
  int64_t count(int64_t s) const { return begin_[s + 1] - begin_[s]; }
  const int64_t* begin(int64_t s) const { return child.data() + begin_[s]; }
  const int64_t* end(int64_t s) const { return child.data() + begin_[s + 1]; }

 private:
  // A product's buffer is taken by the first child to send and given back by the node.
  void set_buffers() {
    std::vector<int64_t> unused;
    for (int64_t s = 0; s < steps; ++s) {
      Step& st = step[s];
      if (st.parent >= 0) {
        st.first = s == *begin(st.parent);
        if (st.first) {
          if (unused.empty()) unused.push_back(buffers++);
          step[st.parent].buffer = unused.back();
          unused.pop_back();
        }
      }
      if (!is_leaf(s)) unused.push_back(st.buffer);
    }
  }
};

}  // namespace htf
