// The nodes below the root are frames over full grids. The root multiplies two of them: of L [nl,
// R], the product of its first children, and N [nr, R], that of the others,
//
//   T = L E^T,  dL = dT E,  dE = dT^T L      E[(j, o), r] = N[j, r] W[r, o]
//
// with T as a matrix [nl, nr * out_features]. E, as large as N that many times, is formed in
// blocks, and a block of its gradient goes into those of N and W as soon as it is there:
//
//   dN[j] = sum over o of dE[(j, o)] * W[:, o]      dW[:, o] = sum over j of N[j] * dE[(j, o)]
#include "full_tensor/full_tensor.h"

#include "cpu/frames.h"

namespace htf {
namespace {

constexpr int64_t kTile = 64;          // rows of L at a time
constexpr int64_t kDepth = 128;        // and of L and dL in the backward pass
constexpr int64_t kColumns = 1024;     // columns of the end tensor in one block
constexpr int64_t kBlock = 32 * 1024;  // elements of a block of E: it stays in the cache
constexpr int64_t kFewest = 32;        // rows of L that a block of E is formed for
constexpr int64_t kParts = 16;         // parts of the root's backward pass, in a line
constexpr int64_t kSide = 8;           // or along the sides of a square

int64_t parts_of(int64_t n, int64_t part) { return (n + part - 1) / part; }
// Up to whole tiles of the GEMM.
int64_t rounded(int64_t rows) { return (rows + 7) / 8 * 8; }

// The tree below the root as rows of full grids; children by their smallest mode.
struct Grid {
  std::vector<FrameRow> rows;
  int64_t left = kNoOperand, right = kNoOperand;  // the root's children in two runs

  explicit Grid(const Program& p) {
    std::vector<std::vector<Operand>> children(p.steps);
    for (int64_t s = 0; s < p.steps; ++s) {
      const Step& st = p.step[s];
      auto& mine = children[s];
      std::sort(mine.begin(), mine.end(),
                [](const Operand& a, const Operand& b) { return a.smallest < b.smallest; });
      if (st.parent < 0)
        split(mine);
      else
        children[st.parent].push_back(p.is_leaf(s) ? Operand{-(s + 1), st.rows, 0, st.mode}
                                                   : combine(mine.begin(), mine.end(), s));
    }
  }

 private:
  struct Operand {
    int64_t code, rows, level, smallest;
  };
  using Iterator = std::vector<Operand>::const_iterator;

  // A step's frame; of step -1 the product alone.
  Operand combine(Iterator from, Iterator to, int64_t step) {
    Operand made = *from++;
    if (from == to && step >= 0) return add(step, made, nullptr);
    for (; from != to; ++from) made = add(from + 1 == to ? step : -1, made, &*from);
    return made;
  }
  Operand add(int64_t step, const Operand& x, const Operand* y) {
    const int64_t n = x.rows * (y == nullptr ? 1 : y->rows);
    const int64_t level = 1 + (y == nullptr ? x.level : std::max(x.level, y->level));
    rows.push_back(
        {step, x.code, y == nullptr ? kNoOperand : y->code, n, -1, -1, -1, -1, -1, level});
    return {static_cast<int64_t>(rows.size()) - 1, n, level, x.smallest};
  }

