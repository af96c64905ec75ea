#include "cpu/walks.h"
#include "evaluate_at/planned.h"

namespace htf {
namespace {

// The part of the tree that is walked per sample: its leaves are the plan's cuts.
struct Upper {
  std::vector<Step> steps;
  std::vector<int64_t> from;  // of each: its program step, or -(cut + 1)

  Upper(const Program& p, const IndexPlan& plan) {
    std::vector<char> walked(p.steps, 0);
    std::vector<std::vector<int64_t>> cuts(p.steps);
    for (std::size_t c = 0; c < plan.cuts.size(); ++c) {
      cuts[plan.cuts[c].parent].push_back(static_cast<int64_t>(c));
      for (int64_t s = plan.cuts[c].parent; s >= 0 && !walked[s]; s = p.step[s].parent)
        walked[s] = 1;
    }
    std::vector<int64_t> place(p.steps, -1);
    for (int64_t s = 0; s < p.steps; ++s) {
      if (!walked[s]) continue;
      for (const int64_t c : cuts[s]) {
        const CutRow& cut = plan.cuts[c];
        // Its "mode" is where its ids start in the lists.
        steps.push_back({-1, 0, cut.rows, p.step[s].rows, cut.ids, -1, s, 0, -1, 0, -1});
        from.push_back(-(c + 1));
      }
      place[s] = static_cast<int64_t>(steps.size());
      steps.push_back(p.step[s]);
      from.push_back(s);
    }
    for (Step& st : steps)
      if (st.parent >= 0) st.parent = place[st.parent];
  }
};

template <class T>
class Planned {
 public:
  Planned(const Program& program, const IndexPlan& plan, const std::vector<Tensor>& weights)
      : p_(program),
        plan_(plan),
        packed_(weights),
        weight_(weights_of(program, packed_)),
        frames_(program, weight_, plan.rows, plan.lists),
        k_(kernels<T>()) {}

  int64_t kept_elements() const {
    int64_t columns = 0;
    if (plan_.form == IndexPlan::kWalk)
      columns = kept_columns<T>(Tree(Upper(p_, plan_).steps, p_.outputs));
    return frames_.elements() + columns * plan_.batch;
  }

  // kept: kept_elements(), or null.
  void forward(Results out, T* kept) {
    Buffer<T> own(kept == nullptr ? frames_.elements() : 0);
    frames_.forward(kept == nullptr ? own.get() : kept);
    if (plan_.form == IndexPlan::kWalk) {
      const Upper upper(p_, plan_);
      walk(Tree(upper.steps, p_.outputs), upper_weights(upper), rows(), {}, plan_.batch, out,
           kept == nullptr ? nullptr : kept + frames_.elements());
      return;
    }
    const int64_t count = plan_.batch * p_.outputs;
    T* to = in_place<T>(out);
    Buffer<T> wide(to == nullptr ? count : 0);
    if (plan_.form == IndexPlan::kFramedRoot)
      framed_root(to == nullptr ? wide.get() : to);
    else
      bilinear(to == nullptr ? wide.get() : to);
    if (to == nullptr) unpack_rows(1, count, wide.get(), count, out, count);
  }

  void backward(Numbers grad, const T* kept, const std::vector<T*>& dw) {
    Buffer<T> own(kept == nullptr ? frames_.elements() : 0);
    if (kept == nullptr)
      frames_.forward(own.get());
    else
      frames_.use(kept);
    frames_.want(dw);
    if (plan_.form == IndexPlan::kFramedRoot) {
      framed_root_backward(Widened<T>(grad, plan_.batch * p_.outputs).get());
    } else if (plan_.form == IndexPlan::kBilinear) {
      bilinear_backward(Widened<T>(grad, plan_.batch).get(), dw[p_.steps - 1]);
    } else {
      const Upper upper(p_, plan_);
      std::vector<T*> d;
      for (const int64_t s : upper.from)
        d.push_back(s >= 0 ? dw[s] : frames_.gradient(plan_.cuts[-(s + 1)].operand));
      walk_back(Tree(upper.steps, p_.outputs), upper_weights(upper), rows(), {}, std::move(d),
                plan_.batch, grad, {}, 0, kept == nullptr ? nullptr : kept + frames_.elements());
    }
    frames_.backward();
  }

