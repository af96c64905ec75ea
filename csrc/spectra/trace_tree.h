// Frames and environments of a tree, explicit or as Gram matrices: traces.h, forward.
#pragma once

#include "spectra/factors.h"
#include "spectra/places.h"

namespace htf {

// What belongs to a place, as offsets into the numbers; -1: nothing. Explicit matrices have the
// rows that are given, Gram matrices as many as columns.
struct TracePlace : Place {
  bool product_explicit = true, frame_explicit = true;
  bool environment_explicit = true, above_explicit = true;
  int64_t product_rows = 0, frame_rows = 0, environment_rows = 0, above_rows = 0;
  int64_t weight = -1,
          transposed = -1;  // [in x ld] and [out x ld_in]; without a step a diagonal [ld]
  int64_t product = -1;     // of two children
  int64_t frame = -1, environment = -1;
  int64_t above = -1;                        // A = E W^T
  int64_t frame_raw = -1, above_raw = -1;    // explicit, where they have too many rows to stay so
  int64_t frame_gram = -1, above_gram = -1;  // of explicit ones, where it is asked for
  int64_t exponents = 0;  // of the frame's columns, then by how much A is smaller, then of E
};

inline int64_t rows_of(bool is_explicit, int64_t rows, int64_t n) { return is_explicit ? rows : n; }

class TraceTree : protected Places<TracePlace> {
 public:
  TraceTree(const Program& program, const std::vector<Tensor>& weights,
            const std::vector<char>& asked, bool stable)
      : Places(program, asked), stable_(stable) {
    for (const Tensor& w : weights) source_.push_back(in_one_piece(w));
    set_needs();
    set_frames();
    set_environments();
  }

  int64_t numbers() const { return size_; }
  int64_t exponents() const { return exponent_size_; }
  void use(double* numbers, int64_t* exponents) { x_ = numbers, exponent_ = exponents; }

  // ranks: of tree.nodes, those asked for; null where they are not wanted.
  void forward(double* ranks) {
    for (const std::vector<int64_t>& places : by_height_)
      wave(places, scratch(), [&](int64_t v, double* memory) { up(place_[v], memory); });
    for (const std::vector<int64_t>& places : by_depth_)
      wave(places, scratch(), [&](int64_t v, double* memory) {
        down(v, memory);
        const TracePlace& p = place_[v];
        if (p.asked && ranks != nullptr)
          ranks[p_.step[p.step].node] = Trace(*this, p, memory).rank();
      });
  }

 protected:
  int64_t scratch() const { return 5 * widest_ * widest_; }

  // P = G H of a place, or a smaller matrix with its eigenvalues, and u: tr(P^2) / tr(P)^2, or the
  // largest eigenvalue over tr(P).
  struct Trace {
    enum class Kind { both, one, none } kind;  // how many of the sides are explicit
    const double *x, *y;                       // explicit before Gram, fewer rows before more
    bool swapped;                              // x is the environment
    int64_t p, q, ldp, ldq;
    // P / t or the projection [p x ldp], M [p x ldq] or X H [p x ld], spare ones.
    double *product, *middle, *a, *b;
    double t = 0, u = 0;

    Trace(const TraceTree& tree, const TracePlace& v, double* memory) {
      const Kernels<double>& k = tree.k_;
      const int64_t room = tree.widest_ * tree.widest_;
      product = memory, middle = memory + room, a = memory + 2 * room, b = memory + 3 * room;
      x = tree.x_ + v.frame, y = tree.x_ + v.environment;
      bool x_explicit = v.frame_explicit, y_explicit = v.environment_explicit;
      p = rows_of(x_explicit, v.frame_rows, v.out),
      q = rows_of(y_explicit, v.environment_rows, v.out);
      swapped = x_explicit == y_explicit ? x_explicit && q < p : y_explicit;
      if (swapped) std::swap(x, y), std::swap(p, q), std::swap(x_explicit, y_explicit);
      kind = y_explicit ? Kind::both : x_explicit ? Kind::one : Kind::none;
      ldp = padded<double>(p), ldq = padded<double>(q);
      const int64_t ld = v.ld, n = v.out;
      if (kind == Kind::both) {
        k.transpose(q, n, y, ld, a, ldq);
        k.gemm(p, ldq, n, x, ld, 1, a, ldq, middle, ldq, Store::assign);
        k.transpose(p, q, middle, ldq, a, ldp);
        k.gemm(p, ldp, q, middle, ldq, 1, a, ldp, product, ldp, Store::assign);
      } else if (kind == Kind::one) {
        k.gemm(p, ld, n, x, ld, 1, y, ld, middle, ld, Store::assign);
        k.transpose(p, n, x, ld, a, ldp);
        k.gemm(p, ldp, n, middle, ld, 1, a, ldp, product, ldp, Store::assign);
      } else {
        k.gemm(n, ld, n, x, ld, 1, y, ld, product, ld, Store::assign);
      }
      for (int64_t i = 0; i < p; ++i) t += product[i * ldp + i];
      if (!(t > 0)) return;
      const std::vector<double> by(p, 1 / t);
      orthogonal().scale(p, ldp, product, ldp, by.data(), nullptr);
      if (tree.stable_)
        project(k);
      else
        u = trace_with(k, product);
    }

