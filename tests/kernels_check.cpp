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
#include "interrupt.h"

// Nothing interrupts this program.
namespace htf {
constinit thread_local Worker worker;
void look_up() { worker.left = 1 << 20; }
}  // namespace htf

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

// Which matrices are asked for: C, C * x, C * y and x * y in the bits of `wanted`. With `shared`,
// C * x goes to where x is, as where a walk keeps a message.
template <class T, class Multiply>
void check_products(const char* what, int64_t m, int64_t n, int64_t k, const std::vector<T>& a,
                    int64_t lda, const std::vector<T>& b, int64_t ldb, const Multiply& multiply) {
  const int64_t ld = n + 5;
  for (int wanted = 1; wanted < 16; ++wanted)
    for (bool shared : {false, true}) {
      const bool c = wanted & 1, cx = wanted & 2, cy = wanted & 4, xy = wanted & 8;
      if (shared && (!cx || cy || xy)) continue;
      auto x = numbers<T>(m * ld);
      const auto y = numbers<T>(m * ld);
      std::vector<std::vector<T>> out, want;
      for (int q = 0; q < 4; ++q) out.push_back(numbers<T>(m * ld));
      if (shared) out[1] = x;
      want = out;
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          T sum = 0;
          for (int64_t l = 0; l < k; ++l) sum += a[i * lda + l] * b[l * ldb + j];
          const int64_t p = i * ld + j;
          if (c) want[0][p] = sum;
          if (cx) want[1][p] = sum * x[p];
          if (cy) want[2][p] = sum * y[p];
          if (xy) want[3][p] = x[p] * y[p];
        }
      const auto to = [&](int q, bool asked) { return asked ? out[q].data() : nullptr; };
      multiply(htf::Products<T>{ld,
                                shared     ? out[1].data()
                                : cx || xy ? x.data()
                                           : nullptr,
                                cy || xy ? y.data() : nullptr, to(0, c), to(1, cx), to(2, cy),
                                to(3, xy)});
      expect(out == want, what, m, n, k);
    }
}

template <class T>
void check_gemm_products(const Kernels<T>& kernels) {
  for (int64_t m : {1, 2, 7, 8, 17})
    for (int64_t vectors = 1; vectors <= 7; ++vectors)
      for (int64_t k : {1, 2, 3, 33}) {
        const int64_t n = vectors * htf::kPad<T>, lda = k + 2, ldb = n + 3;
        const auto a = numbers<T>(m * lda), b = numbers<T>(k * ldb);
        check_products("gemm_products", m, n, k, a, lda, b, ldb, [&](const htf::Products<T>& to) {
          kernels.gemm_products(m, n, k, a.data(), lda, b.data(), ldb, to);
        });
      }
}

template <class T>
void check_copy(const Kernels<T>& kernels) {
  for (int64_t m : {1, 2, 5})
    for (int64_t n = 1; n <= 70; ++n)
      for (int64_t apart : {0, 3}) {
        const int64_t ldx = n + apart, ldo = n + 2 * apart;
        const auto x = numbers<T>(m * ldx);
        auto out = numbers<T>(m * ldo), want = out;
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) want[i * ldo + j] = x[i * ldx + j];
        kernels.copy(m, n, x.data(), ldx, out.data(), ldo);
        expect(out == want, "copy", m, n, 0);
      }
}

// The upper half of a float that bfloat16 can hold.
htf::Pair half(float x) {
  htf::Pair bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits >> 16;
}

// Rows of B two by two, each pair's first number in the lower half.
std::vector<htf::Pair> paired(int64_t k, const std::vector<float>& b, int64_t ldb) {
  std::vector<htf::Pair> out(htf::pair_rows(k) * ldb);
  for (int64_t l = 0; l < k; ++l)
    for (int64_t j = 0; j < ldb; ++j) out[l / 2 * ldb + j] |= half(b[l * ldb + j]) << l % 2 * 16;
  return out;
}

