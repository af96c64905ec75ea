#include "full_tensor/full_tensor.h"

#include "cpu/weights.h"

namespace htf {
namespace {

constexpr int64_t kTile = 64;      // rows of a frame in one work item
constexpr int64_t kColumns = 512;  // columns of the end tensor in one GEMM
constexpr int64_t kDepth = 256;    // rows summed over in one GEMM

int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

// A matrix with padded rows: memory of its own, or a view.
template <class T>
struct Matrix {
  int64_t rows = 0, ld = 0;
  const T* data = nullptr;
  Buffer<T> own;

  Matrix() = default;
  Matrix(int64_t rows, int64_t ld) : rows(rows), ld(ld), own(rows * ld) { data = own.get(); }
  Matrix(int64_t rows, int64_t ld, const T* view) : rows(rows), ld(ld), data(view) {}
  const T* row(int64_t i) const { return data + i * ld; }
  T* write(int64_t i) { return own.get() + i * ld; }  // not of a view
};

template <class S>
class FullTensor {
 public:
  using T = typename ComputeOf<S>::type;
  using Group = std::vector<const Matrix<T>*>;

  FullTensor(const Program& program, const std::vector<Tensor>& weights)
      : p_(program),
        k_(kernels<T>()),
        w_(weights),
        children_(program.steps),
        frames_(program.steps) {
    std::vector<int64_t> smallest(p_.steps, p_.order);
    for (int64_t s = 0; s < p_.steps; ++s) {
      const Step& st = p_.step[s];
      if (p_.is_leaf(s)) smallest[s] = st.mode;
      auto& mine = children_[s];
      std::sort(mine.begin(), mine.end(),
                [&](int64_t a, int64_t b) { return smallest[a] < smallest[b]; });
      if (!mine.empty()) smallest[s] = smallest[mine[0]];
      if (st.parent >= 0) children_[st.parent].push_back(s);
    }
    for (int64_t s = 0; s + 1 < p_.steps; ++s) make_frame(s);
    split_root();
  }

  void forward(S* out) const {
    const int64_t root = p_.steps - 1, rank = p_.step[root].rows, outs = p_.outputs;
    const int64_t nl = left_.rows, nr = right_.rows;
    const Matrix<T> right_t = transposed(right_, rank);
    const int64_t block = std::min(kColumns, right_t.ld);
    for_each_item<T>(tiles_of(nl), nl * nr * rank * outs, kTile * (block + left_.ld),
                     [&](int64_t item, T* scratch) {
                       const int64_t i = item * kTile, n = std::min(kTile, nl - i);
                       T* scaled = scratch + kTile * block;
                       for (int64_t o = 0; o < outs; ++o) {
                         const T* a = weighted(i, n, o, scaled);
                         for (int64_t j = 0; j < nr; j += kColumns) {
                           const int64_t cols = std::min(kColumns, nr - j);
                           T* c = scratch;
                           int64_t ldc = block;
                           if constexpr (std::is_same_v<S, T>) {
                             if (outs == 1 && nr == right_t.ld) c = out + i * nr + j, ldc = nr;
                           }
                           k_.gemm(n, padded<T>(cols), rank, a, left_.ld, 1, right_t.row(0) + j,
                                   right_t.ld, c, ldc, Store::assign);
                           if (c != scratch) continue;
                           for (int64_t r = 0; r < n; ++r)
                             for (int64_t q = 0; q < cols; ++q)
                               out[((i + r) * nr + j + q) * outs + o] =
                                   static_cast<S>(c[r * ldc + q]);
                         }
                       }
                     });
  }

  void backward(const T* grad, WeightGradients<S>& dw) {
    const int64_t root = p_.steps - 1;
    wanted_.assign(p_.steps, false);
    for (int64_t s = 0; s < p_.steps; ++s) {
      if (dw.step(s) != nullptr) {
        wanted_[s] = true;
        std::fill_n(dw.step(s), p_.step[s].rows * padded<T>(p_.step[s].cols), T(0));
      }
      if (wanted_[s] && p_.step[s].parent >= 0) wanted_[p_.step[s].parent] = true;
    }
    gradients_.resize(p_.steps);
    root_backward(grad, dw);
    for (int64_t s = root - 1; s >= 0; --s)
      if (wanted_[s]) node_backward(s, dw);
  }

 private:
  const T* weight(int64_t s) const { return w_[p_.step[s].group].at(p_.step[s].slot); }

  Group frames_of(const std::vector<int64_t>& children) const {
    Group group;
    for (int64_t c : children) group.push_back(&frames_[c]);
    return group;
  }
  static int64_t rows_of(const Group& group) {
    int64_t rows = 1;
    for (const auto* f : group) rows *= f->rows;
    return rows;
  }

