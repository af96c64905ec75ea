// The backward pass of the tree walk.
//
// The batch goes in chunks of rows, the tree in blocks (blocks.h). For a chunk, first the blocks'
// root messages are computed bottom up; then, blocks top down and a few at a time:
//   (a) tiles of rows recompute the block's messages m_v and descend: dp_v = dm_v W_v^T,
//       dm_c = dp_v * (product of the siblings' messages), dx_n = dm_n W_n^T;
//   (b) each weight adds p_v^T dm_v over the chunk.
// A weight's gradient has one owner in (b) and adds its tiles in order: no copy per thread, and the
// same bits whatever the number of threads. Messages live in cache between (a) and (b), weights and
// their gradients are streamed once per chunk, and nothing of the size batch x order is ever kept.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/walk.h"

namespace htf {

constexpr int64_t kChunkRows = 512;
constexpr int64_t kGradientRows = 96;                  // of a weight's gradient in one work item
constexpr int64_t kWorkspaceBytes = int64_t{8} << 20;  // messages and gradients of blocks in work
constexpr int64_t kBoundaryBytes = int64_t{64} << 20;  // of the blocks' roots

template <class S, class Rows>
class BackwardWalk : public Walk<S, Rows> {
  using Base = Walk<S, Rows>;

 public:
  using T = typename Base::T;

  // grad [batch, outputs] contiguous; dx [batch, x_width] or null.
  BackwardWalk(const Program& program, const std::vector<Tensor>& weights, const Rows& rows,
               int64_t batch, const S* grad, WeightGradients<S>& dw, S* dx)
      : Base(program, weights, rows),
        batch_(batch),
        grad_(grad),
        dw_(dw),
        dx_(dx),
        children_(p_.steps),
        column_(p_.steps),
        wanted_(p_.steps, 0) {
    for (int64_t s = 0; s + 1 < p_.steps; ++s) children_[p_.step[s].parent].push_back(s);
    for (int64_t s = 0; s < p_.steps; ++s) {
      if (dw.needed(p_.step[s].group) || (p_.is_leaf(s) && dx != nullptr)) wanted_[s] = 1;
      if (wanted_[s] && p_.step[s].parent >= 0) wanted_[p_.step[s].parent] = 1;
    }
    make_parts();
  }

  void run() {
    for (int64_t b0 = 0; b0 < batch_; b0 += chunk_) {
      b0_ = b0;
      rows_now_ = std::min(chunk_, batch_ - b0);
      tiles_ = (rows_now_ + tile_ - 1) / tile_;
      for (std::size_t end = blocks_.size();
           end > 1;) {  // bottom up, the blocks of one depth together
        std::size_t begin = end - 1;
        while (begin > 1 && blocks_[begin - 1].depth == blocks_[begin].depth) --begin;
        root_messages(begin, end);
        end = begin;
      }
      for (const Part& part : parts_) backward_part(part);
    }
  }

 private:
  using Base::k_, Base::p_, Base::rows_, Base::w_, Base::widest_;
  using Base::ld_cols, Base::ld_rows, Base::macs, Base::message, Base::weight;

  // Rows row .. row+rows-1 of the gradient of one weight, from all steps of a part that use it.
  struct Item {
    int64_t group, slot, row, rows;
    std::vector<int64_t> users;
  };
  struct Transposed {
    int64_t step, offset;
  };
  // Blocks of one depth that are worked on together.
  struct Part {
    std::size_t begin, end;
    int64_t macs;
    std::vector<Item> items;
    std::vector<Transposed> transposed;
    int64_t transposed_size;
  };

