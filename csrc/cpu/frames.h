// Frames: nodes evaluated once per distinct sub-tuple of their modes.
//
// A framed row is a product of two operands' frames, row by row as two lists of ids say, and its
// frame is that product times the node's weight (or the product itself, where a node's operands are
// taken two at a time). A full grid has no lists: every row of the left operand with every row of
// the right one, the right one's fastest. A leaf's frame is its weight. Rows of one level do not
// depend on each other and share parallel regions. In the backward pass each element of a gradient
// has one owner that sums in the order of the rows: deterministic, whatever the number of threads.
// bfloat16 is computed in float32 on every processor.
#pragma once

#include <limits>
#include <numeric>
#include <vector>

#include "cpu/weights.h"

namespace htf {

// As htfkernels/schedule/index_plan.py writes it; offsets into the lists, all -1 of a full grid.
struct FrameRow {
  int64_t step, left, right, rows, left_ids, right_ids, left_start, right_start, right_order, level;
};
constexpr int64_t kFrameFields = 10;
static_assert(sizeof(FrameRow) == kFrameFields * sizeof(int64_t));
constexpr int64_t kNoOperand = -(int64_t{1} << 31);

template <class T>
class Frames {
 public:
  Frames(const Program& program, std::vector<const T*> weight, std::vector<FrameRow> rows,
         const int32_t* lists)
      : p_(program),
        weight_(std::move(weight)),
        row_(std::move(rows)),
        lists_(lists),
        k_(kernels<T>()),
        cols_(row_.size()),
        at_(row_.size()),
        gradient_(row_.size()) {
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      cols_[r] = f.step >= 0 ? p_.step[f.step].cols : cols(f.left);
      at_[r] = elements_;
      elements_ += f.rows * padded<T>(cols_[r]);
      widest_ = std::max(widest_, ld(f.left));
    }
    set_batches();
  }

  int64_t elements() const { return elements_; }  // of all frames
  int64_t cols(int64_t op) const { return op < 0 ? p_.step[-(op + 1)].cols : cols_[op]; }
  int64_t ld(int64_t op) const { return padded<T>(cols(op)); }
  int64_t rows(int64_t op) const { return op < 0 ? p_.step[-(op + 1)].rows : row_[op].rows; }
  const T* frame(int64_t op) const { return op < 0 ? weight_[-(op + 1)] : frames_ + at_[op]; }

  // Frames that were computed before.
  void use(const T* frames) { frames_ = frames; }

  void forward(T* frames) {
    frames_ = frames;
    for (const Batch& batch : batches_) forward(batch, frames);
  }

  // dw: as WeightGradients has them.
  void want(const std::vector<T*>& dw) {
    dw_ = dw;
    wanted_.assign(row_.size(), 0);
    for (std::size_t r = 0; r < row_.size(); ++r) {
      const FrameRow& f = row_[r];
      wanted_[r] = (f.step >= 0 && dw_[f.step] != nullptr) || below(f);
    }
  }
  bool wants(int64_t op) const {
    return op != kNoOperand && (op < 0 ? dw_[-(op + 1)] != nullptr : wanted_[op] != 0);
  }
  // Where an operand's gradient goes, null where it is not wanted. There is memory for it from the
  // first call until it has been passed on.
  T* gradient(int64_t op) {
    if (!wants(op)) return nullptr;
    if (op < 0) return dw_[-(op + 1)];
    if (gradient_[op].get() == nullptr) gradient_[op] = Buffer<T>(rows(op) * ld(op));
    return gradient_[op].get();
  }

  // From the gradients of the cut operands to those of everything below.
  void backward() {
    product_gradient_.assign(row_.size(), nullptr);
    transposed_at_.assign(row_.size(), -1);
    for (std::size_t b = batches_.size(); b-- > 0;) {
      transpose(batches_[b]);
      product_gradients(batches_[b]);
      operand_gradients(batches_[b]);
      for (const int64_t r : batches_[b]) gradient_[r] = Buffer<T>();
    }
  }

 private:
  struct Item {
    int64_t row, i, n, j, cols;
  };
  using Batch = std::vector<int64_t>;

