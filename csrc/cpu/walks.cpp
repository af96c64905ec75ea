#include "cpu/walks.h"

#include "cpu/walk_backward.h"

namespace htf {

template <class T>
int64_t kept_columns(const Tree& tree) {
  int64_t columns = 0;
  for (int64_t s = 0; s + 1 < tree.steps; ++s)
    if (!tree.is_leaf(s)) columns += padded<T>(tree.step[s].cols);
  return columns;
}

template <class T>
void walk(const Tree& tree, std::vector<const T*> weight, const Rows<T>& rows,
          std::vector<PairWeight> pairs, int64_t batch, Results out, T* messages) {
  Walk<T>(tree, std::move(weight), rows, std::move(pairs)).forward(batch, out, messages);
}

template <class T>
void walk_back(const Tree& tree, std::vector<const T*> weight, const Rows<T>& rows,
               std::vector<PairWeight> pairs, std::vector<T*> dw, int64_t batch, Numbers grad,
               Results dx, int64_t x_width, const T* messages) {
  BackwardWalk<T>(tree, std::move(weight), rows, std::move(dw), batch, grad, dx, x_width,
                  std::move(pairs))
      .run(messages);
}

#define HTF_WALKS(T)                                                                              \
  template int64_t kept_columns<T>(const Tree&);                                                  \
  template void walk(const Tree&, std::vector<const T*>, const Rows<T>&, std::vector<PairWeight>, \
                     int64_t, Results, T*);                                                       \
  template void walk_back(const Tree&, std::vector<const T*>, const Rows<T>&,                     \
                          std::vector<PairWeight>, std::vector<T*>, int64_t, Numbers, Results,    \
                          int64_t, const T*);
HTF_WALKS(float)
HTF_WALKS(double)

}  // namespace htf