  // Rows i .. i+n-1, columns from .. from+cols-1, of the Khatri-Rao product of frames: a view where
  // there is one frame, else computed into scratch.
  const T* khatri_rao(const Group& group, int64_t i, int64_t n, int64_t from, int64_t cols,
                      T* scratch, int64_t& ld) const {
    ld = group[0]->ld;
    if (group.size() == 1) return group[0]->row(i) + from;
    ld = cols;
    for (int64_t r = 0; r < n; ++r) {
      int64_t rest = i + r;
      T* to = scratch + r * cols;
      const T* x = nullptr;
      for (std::size_t c = group.size(); c-- > 0;) {
        const T* y = group[c]->row(rest % group[c]->rows) + from;
        rest /= group[c]->rows;
        if (x != nullptr) k_.product(1, cols, x, cols, y, cols, to, cols, Store::assign);
        x = x == nullptr ? y : to;
      }
    }
    return scratch;
  }

  Matrix<T> khatri_rao(const Group& group, int64_t ld) const {
    if (group.empty()) {
      Matrix<T> ones(1, ld);
      std::fill_n(ones.write(0), ld, T(1));
      return ones;
    }
    if (group.size() == 1) return Matrix<T>(group[0]->rows, ld, group[0]->data);
    Matrix<T> all(rows_of(group), ld);
    for_each_item<T>(tiles_of(all.rows), kMoved * all.rows * ld, 0, [&](int64_t item, T*) {
      const int64_t i = item * kTile;
      int64_t unused;
      khatri_rao(group, i, std::min(kTile, all.rows - i), 0, ld, all.write(i), unused);
    });
    return all;
  }

  void make_frame(int64_t s) {
    const Step& st = p_.step[s];
    const int64_t ld = padded<T>(st.cols), ld_in = padded<T>(st.rows);
    if (p_.is_leaf(s)) {
      frames_[s] = Matrix<T>(st.rows, ld, weight(s));
      return;
    }
    const Group group = frames_of(children_[s]);
    Matrix<T> frame(rows_of(group), ld);
    for_each_item<T>(tiles_of(frame.rows), frame.rows * st.rows * ld, kTile * ld_in,
                     [&](int64_t item, T* scratch) {
                       const int64_t i = item * kTile, n = std::min(kTile, frame.rows - i);
                       int64_t lda;
                       const T* a = khatri_rao(group, i, n, 0, ld_in, scratch, lda);
                       k_.gemm(n, ld, st.rows, a, lda, 1, weight(s), ld, frame.write(i), ld,
                               Store::assign);
                     });
    frames_[s] = std::move(frame);
  }

  // The root's children in two runs with as equal products of rows as there are.
  void split_root() {
    const auto& all = children_.back();
    const int64_t total = rows_of(frames_of(all));
    std::size_t best = 1;
    int64_t least = 0, rows = 1;
    for (std::size_t c = 0; c < all.size(); ++c) {
      rows *= frames_[all[c]].rows;
      const int64_t larger = std::max(rows, total / rows);
      if (c == 0 || (c + 1 < all.size() && larger < least)) least = larger, best = c + 1;
    }
    const auto middle = all.begin() + static_cast<std::ptrdiff_t>(best);
    left_children_.assign(all.begin(), middle);
    right_children_.assign(middle, all.end());
    const int64_t ld = padded<T>(p_.step[p_.steps - 1].rows);
    left_ = khatri_rao(frames_of(left_children_), ld);
    right_ = khatri_rao(frames_of(right_children_), ld);
    make_root_rows();
  }

  Matrix<T> transposed(const Matrix<T>& x, int64_t cols) const {
    Matrix<T> out(cols, padded<T>(x.rows));
    const int64_t blocks = tiles_of(cols);
    for_each_item<T>(blocks, kMoved * cols * x.rows, 0, [&](int64_t item, T*) {
      const int64_t j = item * kTile;
      k_.transpose(x.rows, std::min(kTile, cols - j), x.data + j, x.ld, out.write(j), out.ld);
    });
    return out;
  }

  // The root's weight, transposed: [outputs, padded rows]; ones where it has none.
  const T* output_row(int64_t o) const { return root_rows_.row(o); }
  void make_root_rows() {
    const Step& st = p_.step[p_.steps - 1];
    root_rows_ = Matrix<T>(p_.outputs, padded<T>(st.rows));
    if (st.group < 0)
      std::fill_n(root_rows_.write(0), root_rows_.ld, T(1));
    else
      k_.transpose(st.rows, st.cols, weight(p_.steps - 1), padded<T>(st.cols), root_rows_.write(0),
                   root_rows_.ld);
  }