  // In two runs with as equal products of rows as there are.
  void split(const std::vector<Operand>& all) {
    int64_t total = 1, before = 1, least = 0;
    for (const Operand& x : all) total *= x.rows;
    std::ptrdiff_t best = 1;
    for (std::size_t c = 0; c < all.size(); ++c) {
      before *= all[c].rows;
      const int64_t larger = std::max(before, total / before);
      if (c == 0 || (c + 1 < all.size() && larger < least))
        least = larger, best = static_cast<std::ptrdiff_t>(c) + 1;
    }
    left = combine(all.begin(), all.begin() + best, -1).code;
    if (all.begin() + best != all.end()) right = combine(all.begin() + best, all.end(), -1).code;
  }
};

template <class T>
class FullTensor {
 public:
  FullTensor(const Program& program, const std::vector<Tensor>& weights)
      : p_(program),
        k_(kernels<T>()),
        grid_(program),
        packed_(weights),
        weight_(weights_of(program, packed_)),
        frames_(program, weight_, grid_.rows, nullptr),
        own_(frames_.elements()),
        outs_(program.outputs),
        rank_(program.step[program.steps - 1].rows),
        ld_(padded<T>(rank_)) {
    frames_.forward(own_.get());
    l_ = frames_.frame(grid_.left), nl_ = frames_.rows(grid_.left);
    ones_ = Buffer<T>(ld_);
    std::fill_n(ones_.get(), ld_, T(1));
    const bool two = grid_.right != kNoOperand;
    n_ = two ? frames_.frame(grid_.right) : ones_.get();
    nr_ = two ? frames_.rows(grid_.right) : 1;
    w_ = Buffer<T>(outs_ * ld_);
    const T* w = weight_.back();
    if (w == nullptr)
      std::fill_n(w_.get(), ld_, T(1));
    else
      k_.transpose(rank_, outs_, w, padded<T>(outs_), w_.get(), ld_);
    const int64_t columns = std::clamp(kBlock / ld_, kTile, kColumns);
    block_ = std::min(nr_, std::max<int64_t>(1, columns / outs_));
  }

  void forward(Results out) const {
    const int64_t blocks = parts_of(nr_, block_), cols = padded<T>(block_ * outs_);
    // Rows that share a block of E: as many as leave each thread some items.
    const int64_t work = nl_ * nr_ * outs_ * rank_;
    const int64_t threads = work < kWorthThreads ? 1 : torch::stable::get_num_threads();
    const int64_t part = std::max(kFewest, rounded(nl_ * blocks / (4 * threads)));
    const int64_t parts = parts_of(nl_, part);
    for_each_item<T>(parts * blocks, work, cols * (2 * ld_ + kTile), [&](int64_t item, T* e) {
      const int64_t j = item % blocks * block_, n = std::min(block_, nr_ - j);
      T *et = e + cols * ld_, *c = et + cols * ld_;
      expand(j, n, e);
      k_.transpose(n * outs_, rank_, e, ld_, et, cols);
      const int64_t from = item / blocks * part, to = std::min(nl_, from + part);
      for (int64_t i = from; i < to; i += kTile)
        tile(i, std::min(kTile, to - i), n * outs_, et, cols, c, out + (i * nr_ + j) * outs_);
    });
  }

  void backward(Numbers grad, WeightGradients<T>& dw) {
    frames_.want(dw.steps());
    T *dl = frames_.gradient(grid_.left), *dn = frames_.gradient(grid_.right);
    T* own = dw.step(p_.steps - 1);
    const Parts at = parts();
    const int64_t size_l = nl_ * ld_, size_n = nr_ * ld_, size_w = outs_ * ld_;
    const int64_t sums_w = std::max(at.down, at.across);
    Buffer<T> more_l(dl == nullptr || at.square ? 0 : (at.across - 1) * size_l);
    Buffer<T> more_n(dn == nullptr || at.square ? 0 : (at.down - 1) * size_n);
    Buffer<T> dws(own == nullptr ? 0 : sums_w * size_w);
    if (own != nullptr) std::fill_n(dws.get(), sums_w * size_w, T(0));
    const int64_t cols = block_ * outs_;
    const int64_t wide = in_place<T>(grad) != nullptr ? 0 : kDepth * padded<T>(cols);
    const int64_t rounds = at.square ? at.down : 1;
    for (int64_t round = 0; round < rounds; ++round)
      for_each_item<T>(sums_w, 2 * nl_ * nr_ * outs_ * rank_ / rounds, 2 * cols * ld_ + wide,
                       [&](int64_t item, T* scratch) {
                         const int64_t x = at.down > 1 ? item : 0;
                         const int64_t y = at.square ? (item + round) % rounds : item - x;
                         T *to_l = dl, *to_n = dn;
                         if (more_l.get() != nullptr && y > 0)
                           to_l = more_l.get() + (y - 1) * size_l;
                         if (more_n.get() != nullptr && x > 0)
                           to_n = more_n.get() + (x - 1) * size_n;
                         root_part(grad, share(nl_, x, at.down), share(nr_, y, at.across),
                                   round == 0, to_l, to_n,
                                   own == nullptr ? nullptr : dws.get() + item * size_w, scratch);
                       });
    if (more_l.get() != nullptr) add(at.across - 1, size_l, more_l.get(), dl);
    if (more_n.get() != nullptr) add(at.down - 1, size_n, more_n.get(), dn);
    if (own != nullptr) {
      add(sums_w - 1, size_w, dws.get() + size_w, dws.get());
      k_.transpose(outs_, rank_, dws.get(), ld_, own, padded<T>(outs_));
    }
    frames_.backward();
  }