 private:
  const int32_t* ids(const CutRow& cut) const { return plan_.lists + cut.ids; }
  // Of the walk: a cut's "mode" is where its ids start.
  Rows<T> rows() const { return {plan_.lists, 1, 1}; }

  std::vector<const T*> upper_weights(const Upper& upper) const {
    std::vector<const T*> all;
    for (const int64_t s : upper.from)
      all.push_back(s >= 0 ? weight_[s] : frames_.frame(plan_.cuts[-(s + 1)].operand));
    return all;
  }

  // The root's only column, one number after the other; ones where it has no weight.
  Buffer<T> root_column() const {
    const Step& root = p_.step[p_.steps - 1];
    const int64_t ld = padded<T>(root.rows);
    Buffer<T> column(ld);
    std::fill_n(column.get(), ld, T(0));
    for (int64_t r = 0; r < root.rows; ++r)
      column.get()[r] =
          weight_[p_.steps - 1] == nullptr ? T(1) : weight_[p_.steps - 1][r * padded<T>(root.cols)];
    return column;
  }

  void framed_root(T* out) const {
    const CutRow& cut = plan_.cuts[0];
    const T* root = frames_.frame(cut.operand);
    const int64_t ld = frames_.ld(cut.operand);
    for (int64_t b = 0; b < plan_.batch; ++b)
      for (int64_t o = 0; o < p_.outputs; ++o) out[b * p_.outputs + o] = root[ids(cut)[b] * ld + o];
  }

  // out[b] = sum over r of A[i_b, r] w[r] N[j_b, r]: the samples of a row of A together.
  void bilinear(T* out) const {
    const CutRow &a = plan_.cuts[0], &n = plan_.cuts[1];
    const int64_t ld = frames_.ld(a.operand), part = rows_together(a);
    const Buffer<T> w = root_column();
    const T *left = frames_.frame(a.operand), *right = frames_.frame(n.operand);
    const int32_t *start = plan_.lists + a.start, *order = plan_.lists + a.order;
    for_each_item<T>(
        (a.rows + part - 1) / part, kMoved * plan_.batch * ld, ld, [&](int64_t item, T* scaled) {
          for (int64_t i = item * part; i < std::min(a.rows, (item + 1) * part); ++i) {
            k_.product(1, ld, left + i * ld, ld, w.get(), ld, scaled, ld, Store::assign);
            for (int64_t q = start[i]; q < start[i + 1]; ++q)
              out[order[q]] = k_.dot(ld, scaled, right + ids(n)[order[q]] * ld);
          }
        });
  }