    // tr(x P), x [p x p] of the same kind as P; writes a.
    double trace_with(const Kernels<double>& k, const double* x) {
      const double* transposed = product;
      if (kind == Kind::none) {
        k.transpose(p, p, product, ldp, a, ldp);
        transposed = a;
      }
      double sum = 0;
      for (int64_t i = 0; i < p; ++i) sum += k.dot(ldp, x + i * ldp, transposed + i * ldp);
      return sum;
    }

    // Squared again and again, with the trace kept at 1, P tends to the projection onto the
    // eigenspace of its largest eigenvalue over that space's dimension.
    void project(const Kernels<double>& k) {
      double *now = b, *next = a;
      std::copy_n(product, p * ldp, now);
      std::vector<double> by(p);
      for (int squarings = 0; squarings < 40; ++squarings) {
        k.gemm(p, ldp, p, now, ldp, 1, now, ldp, next, ldp, Store::assign);
        double trace = 0, change = 0;
        for (int64_t i = 0; i < p; ++i) trace += next[i * ldp + i];
        std::fill(by.begin(), by.end(), 1 / trace);
        orthogonal().scale(p, ldp, next, ldp, by.data(), nullptr);
        for (int64_t i = 0; i < p * ldp; ++i) change = std::max(change, std::abs(next[i] - now[i]));
        std::swap(now, next);
        if (change <= 4 * std::numeric_limits<double>::epsilon()) break;
      }
      if (now != b) std::copy_n(now, p * ldp, b);
      u = trace_with(k, b);
      std::copy_n(b, p * ldp, product);
    }

    // Not a number where t is not one.
    double rank() const { return t > 0 ? 1 / u : t; }
  };

  Factor side(int64_t at, bool is_explicit, int64_t rows, int64_t n) const {
    return {x_ + at, rows_of(is_explicit, rows, n), false, nullptr};
  }
  const double* gram_of_frame(const TracePlace& v) const {
    return x_ + (v.frame_explicit ? v.frame_gram : v.frame);
  }
  const double* gram_of_above(const TracePlace& v) const {
    return x_ + (v.above_explicit ? v.above_gram : v.above);
  }

  // out[n x ld] = x^T x.
  void gram(int64_t n, int64_t ld, const double* x, int64_t rows, double* out) const {
    k_.gemm(n, ld, rows, x, 1, ld, x, ld, out, ld, Store::assign);
  }

  void khatri_rao(int64_t ld, const double* x, int64_t rows_x, const double* y, int64_t rows_y,
                  double* out) const {
    for (int64_t i = 0; i < rows_x; ++i)
      k_.product(rows_y, ld, x + i * ld, 0, y, ld, out + i * rows_y * ld, ld, Store::assign);
  }

  // The product of a place's children, or its only child's frame.
  const double* product_of(const TracePlace& v) const {
    return x_ + (v.product >= 0 ? v.product : place_[v.left].frame);
  }

  // Of an environment: E is what is stored times 2^this, and 2^-(the frame's exponents) in its
  // columns.
  int64_t& environment_exponent(const TracePlace& v) const {
    return exponent_[v.exponents + v.out + 1];
  }

  std::vector<int64_t> row_exponents(const TracePlace& v) const {
    std::vector<int64_t> sum(v.in);
    for (const int64_t c : {v.left, v.right})
      if (c >= 0)
        for (int64_t j = 0; j < v.in; ++j) sum[j] += exponent_[place_[c].exponents + j];
    return sum;
  }

  const Kernels<double>& k_ = kernels<double>();
  const bool stable_;
  std::vector<Tensor> source_;
  double* x_ = nullptr;
  int64_t* exponent_ = nullptr;
  int64_t size_ = 0, exponent_size_ = 0, widest_ = 8;