  void make_parts() {
    std::vector<int64_t> width(p_.steps);
    for (int64_t s = 0; s < p_.steps; ++s) width[s] = ld_cols(s);
    const int64_t pair = 2 * static_cast<int64_t>(sizeof(T));
    chunk_ = std::min(kChunkRows, (std::max<int64_t>(batch_, 1) + kTile - 1) / kTile * kTile);
    blocks_ = make_blocks(p_, children_, width, kWorkspaceBytes / (pair * chunk_));
    for (const Block& b : blocks_) boundary_ += width[b.root];
    int64_t widest_block = 1;
    for (const Block& b : blocks_) widest_block = std::max(widest_block, b.width);
    // A wide tree works on fewer rows at a time, and in the end on smaller tiles.
    const int64_t most =
        std::min(kBoundaryBytes / (pair * boundary_), kBoundaryBytes / (pair * widest_block));
    tile_ = std::clamp<int64_t>(most / 8 * 8, 8, kTile);
    chunk_ = std::min(chunk_, std::max(tile_, most / tile_ * tile_));
    const int64_t limit = std::max(widest_block, kWorkspaceBytes / (pair * chunk_));
    int64_t at = 0;
    for (const Block& b : blocks_) {
      column_[b.root] = at;
      at += width[b.root];
    }
    root_messages_ = Buffer<T>(chunk_ * boundary_);
    root_gradients_ = Buffer<T>(chunk_ * boundary_);
    std::size_t begin = 0;
    int64_t sum = 0;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      if (i > begin &&
          (sum + blocks_[i].width > limit || blocks_[i].depth != blocks_[begin].depth)) {
        add_part(begin, i);
        begin = i, sum = 0;
      }
      for (const int64_t s : blocks_[i].steps)
        if (s != blocks_[i].root) {
          column_[s] = sum;
          sum += width[s];
        }
      part_width_ = std::max(part_width_, sum);
    }
    add_part(begin, blocks_.size());
    messages_ = Buffer<T>(chunk_ * part_width_);
    gradients_ = Buffer<T>(chunk_ * part_width_);
    int64_t most_transposed = 0;
    for (const Part& part : parts_)
      most_transposed = std::max(most_transposed, part.transposed_size);
    transposed_ = Buffer<T>(most_transposed);
    transposed_at_.assign(p_.steps, nullptr);
    is_root_.assign(p_.steps, 0);
    for (const Block& b : blocks_) is_root_[b.root] = 1;
  }

  void add_part(std::size_t begin, std::size_t end) {
    Part part{begin, end, 0, {}, {}, 0};
    std::vector<Item> whole;
    for (std::size_t i = begin; i < end; ++i)
      for (const int64_t s : blocks_[i].steps) {
        const Step& st = p_.step[s];
        part.macs += macs(s);
        if (st.group < 0 || !wanted_[s]) continue;
        if (!p_.is_leaf(s) || dx_ != nullptr) {
          part.transposed.push_back({s, part.transposed_size});
          part.transposed_size += st.cols * ld_rows(s);
        }
        if (!dw_.needed(st.group)) continue;
        int64_t at = -1;
        if (w_[st.group].count == 1)  // the only weight that may have several users
          for (std::size_t k = 0; k < whole.size(); ++k)
            if (whole[k].group == st.group) at = static_cast<int64_t>(k);
        if (at < 0) {
          at = static_cast<int64_t>(whole.size());
          whole.push_back({st.group, st.slot, 0, st.rows, {}});
        }
        whole[at].users.push_back(s);
      }
    for (const Item& w : whole)
      for (int64_t row = 0; row < w.rows; row += kGradientRows)
        part.items.push_back(
            {w.group, w.slot, row, std::min(kGradientRows, w.rows - row), w.users});
    parts_.push_back(std::move(part));
  }

  int64_t tile_rows(int64_t t) const { return std::min(tile_, rows_now_ - t * tile_); }
  // The rows of tile t of a step's message or gradient lie together: [tile][step][row][column].
  T* message_of(int64_t s, int64_t t) const {
    return is_root_[s] ? root_messages_.get() + (t * boundary_ + column_[s]) * tile_
                       : messages_.get() + (t * part_width_ + column_[s]) * tile_;
  }
  T* gradient_of(int64_t s, int64_t t) const {
    return is_root_[s] ? root_gradients_.get() + (t * boundary_ + column_[s]) * tile_
                       : gradients_.get() + (t * part_width_ + column_[s]) * tile_;
  }

  // p_v for a tile, columns from .. from+cols-1: the only child's message itself, or the product in
  // scratch.
  const T* product(int64_t s, int64_t t, int64_t from, int64_t cols, T* scratch,
                   int64_t& ld) const {
    const auto& children = children_[s];
    ld = ld_cols(children[0]);
    const T* p = message_of(children[0], t) + from;
    for (std::size_t i = 1; i < children.size(); ++i) {
      k_.product(tile_rows(t), cols, p, ld, message_of(children[i], t) + from, ld_cols(children[i]),
                 scratch, cols, Store::assign);
      p = scratch;
      ld = cols;
    }
    return p;
  }

