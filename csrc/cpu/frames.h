// Frames: nodes evaluated once per distinct sub-tuple of their modes.
//
// A framed row is a product of two operands' frames, row by row as two lists of ids say, and its
// frame is that product times the node's weight (or the product itself, where a node's operands are
// taken two at a time). A leaf's frame is its weight. Rows of one level do not depend on each other
// and share parallel regions. In the backward pass each element of a gradient has one owner that
// sums in the order of the rows: deterministic, whatever the number of threads.
#pragma once

#include <vector>

#include "cpu/weights.h"

namespace htf {

// As htfkernels/index_plan.py writes it; offsets into the lists.
struct FrameRow {
  int64_t step, left, right, rows, left_ids, right_ids, left_start, right_start, right_order, level;
};
constexpr int64_t kFrameFields = 10;
static_assert(sizeof(FrameRow) == kFrameFields * sizeof(int64_t));
constexpr int64_t kNoOperand = -(int64_t{1} << 31);

template <class S>
class Frames {
 public:
  using T = typename ComputeOf<S>::type;

  Frames(const Program& program, std::vector<const T*> weight, std::vector<FrameRow> rows,
         const int32_t* lists)
      : p_(program),
        weight_(std::move(weight)),
        row_(std::move(rows)),
        lists_(lists),
        k_(kernels<T>()),
        at_(row_.size()),
        gradient_(row_.size(), nullptr) {
    for (std::size_t r = 0; r < row_.size(); ++r) {
      at_[r] = elements_;
      elements_ += row_[r].rows * ld(static_cast<int64_t>(r));
      levels_ = std::max(levels_, row_[r].level);
      widest_ = std::max(widest_, ld(row_[r].left));
    }
  }

  int64_t elements() const { return elements_; }  // of all frames
  int64_t cols(int64_t op) const {
    if (op < 0) return p_.step[-(op + 1)].cols;
    return row_[op].step >= 0 ? p_.step[row_[op].step].cols : cols(row_[op].left);
  }
  int64_t ld(int64_t op) const { return padded<T>(cols(op)); }
  int64_t rows(int64_t op) const { return op < 0 ? p_.step[-(op + 1)].rows : row_[op].rows; }
  const T* frame(int64_t op) const { return op < 0 ? weight_[-(op + 1)] : frames_ + at_[op]; }

  // Frames that were computed before.
  void use(const T* frames) { frames_ = frames; }

  void forward(T* frames) {
    frames_ = frames;
    for (int64_t level = 1; level <= levels_; ++level) forward_level(level, frames);
  }

  // dw: as WeightGradients has them. Afterwards gradient(op) is where an operand's goes, null where
  // it is not wanted.
  void want(const std::vector<T*>& dw) {
    dw_ = dw;
    gradients_ = Buffer<T>(elements_);
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      if ((f.step >= 0 && dw_[f.step] != nullptr) || below(f))
        gradient_[r] = gradients_.get() + at_[r];
    }
  }
  T* gradient(int64_t op) const {
    return op == kNoOperand ? nullptr : op < 0 ? dw_[-(op + 1)] : gradient_[op];
  }

  // From the gradients of the cut operands to those of everything below.
  void backward() {
    transpose_weights();
    for (int64_t level = levels_; level >= 1; --level) {
      product_gradients(level);
      operand_gradients(level);
    }
  }

 private:
  struct Item {
    int64_t row, i, n, j, cols;
  };

  bool below(const FrameRow& f) const {
    return gradient(f.left) != nullptr || gradient(f.right) != nullptr;
  }