 private:
  void set_frames() {
    for (TracePlace& v : place_) {
      if (v.is_leaf()) {
        v.product_rows = v.in;
      } else if (v.right < 0) {
        v.product_explicit = place_[v.left].frame_explicit;
        v.product_rows = place_[v.left].frame_rows;
      } else {
        TracePlace &l = place_[v.left], &r = place_[v.right];
        v.product_explicit =
            l.frame_explicit && r.frame_explicit && l.frame_rows * r.frame_rows <= v.in;
        v.product_rows = l.frame_rows * r.frame_rows;
        if (v.needed) {
          v.product = take(size_, rows_of(v.product_explicit, v.product_rows, v.in) * v.ld_in);
          if (!v.product_explicit) need_gram(l), need_gram(r);
        }
      }
      v.frame_explicit = v.product_explicit && v.product_rows <= v.out;
      v.frame_rows = rows_of(v.frame_explicit, v.product_rows, v.out);
      if (v.needed) {
        v.frame = take(size_, v.frame_rows * v.ld);
        if (v.product_explicit && !v.frame_explicit)
          v.frame_raw = take(size_, v.product_rows * v.ld);
      }
      v.weight = take(size_, (v.step < 0 ? 1 : v.in) * v.ld);
      if (v.step >= 0) v.transposed = take(size_, v.out * v.ld_in);
      v.exponents = take(exponent_size_, v.out + 2);
      widest_ = std::max({widest_, v.ld, v.ld_in});
    }
  }

  void set_environments() {
    for (int64_t i = count() - 1; i >= 0; --i) {
      TracePlace& v = place_[i];
      if (!v.wanted) continue;
      v.environment_rows = v.out;
      if (v.parent >= 0) {
        TracePlace& up = place_[v.parent];
        const int64_t s = other(i);
        v.environment_explicit = up.above_explicit;
        v.environment_rows = up.above_rows;
        if (s >= 0) {
          TracePlace& sibling = place_[s];
          v.environment_rows *= sibling.frame_rows;
          v.environment_explicit =
              up.above_explicit && sibling.frame_explicit && v.environment_rows <= v.out;
          if (!v.environment_explicit) {
            need_gram(sibling);
            if (up.above_explicit && up.above_gram < 0)
              up.above_gram = take(size_, up.in * up.ld_in);
          }
        }
        v.environment_rows = rows_of(v.environment_explicit, v.environment_rows, v.out);
      }
      v.environment = take(size_, v.environment_rows * v.ld);
      if (v.is_leaf()) continue;
      v.above_explicit = v.environment_explicit && v.environment_rows <= v.in;
      v.above_rows = rows_of(v.above_explicit, v.environment_rows, v.in);
      v.above = take(size_, v.above_rows * v.ld_in);
      if (v.environment_explicit && !v.above_explicit)
        v.above_raw = take(size_, v.environment_rows * v.ld_in);
    }
  }

  void need_gram(TracePlace& v) {
    if (v.frame_explicit && v.frame_gram < 0) v.frame_gram = take(size_, v.out * v.ld);
  }

  void up(TracePlace& v, double* memory) {
    int64_t* exponents = exponent_ + v.exponents;
    double* w = x_ + v.weight;
    const std::vector<int64_t> rows = row_exponents(v);
    if (v.step < 0) {
      std::copy(rows.begin(), rows.end(), exponents);
      std::fill_n(w, v.ld, 1.0);
    } else {
      scaled_weight(v.in, v.out, weight_of(p_, source_, v.step), rows.data(), w, v.ld, exponents);
    }
    if (v.needed) make_frame(v, w, exponents, memory);
    if (v.step >= 0) k_.transpose(v.in, v.out, w, v.ld, x_ + v.transposed, v.ld_in);
    if (v.needed && v.frame_gram >= 0)
      gram(v.out, v.ld, x_ + v.frame, v.frame_rows, x_ + v.frame_gram);
  }

  void make_frame(TracePlace& v, double* w, int64_t* exponents, double* memory) {
    if (v.right >= 0) {
      const TracePlace &l = place_[v.left], &r = place_[v.right];
      if (v.product_explicit)
        khatri_rao(v.ld_in, x_ + l.frame, l.frame_rows, x_ + r.frame, r.frame_rows, x_ + v.product);
      else
        k_.product(v.in, v.ld_in, gram_of_frame(l), v.ld_in, gram_of_frame(r), v.ld_in,
                   x_ + v.product, v.ld_in, Store::assign);
    }
    const int64_t weight_rows = v.step < 0 ? 1 : v.in;
    double* f = x_ + (v.frame_raw >= 0 ? v.frame_raw : v.frame);
    if (v.product_explicit) {
      if (v.is_leaf())
        std::copy_n(w, v.in * v.ld, f);
      else if (v.step < 0)
        std::copy_n(product_of(v), v.product_rows * v.ld, f);
      else
        k_.gemm(v.product_rows, v.ld, v.in, product_of(v), v.ld_in, 1, w, v.ld, f, v.ld,
                Store::assign);
      std::vector<double> largest(v.ld);
      orthogonal().column_maxima(v.product_rows, v.ld, f, v.ld, largest.data());
      const std::vector<int64_t> by = shrink(v, largest, exponents);
      scale_by_powers(v.product_rows, v.out, f, v.ld, nullptr, by.data());
      scale_by_powers(weight_rows, v.out, w, v.ld, nullptr, by.data());
      if (v.frame_raw >= 0) gram(v.out, v.ld, f, v.product_rows, x_ + v.frame);
      return;
    }
    if (v.step < 0) {
      std::copy_n(product_of(v), v.in * v.ld, f);
    } else {
      k_.gemm(v.in, v.ld, v.in, product_of(v), v.ld_in, 1, w, v.ld, memory, v.ld, Store::assign);
      k_.gemm(v.out, v.ld, v.in, w, 1, v.ld, memory, v.ld, f, v.ld, Store::assign);
    }
    std::vector<double> largest(v.ld);
    for (int64_t j = 0; j < v.out; ++j) largest[j] = std::sqrt(std::max(f[j * v.ld + j], 0.0));
    const std::vector<int64_t> by = shrink(v, largest, exponents);
    scale_by_powers(v.out, v.out, f, v.ld, by.data(), by.data());
    scale_by_powers(weight_rows, v.out, w, v.ld, nullptr, by.data());
  }