  // Rows of L scaled by column o of the root's weight.
  const T* weighted(int64_t i, int64_t n, int64_t o, T* scratch) const {
    k_.product(n, left_.ld, left_.row(i), left_.ld, output_row(o), 0, scratch, left_.ld,
               Store::assign);
    return scratch;
  }

  // C[rows x ld] += G^T A, summed over A's rows, G(l, i) = g[l * down + i * across].
  void gemm_over(int64_t rows, int64_t ld, int64_t depth, const T* g, int64_t down, int64_t across,
                 const T* a, T* c) const {
    for (int64_t l = 0; l < depth; l += kDepth)
      k_.gemm(rows, ld, std::min(kDepth, depth - l), g + l * down, across, down, a + l * ld, ld, c,
              ld, Store::add);
  }

  void root_backward(const T* grad, WeightGradients<S>& dw) {
    const int64_t root = p_.steps - 1, rank = p_.step[root].rows, outs = p_.outputs;
    const int64_t nl = left_.rows, nr = right_.rows, ld = left_.ld;
    const bool own = dw.step(root) != nullptr;
    const bool go_left = any_wanted(left_children_), go_right = any_wanted(right_children_);
    Matrix<T> d_left(nl, ld), d_right(nr, ld), z(nl, ld), scaled(nl, ld);
    std::fill_n(d_left.write(0), nl * ld, T(0));
    std::fill_n(d_right.write(0), nr * ld, T(0));
    const int64_t left_tiles = own || go_left ? tiles_of(nl) : 0;
    for (int64_t o = 0; o < outs; ++o) {
      const T* g = grad + o;  // G(i, j) = g[(i * nr + j) * outs]
      for_each_item<T>(tiles_of(nl), kMoved * nl * ld, 0, [&](int64_t item, T*) {
        const int64_t i = item * kTile;
        weighted(i, std::min(kTile, nl - i), o, scaled.write(i));
      });
      for_each_item<T>(
          left_tiles + (go_right ? tiles_of(nr) : 0), 2 * nl * nr * ld, 0, [&](int64_t item, T*) {
            if (item < left_tiles) {  // Z = G N, dL += Z * w_o
              const int64_t i = item * kTile, n = std::min(kTile, nl - i);
              std::fill_n(z.write(i), n * ld, T(0));
              gemm_over(n, ld, nr, g + i * nr * outs, outs, nr * outs, right_.data, z.write(i));
              k_.product(n, ld, z.write(i), ld, output_row(o), 0, d_left.write(i), ld, Store::add);
            } else {  // dN += G^T (L * w_o)
              const int64_t j = (item - left_tiles) * kTile, n = std::min(kTile, nr - j);
              gemm_over(n, ld, nl, g + j * outs, nr * outs, outs, scaled.data, d_right.write(j));
            }
          });
      if (!own) continue;
      T* to = dw.step(root) + o;  // dw_o = column sums of L * Z
      const int64_t stride = padded<T>(outs), blocks = ld / kPad<T>;
      for_each_item<T>(blocks, kMoved * nl * ld, kPad<T>, [&](int64_t item, T* sums) {
        const int64_t j = item * kPad<T>;
        std::fill_n(sums, kPad<T>, T(0));
        k_.product(nl, kPad<T>, left_.row(0) + j, ld, z.write(0) + j, ld, sums, 0, Store::add);
        for (int64_t q = j; q < std::min(j + kPad<T>, rank); ++q) to[q * stride] += sums[q - j];
      });
    }
    if (go_left) spread(left_children_, std::move(d_left));
    if (go_right) spread(right_children_, std::move(d_right));
  }

  bool any_wanted(const std::vector<int64_t>& children) const {
    return std::any_of(children.begin(), children.end(), [&](int64_t c) { return wanted_[c]; });
  }

