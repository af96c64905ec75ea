#include "cpu/weights.h"
#include "spectra/factors.h"
#include "spectra/places.h"
#include "spectra/spectra.h"

namespace htf {
namespace {

// Elements of buffers are offsets.
struct FactorPlace : Place {
  int64_t product_rows = 0, rows = 0;            // of the product, of the frame
  int64_t environment_rows = 0, above_rows = 0;  // of E, of A = E W^T
  int64_t frame = 0, weight = -1, environment = -1, above = -1, exponents = 0;
  int64_t frame_gram = -1, above_gram = -1;
  bool direct = false;  // the product goes through the weight before it shrinks
  bool environment_triangular = false, triangular = false, above_triangular = false;
  int64_t scale = 0, above_scale = 0;  // powers of two of E and A
  // Whose rows are index tuples of which this place's rows are a part, see spectra.h.
  bool reported = false;
  int64_t anchor = -1, after = 1;
};

int64_t at_most(int64_t rows, int64_t n) { return std::min(rows, n); }

class Spectra : Places<FactorPlace> {
 public:
  Spectra(const Program& program, const std::vector<Tensor>& weights,
          const std::vector<char>& wanted, bool gram, bool keep)
      : Places(program, wanted), gram_(gram) {
    for (const Tensor& w : weights) source_.push_back(in_one_piece(w));
    set_rows();
    set_anchors(keep);
    set_needs();
    set_frames();
    set_environments();
  }

  std::vector<Tensor> run(const Tensor& like) {
    const Tensor frames = new_tensor(like, {frame_size_}, ScalarType::Double);
    const Tensor environments = new_tensor(like, {environment_size_}, ScalarType::Double);
    frames_ = static_cast<double*>(frames.data_ptr());
    environments_ = static_cast<double*>(environments.data_ptr());
    inner_ = Buffer<double>(inner_size_);
    const Tensor exponents = new_tensor(like, {exponent_size_}, ScalarType::Long);
    exponent_ = static_cast<int64_t*>(exponents.data_ptr());
    const int64_t shop_size = Workshop::size(widest_);
    for (const std::vector<int64_t>& places : by_height_)
      wave(places, shop_size + scratch_, [&](int64_t v, double* memory) {
        Workshop shop(memory, widest_);
        up(v, shop, memory + shop_size);
      });
    for (const std::vector<int64_t>& places : by_depth_)
      wave(places, shop_size + scratch_, [&](int64_t v, double* memory) {
        Workshop shop(memory, widest_);
        down(v, shop, memory + shop_size);
      });

    const Tensor table = new_tensor(like, {p_.steps, kFactorFields}, ScalarType::Long);
    FactorRow* row = static_cast<FactorRow*>(table.data_ptr());
    for (const FactorPlace& v : place_) {
      if (v.step < 0) continue;
      const FactorPlace& from = v.anchor >= 0 ? place_[v.anchor] : v;
      const bool there = v.reported && from.asked;
      row[p_.step[v.step].node] = {from.frame,
                                   from.needed ? from.rows : 0,
                                   there ? from.environment : 0,
                                   there ? from.environment_rows : 0,
                                   from.out,
                                   from.ld,
                                   v.exponents,
                                   from.scale,
                                   v.rows,
                                   v.after};
    }
    return {frames, environments, table, exponents};
  }

 private:
  // Frames are triangular where they have as many rows as columns: that is what the structured
  // product of two of them lives by.
  bool triangulates(int64_t rows, int64_t n) const { return gram_ ? rows > n : rows >= n; }

  // Of few outputs, as the root has. Multiply-adds: all rows through the weight and into a triangle
  // of v.out columns, against into one of v.in columns.
  bool direct_is_cheaper(const FactorPlace& v, int64_t rows) const {
    const int64_t through = rows * v.out * (v.in + 2 * v.out);
    const int64_t shrunk = gram_ ? 3 * v.in * v.in * v.in : rows * v.in * v.in / 3;
    return through < shrunk;
  }

  int64_t rows_below(const FactorPlace& v) const {
    if (v.is_leaf()) return v.in;
    return place_[v.left].rows * (v.right < 0 ? 1 : place_[v.right].rows);
  }
  bool shrinks(const FactorPlace& v) const { return v.right >= 0 && rows_below(v) > v.in; }