  // Z[i] = sum of g_b N[j_b] over the samples of row i: dA = Z w, dw = sum over i of A[i] Z[i]; and
  // the other way round for dN.
  void bilinear_backward(const T* g, T* dw) {
    const CutRow &a = plan_.cuts[0], &n = plan_.cuts[1];
    const int64_t ld = frames_.ld(a.operand), outs = padded<T>(1);
    const Buffer<T> w = root_column();
    T *da = frames_.gradient(a.operand), *dn = frames_.gradient(n.operand);
    const bool own = dw != nullptr;
    Buffer<T> z(own ? a.rows * ld : 0);
    const int64_t part_a = rows_together(a), part_n = rows_together(n);
    const int64_t items_a = da != nullptr || own ? (a.rows + part_a - 1) / part_a : 0;
    const int64_t items_n = dn != nullptr ? (n.rows + part_n - 1) / part_n : 0;
    for_each_item<T>(
        items_a + items_n, 2 * kMoved * plan_.batch * ld, ld, [&](int64_t item, T* scratch) {
          const bool left = item < items_a;
          const CutRow &mine = left ? a : n, &other = left ? n : a;
          const int64_t part = left ? part_a : part_n,
                        first = (left ? item : item - items_a) * part;
          T* d = left ? da : dn;
          for (int64_t i = first; i < std::min(mine.rows, first + part); ++i) {
            const int64_t from = plan_.lists[mine.start + i];
            T* sum = left && own ? z.get() + i * ld : scratch;
            k_.sum_rows(ld, plan_.lists[mine.start + i + 1] - from, plan_.lists + mine.order + from,
                        g, ids(other), frames_.frame(other.operand), ld, sum);
            if (d != nullptr)
              k_.product(1, ld, sum, ld, w.get(), ld, d + i * ld, ld, Store::assign);
          }
        });
    if (!own) return;
    const int64_t rank = p_.step[p_.steps - 1].rows;
    const T* frame = frames_.frame(a.operand);
    for_each_item<T>(ld / kPad<T>, kMoved * a.rows * ld, kPad<T>, [&](int64_t item, T* sums) {
      const int64_t j = item * kPad<T>;
      std::fill_n(sums, kPad<T>, T(0));
      k_.product(a.rows, kPad<T>, frame + j, ld, z.get() + j, ld, sums, 0, Store::add);
      for (int64_t q = j; q < std::min(j + kPad<T>, rank); ++q) dw[q * outs] = sums[q - j];
    });
  }
  static int64_t rows_together(const CutRow& cut) {
    return std::clamp<int64_t>(cut.rows / 64, 1, 64);
  }

  void framed_root_backward(const T* grad) {
    const CutRow& cut = plan_.cuts[0];
    T* d = frames_.gradient(cut.operand);
    if (d == nullptr) return;
    const int64_t ld = frames_.ld(cut.operand);
    for (int64_t i = 0; i < cut.rows; ++i) {
      std::fill_n(d + i * ld, ld, T(0));
      for (int64_t q = plan_.lists[cut.start + i]; q < plan_.lists[cut.start + i + 1]; ++q)
        for (int64_t o = 0; o < p_.outputs; ++o)
          d[i * ld + o] += grad[plan_.lists[cut.order + q] * p_.outputs + o];
    }
  }

  const Program& p_;
  const IndexPlan& plan_;
  const PackedWeights<T> packed_;
  const std::vector<const T*> weight_;
  Frames<T> frames_;
  const Kernels<T>& k_;
};

}  // namespace

std::vector<Tensor> evaluate_at_planned_cpu(const Program& program, const IndexPlan& plan,
                                            const std::vector<Tensor>& weights, bool keep) {
  const ScalarType dtype = weights[0].scalar_type();
  Tensor out = program.new_result(weights[0], plan.batch, dtype);
  return with_computed(dtype, [&](auto t) {
    using T = decltype(t);
    Planned<T> planned(program, plan, weights);
    Tensor kept = keep ? kept_tensor<T>(out, planned.kept_elements()) : out;
    planned.forward(results_of(out),
                    keep && kept.numel() > 0 ? kept.mutable_data_ptr<T>() : nullptr);
    return keep ? std::vector<Tensor>{out, kept} : std::vector<Tensor>{out};
  });
}

std::vector<Tensor> evaluate_at_planned_backward_cpu(const Program& program, const IndexPlan& plan,
                                                     const Tensor& grad,
                                                     const std::vector<Tensor>& weights,
                                                     const Tensor& kept,
                                                     const std::vector<int64_t>& needs) {
  const char* op = "evaluate_at_planned_backward";
  const Tensor g = in_one_piece(grad);
  return with_computed(weights[0].scalar_type(), [&](auto t) {
    using T = decltype(t);
    WeightGradients<T> dw(program, weights, needs);
    Planned<T> planned(program, plan, weights);
    planned.backward(numbers_of(g), kept_pointer<T>(op, kept, planned.kept_elements()), dw.steps());
    return dw.finish();
  });
}

}  // namespace htf