  // Rows i .. i+n-1, columns j .. j+cols-1 of a product: a view, or computed into scratch.
  const T* product(const FrameRow& f, int64_t i, int64_t n, int64_t j, int64_t cols, T* scratch,
                   int64_t& ldp) const {
    const int64_t ldx = ld(f.left);
    if (f.right == kNoOperand) {
      ldp = ldx;
      return frame(f.left) + i * ldx + j;
    }
    ldp = cols;
    gather_product(f, i, n, j, cols, scratch, cols);
    return scratch;
  }
  void gather_product(const FrameRow& f, int64_t i, int64_t n, int64_t j, int64_t cols, T* to,
                      int64_t ldo) const {
    constexpr int64_t kPiece = 64;
    const int64_t ldx = ld(f.left);
    int64_t at[kPiece];
    for (int64_t i0 = 0; i0 < n; i0 += kPiece) {
      const int64_t m = std::min(kPiece, n - i0);
      std::copy_n(lists_ + f.left_ids + i + i0, m, at);
      k_.gather(m, cols, at, frame(f.left) + j, ldx, to + i0 * ldo, ldo, Store::assign);
      std::copy_n(lists_ + f.right_ids + i + i0, m, at);
      k_.gather(m, cols, at, frame(f.right) + j, ldx, to + i0 * ldo, ldo, Store::multiply);
    }
  }