  void set_rows() {
    for (FactorPlace& v : place_) {
      v.direct = shrinks(v) && v.step >= 0 && direct_is_cheaper(v, rows_below(v));
      v.product_rows = shrinks(v) ? v.in : rows_below(v);
      v.rows = at_most(v.product_rows, v.out);
      v.triangular =
          v.step < 0 ? shrinks(v) && !gram_ : v.direct || triangulates(v.product_rows, v.out);
    }
  }

  void set_anchors(bool keep) {
    for (FactorPlace& v : place_) v.reported = v.asked;
    for (int64_t i = count() - 1; i >= 0 && !keep; --i) {
      FactorPlace& v = place_[i];
      if (v.parent < 0) continue;
      const FactorPlace& up = place_[v.parent];
      if (up.triangular || shrinks(up)) continue;
      v.anchor = up.anchor >= 0 ? up.anchor : v.parent;
      v.after = up.after * (i == up.left && up.right >= 0 ? place_[up.right].rows : 1);
      if (!v.asked) continue;
      v.asked = false;
      place_[v.anchor].asked = true;
    }
  }

  void set_frames() {
    for (FactorPlace& v : place_) {
      if (shrinks(v) && !v.direct && v.needed) needs_gram(v.left), needs_gram(v.right);
      if (v.needed) v.frame = take(frame_size_, v.rows * v.ld);
      v.exponents = take(exponent_size_, v.out);
      if (!v.is_leaf()) v.weight = take(inner_size_, (v.step < 0 ? 1 : v.in) * v.ld);
      widest_ = std::max({widest_, v.ld, v.ld_in});
      scratch_ = std::max(scratch_, v.is_leaf() ? v.in * v.ld : v.product_rows * (v.ld_in + v.ld));
    }
  }

  bool hands_on(const FactorPlace& v) const {
    return (v.left >= 0 && place_[v.left].wanted) || (v.right >= 0 && place_[v.right].wanted);
  }

  void set_environments() {
    for (int64_t i = count() - 1; i >= 0; --i) {
      FactorPlace& v = place_[i];
      if (!v.wanted) continue;
      if (v.parent < 0) {
        v.environment_rows = v.out;
        v.environment_triangular = true;
      } else {
        FactorPlace& up = place_[v.parent];
        const int64_t sibling = other(i);
        const int64_t rows = up.above_rows * (sibling < 0 ? 1 : place_[sibling].rows);
        v.environment_rows = at_most(rows, v.out);
        v.environment_triangular = sibling < 0 ? up.above_triangular : rows > v.out && !gram_;
        if (sibling >= 0 && rows > v.out) {
          needs_gram(sibling);
          if (gram_ && up.above_gram < 0) up.above_gram = take(inner_size_, v.out * v.ld);
        }
      }
      v.environment = take(environment_size_, v.environment_rows * v.ld);
      if (!hands_on(v)) continue;
      v.above_rows = at_most(v.environment_rows, v.in);
      v.above_triangular =
          v.step < 0 ? v.environment_triangular : triangulates(v.environment_rows, v.in);
      v.above = take(inner_size_, v.above_rows * v.ld_in);
      scratch_ = std::max(scratch_, v.out * v.ld_in + v.environment_rows * v.ld_in);
    }
  }

  void needs_gram(int64_t v) {
    if (gram_ && place_[v].frame_gram < 0)
      place_[v].frame_gram = take(inner_size_, place_[v].out * place_[v].ld);
  }
  Numbers weight(const FactorPlace& v) const { return weight_of(p_, source_, v.step); }

  Factor frame(int64_t v) const {
    const FactorPlace& p = place_[v];
    return {frames_ + p.frame, p.rows, p.triangular,
            p.frame_gram < 0 ? nullptr : inner_.get() + p.frame_gram};
  }
  Factor above(int64_t v) const {
    const FactorPlace& p = place_[v];
    return {inner_.get() + p.above, p.above_rows, p.above_triangular,
            p.above_gram < 0 ? nullptr : inner_.get() + p.above_gram};
  }