void check_pairs(const htf::PairKernels& kernels) {
  const long before = checks;
  for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 143})
    for (int64_t vectors = 1; vectors <= 7; ++vectors)
      for (int64_t k : {1, 2, 3, 15, 16, 17, 31, 32, 33, 130}) {
        const int64_t n = vectors * htf::kPad<float>, lda = k + 1, ldb = n + 3, ldc = n + 5;
        const auto a = numbers<float>((m - 1) * lda + k), b = numbers<float>(k * ldb);
        const auto bp = paired(k, b, ldb);
        for (Store store : {Store::assign, Store::add, Store::multiply}) {
          auto c = numbers<float>(m * ldc), want = c;
          for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
              float sum = 0;
              for (int64_t l = 0; l < k; ++l) sum += a[i * lda + l] * b[l * ldb + j];
              want[i * ldc + j] = stored(store, want[i * ldc + j], sum);
            }
          kernels.gemm(m, n, k, a.data(), lda, bp.data(), ldb, c.data(), ldc, store,
                       {b.data(), static_cast<int64_t>(b.size() * sizeof(float))});
          expect(c == want, "pairs, gemm", m, n, k);
        }
        if (m > 17 || k > 33) continue;
        check_products("pairs, gemm_products", m, n, k, a, lda, b, ldb,
                       [&](const htf::Products<float>& to) {
                         kernels.gemm_products(m, n, k, a.data(), lda, bp.data(), ldb, to);
                       });
      }
  for (int64_t m : {1, 3, 8, 15, 16, 17, 127, 131})
    for (int64_t vectors = 1; vectors <= 7; ++vectors)
      for (int64_t k : {1, 2, 3, 33, 256, 257, 515})
        for (Store store : {Store::assign, Store::add}) {
          const int64_t n = vectors * htf::kPad<float>, lda = m + 1, ldb = n + 3, ldc = n + 5;
          const auto a = numbers<float>((k - 1) * lda + m), b = numbers<float>(k * ldb);
          auto c = numbers<float>(m * ldc), want = c;
          if (store == Store::assign)
            for (int64_t i = 0; i < m; ++i) std::fill_n(want.begin() + i * ldc, n, 0.0f);
          for (int64_t l = 0; l < k; ++l)
            for (int64_t i = 0; i < m; ++i)
              for (int64_t j = 0; j < n; ++j) want[i * ldc + j] += a[l * lda + i] * b[l * ldb + j];
          kernels.gemm_transposed(m, n, k, a.data(), lda, b.data(), ldb, c.data(), ldc, store,
                                  {b.data(), static_cast<int64_t>(b.size() * sizeof(float))});
          expect(c == want, "pairs, gemm_transposed", m, n, k);
        }
  // The deepest product, several blocks of rows; and A is rounded to the nearest, ties to even.
  const int64_t m = 19, n = htf::kPad<float>, k = htf::PairKernels::kMostDepth;
  const auto a = numbers<float>(m * k), b = numbers<float>(k * n);
  std::vector<float> c(m * n), want(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < k; ++l)
      for (int64_t j = 0; j < n; ++j) want[i * n + j] += a[i * k + l] * b[l * n + j];
  kernels.gemm(m, n, k, a.data(), k, paired(k, b, n).data(), n, c.data(), n, Store::assign);
  expect(c == want, "pairs, deep", m, n, k);
  const std::vector<float> numbers_of{1 + 0x1p-8f, 1 + 0x3p-8f, 1 + 0x1.8p-8f, -1 - 0x1.8p-8f};
  const std::vector<float> rounded{1, 1 + 0x4p-8f, 1 + 0x2p-8f, -1 - 0x2p-8f};
  const auto one = paired(1, std::vector<float>(n, 1), n);
  kernels.gemm(4, n, 1, numbers_of.data(), 1, one.data(), n, c.data(), n, Store::assign);
  for (int64_t i = 0; i < 4; ++i) expect(c[i * n] == rounded[i], "pairs, rounding", i, n, 1);
  std::printf("pairs: %ld checks\n", checks - before);
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
  check_gemm_products(kernels);
  check_copy(kernels);
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
  if (const htf::PairKernels* kernels = htf::pair_kernels()) check_pairs(*kernels);
  std::printf("%ld wrong\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