  void forward_level(int64_t level, T* frames) const {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t tiles = 0, work = 0;
    for (const FrameRow& f : row_)
      if (f.level == level) tiles += (f.rows + kRows - 1) / kRows;
    std::vector<Item> items;
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      if (f.level != level) continue;
      const int64_t all = ld(static_cast<int64_t>(r));
      // Few rows are shared out by columns.
      int64_t part = all;
      if (tiles % threads != 0 && tiles < 2 * threads)
        part = std::max<int64_t>((all * tiles / (2 * threads) + kColumns - 1) / kColumns * kColumns,
                                 kColumns);
      for (int64_t i = 0; i < f.rows; i += kRows)
        for (int64_t j = 0; j < all; j += part)
          items.push_back({static_cast<int64_t>(r), i, std::min(kRows, f.rows - i), j,
                           std::min(part, all - j)});
      work += f.rows * all * (f.step >= 0 ? p_.step[f.step].rows : kMoved);
    }
    for_each_item<T>(static_cast<int64_t>(items.size()), work, kRows * widest_,
                     [&](int64_t number, T* scratch) {
                       const Item& it = items[number];
                       const FrameRow& f = row_[it.row];
                       const int64_t ldo = ld(it.row);
                       T* to = frames + at_[it.row] + it.i * ldo + it.j;
                       if (f.step < 0) {
                         gather_product(f, it.i, it.n, it.j, it.cols, to, ldo);
                         return;
                       }
                       int64_t ldp;
                       const T* p = product(f, it.i, it.n, 0, ld(f.left), scratch, ldp);
                       const T* w = weight_[f.step];
                       if (w == nullptr)
                         sum_rows(it.n, p_.step[f.step].rows, p, ldp, to, ldo);
                       else
                         k_.gemm(it.n, it.cols, p_.step[f.step].rows, p, ldp, 1, w + it.j, ldo, to,
                                 ldo, Store::assign);
                     });
  }
  static void sum_rows(int64_t n, int64_t cols, const T* x, int64_t ldx, T* out, int64_t ldo) {
    for (int64_t i = 0; i < n; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < cols; ++j) sum += x[i * ldx + j];
      std::fill_n(out + i * ldo, ldo, T(0));
      out[i * ldo] = sum;
    }
  }

  // Where rows are few, dP^T = W dF^T: transposing the rows costs less than transposing the weight.
  bool by_columns(const FrameRow& f) const {
    if (f.step < 0 || weight_[f.step] == nullptr) return false;
    const Step& st = p_.step[f.step];
    return 2 * f.rows * (st.rows + st.cols) < st.rows * st.cols;
  }

  void transpose_weights() {
    transposed_at_.assign(row_.size(), -1);
    int64_t size = 0;
    std::vector<Item> items;
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      if (f.step < 0 || weight_[f.step] == nullptr || !below(f) || by_columns(f)) continue;
      const Step& st = p_.step[f.step];
      transposed_at_[r] = size;
      for (int64_t j = 0; j < st.cols; j += kRows)
        items.push_back({static_cast<int64_t>(r), 0, 0, j, std::min(kRows, st.cols - j)});
      size += st.cols * padded<T>(st.rows);
    }
    transposed_ = Buffer<T>(size);
    for_each_item<T>(static_cast<int64_t>(items.size()), kMoved * size, 0, [&](int64_t number, T*) {
      const Item& it = items[number];
      const Step& st = p_.step[row_[it.row].step];
      const int64_t ldt = padded<T>(st.rows);
      k_.transpose(st.rows, it.cols, weight_[row_[it.row].step] + it.j, padded<T>(st.cols),
                   transposed_.get() + transposed_at_[it.row] + it.j * ldt, ldt);
    });
  }

  // dP = dF W^T and dW = P^T dF of a level. Of a row without a weight, dP is dF.
  void product_gradients(int64_t level) {
    product_gradient_.assign(row_.size(), nullptr);
    int64_t size = 0, work = 0, most = kDepth * kRows;
    std::vector<Item> items;
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      if (f.level == level && f.step >= 0 && f.right != kNoOperand && below(f))
        size += f.rows * ld(f.left);
    }
    products_ = Buffer<T>(size);
    transpose_rows(level);
    T* next = products_.get();
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      if (f.level != level || gradient_[r] == nullptr) continue;
      const auto id = static_cast<int64_t>(r);
      if (f.step < 0) {
        product_gradient_[r] = gradient_[r];
        continue;
      }
      if (below(f)) {
        product_gradient_[r] = f.right == kNoOperand ? gradient(f.left) : next;
        if (f.right != kNoOperand) next += f.rows * ld(f.left);
        if (by_columns(f)) {
          for (int64_t j = 0; j < p_.step[f.step].rows; j += kRows)
            items.push_back({id, 0, f.rows, j, std::min(kRows, p_.step[f.step].rows - j)});
          most = std::max(most, kRows * padded<T>(f.rows));
        }
        const int64_t part = f.rows <= 2 * kRows ? 2 * kColumns : ld(f.left);
        for (int64_t i = 0; i < f.rows && !by_columns(f); i += kRows)
          for (int64_t j = 0; j < ld(f.left); j += part)
            items.push_back(
                {id, i, std::min(kRows, f.rows - i), j, std::min(part, ld(f.left) - j)});
        work += f.rows * p_.step[f.step].rows * ld(id);
      }
      if (dw_[f.step] != nullptr) {
        for (int64_t j = 0; j < p_.step[f.step].rows; j += kRows)
          items.push_back({id, -1, 0, j, std::min(kRows, p_.step[f.step].rows - j)});
        work += f.rows * p_.step[f.step].rows * ld(id);
      }
    }
    for_each_item<T>(static_cast<int64_t>(items.size()), work, most,
                     [&](int64_t number, T* scratch) {
                       const Item& it = items[number];
                       if (it.i < 0)
                         weight_gradient(it, scratch);
                       else if (by_columns(row_[it.row]))
                         product_gradient_columns(it, scratch);
                       else
                         product_gradient(it);
                     });
  }
  void product_gradient(const Item& it) const {
    const FrameRow& f = row_[it.row];
    const int64_t ldd = ld(it.row), ldp = ld(f.left);
    const T* d = gradient_[it.row] + it.i * ldd;
    T* to = product_gradient_[it.row] + it.i * ldp + it.j;
    if (weight_[f.step] == nullptr)
      for (int64_t i = 0; i < it.n; ++i) std::fill_n(to + i * ldp, it.cols, d[i * ldd]);
    else
      k_.gemm(it.n, it.cols, p_.step[f.step].cols, d, ldd, 1,
              transposed_.get() + transposed_at_[it.row] + it.j, ldp, to, ldp, Store::assign);
  }
  // dF^T of the rows of a level that need it.
  void transpose_rows(int64_t level) {
    rows_at_.assign(row_.size(), -1);
    int64_t size = 0;
    std::vector<Item> items;
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      if (f.level != level || !by_columns(f) || !below(f)) continue;
      rows_at_[r] = size;
      const int64_t cols = p_.step[f.step].cols;
      for (int64_t j = 0; j < cols; j += kRows)
        items.push_back({static_cast<int64_t>(r), 0, 0, j, std::min(kRows, cols - j)});
      size += cols * padded<T>(f.rows);
    }
    rows_transposed_ = Buffer<T>(size);
    for_each_item<T>(static_cast<int64_t>(items.size()), kMoved * size, 0, [&](int64_t i, T*) {
      const Item& it = items[i];
      const int64_t n = row_[it.row].rows, ldt = padded<T>(n);
      k_.transpose(n, it.cols, gradient_[it.row] + it.j, ld(it.row),
                   rows_transposed_.get() + rows_at_[it.row] + it.j * ldt, ldt);
    });
  }
  void product_gradient_columns(const Item& it, T* scratch) const {
    const FrameRow& f = row_[it.row];
    const Step& st = p_.step[f.step];
    const int64_t ldt = padded<T>(f.rows), ldp = ld(f.left), ldw = padded<T>(st.cols);
    k_.gemm(it.cols, ldt, st.cols, weight_[f.step] + it.j * ldw, ldw, 1,
            rows_transposed_.get() + rows_at_[it.row], ldt, scratch, ldt, Store::assign);
    k_.transpose(it.cols, f.rows, scratch, ldt, product_gradient_[it.row] + it.j, ldp);
  }
  void weight_gradient(const Item& it, T* scratch) const {
    const FrameRow& f = row_[it.row];
    const int64_t ldd = ld(it.row);
    T* to = dw_[f.step] + it.j * ldd;
    for (int64_t i = 0; i < f.rows; i += kDepth) {
      const int64_t n = std::min(kDepth, f.rows - i);
      int64_t ldp;
      const T* p = product(f, i, n, it.j, padded<T>(it.cols), scratch, ldp);
      k_.gemm(it.cols, ldd, n, p, 1, ldp, gradient_[it.row] + i * ldd, ldd, to, ldd,
              i == 0 ? Store::assign : Store::add);
    }
  }

  // Each row of an operand collects from the products it is part of.
  void operand_gradients(int64_t level) {
    std::vector<Item> items;
    int64_t work = 0;
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      if (f.level != level || product_gradient_[r] == nullptr || f.right == kNoOperand) continue;
      for (const int64_t op : {f.left, f.right}) {
        if (gradient(op) == nullptr) continue;
        work += kMoved * f.rows * ld(op);
        const int64_t all = rows(op), part = std::max<int64_t>(1, std::min(kRows, all / 16));
        for (int64_t i = 0; i < all; i += part)
          items.push_back(
              {static_cast<int64_t>(r), i, std::min(part, all - i), op == f.left ? 0 : 1, 0});
      }
    }
    for_each_item<T>(static_cast<int64_t>(items.size()), work, 0, [&](int64_t number, T*) {
      const Item& it = items[number];
      const FrameRow& f = row_[it.row];
      const bool left = it.j == 0;
      const int64_t op = left ? f.left : f.right, n = ld(op);
      const T* dp = product_gradient_[it.row];
      const T* other = frame(left ? f.right : f.left);
      const int32_t* start = lists_ + (left ? f.left_start : f.right_start);
      for (int64_t i = it.i; i < it.i + it.n; ++i) {
        const int64_t from = start[i], count = start[i + 1] - from;
        if (left)
          k_.sum_products(n, count, nullptr, dp + from * n, n, lists_ + f.right_ids + from, other,
                          n, gradient(op) + i * n);
        else
          k_.sum_products(n, count, lists_ + f.right_order + from, dp, n, lists_ + f.left_ids,
                          other, n, gradient(op) + i * n);
      }
    });
  }

  static constexpr int64_t kRows = 64;
  static constexpr int64_t kColumns = 48;  // a multiple of what the GEMM takes at a time
  static constexpr int64_t kDepth = 256;

  const Program& p_;
  const std::vector<const T*> weight_;
  const std::vector<FrameRow> row_;
  const int32_t* lists_;
  const Kernels<T>& k_;
  std::vector<int64_t> at_;
  int64_t elements_ = 0, levels_ = 0, widest_ = 0;
  const T* frames_ = nullptr;
  std::vector<T*> dw_;
  std::vector<T*> gradient_;
  std::vector<T*> product_gradient_;
  std::vector<int64_t> transposed_at_, rows_at_;
  Buffer<T> gradients_, products_, transposed_, rows_transposed_;
};

}  // namespace htf
