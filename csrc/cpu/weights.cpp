#include "cpu/weights.h"

namespace htf {
namespace {

// Rows of one type, padded with zeros or without their padding: many short ones at vector speed.
template <class T>
void copy_padded(int64_t rows, int64_t cols, const T* x, int64_t ldx, T* out, int64_t ldo) {
  kernels<T>().copy(rows, cols, x, ldx, out, ldo);
  if (ldo > cols)
    for (int64_t i = 0; i < rows; ++i) std::fill_n(out + i * ldo + cols, ldo - cols, T(0));
}

}  // namespace

template <class T>
PackedWeights<T>::PackedWeights(const std::vector<Tensor>& weights, const std::vector<char>& skip) {
  struct Item {
    Numbers from;
    int64_t to, rows, cols, ld;
  };
  std::vector<Item> items;
  std::vector<int64_t> start(weights.size(), -1);
  int64_t size = 0;
  source_.reserve(weights.size());
  for (std::size_t g = 0; g < weights.size(); ++g) {
    source_.push_back(in_one_piece(weights[g]));
    const Tensor& w = source_[g];
    const int64_t count = w.size(0), rows = w.size(1), cols = w.size(2), ld = padded<T>(cols);
    const Numbers x = numbers_of(w);
    const T* data = ld == cols ? in_place<T>(x) : nullptr;
    group_.push_back({rows, ld, data});
    if (data != nullptr || (!skip.empty() && skip[g])) continue;
    start[g] = size;
    for (int64_t f = 0; f < count; ++f, size += rows * ld)
      items.push_back({x + f * rows * cols, size, rows, cols, ld});
  }
  copy_ = Buffer<T>(size);
  for (std::size_t g = 0; g < weights.size(); ++g)
    if (start[g] >= 0) group_[g].data = copy_.get() + start[g];
  const auto items_together = std::max<int64_t>(1, static_cast<int64_t>(items.size()) / 64);
  const int64_t parts = (static_cast<int64_t>(items.size()) + items_together - 1) / items_together;
  for_each_item<T>(parts, size, 0, [&](int64_t part, T*) {
    const int64_t end = std::min<int64_t>(items.size(), (part + 1) * items_together);
    for (int64_t i = part * items_together; i < end; ++i) {
      const Item& it = items[i];
      if (const T* from = in_place<T>(it.from))
        copy_padded(it.rows, it.cols, from, it.cols, copy_.get() + it.to, it.ld);
      else
        pack_rows(it.rows, it.cols, it.from, it.cols, copy_.get() + it.to, it.ld);
    }
  });
}

namespace {

Pair pair(BFloat16 first, BFloat16 second) { return first.x | static_cast<Pair>(second.x) << 16; }

void pack_down(int64_t rows, int64_t cols, const BFloat16* x, Pair* out) {
  const int64_t ld = padded<float>(cols);
  for (int64_t i = 0; i < rows; i += 2, x += 2 * cols, out += ld) {
    if (i + 1 < rows)
      for (int64_t j = 0; j < cols; ++j) out[j] = pair(x[j], x[cols + j]);
    else
      for (int64_t j = 0; j < cols; ++j) out[j] = x[j].x;
    std::fill_n(out + cols, ld - cols, Pair{0});
  }
}
void pack_along(int64_t rows, int64_t cols, const BFloat16* x, Pair* out) {
  for (int64_t i = 0; i < rows; ++i, x += cols, out += pair_rows(cols)) {
    for (int64_t l = 0; l < cols / 2; ++l) out[l] = pair(x[2 * l], x[2 * l + 1]);
    if (cols % 2 != 0) out[cols / 2] = x[cols - 1].x;
  }
}

}  // namespace

PairWeights::PairWeights(const Program& p, const std::vector<Tensor>& weights, bool gathers,
                         bool backward) {
  if (weights[0].scalar_type() != ScalarType::BFloat16 || pair_kernels() == nullptr) return;
  std::vector<char> wanted(weights.size(), 0);
  only_.assign(weights.size(), 1);
  const auto multiplies = [&](const Step& st) {
    return !(gathers && st.mode >= 0) && std::max(st.rows, st.cols) <= PairKernels::kMostDepth;
  };
  for (int64_t s = 0; s < p.steps; ++s) {
    const Step& st = p.step[s];
    if (st.group >= 0) (multiplies(st) ? wanted[st.group] : only_[st.group]) = multiplies(st);
  }
  struct Item {
    const BFloat16* from;
    int64_t rows, cols, down, along;  // along: -1 where the caller's memory serves
  };
  std::vector<Item> items;
  std::vector<int64_t> start(weights.size(), -1);  // of a group's items
  int64_t size = 0;
  for (std::size_t g = 0; g < weights.size(); ++g) {
    if (!wanted[g]) continue;
    source_.push_back(in_one_piece(weights[g]));
    const int64_t rows = weights[g].size(1), cols = weights[g].size(2);
    const BFloat16* x = source_.back().const_data_ptr<BFloat16>();
    const bool fits = cols % 2 == 0 && reinterpret_cast<std::uintptr_t>(x) % sizeof(Pair) == 0;
    start[g] = static_cast<int64_t>(items.size());
    for (int64_t f = 0; f < weights[g].size(0); ++f) {
      items.push_back({x + f * rows * cols, rows, cols, size, -1});
      size += pair_rows(rows) * padded<float>(cols);
      if (!backward || fits) continue;
      items.back().along = size;
      size += rows * pair_rows(cols);
    }
  }
  copy_ = Buffer<Pair>(size);
  for_each_item<Pair>(static_cast<int64_t>(items.size()), size, 0, [&](int64_t i, Pair*) {
    const Item& it = items[i];
    pack_down(it.rows, it.cols, it.from, copy_.get() + it.down);
    if (it.along >= 0) pack_along(it.rows, it.cols, it.from, copy_.get() + it.along);
  });
  step_.resize(p.steps);
  for (int64_t s = 0; s < p.steps; ++s) {
    const Step& st = p.step[s];
    if (st.group < 0 || !multiplies(st)) continue;
    const Item& it = items[start[st.group] + st.slot];
    step_[s].down = copy_.get() + it.down;
    step_[s].along =
        it.along >= 0 ? copy_.get() + it.along : reinterpret_cast<const Pair*>(it.from);
  }
}

template <class T>
WeightGradients<T>::WeightGradients(const Program& p, const std::vector<Tensor>& weights,
                                    const std::vector<int64_t>& needs)
    : entries_(weights.size()), step_(p.steps, nullptr) {
  int64_t size = 0;
  for (std::size_t g = 0; g < weights.size(); ++g) {
    Entry& e = entries_[g];
    const Tensor& w = weights[g];
    if (!needs[g]) {
      e.tensor = torch::stable::new_empty(w, {0});
      continue;
    }
    e.count = w.size(0), e.rows = w.size(1), e.cols = w.size(2), e.ld = padded<T>(e.cols);
    e.tensor = new_tensor(w, {e.count, e.rows, e.cols}, w.scalar_type());
    if (e.ld == e.cols) e.data = in_place<T>(results_of(e.tensor));
    if (e.data == nullptr) {
      e.start = size;
      size += e.count * e.rows * e.ld;
    }
  }
  padded_ = Buffer<T>(size);
  std::vector<int64_t> slots(weights.size() + 1, 0);  // of the groups before
  for (std::size_t g = 0; g < weights.size(); ++g) {
    Entry& e = entries_[g];
    if (e.start >= 0) e.data = padded_.get() + e.start;
    slots[g + 1] = slots[g] + e.count;
  }
  std::vector<T*> owner(slots.back(), nullptr);
  for (int64_t s = 0; s < p.steps; ++s) {
    if (p.step[s].group < 0) continue;
    Entry& e = entries_[p.step[s].group];
    if (e.data == nullptr) continue;
    T*& mine = owner[slots[p.step[s].group] + p.step[s].slot];
    const int64_t elements = e.rows * e.ld;
    if (mine == nullptr) {
      step_[s] = mine = e.data + p.step[s].slot * elements;
    } else {
      others_.push_back({mine, Buffer<T>(elements), elements});
      step_[s] = others_.back().own.get();
    }
  }
  // A weight that no step uses: a group of one shape may have spare slots in a foreign program.
  for (std::size_t g = 0; g < weights.size(); ++g)
    for (int64_t f = 0; f < entries_[g].count; ++f)
      if (owner[slots[g] + f] == nullptr)
        std::fill_n(entries_[g].data + f * entries_[g].rows * entries_[g].ld,
                    entries_[g].rows * entries_[g].ld, T(0));
}

template <class T>
std::vector<Tensor> WeightGradients<T>::finish() {
  for (Other& other : others_)
    for (int64_t i = 0; i < other.elements; ++i) other.owner[i] += other.own.get()[i];
  std::vector<Tensor> out;
  out.reserve(entries_.size());
  for (Entry& e : entries_) {
    if (e.start >= 0) {
      const Results to = results_of(e.tensor);
      if (T* same = in_place<T>(to))
        copy_padded(e.count * e.rows, e.cols, e.data, e.ld, same, e.cols);
      else
        unpack_rows(e.count * e.rows, e.cols, e.data, e.ld, to, e.cols);
    }
    out.push_back(std::move(e.tensor));
  }
  return out;
}

template class PackedWeights<float>;
template class PackedWeights<double>;
template class WeightGradients<float>;
template class WeightGradients<double>;

}  // namespace htf