  // The rows of a level, as many at a time as keep the memory of a backward pass low.
  void set_batches() {
    std::vector<int64_t> order(row_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return row_[a].level < row_[b].level; });
    int64_t size = 0;
    for (const int64_t r : order) {
      const int64_t mine = row_[r].rows * ld(row_[r].left);
      if (batches_.empty() || row_[batches_.back()[0]].level != row_[r].level ||
          size + mine > kTogether) {
        batches_.emplace_back();
        size = 0;
      }
      batches_.back().push_back(r);
      size += mine;
    }
  }

  static bool is_grid(const FrameRow& f) { return f.left_ids < 0 && f.right != kNoOperand; }
  bool below(const FrameRow& f) const { return wants(f.left) || wants(f.right); }

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
    if (is_grid(f)) {
      const int64_t nr = rows(f.right);
      for (int64_t done = 0; done < n;) {
        const int64_t x = (i + done) / nr, y = (i + done) % nr, m = std::min(n - done, nr - y);
        k_.product(m, cols, frame(f.left) + x * ldx + j, 0, frame(f.right) + y * ldx + j, ldx,
                   to + done * ldo, ldo, Store::assign);
        done += m;
      }
      return;
    }
    int64_t at[kPiece];
    for (int64_t i0 = 0; i0 < n; i0 += kPiece) {
      const int64_t m = std::min(kPiece, n - i0);
      std::copy_n(lists_ + f.left_ids + i + i0, m, at);
      k_.gather(m, cols, at, frame(f.left) + j, ldx, to + i0 * ldo, ldo, Store::assign);
      std::copy_n(lists_ + f.right_ids + i + i0, m, at);
      k_.gather(m, cols, at, frame(f.right) + j, ldx, to + i0 * ldo, ldo, Store::multiply);
    }
  }

  void forward(const Batch& batch, T* frames) const {
    int64_t tiles = 0, work = 0;
    for (const int64_t r : batch) {
      const FrameRow& f = row_[r];
      tiles += (f.rows + kRows - 1) / kRows;
      work += f.rows * ld(r) * (f.step >= 0 ? p_.step[f.step].rows : kMoved);
    }
    const int64_t threads = work < kWorthThreads ? 1 : num_threads();
    std::vector<Item> items;
    for (const int64_t r : batch) {
      const FrameRow& f = row_[r];
      const int64_t all = ld(r);
      // Few rows are shared out by columns.
      int64_t part = all;
      if (tiles % threads != 0 && tiles < 2 * threads)
        part = std::max<int64_t>((all * tiles / (2 * threads) + kColumns - 1) / kColumns * kColumns,
                                 kColumns);
      for (int64_t i = 0; i < f.rows; i += kRows)
        for (int64_t j = 0; j < all; j += part)
          items.push_back({r, i, std::min(kRows, f.rows - i), j, std::min(part, all - j)});
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

  // Of the rows of a batch whose operands want gradients: W^T, or dF^T by columns.
  void transpose(const Batch& batch) {
    int64_t size = 0;
    std::vector<Item> items;
    for (const int64_t r : batch) {
      const FrameRow& f = row_[r];
      if (f.step < 0 || weight_[f.step] == nullptr || !below(f)) continue;
      const int64_t cols = p_.step[f.step].cols;
      const int64_t n = by_columns(f) ? f.rows : p_.step[f.step].rows;
      transposed_at_[r] = size;
      for (int64_t j = 0; j < cols; j += kRows)
        items.push_back({r, 0, n, j, std::min(kRows, cols - j)});
      size += cols * padded<T>(n);
    }
    transposed_ = Buffer<T>();
    transposed_ = Buffer<T>(size);
    for_each_item<T>(static_cast<int64_t>(items.size()), kMoved * size, 0, [&](int64_t number, T*) {
      const Item& it = items[number];
      const FrameRow& f = row_[it.row];
      const T* from = by_columns(f) ? gradient_[it.row].get() : weight_[f.step];
      const int64_t ldt = padded<T>(it.n);
      k_.transpose(it.n, it.cols, from + it.j, ld(it.row),
                   transposed_.get() + transposed_at_[it.row] + it.j * ldt, ldt);
    });
  }

  // dP = dF W^T and dW = P^T dF. Of a row without a weight, dP is dF.
  void product_gradients(const Batch& batch) {
    int64_t size = 0, work = 0, most = kDepth * kRows;
    std::vector<Item> items;
    for (const int64_t r : batch) {
      const FrameRow& f = row_[r];
      if (f.step >= 0 && f.right != kNoOperand && below(f)) size += f.rows * ld(f.left);
    }
    products_ = Buffer<T>();
    products_ = Buffer<T>(size);
    T* next = products_.get();
    for (const int64_t id : batch) {
      const FrameRow& f = row_[id];
      if (!wants(id)) continue;
      if (f.step < 0) {
        product_gradient_[id] = gradient_[id].get();
        continue;
      }
      if (below(f)) {
        product_gradient_[id] = f.right == kNoOperand ? gradient(f.left) : next;
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
    const T* d = gradient_[it.row].get() + it.i * ldd;
    T* to = product_gradient_[it.row] + it.i * ldp + it.j;
    if (weight_[f.step] == nullptr)
      for (int64_t i = 0; i < it.n; ++i) std::fill_n(to + i * ldp, it.cols, d[i * ldd]);
    else
      k_.gemm(it.n, it.cols, p_.step[f.step].cols, d, ldd, 1,
              transposed_.get() + transposed_at_[it.row] + it.j, ldp, to, ldp, Store::assign);
  }
  void product_gradient_columns(const Item& it, T* scratch) const {
    const FrameRow& f = row_[it.row];
    const Step& st = p_.step[f.step];
    const int64_t ldt = padded<T>(f.rows), ldp = ld(f.left), ldw = padded<T>(st.cols);
    k_.gemm(it.cols, ldt, st.cols, weight_[f.step] + it.j * ldw, ldw, 1,
            transposed_.get() + transposed_at_[it.row], ldt, scratch, ldt, Store::assign);
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
      k_.gemm(it.cols, ldd, n, p, 1, ldp, gradient_[it.row].get() + i * ldd, ldd, to, ldd,
              i == 0 ? Store::assign : Store::add);
      worked(it.cols * n * ldd);
    }
  }

  // Each row of an operand collects from the products it is part of.
  void operand_gradients(const Batch& batch) {
    struct Part {
      int64_t row, i, n;
      bool left;
      T* to;
    };
    std::vector<Part> parts;
    int64_t work = 0, most = 0;
    for (const int64_t r : batch) {
      const FrameRow& f = row_[r];
      if (product_gradient_[r] == nullptr || f.right == kNoOperand) continue;
      for (const int64_t op : {f.left, f.right}) {
        if (!wants(op)) continue;
        work += kMoved * f.rows * ld(op);
        if (is_grid(f)) most = std::max(most, rows(op == f.left ? f.right : f.left));
        const int64_t all = rows(op), part = std::max<int64_t>(1, std::min(kRows, all / 16));
        for (int64_t i = 0; i < all; i += part)
          parts.push_back({r, i, std::min(part, all - i), op == f.left, gradient(op)});
      }
    }
    check(most <= std::numeric_limits<int32_t>::max(), "frames: more than 2^31 - 1 rows");
    std::vector<int32_t> all(most);  // ids of the other operand's rows, where all of them occur
    std::iota(all.begin(), all.end(), 0);
    for_each_item<T>(static_cast<int64_t>(parts.size()), work, 0, [&](int64_t number, T*) {
      const Part& it = parts[number];
      const FrameRow& f = row_[it.row];
      const int64_t n = ld(f.left), nr = rows(f.right);
      const T* dp = product_gradient_[it.row];
      const T* other = frame(it.left ? f.right : f.left);
      for (int64_t i = it.i; i < it.i + it.n; ++i) {
        T* to = it.to + i * n;
        if (is_grid(f)) {
          const int64_t count = rows(it.left ? f.right : f.left);
          k_.sum_products(n, count, nullptr, dp + (it.left ? i * nr : i) * n, it.left ? n : nr * n,
                          all.data(), other, n, to);
          worked(kMoved * n * count);
          continue;
        }
        const int32_t* start = lists_ + (it.left ? f.left_start : f.right_start);
        const int64_t from = start[i], count = start[i + 1] - from;
        if (it.left)
          k_.sum_products(n, count, nullptr, dp + from * n, n, lists_ + f.right_ids + from, other,
                          n, to);
        else
          k_.sum_products(n, count, lists_ + f.right_order + from, dp, n, lists_ + f.left_ids,
                          other, n, to);
        worked(kMoved * n * count);
      }
    });
  }

  static constexpr int64_t kRows = 64;
  static constexpr int64_t kColumns = 48;  // a multiple of what the GEMM takes at a time
  static constexpr int64_t kDepth = 256;
  static constexpr int64_t kTogether = int64_t{1} << 19;  // elements of a batch's products

  const Program& p_;
  const std::vector<const T*> weight_;
  const std::vector<FrameRow> row_;
  const int32_t* lists_;
  const Kernels<T>& k_;
  std::vector<int64_t> cols_, at_;
  std::vector<Batch> batches_;
  int64_t elements_ = 0, widest_ = 0;
  const T* frames_ = nullptr;
  std::vector<T*> dw_;
  std::vector<char> wanted_;
  std::vector<Buffer<T>> gradient_;
  std::vector<T*> product_gradient_;
  std::vector<int64_t> transposed_at_;
  Buffer<T> products_, transposed_;
};

}  // namespace htf