  // Messages of the roots of blocks begin .. end-1, by a forward walk through each.
  void root_messages(std::size_t begin, std::size_t end) {
    int64_t work = 0;
    for (std::size_t i = begin; i < end; ++i)
      for (const int64_t s : blocks_[i].steps) work += rows_now_ * macs(s);
    const int64_t size = tile_ * widest_;
    for_blocks(begin, end, work, (p_.buffers + 1) * size,
               [&](const Block& block, int64_t t, T* buffers) {
                 const int64_t n = tile_rows(t), b = b0_ + t * tile_;
                 T* widened = buffers + p_.buffers * size;
                 std::size_t below = 0;
                 for (const int64_t s : block.steps) {
                   for (; below < block.below.size() && block.below[below] < s; ++below)
                     send(block.below[below], n, t, buffers, size);
                   const Step& st = p_.step[s];
                   const T* from = buffers + std::max<int64_t>(st.buffer, 0) * size;
                   if (s == block.root)
                     message(s, b, n, from, ld_rows(s), message_of(s, t), Store::assign, widened);
                   else
                     message(s, b, n, from, ld_rows(s), buffers + p_.step[st.parent].buffer * size,
                             st.first ? Store::assign : Store::multiply, widened);
                 }
               });
  }
  void send(int64_t s, int64_t n, int64_t t, T* buffers, int64_t size) const {
    const int64_t ld = ld_cols(s);
    T* to = buffers + p_.step[p_.step[s].parent].buffer * size;
    if (p_.step[s].first)
      std::copy_n(message_of(s, t), n * ld, to);
    else
      k_.product(n, ld, to, ld, message_of(s, t), ld, to, ld, Store::assign);
  }

  template <class F>
  void for_blocks(std::size_t begin, std::size_t end, int64_t work, int64_t scratch_size,
                  const F& f) {
    for_each_item<T>(static_cast<int64_t>(end - begin) * tiles_, work, scratch_size,
                     [&](int64_t item, T* scratch) {
                       f(blocks_[begin + static_cast<std::size_t>(item / tiles_)], item % tiles_,
                         scratch);
                     });
  }

  void backward_part(const Part& part) {
    const int64_t count = static_cast<int64_t>(part.transposed.size());
    for_each_item<T>(count, part.transposed_size, 0, [&](int64_t i, T*) {
      const auto [s, offset] = part.transposed[i];
      T* to = transposed_.get() + offset;
      k_.transpose(p_.step[s].rows, p_.step[s].cols, weight(s), ld_cols(s), to, ld_rows(s));
      transposed_at_[s] = to;
    });
    for_blocks(part.begin, part.end, 2 * rows_now_ * part.macs, 3 * tile_ * widest_,
               [&](const Block& block, int64_t t, T* scratch) {
                 if (!wanted_[block.root]) return;
                 recompute(block, t, scratch);
                 descend(block, t, scratch);
               });
    for_each_item<T>(static_cast<int64_t>(part.items.size()), rows_now_ * part.macs,
                     tile_ * widest_, [&](int64_t i, T* scratch) {
                       const Item& item = part.items[i];
                       for (const int64_t s : item.users)
                         for (int64_t t = 0; t < tiles_; ++t) accumulate(item, s, t, scratch);
                     });
  }

  void recompute(const Block& block, int64_t t, T* scratch) const {
    const int64_t n = tile_rows(t), b = b0_ + t * tile_;
    for (const int64_t s : block.steps) {
      if (s == block.root) continue;
      int64_t ld = 0;
      const T* p = p_.is_leaf(s) ? nullptr : product(s, t, 0, ld_rows(s), scratch, ld);
      message(s, b, n, p, ld, message_of(s, t), Store::assign, scratch);
    }
  }

