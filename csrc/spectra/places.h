// A tree as the spectra go through it: two operands at most at a time, wave by wave.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/numbers.h"
#include "cpu/program.h"

namespace htf {

// A node, or the product of two children of one that has many.
struct Place {
  int64_t step = -1;  // -1: such a product; its weight is a diagonal of powers of two
  int64_t left = -1, right = -1, parent = -1;
  int64_t in = 0, out = 0, ld_in = 0, ld = 0;  // columns of the product and of the frame
  int64_t height = 0, depth = 0;
  bool asked = false, wanted = false;  // the environment is: here, or here or below
  bool needed = false;                 // the frame is

  bool is_leaf() const { return left < 0; }
};

// P: a Place with more in it.
template <class P>
class Places {
 public:
  // asked: of the nodes (indices of tree.nodes).
  Places(const Program& program, const std::vector<char>& asked) : p_(program) {
    std::vector<std::vector<int64_t>> children(p_.steps);
    for (int64_t s = 0; s < p_.steps; ++s) {
      const Step& st = p_.step[s];
      std::vector<int64_t>& ops = children[s];
      // Many children: neighbours first, so that a node of C children is log2(C) deep.
      while (ops.size() > 2) {
        std::vector<int64_t> halved;
        for (std::size_t i = 0; i + 1 < ops.size(); i += 2)
          halved.push_back(add(-1, st.rows, st.rows, ops[i], ops[i + 1]));
        if (ops.size() % 2 == 1) halved.push_back(ops.back());
        ops = halved;
      }
      const int64_t v =
          add(s, st.rows, st.cols, !ops.empty() ? ops[0] : -1, ops.size() > 1 ? ops[1] : -1);
      place_[v].asked = asked[st.node] != 0;
      if (st.parent >= 0) children[st.parent].push_back(v);
    }
  }

 protected:
  int64_t count() const { return static_cast<int64_t>(place_.size()); }
  int64_t other(int64_t child) const {
    const P& up = place_[place_[child].parent];
    return up.left == child ? up.right : up.left;
  }

  // Environments of what is asked for and of all above it; frames of what is asked for, of the
  // siblings of wanted environments, and of all below them.
  void set_needs() {
    for (P& v : place_) {
      v.wanted = v.wanted || v.asked;
      if (v.wanted && v.parent >= 0) place_[v.parent].wanted = true;
    }
    for (int64_t i = count() - 1; i >= 0; --i) {
      P& v = place_[i];
      v.needed = v.asked;
      if (v.parent < 0) continue;
      const int64_t sibling = other(i);
      v.depth = place_[v.parent].depth + 1;
      v.needed |= place_[v.parent].needed || (sibling >= 0 && place_[sibling].wanted);
    }
    for (int64_t i = 0; i < count(); ++i) {
      put(by_height_, place_[i].height, i);
      if (place_[i].wanted) put(by_depth_, place_[i].depth, i);
    }
  }

  static int64_t take(int64_t& size, int64_t more) {
    const int64_t at = size;
    size += more;
    return at;
  }

  // Runs f(place, scratch) for the places of a wave, which do not depend on each other.
  template <class F>
  void wave(const std::vector<int64_t>& places, int64_t scratch, const F& f) const {
    int64_t work = 0;
    for (const int64_t i : places) {
      const P& v = place_[i];
      work += v.in * v.out * (std::max(v.in, v.out) + 64);
    }
    for_each_item<double>(static_cast<int64_t>(places.size()), work, scratch,
                          [&](int64_t i, double* memory) { f(places[i], memory); });
  }

  const Program& p_;
  std::vector<P> place_;  // children before parents
  std::vector<std::vector<int64_t>> by_height_, by_depth_;

 private:
  int64_t add(int64_t step, int64_t in, int64_t out, int64_t left, int64_t right) {
    P v;
    v.step = step, v.in = in, v.out = out, v.left = left, v.right = right;
    v.ld_in = padded<double>(in), v.ld = padded<double>(out);
    const int64_t index = count();
    for (const int64_t c : {left, right})
      if (c >= 0) {
        place_[c].parent = index;
        v.height = std::max(v.height, place_[c].height + 1);
      }
    place_.push_back(v);
    return index;
  }

  static void put(std::vector<std::vector<int64_t>>& waves, int64_t at, int64_t v) {
    if (static_cast<int64_t>(waves.size()) <= at) waves.resize(at + 1);
    waves[at].push_back(v);
  }
};

// A weight's matrix, null for the root of a "sum", which is a column of ones.
inline Numbers weight_of(const Program& p, const std::vector<Tensor>& weights, int64_t step) {
  const Step& st = p.step[step];
  if (st.group < 0) return {};
  return numbers_of(weights[st.group]) + st.slot * st.rows * st.cols;
}

}  // namespace htf