  // From the gradient of the children's Khatri-Rao product to the gradients of their frames,
  // splitting the last child off each time. Threads own columns, so the sums need no order between
  // them.
  void spread(std::vector<int64_t> children, Matrix<T> d) {
    while (children.size() > 1) {
      const int64_t last = children.back(), ld = d.ld;
      children.pop_back();
      const Matrix<T> rest = khatri_rao(frames_of(children), ld);
      const Matrix<T>& own = frames_[last];
      Matrix<T> d_rest(rest.rows, ld), d_own(own.rows, ld);
      const int64_t width = std::min(ld, std::max(kPad<T>, padded<T>(int64_t{64})));
      for_each_item<T>((ld + width - 1) / width, 2 * kMoved * d.rows * ld, 0,
                       [&](int64_t item, T*) {
                         const int64_t j = item * width, cols = std::min(width, ld - j);
                         for (int64_t i = 0; i < d_rest.rows; ++i)
                           std::fill_n(d_rest.write(i) + j, cols, T(0));
                         for (int64_t i = 0; i < d_own.rows; ++i)
                           std::fill_n(d_own.write(i) + j, cols, T(0));
                         for (int64_t i = 0; i < rest.rows; ++i) {
                           const T* g = d.row(i * own.rows) + j;
                           k_.product(own.rows, cols, g, ld, own.row(0) + j, ld,
                                      d_rest.write(i) + j, 0, Store::add);
                           k_.product(own.rows, cols, g, ld, rest.row(i) + j, 0, d_own.write(0) + j,
                                      ld, Store::add);
                         }
                       });
      gradients_[last] = std::move(d_own);
      d = std::move(d_rest);
    }
    gradients_[children[0]] = std::move(d);
  }

  void node_backward(int64_t s, WeightGradients<S>& dw) {
    const Step& st = p_.step[s];
    const Matrix<T> d = std::move(gradients_[s]);
    const int64_t ld_in = padded<T>(st.rows), rows = d.rows;
    const bool own = dw.step(s) != nullptr;
    if (p_.is_leaf(s)) {
      T* to = dw.step(s);
      for (int64_t i = 0; i < rows * d.ld; ++i) to[i] += d.data[i];
      return;
    }
    const Group group = frames_of(children_[s]);
    const bool below = any_wanted(children_[s]);
    Matrix<T> dp(below ? rows : 0, ld_in);
    const Matrix<T> wt =
        below ? transposed(Matrix<T>(st.rows, d.ld, weight(s)), st.cols) : Matrix<T>();
    const int64_t blocks = own ? tiles_of(st.rows) : 0, down = below ? tiles_of(rows) : 0;
    for_each_item<T>(
        blocks + down, 2 * rows * st.rows * d.ld, kTile * kTile, [&](int64_t item, T* scratch) {
          if (item < blocks) {  // rows of dW = P^T dU
            const int64_t from = item * kTile, n = std::min(kTile, st.rows - from);
            T* to = dw.step(s) + from * d.ld;
            for (int64_t i = 0; i < rows; i += kTile) {
              const int64_t depth = std::min(kTile, rows - i);
              int64_t lda;
              const T* a = khatri_rao(group, i, depth, from, padded<T>(n), scratch, lda);
              k_.gemm(n, d.ld, depth, a, 1, lda, d.row(i), d.ld, to, d.ld, Store::add);
            }
          } else {  // dP = dU W^T
            const int64_t i = (item - blocks) * kTile, n = std::min(kTile, rows - i);
            k_.gemm(n, ld_in, st.cols, d.row(i), d.ld, 1, wt.row(0), wt.ld, dp.write(i), ld_in,
                    Store::assign);
          }
        });
    if (below) spread(children_[s], std::move(dp));
  }

  const Program& p_;
  const Kernels<T>& k_;
  const PackedWeights<S> w_;
  std::vector<std::vector<int64_t>> children_;
  std::vector<Matrix<T>> frames_;
  std::vector<int64_t> left_children_, right_children_;
  Matrix<T> left_, right_, root_rows_;
  std::vector<bool> wanted_;
  std::vector<Matrix<T>> gradients_;
};

}  // namespace

Tensor full_tensor_cpu(const Program& program, const std::vector<Tensor>& weights,
                       int64_t entries) {
  Tensor out = new_tensor(weights[0], {entries, program.outputs}, weights[0].scalar_type());
  with_dtype(weights[0].scalar_type(), "full_tensor", [&](auto s) {
    using S = decltype(s);
    FullTensor<S>(program, weights).forward(out.mutable_data_ptr<S>());
  });
  return out;
}

std::vector<Tensor> full_tensor_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const std::vector<int64_t>& needs) {
  const Tensor g = torch::stable::contiguous(grad);
  return with_dtype(weights[0].scalar_type(), "full_tensor_backward", [&](auto s) {
    using S = decltype(s);
    using T = typename ComputeOf<S>::type;
    WeightGradients<S> dw(program, weights, needs);
    FullTensor<S> tree(program, weights);
    if constexpr (std::is_same_v<S, T>) {
      tree.backward(g.const_data_ptr<T>(), dw);
    } else {
      Buffer<T> wide(g.numel());
      pack_rows(1, g.numel(), g.const_data_ptr<S>(), g.numel(), wide.get(), g.numel());
      tree.backward(wide.get(), dw);
    }
    return dw.finish();
  });
}

}  // namespace htf