  void descend(const Block& block, int64_t t, T* scratch) const {
    const int64_t n = tile_rows(t), b = b0_ + t * tile_;
    T *dp = scratch, *other = scratch + tile_ * widest_;
    if (p_.step[block.root].parent < 0)
      pack_rows(n, p_.outputs, grad_ + b * p_.outputs, p_.outputs, gradient_of(block.root, t),
                ld_cols(block.root));
    for (auto it = block.steps.rbegin(); it != block.steps.rend(); ++it) {
      const int64_t s = *it, ld = ld_rows(s);
      const Step& st = p_.step[s];
      if (!wanted_[s] || (p_.is_leaf(s) && dx_ == nullptr)) continue;
      const T* dm = gradient_of(s, t);
      if (st.group < 0) {
        for (int64_t i = 0; i < n; ++i) std::fill_n(dp + i * ld, ld, dm[i * ld_cols(s)]);
      } else {
        k_.gemm(n, ld, st.cols, dm, ld_cols(s), 1, transposed_at_[s], ld, dp, ld, Store::assign);
      }
      if (p_.is_leaf(s))
        unpack_rows(n, st.rows, dp, ld, dx_ + b * p_.x_width + st.offset, p_.x_width);
      else
        split(children_[s], t, n, ld, dp, other);
    }
  }

  // dm_c = dp * (product of the siblings' messages), by running products from both ends.
  void split(const std::vector<int64_t>& children, int64_t t, int64_t n, int64_t ld, T* dp,
             T* other) const {
    const std::size_t count = children.size();
    auto m = [&](std::size_t i) { return message_of(children[i], t); };
    auto dm = [&](std::size_t i) { return gradient_of(children[i], t); };
    auto times = [&](const T* x, const T* y, T* out) {
      k_.product(n, ld, x, ld, y, ld, out, ld, Store::assign);
    };
    if (count == 1) {
      std::copy_n(dp, n * ld, dm(0));
    } else if (count == 2) {
      times(dp, m(1), dm(0));
      times(dp, m(0), dm(1));
    } else {
      for (std::size_t i = 0; i < count; ++i) {
        std::copy_n(dp, n * ld, dm(i));
        if (i + 1 < count) times(dp, m(i), dp);
      }
      std::copy_n(m(count - 1), n * ld, other);
      for (std::size_t i = count - 1; i-- > 0;) {
        times(dm(i), other, dm(i));
        if (i > 0) times(other, m(i), other);
      }
    }
  }

  // Rows of dW_v += p_v^T dm_v for one tile.
  void accumulate(const Item& item, int64_t s, int64_t t, T* scratch) const {
    const Step& st = p_.step[s];
    const int64_t n = tile_rows(t), b = b0_ + t * tile_, ld_out = dw_.ld(item.group);
    T* out = dw_.at(item.group, item.slot) + item.row * ld_out;
    const T* dm = gradient_of(s, t);
    const T* p;
    int64_t ld;
    if (!p_.is_leaf(s)) {
      p = product(s, t, item.row, padded<T>(item.rows), scratch, ld);
    } else if constexpr (Rows::kDense) {
      std::tie(p, ld) = rows_.operand(st, b, n, scratch);
      p += item.row;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t r = rows_.row(st, b + i) - item.row;
        if (r < 0 || r >= item.rows) continue;
        for (int64_t j = 0; j < ld_out; ++j) out[r * ld_out + j] += dm[i * ld_out + j];
      }
      return;
    }
    k_.gemm(item.rows, ld_out, n, p, 1, ld, dm, ld_out, out, ld_out, Store::add);
  }

  const int64_t batch_;
  const S* grad_;
  WeightGradients<S>& dw_;
  S* dx_;
  std::vector<std::vector<int64_t>> children_;
  std::vector<int64_t> column_;  // of a step's message in its tile's row
  std::vector<char> wanted_;     // whether a gradient at or below a step is asked for
  std::vector<char> is_root_;    // of a block
  std::vector<Block> blocks_;
  std::vector<Part> parts_;
  std::vector<const T*> transposed_at_;
  int64_t chunk_ = 0, tile_ = 0, boundary_ = 0, part_width_ = 0;
  int64_t b0_ = 0, rows_now_ = 0, tiles_ = 0;
  Buffer<T> root_messages_, root_gradients_, messages_, gradients_, transposed_;
};

}  // namespace htf