  // What brings each column's size to between a half and 1; the exponents change with it.
  static std::vector<int64_t> shrink(const TracePlace& v, const std::vector<double>& size,
                                     int64_t* exponents) {
    std::vector<int64_t> by(v.out);
    for (int64_t j = 0; j < v.out; ++j) {
      const int64_t k = exponent_of(size[j]);
      by[j] = k == kNothing ? 0 : -k;
      exponents[j] -= by[j];
    }
    return by;
  }

  void down(int64_t index, double* memory) {
    TracePlace& v = place_[index];
    double* e = x_ + v.environment;
    if (v.parent < 0) {
      const int64_t* k = exponent_ + v.exponents;
      const int64_t most = *std::max_element(k, k + v.out);
      environment_exponent(v) = most;
      std::fill_n(e, v.out * v.ld, 0.0);
      for (int64_t j = 0; j < v.out; ++j) e[j * v.ld + j] = PowerOfTwo(k[j] - most)(1.0);
    } else {
      const TracePlace& up = place_[v.parent];
      const int64_t s = other(index);
      environment_exponent(v) = environment_exponent(up) + exponent_[up.exponents + up.out];
      if (s < 0)
        std::copy_n(x_ + up.above, v.environment_rows * v.ld, e);
      else if (v.environment_explicit)
        khatri_rao(v.ld, x_ + up.above, up.above_rows, x_ + place_[s].frame, place_[s].frame_rows,
                   e);
      else
        k_.product(v.out, v.ld, gram_of_above(up), v.ld, gram_of_frame(place_[s]), v.ld, e, v.ld,
                   Store::assign);
    }
    if (!v.is_leaf()) make_above(v, e, memory);
  }

  void make_above(TracePlace& v, const double* e, double* memory) {
    double *w = x_ + v.weight, *a = x_ + (v.above_raw >= 0 ? v.above_raw : v.above);
    const int64_t rows = v.environment_rows;
    std::vector<double> size(std::max(rows, v.in));
    if (v.environment_explicit) {
      if (v.step < 0)
        k_.product(rows, v.ld, e, v.ld, w, 0, a, v.ld, Store::assign);
      else
        k_.gemm(rows, v.ld_in, v.out, e, v.ld, 1, x_ + v.transposed, v.ld_in, a, v.ld_in,
                Store::assign);
      orthogonal().row_maxima(rows, v.ld_in, a, v.ld_in, size.data());
    } else if (v.step < 0) {
      std::copy_n(e, v.out * v.ld, a);
      orthogonal().scale(v.out, v.ld, a, v.ld, w, w);
    } else {
      k_.gemm(v.in, v.ld, v.out, w, v.ld, 1, e, v.ld, memory, v.ld, Store::assign);
      k_.gemm(v.in, v.ld_in, v.out, memory, v.ld, 1, x_ + v.transposed, v.ld_in, a, v.ld_in,
              Store::assign);
    }
    if (!v.environment_explicit)
      for (int64_t j = 0; j < v.in; ++j) size[j] = std::sqrt(std::max(a[j * v.ld_in + j], 0.0));
    int64_t k = exponent_of(*std::max_element(size.begin(), size.end()));
    if (k == kNothing) k = 0;
    exponent_[v.exponents + v.out] = k;
    const int64_t count = v.environment_explicit ? rows : v.in;
    const std::vector<int64_t> by(count, v.environment_explicit ? -k : -2 * k);
    scale_by_powers(count, v.in, a, v.ld_in, by.data(), nullptr);
    if (v.above_raw >= 0) gram(v.in, v.ld_in, a, rows, x_ + v.above);
    if (v.above_gram >= 0) gram(v.in, v.ld_in, x_ + v.above, v.above_rows, x_ + v.above_gram);
  }
};

}  // namespace htf
