#include <map>

#include "cpu/weights.h"
#include "spectra/trace_tree.h"
#include "spectra/traces.h"

namespace htf {
namespace {

// A node's singular vectors, in the coordinates of its frame's and its environment's columns.
struct SingularVectors {
  const double *left, *right;  // [out x count]
  const double* weight;        // [count]
  const int64_t* exponents;    // of the frame's columns [out]
  int64_t count, scale;
};

// Derivatives lie where in the numbers of the forward pass lies what they are derivatives by:
// frames, environments and weights; those by Gram matrices are symmetric.
class TraceGradients : TraceTree {
 public:
  TraceGradients(const Program& program, const std::vector<Tensor>& weights,
                 const std::vector<char>& asked, bool stable)
      : TraceTree(program, weights, asked, stable) {}

  using TraceTree::exponents;
  using TraceTree::forward;
  using TraceTree::numbers;
  using TraceTree::use;

  // grad: of tree.nodes.
  std::vector<Tensor> of_ranks(const double* grad) {
    return run([&](const TracePlace& v, double* scratch) {
      by_trace(v, grad[p_.step[v.step].node], scratch);
    });
  }
  // vectors: of tree.nodes.
  std::vector<Tensor> of_vectors(const std::vector<SingularVectors>& vectors) {
    return run([&](const TracePlace& v, double* scratch) {
      by_vectors(v, vectors[p_.step[v.step].node], scratch);
    });
  }

