// Every kernel of csrc/cpu/kernels.h against plain loops, in every instruction set that the
// processor has. The numbers are small integers: all sums are exact, so results must be equal.
// Elements that a kernel must not touch are checked as well. test_cross_compile.py compiles this.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"

namespace {

using htf::Kernels;
using htf::padded;
using htf::Store;

long checks = 0, failures = 0;
std::mt19937 source(0);

void expect(bool right, const char* what, int64_t m, int64_t n, int64_t k) {
  ++checks;
  if (right) return;
  if (++failures <= 20)
    std::printf("wrong: %s, m = %ld, n = %ld, k = %ld\n", what, static_cast<long>(m),
                static_cast<long>(n), static_cast<long>(k));
}

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> x(count);
  for (T& v : x) v = static_cast<T>(static_cast<int>(source() % 9) - 4);
  return x;
}

template <class I>
std::vector<I> below(int64_t limit, int64_t count) {
  std::vector<I> at(count);
  for (I& v : at) v = static_cast<I>(source() % limit);
  return at;
}

template <class T>
T stored(Store store, T old, T value) {
  return store == Store::add ? old + value : store == Store::multiply ? old * value : value;
}

template <class T>
void check_gemm(const Kernels<T>& kernels) {
  for (int64_t m : {1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31})
    for (int64_t vectors = 1; vectors <= 7; ++vectors)
      for (int64_t k : {1, 2, 3, 8, 33})
        for (bool transposed : {false, true})
          for (Store store : {Store::assign, Store::add, Store::multiply}) {
            const int64_t n = vectors * htf::kPad<T>, ldb = n + 3, ldc = n + 5;
            const int64_t rs = transposed ? 1 : k + 2, cs = transposed ? m + 1 : 1;
            const auto a = numbers<T>((m + 1) * (k + 2)), b = numbers<T>(k * ldb);
            auto c = numbers<T>(m * ldc), want = c;
            for (int64_t i = 0; i < m; ++i)
              for (int64_t j = 0; j < n; ++j) {
                T sum = 0;
                for (int64_t l = 0; l < k; ++l) sum += a[i * rs + l * cs] * b[l * ldb + j];
                want[i * ldc + j] = stored(store, want[i * ldc + j], sum);
              }
            kernels.gemm(m, n, k, a.data(), rs, cs, b.data(), ldb, c.data(), ldc, store);
            expect(c == want, transposed ? "gemm, transposed" : "gemm", m, n, k);
          }
}

template <class T>
void check_rows(const Kernels<T>& kernels) {
  for (int64_t m : {1, 2, 5, 8})
    for (int64_t vectors : {1, 2, 3, 8, 9, 11, 19}) {
      const int64_t n = vectors * htf::kPad<T>, ld = n + 1, count = 3 * m;
      const auto x = numbers<T>(count * ld), y = numbers<T>(count * ld);
      const auto at = below<int64_t>(m, count);
      for (Store store : {Store::assign, Store::add, Store::multiply}) {
        auto out = numbers<T>(count * ld), want = out;
        if (store != Store::multiply) {
          for (int64_t ldy : {ld, int64_t{0}}) {
            for (int64_t i = 0; i < m; ++i)
              for (int64_t j = 0; j < n; ++j)
                want[i * ld + j] = stored(store, want[i * ld + j], x[i * ld + j] * y[i * ldy + j]);
            kernels.product(m, n, x.data(), ld, y.data(), ldy, out.data(), ld, store);
            expect(out == want, "product", m, n, 0);
          }
          for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
              T& v = want[i * ld + j];
              v = stored(store, v, v * y[i * ld + j]);
            }
          kernels.product(m, n, out.data(), ld, y.data(), ld, out.data(), ld, store);
          expect(out == want, "product in place", m, n, 0);
        }
        if (store != Store::add) {
          for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < n; ++j)
              want[i * ld + j] = stored(store, want[i * ld + j], x[at[i] * ld + j]);
          kernels.gather(count, n, at.data(), x.data(), ld, out.data(), ld, store);
          expect(out == want, "gather", m, n, 0);
        }
      }
      auto out = numbers<T>(m * ld), want = out;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < n; ++j) want[at[i] * ld + j] += x[i * ld + j];
      kernels.scatter(count, n, at.data(), x.data(), ld, out.data(), ld);
      expect(out == want, "scatter", m, n, 0);

      T sum = 0;
      for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
      expect(kernels.dot(n, x.data(), y.data()) == sum, "dot", 1, n, 0);
    }
}

template <class T>
void check_sums(const Kernels<T>& kernels) {
  for (int64_t count : {0, 1, 2, 7, 20})
    for (int64_t vectors = 1; vectors <= 13; ++vectors)
      for (bool ordered : {false, true}) {
        const int64_t n = vectors * htf::kPad<T>, ld = n + 2, rows = 5;
        const auto x = numbers<T>(count * ld), y = numbers<T>(rows * ld);
        const auto at = below<int32_t>(rows, count);
        std::vector<int32_t> order(count);
        for (int64_t q = 0; q < count; ++q) order[q] = static_cast<int32_t>(q);
        std::shuffle(order.begin(), order.end(), source);
        const int32_t* given = ordered ? order.data() : nullptr;
        // An order may name fewer than all.
        const int64_t used = ordered ? (count + 1) / 2 : count;
        std::vector<T> products(n + 1), sums(n + 1);
        for (int64_t q = 0; q < used; ++q) {
          const int64_t r = ordered ? order[q] : q;
          for (int64_t j = 0; j < n; ++j) {
            products[j] += x[r * ld + j] * y[at[r] * ld + j];
            sums[j] += x[r] * y[at[r] * ld + j];
          }
        }
        std::vector<T> out(n + 1);
        kernels.sum_products(n, used, given, x.data(), ld, at.data(), y.data(), ld, out.data());
        expect(out == products, "sum_products", used, n, 0);
        kernels.sum_rows(n, used, given, x.data(), at.data(), y.data(), ld, out.data());
        expect(out == sums, "sum_rows", used, n, 0);
      }
}

template <class T>
void check_transpose(const Kernels<T>& kernels) {
  for (int64_t rows = 1; rows <= 35; ++rows)
    for (int64_t cols = 1; cols <= 35; ++cols) {
      const int64_t ldx = cols + 3, ldo = padded<T>(rows) + 1;
      const auto x = numbers<T>(rows * ldx);
      auto out = numbers<T>(cols * ldo), want = out;
      for (int64_t j = 0; j < cols; ++j)
        for (int64_t i = 0; i < padded<T>(rows); ++i)
          want[j * ldo + i] = i < rows ? x[i * ldx + j] : T(0);
      kernels.transpose(rows, cols, x.data(), ldx, out.data(), ldo);
      expect(out == want, "transpose", rows, cols, 0);
    }
}

template <class T>
void check(const Kernels<T>& kernels) {
  const long before = checks;
  check_gemm(kernels);
  check_rows(kernels);
  check_sums(kernels);
  check_transpose(kernels);
  std::printf("%s, %s: %ld checks\n", kernels.name, std::is_same_v<T, float> ? "float" : "double",
              checks - before);
}

template <class T>
void check_all() {
  check(htf::kernels_generic<T>());
  const char* best = htf::kernels<T>().name;
#if defined(__x86_64__)
  if (std::strcmp(best, "generic")) check(htf::kernels_avx2<T>());
  if (!std::strcmp(best, "avx512")) check(htf::kernels_avx512<T>());
#else
  expect(!std::strcmp(best, "generic"), "the choice of kernels", 0, 0, 0);
#endif
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  std::printf("%ld wrong\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