 private:
  // The root's backward pass in parts of some rows of L and some of N, as the shapes alone say.
  // Parts that add to the same rows of dL or dN are of different rounds, in an order that is fixed:
  // in a square of parts, the round k has (0, k), (1, k + 1), ... Where one of L and N is much the
  // smaller one, the other alone is cut, and each part has sums of its own for the smaller one.
  struct Parts {
    int64_t down = 1, across = 1;
    bool square = false;
  };
  Parts parts() const {
    const int64_t work = 2 * nl_ * nr_ * outs_ * rank_ / kWorthThreads;
    Parts at;
    if (nl_ >= kParts * (nr_ + outs_)) {
      at.down = std::clamp<int64_t>(work, 1, kParts);
    } else if (nr_ >= kParts * (nl_ + outs_)) {
      at.across = std::clamp<int64_t>(work, 1, kParts);
    } else {
      int64_t side = 1;
      while (2 * side <= kSide && 16 * side * side <= work &&
             2 * side * kFewest <= std::min(nl_, nr_ * outs_) && 2 * side <= nr_)
        side *= 2;
      at.square = side > 1;
      at.down = at.across = side;
    }
    return at;
  }

  struct Rows {
    int64_t from, to;
  };
  static Rows share(int64_t rows, int64_t part, int64_t parts) {
    const int64_t unit = rows >= kFewest * parts ? kFewest / 2 : 1;  // whole tiles of the GEMM
    const int64_t from = part * rows / parts, to = (part + 1) * rows / parts;
    return {from / unit * unit, part + 1 == parts ? rows : to / unit * unit};
  }

  // Rows l of L and r of N. dl and dn are assigned in the first round, else added to, dw always;
  // any may be null.
  void root_part(Numbers grad, Rows l, Rows r, bool first, T* dl, T* dn, T* dw, T* scratch) const {
    const int64_t size = block_ * outs_ * ld_;
    T *e = scratch, *de = e + size, *wide = de + size;
    for (int64_t j = r.from; j < r.to; j += block_) {
      const int64_t n = std::min(block_, r.to - j), cols = n * outs_;
      expand(j, n, e);
      for (int64_t i = l.from; i < l.to; i += kDepth) {
        const int64_t m = std::min(kDepth, l.to - i);
        const Numbers from = grad + (i * nr_ + j) * outs_;
        const T* g = wide;
        int64_t ldg = padded<T>(cols);
        if (const T* there = in_place<T>(from))
          g = there, ldg = nr_ * outs_;
        else
          pack_rows(m, cols, from, nr_ * outs_, wide, ldg);
        if (dl != nullptr)
          k_.gemm(m, ld_, cols, g, ldg, 1, e, ld_, dl + i * ld_, ld_,
                  first && j == r.from ? Store::assign : Store::add);
        if (dn != nullptr || dw != nullptr)
          k_.gemm(cols, ld_, m, g, 1, ldg, l_ + i * ld_, ld_, de, ld_,
                  i == l.from ? Store::assign : Store::add);
      }
      for (int64_t o = 0; o < outs_; ++o) {
        const T *de_o = de + o * ld_, *w = w_.get() + o * ld_, *rows = n_ + j * ld_;
        if (dn != nullptr)
          k_.product(n, ld_, de_o, outs_ * ld_, w, 0, dn + j * ld_, ld_,
                     first && o == 0 ? Store::assign : Store::add);
        if (dw != nullptr)
          k_.product(n, ld_, rows, ld_, de_o, outs_ * ld_, dw + o * ld_, 0, Store::add);
      }
    }
  }

