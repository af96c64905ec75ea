#include <cmath>
#include <functional>
#include <type_traits>

#include "cpu/kernels.h"
#include "group_rmsprop/group_rmsprop.h"

namespace htf {
namespace {

constexpr int64_t kBlock = 4096;  // two of them lie in the first cache

struct Block {
  std::size_t tensor;
  int64_t from, size;
};

template <class S>
class GroupRMSprop {
 public:
  using T = typename ComputeOf<S>::type;

  explicit GroupRMSprop(const GroupStep& step) : s_(step), k_(kernels<T>()) {
    for (std::size_t i = 0; i < s_.params.size(); ++i) {
      param_.push_back(s_.params[i].mutable_data_ptr<S>());
      grad_.push_back(s_.grads[i].const_data_ptr<S>());
      const int64_t size = s_.params[i].numel();
      for (int64_t from = 0; from < size; from += kBlock)
        blocks_.push_back({i, from, std::min(kBlock, size - from)});
      elements_ += size;
    }
  }

  double squares() const {
    std::vector<double> sums(blocks_.size());
    for_each_item<T>(count(), kMoved * elements_, kBlock, [&](int64_t number, T* scratch) {
      const Block& b = blocks_[number];
      const T* d = direction(b, scratch);
      const int64_t whole = b.size / kPad<T> * kPad<T>;
      double sum = whole > 0 ? k_.dot(whole, d, d) : T(0);
      for (int64_t i = whole; i < b.size; ++i) sum += static_cast<double>(d[i]) * d[i];
      sums[number] = sum;
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
  }

  // p -= lr / denominator d. Parameters that share memory change one after the other.
  void move(double denominator) const {
    const int64_t work = disjoint() ? 2 * kMoved * elements_ : 0;
    for_each_item<T>(count(), work, kBlock + kPad<T>, [&](int64_t number, T* scratch) {
      const Block& b = blocks_[number];
      const T size = static_cast<T>(-s_.lr[b.tensor] / denominator);
      const T* d = direction(b, scratch);
      S* p = param_[b.tensor] + b.from;
      int64_t i = 0;
      if constexpr (std::is_same_v<S, T>) {
        T* sizes = scratch + kBlock;
        std::fill_n(sizes, kPad<T>, size);
        i = b.size / kPad<T> * kPad<T>;
        k_.product(i / kPad<T>, kPad<T>, d, kPad<T>, sizes, 0, p, kPad<T>, Store::add);
      }
      for (; i < b.size; ++i) p[i] = static_cast<S>(static_cast<T>(p[i]) + size * d[i]);
    });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(blocks_.size()); }

  // The block of d: the gradient where it lies, or in scratch.
  const T* direction(const Block& b, T* scratch) const {
    const S* g = grad_[b.tensor] + b.from;
    const S* p = param_[b.tensor] + b.from;
    const T decay = static_cast<T>(s_.weight_decay[b.tensor]);
    if constexpr (std::is_same_v<S, T>) {
      if (decay == 0) return g;
    }
    if (decay == 0)
      for (int64_t i = 0; i < b.size; ++i) scratch[i] = static_cast<T>(g[i]);
    else
      for (int64_t i = 0; i < b.size; ++i)
        scratch[i] = static_cast<T>(g[i]) + decay * static_cast<T>(p[i]);
    return scratch;
  }

  // Whether no memory is of two parameters, or of a parameter and a gradient.
  bool disjoint() const {
    struct Range {
      const S *begin, *end;
      bool written;
    };
    std::vector<Range> ranges;
    for (std::size_t i = 0; i < param_.size(); ++i) {
      const int64_t size = s_.params[i].numel();
      ranges.push_back({param_[i], param_[i] + size, true});
      ranges.push_back({grad_[i], grad_[i] + size, false});
    }
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
      return std::less<const S*>{}(a.begin, b.begin);
    });
    const S *end = nullptr, *written_end = nullptr;
    for (const Range& r : ranges) {
      if (r.begin == r.end) continue;
      if (std::less<const S*>{}(r.begin, r.written ? end : written_end)) return false;
      end = std::max(end, r.end, std::less<const S*>{});
      if (r.written) written_end = std::max(written_end, r.end, std::less<const S*>{});
    }
    return true;
  }

  const GroupStep& s_;
  const Kernels<T>& k_;
  std::vector<S*> param_;
  std::vector<const S*> grad_;
  std::vector<Block> blocks_;
  int64_t elements_ = 0;
};

}  // namespace

Tensor group_rmsprop_cpu(const GroupStep& s, const Tensor& average) {
  Tensor result = torch::stable::new_empty(average, {}, average.scalar_type());
  with_dtype(s.params[0].scalar_type(), "group_rmsprop_", [&](auto number) {
    using S = decltype(number);
    using T = typename ComputeOf<S>::type;
    const GroupRMSprop<S> step(s);
    const Undisturbed whole;  // a step is taken, or not taken
    const double before = *average.const_data_ptr<T>();
    const T after = static_cast<T>(s.alpha * before + (1 - s.alpha) * step.squares());
    *result.mutable_data_ptr<T>() = after;
    const double corrected = after / (1 - std::pow(s.alpha, static_cast<double>(s.step)));
    step.move(std::sqrt(corrected) + s.eps);
  });
  return result;
}

}  // namespace htf