  void up(int64_t index, Workshop& shop, double* scratch) {
    FactorPlace& v = place_[index];
    double* out = frames_ + v.frame;
    int64_t* exponents = exponent_ + v.exponents;
    if (v.is_leaf() && !v.needed) {
      std::vector<double> unused(v.in * v.ld);
      scaled_weight(v.in, v.out, weight(v), nullptr, unused.data(), v.ld, exponents);
    } else if (v.is_leaf()) {
      const bool direct = !v.triangular;
      double* x = direct ? out : scratch;
      scaled_weight(v.in, v.out, weight(v), nullptr, x, v.ld, exponents);
      normalise(v, x, v.in, 0, nullptr, exponents);
      if (!direct) shop.triangle(v.in, v.out, x, out);
    } else {
      join(v, shop, scratch, out, exponents);
    }
    if (v.frame_gram >= 0 && v.needed)
      shop.gram_of(v.out, out, v.rows, inner_.get() + v.frame_gram);
  }

  void join(FactorPlace& v, Workshop& shop, double* scratch, double* out, int64_t* exponents) {
    std::vector<int64_t> sum(v.in);
    for (int64_t j = 0; j < v.in; ++j)
      sum[j] = exponent_[place_[v.left].exponents + j] +
               (v.right >= 0 ? exponent_[place_[v.right].exponents + j] : 0);
    double* w = inner_.get() + v.weight;
    if (v.step < 0) {
      std::copy(sum.begin(), sum.end(), exponents);
      std::fill_n(w, v.ld, 1.0);
      if (!v.needed) return;
      shop.khatri_rao(v.in, frame(v.left), frame(v.right), gram_, out);
      normalise(v, out, v.rows, 1, w, exponents);
      return;
    }
    if (v.needed && !v.direct && !hands_on(v) &&
        plain_product(v, shop, scratch, sum, out, exponents))
      return;
    // Where no frame is needed, the weight alone says how large its columns may be.
    scaled_weight(v.in, v.out, weight(v), sum.data(), w, v.ld, exponents);
    if (!v.needed) return;
    if (v.direct) {
      shop.khatri_rao_through(v.in, frame(v.left), frame(v.right), w, v.out, out);
      normalise(v, out, v.rows, v.in, w, exponents);
      return;
    }
    const double* product = frames_ + place_[v.left].frame;
    if (v.right >= 0) {
      shop.khatri_rao(v.in, frame(v.left), frame(v.right), gram_, scratch);
      product = scratch;
    }
    double* x = v.triangular ? scratch + v.product_rows * v.ld_in : out;
    shop.kernel().gemm(v.product_rows, v.ld, v.in, product, v.ld_in, 1, w, v.ld, x, v.ld,
                       Store::assign);
    normalise(v, x, v.product_rows, v.in, w, exponents);
    if (v.triangular) shop.triangle(v.product_rows, v.out, x, out);
  }

  // The frame alone, of numbers in the middle of the range: then the product takes up the scale,
  // and the weight, which nobody else reads, is multiplied as it is. Returns false, with nothing
  // done, where a column may have lost digits.
  bool plain_product(FactorPlace& v, Workshop& shop, double* scratch,
                     const std::vector<int64_t>& sum, double* out, int64_t* exponents) {
    const int64_t most = *std::max_element(sum.begin(), sum.end());
    if (*std::min_element(sum.begin(), sum.end()) < most - 300) return false;
    double* product = scratch;
    if (v.right >= 0)
      shop.khatri_rao(v.in, frame(v.left), frame(v.right), gram_, product);
    else
      std::copy_n(frames_ + place_[v.left].frame, v.product_rows * v.ld_in, product);
    std::vector<int64_t> by(sum);
    for (int64_t& k : by) k -= most;
    scale_by_powers(v.product_rows, v.in, product, v.ld_in, nullptr, by.data());
    double* x = v.triangular ? scratch + v.product_rows * v.ld_in : out;
    // Some rows of the weight at a time, which stay in the cache as float64.
    const Numbers source = weight(v);
    double* block = shop.block();
    for (int64_t i = 0; i < v.in; i += Workshop::kBlock) {
      const int64_t rows = std::min(Workshop::kBlock, v.in - i);
      if (source)
        pack_rows(rows, v.out, source + i * v.out, v.out, block, v.ld);
      else
        for (int64_t r = 0; r < rows; ++r)
          std::fill_n(block + r * v.ld, v.ld, 0.0), block[r * v.ld] = 1;
      shop.kernel().gemm(v.product_rows, v.ld, rows, product + i, v.ld_in, 1, block, v.ld, x, v.ld,
                         i == 0 ? Store::assign : Store::add);
    }
    std::vector<double> largest(v.ld);
    orthogonal().column_maxima(v.product_rows, v.ld, x, v.ld, largest.data());
    for (int64_t j = 0; j < v.out; ++j)
      if (!(largest[j] > 4.9e-91 && largest[j] < 2e90)) return false;
    std::fill_n(exponents, v.out, most);
    normalise(v, x, v.product_rows, 0, nullptr, exponents);
    if (v.triangular) shop.triangle(v.product_rows, v.out, x, out);
    return true;
  }