  // The rows of E that belong to rows j .. j+n-1 of N.
  void expand(int64_t j, int64_t n, T* e) const {
    for (int64_t o = 0; o < outs_; ++o)
      k_.product(n, ld_, n_ + j * ld_, ld_, w_.get() + o * ld_, 0, e + o * ld_, outs_ * ld_,
                 Store::assign);
  }

  // Rows i .. i+n-1 of L times a block of E^T.
  void tile(int64_t i, int64_t n, int64_t cols, const T* et, int64_t lde, T* c, Results out) const {
    const int64_t width = nr_ * outs_;
    int64_t done = 0;
    if (T* there = in_place<T>(out)) {
      done = cols / kPad<T> * kPad<T>;
      k_.gemm(n, done, rank_, l_ + i * ld_, ld_, 1, et, lde, there, width, Store::assign);
    }
    if (done == cols) return;
    const int64_t rest = padded<T>(cols - done);
    k_.gemm(n, rest, rank_, l_ + i * ld_, ld_, 1, et + done, lde, c, rest, Store::assign);
    unpack_rows(n, cols - done, c, rest, out + done, width);
  }

  // to += each of count blocks.
  void add(int64_t count, int64_t size, const T* blocks, T* to) const {
    constexpr int64_t kPiece = 16 * 1024;
    if (count == 0) return;
    for_each_item<T>(parts_of(size, kPiece), kMoved * count * size, 0, [&](int64_t item, T*) {
      const int64_t at = item * kPiece, first = 0;
      for (int64_t q = 0; q < count; ++q)
        k_.scatter(1, std::min(kPiece, size - at), &first, blocks + q * size + at, 0, to + at, 0);
    });
  }

  const Program& p_;
  const Kernels<T>& k_;
  const Grid grid_;
  const PackedWeights<T> packed_;
  const std::vector<const T*> weight_;
  Frames<T> frames_;
  const Buffer<T> own_;
  const int64_t outs_, rank_, ld_;
  int64_t nl_ = 0, nr_ = 0, block_ = 1;  // block_: rows of N whose rows of E make a block
  const T *l_ = nullptr, *n_ = nullptr;
  Buffer<T> ones_, w_;  // w_: the root's weight, transposed; ones where it has none
};

}  // namespace

Tensor full_tensor_cpu(const Program& program, const std::vector<Tensor>& weights,
                       int64_t entries) {
  Tensor out = program.new_result(weights[0], entries, weights[0].scalar_type());
  with_computed(weights[0].scalar_type(), [&](auto t) {
    FullTensor<decltype(t)>(program, weights).forward(results_of(out));
  });
  return out;
}

std::vector<Tensor> full_tensor_backward_cpu(const Program& program, const Tensor& grad,
                                             const std::vector<Tensor>& weights,
                                             const std::vector<int64_t>& needs) {
  const Tensor g = in_one_piece(grad);
  return with_computed(weights[0].scalar_type(), [&](auto t) {
    using T = decltype(t);
    WeightGradients<T> dw(program, weights, needs);
    FullTensor<T>(program, weights).backward(numbers_of(g), dw);
    return dw.finish();
  });
}

}  // namespace htf