 private:
  // begin(place): derivatives by the frame and the environment of a place that is asked for.
  template <class F>
  std::vector<Tensor> run(const F& begin) {
    const Buffer<double> memory(size_);
    g_ = memory.get();
    std::vector<int64_t> all(place_.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
    wave(all, scratch(), [&](int64_t i, double* scratch) {
      const TracePlace& v = place_[i];
      std::fill_n(g_ + v.weight, (v.step < 0 ? 1 : v.in) * v.ld, 0.0);
      if (v.needed) std::fill_n(g_ + v.frame, v.frame_rows * v.ld, 0.0);
      if (v.wanted) std::fill_n(g_ + v.environment, v.environment_rows * v.ld, 0.0);
      if (v.asked) begin(v, scratch);
    });
    for (auto places = by_depth_.rbegin(); places != by_depth_.rend(); ++places)
      wave(*places, scratch(), [&](int64_t i, double* scratch) {
        if (!place_[i].is_leaf()) through_above(place_[i], scratch);
      });
    for (auto places = by_height_.rbegin(); places != by_height_.rend(); ++places)
      wave(*places, scratch(), [&](int64_t i, double* scratch) {
        if (place_[i].needed) through_frame(place_[i], scratch);
      });
    return by_weights();
  }

  int64_t room() const { return widest_ * widest_; }

  // The rank is 1 / u, u = tr(P^2) / t^2, so that d rank = <Q, dP> with Q = 2 / (t u) - 2 P / (t
  // u)^2; or u = tr(X P) / t with the projection X, and Q = 1 / (t u) - X / (t u^2).
  void by_trace(const TracePlace& v, double grad, double* scratch) {
    const Trace trace(*this, v, scratch);
    if (!(trace.t > 0) || grad == 0) return;
    const int64_t p = trace.p, ldp = trace.ldp, ld = v.ld, n = v.out;
    const double one = (stable_ ? 1 : 2) * grad / (trace.t * trace.u), other = -one / trace.u;
    double* q = trace.product;
    const std::vector<double> by(p, other);
    orthogonal().scale(p, ldp, q, ldp, by.data(), nullptr);
    for (int64_t i = 0; i < p; ++i) q[i * ldp + i] += one;
    double *gx = g_ + v.frame, *gy = g_ + v.environment;
    if (trace.swapped) std::swap(gx, gy);
    if (trace.kind == Trace::Kind::both) {
      // P = M M^T, M = X Y^T.
      twice(p, ldp, q);
      k_.gemm(p, trace.ldq, p, q, ldp, 1, trace.middle, trace.ldq, trace.a, trace.ldq,
              Store::assign);
      k_.gemm(p, ld, trace.q, trace.a, trace.ldq, 1, trace.y, ld, gx, ld, Store::add);
      k_.gemm(trace.q, ld, p, trace.a, 1, trace.ldq, trace.x, ld, gy, ld, Store::add);
    } else if (trace.kind == Trace::Kind::one) {
      // P = X H X^T.
      k_.gemm(p, ld, p, q, ldp, 1, trace.x, ld, trace.a, ld, Store::assign);
      k_.gemm(n, ld, p, trace.x, 1, ld, trace.a, ld, gy, ld, Store::add);
      twice(p, ldp, q);
      k_.gemm(p, ld, p, q, ldp, 1, trace.middle, ld, gx, ld, Store::add);
    } else {
      // P = G H, and Q is a polynomial of it: H Q and Q G are symmetric.
      k_.gemm(n, ld, n, trace.y, ld, 1, q, ldp, gx, ld, Store::add);
      k_.gemm(n, ld, n, q, ldp, 1, trace.x, ld, gy, ld, Store::add);
    }
  }

  // Of the sum of w_i (l_i^T G l_i + r_i^T H r_i).
  void by_vectors(const TracePlace& v, const SingularVectors& s, double* scratch) {
    std::vector<int64_t> columns(v.out), rows(v.out);
    const int64_t shift = environment_exponent(v) - s.scale;
    for (int64_t j = 0; j < v.out; ++j) {
      columns[j] = exponent_[v.exponents + j] - s.exponents[j];
      rows[j] = shift - columns[j];
    }
    quadratic(v, s, s.left, columns, v.frame_explicit, v.frame_rows, v.frame, scratch);
    quadratic(v, s, s.right, rows, v.environment_explicit, v.environment_rows, v.environment,
              scratch);
  }

  // g += vectors diag(w) vectors^T for a Gram matrix, x 2 that for an explicit one; the vectors'
  // rows times 2^by first.
  void quadratic(const TracePlace& v, const SingularVectors& s, const double* vectors,
                 const std::vector<int64_t>& by, bool is_explicit, int64_t x_rows, int64_t at,
                 double* scratch) const {
    const int64_t n = v.out, ld = v.ld, ldk = padded<double>(s.count);
    double *l = scratch, *transposed = scratch + room(), *image = scratch + 2 * room();
    for (int64_t j = 0; j < n; ++j) {
      std::copy_n(vectors + j * s.count, s.count, l + j * ldk);
      std::fill_n(l + j * ldk + s.count, ldk - s.count, 0.0);
    }
    scale_by_powers(n, s.count, l, ldk, by.data(), nullptr);
    k_.transpose(n, s.count, l, ldk, transposed, ld);
    std::vector<double> w(s.weight, s.weight + s.count);
    if (!is_explicit) {
      orthogonal().scale(s.count, ld, transposed, ld, w.data(), nullptr);
      k_.gemm(n, ld, s.count, l, ldk, 1, transposed, ld, g_ + at, ld, Store::add);
      return;
    }
    for (double& each : w) each *= 2;
    orthogonal().scale(s.count, ld, transposed, ld, w.data(), nullptr);
    k_.gemm(x_rows, ldk, n, x_ + at, ld, 1, l, ldk, image, ldk, Store::assign);
    k_.gemm(x_rows, ld, s.count, image, ldk, 1, transposed, ld, g_ + at, ld, Store::add);
  }

  void twice(int64_t rows, int64_t ld, double* x) const {
    const std::vector<double> two(rows, 2.0);
    orthogonal().scale(rows, ld, x, ld, two.data(), nullptr);
  }

  // Adds a derivative by the Gram matrix of x[rows x n]: 2 x g.
  void through_gram(int64_t rows, int64_t n, int64_t ld, const double* x, double* g, double* gx,
                    Store store = Store::add) const {
    twice(n, ld, g);
    k_.gemm(rows, ld, n, x, ld, 1, g, ld, gx, ld, store);
  }
  void add(int64_t rows, int64_t ld, const double* x, double* to) const {
    for (int64_t i = 0; i < rows * ld; ++i) to[i] += x[i];
  }

  // Of out = KhatriRao(x, y), or out = x * y for Gram matrices, the derivatives by both.
  void through_khatri_rao(int64_t ld, const double* g, const double* x, int64_t rows_x, double* gx,
                          const double* y, int64_t rows_y, double* gy) const {
    for (int64_t i = 0; i < rows_x; ++i) {
      const double* block = g + i * rows_y * ld;
      k_.product(rows_y, ld, block, ld, y, ld, gx + i * ld, 0, Store::add);
      k_.product(rows_y, ld, block, ld, x + i * ld, 0, gy, ld, Store::add);
    }
  }
  // g * other, a derivative by v's frame as a Gram matrix.
  void into_frame(const TracePlace& v, const double* g, const double* other,
                  double* scratch) const {
    if (!v.frame_explicit) {
      k_.product(v.out, v.ld, g, v.ld, other, v.ld, g_ + v.frame, v.ld, Store::add);
      return;
    }
    k_.product(v.out, v.ld, g, v.ld, other, v.ld, scratch, v.ld, Store::assign);
    through_gram(v.frame_rows, v.out, v.ld, x_ + v.frame, scratch, g_ + v.frame);
  }

  // From the children's environments to A = E W^T and to their siblings, then to E and W.
  void through_above(const TracePlace& v, double* scratch) {
    double *ga = scratch, *spare = scratch + room(), *more = scratch + 2 * room();
    std::fill_n(ga, v.above_rows * v.ld_in, 0.0);
    for (const int64_t c : {v.left, v.right}) {
      if (c < 0 || !place_[c].wanted) continue;
      const TracePlace& child = place_[c];
      const double* g = g_ + child.environment;
      const int64_t s = other(c);
      if (s < 0) {
        add(v.above_rows, v.ld_in, g, ga);
        continue;
      }
      const TracePlace& sibling = place_[s];
      if (child.environment_explicit) {
        through_khatri_rao(v.ld_in, g, x_ + v.above, v.above_rows, ga, x_ + sibling.frame,
                           sibling.frame_rows, g_ + sibling.frame);
        continue;
      }
      into_frame(sibling, g, gram_of_above(v), spare);
      const double* other = gram_of_frame(sibling);
      if (v.above_explicit) {
        k_.product(v.in, v.ld_in, g, v.ld_in, other, v.ld_in, spare, v.ld_in, Store::assign);
        through_gram(v.above_rows, v.in, v.ld_in, x_ + v.above, spare, ga);
      } else {
        k_.product(v.in, v.ld_in, g, v.ld_in, other, v.ld_in, ga, v.ld_in, Store::add);
      }
    }
    const int64_t rows = v.environment_rows;
    if (v.above_raw >= 0) {
      through_gram(rows, v.in, v.ld_in, x_ + v.above_raw, ga, spare, Store::assign);
      std::swap(ga, spare);
    }
    const int64_t k = exponent_[v.exponents + v.out];
    const int64_t count = v.environment_explicit ? rows : v.in;
    const std::vector<int64_t> by(count, v.environment_explicit ? -k : -2 * k);
    scale_by_powers(count, v.in, ga, v.ld_in, by.data(), nullptr);
    const double *w = x_ + v.weight, *e = x_ + v.environment;
    double *ge = g_ + v.environment, *gw = g_ + v.weight;
    if (v.step < 0) {
      orthogonal().scale(count, v.ld, ga, v.ld, v.environment_explicit ? nullptr : w, w);
      add(count, v.ld, ga, ge);
    } else if (v.environment_explicit) {
      k_.gemm(rows, v.ld, v.in, ga, v.ld_in, 1, w, v.ld, ge, v.ld, Store::add);
      k_.gemm(v.in, v.ld, rows, ga, 1, v.ld_in, e, v.ld, gw, v.ld, Store::add);
    } else {
      k_.gemm(v.in, v.ld, v.in, ga, v.ld_in, 1, w, v.ld, more, v.ld, Store::assign);
      k_.gemm(v.out, v.ld, v.in, w, 1, v.ld, more, v.ld, ge, v.ld, Store::add);
      twice(v.in, v.ld, more);
      k_.gemm(v.in, v.ld, v.out, more, v.ld, 1, e, v.ld, gw, v.ld, Store::add);
    }
  }

  // From a frame to its weight and to the children's frames.
  void through_frame(const TracePlace& v, double* scratch) {
    double *gp = scratch, *spare = scratch + room(), *more = scratch + 2 * room();
    double *g = g_ + v.frame, *gw = g_ + v.weight;
    const double* w = x_ + v.weight;
    if (v.frame_raw >= 0) {
      through_gram(v.product_rows, v.out, v.ld, x_ + v.frame_raw, g, spare, Store::assign);
      g = spare;
    }
    if (v.is_leaf()) {
      add(v.in, v.ld, g, gw);
      return;
    }
    const int64_t rows = rows_of(v.product_explicit, v.product_rows, v.in);
    const double* product = product_of(v);
    if (v.step < 0) {
      std::copy_n(g, rows * v.ld, gp);
      orthogonal().scale(rows, v.ld, gp, v.ld, v.product_explicit ? nullptr : w, w);
    } else if (v.product_explicit) {
      k_.gemm(rows, v.ld_in, v.out, g, v.ld, 1, x_ + v.transposed, v.ld_in, gp, v.ld_in,
              Store::assign);
      k_.gemm(v.in, v.ld, rows, product, 1, v.ld_in, g, v.ld, gw, v.ld, Store::add);
    } else {
      k_.gemm(v.in, v.ld, v.out, w, v.ld, 1, g, v.ld, more, v.ld, Store::assign);
      k_.gemm(v.in, v.ld_in, v.out, more, v.ld, 1, x_ + v.transposed, v.ld_in, gp, v.ld_in,
              Store::assign);
      twice(v.in, v.ld, more);
      k_.gemm(v.in, v.ld, v.in, product, v.ld_in, 1, more, v.ld, gw, v.ld, Store::add);
    }
    const TracePlace& l = place_[v.left];
    if (v.right < 0) {
      add(rows, v.ld_in, gp, g_ + l.frame);
      return;
    }
    const TracePlace& r = place_[v.right];
    if (v.product_explicit) {
      through_khatri_rao(v.ld_in, gp, x_ + l.frame, l.frame_rows, g_ + l.frame, x_ + r.frame,
                         r.frame_rows, g_ + r.frame);
    } else {
      into_frame(l, gp, gram_of_frame(r), spare);
      into_frame(r, gp, gram_of_frame(l), spare);
    }
  }

  // Back to the scale of the weights, those of a shared one added up.
  std::vector<Tensor> by_weights() {
    std::vector<Tensor> grads;
    for (const Tensor& w : source_)
      grads.push_back(new_tensor(w, {w.size(0), w.size(1), w.size(2)}, w.scalar_type()));
    std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> users;
    for (std::size_t i = 0; i < place_.size(); ++i) {
      const int64_t step = place_[i].step;
      if (step >= 0 && p_.step[step].group >= 0)
        users[{p_.step[step].group, p_.step[step].slot}].push_back(static_cast<int64_t>(i));
    }
    std::vector<std::vector<int64_t>> shared;
    std::vector<int64_t> first;
    for (auto& entry : users) {
      first.push_back(entry.second[0]);
      shared.push_back(std::move(entry.second));
    }
    std::vector<int64_t> items(shared.size());
    for (std::size_t i = 0; i < items.size(); ++i) items[i] = static_cast<int64_t>(i);
    for_each_item<double>(static_cast<int64_t>(items.size()), size_, 1,
                          [&](int64_t i, double*) { by_weight(shared[i], grads); });
    return grads;
  }

  void by_weight(const std::vector<int64_t>& users, const std::vector<Tensor>& grads) {
    const TracePlace& first = place_[users[0]];
    const Step& st = p_.step[first.step];
    double* sum = g_ + first.weight;
    for (const int64_t i : users) {
      const TracePlace& v = place_[i];
      std::vector<int64_t> rows = row_exponents(v);
      std::vector<int64_t> columns(v.out);
      for (int64_t j = 0; j < v.out; ++j) columns[j] = -exponent_[v.exponents + j];
      scale_by_sums(v, rows, columns);
      if (i != users[0]) add(v.in, v.ld, g_ + v.weight, sum);
    }
    unpack_rows(st.rows, st.cols, sum, first.ld,
                results_of(grads[st.group]) + st.slot * st.rows * st.cols, st.cols);
  }

  // Row and column exponents may be far out of range each, and cancel.
  void scale_by_sums(const TracePlace& v, std::vector<int64_t>& rows,
                     std::vector<int64_t>& columns) {
    const int64_t middle = rows.empty() ? 0 : rows[rows.size() / 2];
    for (int64_t& k : rows) k -= middle;
    for (int64_t& k : columns) k += middle;
    scale_by_powers(v.in, v.out, g_ + v.weight, v.ld, rows.data(), columns.data());
  }

  double* g_ = nullptr;
};

std::vector<char> marked(const Program& program, const std::vector<int64_t>& wanted) {
  std::vector<char> asked(program.steps, 0);
  for (const int64_t node : wanted) asked[node] = 1;
  return asked;
}

}  // namespace

std::vector<Tensor> trace_ranks_cpu(const Program& program, const std::vector<Tensor>& weights,
                                    const std::vector<int64_t>& wanted, bool stable) {
  TraceTree tree(program, weights, marked(program, wanted), stable);
  const Tensor& like = weights[0];
  const int64_t count = static_cast<int64_t>(wanted.size());
  const Tensor ranks = new_tensor(like, {count}, ScalarType::Double);
  const Tensor numbers = new_tensor(like, {tree.numbers()}, ScalarType::Double);
  const Tensor exponents = new_tensor(like, {tree.exponents()}, ScalarType::Long);
  tree.use(static_cast<double*>(numbers.data_ptr()), static_cast<int64_t*>(exponents.data_ptr()));
  std::vector<double> by_node(program.steps);
  tree.forward(by_node.data());
  for (int64_t i = 0; i < count; ++i)
    static_cast<double*>(ranks.data_ptr())[i] = by_node[wanted[i]];
  return {ranks, numbers, exponents};
}

std::vector<Tensor> trace_ranks_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const std::vector<int64_t>& wanted,
                                             const Tensor& numbers, const Tensor& exponents,
                                             bool stable) {
  TraceGradients tree(program, weights, marked(program, wanted), stable);
  check(numbers.numel() == tree.numbers() && exponents.numel() == tree.exponents(),
        "trace_ranks_backward: numbers and exponents are of another call");
  tree.use(static_cast<double*>(numbers.data_ptr()), static_cast<int64_t*>(exponents.data_ptr()));
  const Tensor dense = in_one_piece(grad);
  std::vector<double> by_node(program.steps, 0.0);
  for (std::size_t i = 0; i < wanted.size(); ++i)
    by_node[wanted[i]] = static_cast<const double*>(dense.const_data_ptr())[i];
  return tree.of_ranks(by_node.data());
}

std::vector<Tensor> matricization_pullback_cpu(
    const Program& program, const std::vector<Tensor>& weights, const std::vector<int64_t>& wanted,
    const std::vector<Tensor>& left, const std::vector<Tensor>& right,
    const std::vector<Tensor>& weight, const std::vector<Tensor>& exponents,
    const std::vector<int64_t>& scales) {
  TraceGradients tree(program, weights, marked(program, wanted), false);
  const Buffer<double> numbers(tree.numbers());
  const Buffer<int64_t> powers(tree.exponents());
  tree.use(numbers.get(), powers.get());
  tree.forward(nullptr);
  std::vector<Tensor> dense;
  const auto data = [&](const Tensor& t) {
    dense.push_back(in_one_piece(t));
    return dense.back().const_data_ptr();
  };
  std::vector<SingularVectors> vectors(program.steps);
  for (std::size_t i = 0; i < wanted.size(); ++i)
    vectors[wanted[i]] = {static_cast<const double*>(data(left[i])),
                          static_cast<const double*>(data(right[i])),
                          static_cast<const double*>(data(weight[i])),
                          static_cast<const int64_t*>(data(exponents[i])),
                          weight[i].size(0),
                          scales[i]};
  return tree.of_vectors(vectors);
}

}  // namespace htf