  // Brings each column's largest entry to between a half and 1, the weight's columns with it.
  void normalise(const FactorPlace& v, double* x, int64_t rows, int64_t weight_rows, double* w,
                 int64_t* exponents) {
    std::vector<double> largest(v.ld);
    std::vector<int64_t> by(v.out);
    orthogonal().column_maxima(rows, v.ld, x, v.ld, largest.data());
    for (int64_t j = 0; j < v.out; ++j) {
      const int64_t k = exponent_of(largest[j]);
      by[j] = k == kNothing ? 0 : -k;
      exponents[j] -= by[j];
    }
    scale_by_powers(rows, v.out, x, v.ld, nullptr, by.data());
    if (w != nullptr) scale_by_powers(weight_rows, v.out, w, v.ld, nullptr, by.data());
  }

  // The environment of a place, and A = E W^T for its children.
  void down(int64_t index, Workshop& shop, double* scratch) {
    FactorPlace& v = place_[index];
    double* e = environments_ + v.environment;
    if (v.parent < 0) {
      outputs(v, e);
    } else {
      const Factor from = above(v.parent);
      const int64_t sibling = other(index);
      v.scale = place_[v.parent].above_scale;
      if (sibling < 0)
        std::copy_n(from.data, from.rows * v.ld, e);
      else
        shop.khatri_rao(v.out, from, frame(sibling), gram_, e);
    }
    if (!hands_on(v)) return;
    double* a = inner_.get() + v.above;
    v.above_scale = v.scale;
    if (v.step < 0) {
      shop.kernel().product(v.environment_rows, v.ld, e, v.ld, inner_.get() + v.weight, 0, a, v.ld,
                            Store::assign);
      v.above_scale += normalise_all(a, v.environment_rows, v.ld);
    } else {
      double* transposed = scratch;
      double* x = v.above_triangular ? scratch + v.out * v.ld_in : a;
      shop.kernel().transpose(v.in, v.out, inner_.get() + v.weight, v.ld, transposed, v.ld_in);
      shop.kernel().gemm(v.environment_rows, v.ld_in, v.out, e, v.ld, 1, transposed, v.ld_in, x,
                         v.ld_in, Store::assign);
      v.above_scale += normalise_all(x, v.environment_rows, v.ld_in);
      if (v.above_triangular) shop.triangle(v.environment_rows, v.in, x, a);
    }
    if (v.above_gram >= 0) shop.gram_of(v.in, a, v.above_rows, inner_.get() + v.above_gram);
  }

  // The outputs are one more mode: their environment is the identity, in the frames' scale.
  void outputs(FactorPlace& v, double* e) {
    const int64_t* k = exponent_ + v.exponents;
    v.scale = *std::max_element(k, k + v.out);
    std::fill_n(e, v.out * v.ld, 0.0);
    for (int64_t j = 0; j < v.out; ++j) e[j * v.ld + j] = PowerOfTwo(k[j] - v.scale)(1.0);
  }

  static int64_t normalise_all(double* x, int64_t rows, int64_t ld) {
    std::vector<double> largest(rows);
    orthogonal().row_maxima(rows, ld, x, ld, largest.data());
    const int64_t k = exponent_of(*std::max_element(largest.begin(), largest.end()));
    if (k == kNothing) return 0;
    const std::vector<int64_t> by(rows, -k);
    scale_by_powers(rows, ld, x, ld, by.data(), nullptr);
    return k;
  }

  const bool gram_;
  std::vector<Tensor> source_;
  int64_t frame_size_ = 0, environment_size_ = 0, inner_size_ = 0, exponent_size_ = 0;
  int64_t widest_ = 0, scratch_ = 0;
  double *frames_ = nullptr, *environments_ = nullptr;
  int64_t* exponent_ = nullptr;
  Buffer<double> inner_;
};

}  // namespace

std::vector<Tensor> spectral_factors_cpu(const Program& program, const std::vector<Tensor>& weights,
                                         const std::vector<char>& wanted, bool gram, bool keep) {
  return Spectra(program, weights, wanted, gram, keep).run(weights[0]);
}

}  // namespace htf
