// Matrix products of one block of 256 threads, at most 64 wide; every weight is one thread's.
//
//   Product<M, Stored, Rows, false>   [Rows, K] times W [K, N]
//   Product<M, Stored, Rows, true>    [Rows, N] times W^T, W [K, N]
//   outer<M, Stored, Rows>            [Rows, I]^T times [Rows, J]
//
// What such a product costs is its instructions: on an H200, some 1200 of a warp took 1.7 us, and
// the multiply-adds among them a tenth of that. So the warps divide the weight, not the result: 2
// halves of 32 columns times 4 quarters of 16 terms of the sum. Each thread has 16 weights, four
// rows of four, which it copies for itself (stage_weights), one instruction for four, and reads
// back as whole vectors, free of bank conflicts; with tensor cores nobody else reads them. The
// quarters' sums are added through shared memory, always in the same order.
//
// With g = lane / 4 and t = lane % 4, a thread's four terms of the sum are 16 quarter + 4 t + 0..3,
// its four columns 32 half + 4 g + 0..3; a term or a column can be any of an mma's, as long as both
// operands agree. Column j of the four is in tile j, as column g of its 8. tf32: the first two
// terms are t and t + 4 of one instruction, the others of a second. bf16: one instruction for 16.
//
// fma (float32, float64): a thread has 4 columns of rows t, t + 4, ..., and reads the weights of
// the four lanes with its g.
//
// Operands in shared memory have rows of padded widths, zero where nothing is summed, 16 banks
// (fma: 4) apart.
#pragma once

#include <type_traits>

#include "cuda/device.h"

namespace htf::gpu::tree {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSide = 64;  // the widest operand, and the rows of a chunk of weights
constexpr int kFour = 4;   // numbers that a thread takes at a time

enum class Math { fma, tf32, tf32x3, bf16 };

template <class Stored>
using ValueOf = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T x[V];
};
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& values) {
  if constexpr (std::is_same_v<T, BFloat16> && V == 4) {  // or each is stored by itself
    *reinterpret_cast<uint2*>(p) =
        make_uint2(pack_bf16(values.x[0], values.x[1]), pack_bf16(values.x[2], values.x[3]));
  } else {
    *reinterpret_cast<Pack<T, V>*>(p) = values;
  }
}
// Into shared memory. nvcc stores a struct's members one by one where it likes, which are four
// instructions, each of four times the bank conflicts.
template <int V, class T>
__device__ __forceinline__ void store_shared(T* p, const Pack<T, V>& v) {
#ifndef HTF_EMULATE
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(p));
  if constexpr (std::is_same_v<T, float> && V == 4) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "f"(v.x[0]), "f"(v.x[1]),
                 "f"(v.x[2]), "f"(v.x[3])
                 : "memory");
    return;
  } else if constexpr (std::is_same_v<T, double> && V == 4) {
    asm volatile(
        "st.shared.v2.f64 [%0], {%1, %2};\n"
        "st.shared.v2.f64 [%0+16], {%3, %4};\n" ::"r"(to),
        "d"(v.x[0]), "d"(v.x[1]), "d"(v.x[2]), "d"(v.x[3])
        : "memory");
    return;
  }
#endif
  store(p, v);
}

template <class T>
using Four = Pack<T, kFour>;

template <class T>
__device__ __forceinline__ Four<T> operator*(const Four<T>& a, const Four<T>& b) {
  Four<T> product;
#pragma unroll
  for (int i = 0; i < kFour; ++i) product.x[i] = a.x[i] * b.x[i];
  return product;
}
template <class T>
__device__ __forceinline__ Four<T> filled(T x) {
  Four<T> all;
#pragma unroll
  for (int i = 0; i < kFour; ++i) all.x[i] = x;
  return all;
}

__host__ __device__ __forceinline__ int padded(int width) { return (width + 15) & ~15; }

// Which part of a weight a thread has.
struct Share {
  int half = static_cast<int>(threadIdx.x) / kWarp % 2;
  int quarter = static_cast<int>(threadIdx.x) / kWarp / 2;
  int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  int t = static_cast<int>(threadIdx.x) % 4;
  __device__ __forceinline__ int term() const { return 16 * quarter + 4 * t; }
  __device__ __forceinline__ int column() const { return 32 * half + 4 * g; }
  __device__ __forceinline__ bool none(int terms, int columns) const {
    return 16 * quarter >= terms || 32 * half >= columns;
  }
};

// sum[j] += a b_j for four tiles of 8 columns. x: a in the order of its registers, y0 and y1: the
// two of b_j.
template <bool Split>
__device__ __forceinline__ void add_tf32(float (&sum)[4][4], const float (&x)[4], const float* y0,
                                         const float* y1) {
  const auto rest = [](float v, uint32_t high) { return to_tf32(v - __uint_as_float(high)); };
  uint32_t a[4], a_rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = to_tf32(x[i]);
    if constexpr (Split) a_rest[i] = rest(x[i], a[i]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t b[2] = {to_tf32(y0[j]), to_tf32(y1[j])};
    if constexpr (Split) {
      const uint32_t b_rest[2] = {rest(y0[j], b[0]), rest(y1[j], b[1])};
      // None onto the long sum: tensor cores cut off, and would take half a unit in its last
      // place each time, always towards zero. Additions round.
      float part[4] = {}, small[4] = {};
      mma_tf32(small, a_rest, b);
      mma_tf32(small, a, b_rest);
      mma_tf32(part, a, b);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] += part[e] + small[e];
    } else {
      mma_tf32(sum[j], a, b);
    }
  }
}

// f(row, col, i) for every four numbers of a tile, the same thread for equal places; i counts a
// thread's.
template <int Rows>
constexpr int kPlaces = (Rows + 15) / 16;

template <int Rows, class F>
__device__ __forceinline__ void for_fours(int width, F f) {
  const int first = threadIdx.x / 16, col = threadIdx.x % 16 * kFour;
  if (col >= width) return;
#pragma unroll
  for (int i = 0; i < kPlaces<Rows>; ++i)
    if (Rows % 16 == 0 || first < Rows) f(first + 16 * i, col, i);
}

// What all products share; Own has add() and each().
template <class Own, class Value, int Rows>
struct Summed {
  // The product, each thread's places as in for_fours. terms: of the first chunk, which has most;
  // both are padded. scratch is [quarters, Rows, ld], ld at least width; it is read until the next
  // barrier. Contains one.
  __device__ __forceinline__ void finish(int terms, int width, Value* scratch, int ld,
                                         Four<Value> (&sums)[kPlaces<Rows>]) const {
    const Share own;
    if (!own.none(terms, width)) {
      Value* to = scratch + own.quarter * Rows * ld;
      static_cast<const Own*>(this)->each([&](int row, int col, const Four<Value>& v) {
        if (col < width) store_shared(to + row * ld + col, v);
      });
    }
    __syncthreads();
    for_fours<Rows>(width, [&](int row, int col, int i) {
      const Value* from = scratch + row * ld + col;
      sums[i] = load<kFour>(from);
      Four<Value> part[3];
#pragma unroll
      for (int q = 0; q < 3; ++q)
        part[q] = 16 * (q + 1) < terms ? load<kFour>(from + (q + 1) * Rows * ld) : filled(Value(0));
#pragma unroll
      for (int q = 0; q < 3; ++q)
#pragma unroll
        for (int j = 0; j < kFour; ++j) sums[i].x[j] += part[q].x[j];
    });
  }
};

template <Math M, class Stored, int Rows, bool Transposed>
struct Product : Summed<Product<M, Stored, Rows, Transposed>, float, Rows> {
  static constexpr int kTall = Rows / 16;
  float sum[kTall][4][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTall * 16; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0;
  }

  // w: the staged weights, rows of 4 `stride` numbers. terms and columns are padded.
  template <class A>
  __device__ __forceinline__ void add(const A* a, int lda, const Stored* w, int stride, int terms,
                                      int columns) {
    const Share own;
    if (own.none(terms, columns)) return;
    Four<Stored> y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = load<kFour>(w + kFour * (i * stride + threadIdx.x));
    const A* from = a + own.g * lda + own.term();
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
      const Four<A> high = load<kFour>(from + 16 * m * lda);
      const Four<A> low = load<kFour>(from + (16 * m + 8) * lda);
      if constexpr (M == Math::bf16) {
        const uint32_t x[4] = {pack_bf16(high.x[0], high.x[1]), pack_bf16(low.x[0], low.x[1]),
                               pack_bf16(high.x[2], high.x[3]), pack_bf16(low.x[2], low.x[3])};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto of = [&](int term) { return Transposed ? y[j].x[term] : y[term].x[j]; };
          const uint32_t b[2] = {pack_bf16(of(0), of(1)), pack_bf16(of(2), of(3))};
          mma_bf16(sum[m][j], x, b);
        }
      } else {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const float x[4] = {high.x[k], low.x[k], high.x[k + 1], low.x[k + 1]};
          float y0[4], y1[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            y0[j] = Transposed ? y[j].x[k] : y[k].x[j];
            y1[j] = Transposed ? y[j].x[k + 1] : y[k + 1].x[j];
          }
          add_tf32<M == Math::tf32x3>(sum[m], x, y0, y1);
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(F f) const {
    const Share own;
#pragma unroll
    for (int m = 0; m < kTall; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f(16 * m + own.g + i / 2 * 8, 32 * own.half + 8 * own.t + i % 2 * kFour,
          Four<float>{{sum[m][0][i], sum[m][1][i], sum[m][2][i], sum[m][3][i]}});
  }
};

template <class Stored, int Rows, bool Transposed>
struct Product<Math::fma, Stored, Rows, Transposed>
    : Summed<Product<Math::fma, Stored, Rows, Transposed>, Stored, Rows> {
  static constexpr int kTall = Rows / 4;
  Stored sum[kTall][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTall * 4; ++i) sum[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ void add(const Stored* a, int lda, const Stored* w, int stride,
                                      int terms, int columns) {
    const Share own;
    if (own.none(terms, columns)) return;
    const Stored* rows = a + own.t * lda + 16 * own.quarter;
    const Stored* shares = w + kFour * (static_cast<int>(threadIdx.x) - own.t);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      Four<Stored> y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = load<kFour>(shares + kFour * (i * stride + t));
#pragma unroll
      for (int r = 0; r < kTall; ++r) {
        const Four<Stored> x = load<kFour>(rows + 4 * r * lda + 4 * t);
#pragma unroll
        for (int term = 0; term < 4; ++term)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sum[r][j] += x.x[term] * (Transposed ? y[j].x[term] : y[term].x[j]);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(F f) const {
    const Share own;
#pragma unroll
    for (int r = 0; r < kTall; ++r)
      f(own.t + 4 * r, own.column(), Four<Stored>{{sum[r][0], sum[r][1], sum[r][2], sum[r][3]}});
  }
};

// The product is added to f.before(i, j), four columns from j on, and goes to f(i, j, sum), each
// place from one thread. What was before comes while the product is formed. mma: a warp has 16 rows
// of the result, of which its lanes' two are neighbours, and 32 columns.
template <Math M, class Stored, int Rows, class A, class F>
__device__ __forceinline__ void outer(const A* a, int lda, const ValueOf<Stored>* g, int ldg,
                                      int tall, int width, F f) {
  const auto add = [](Four<ValueOf<Stored>> to, const Four<ValueOf<Stored>>& x) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) to.x[i] += x.x[i];
    return to;
  };
  Four<ValueOf<Stored>> before[4];
  if constexpr (M == Math::fma) {
    const int i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4;
    if (i >= tall || j >= width) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) before[r] = f.before(i + r, j);
    Stored sum[4][4] = {};
#pragma unroll 4
    for (int b = 0; b < Rows; ++b) {
      const auto x = load<4>(a + b * lda + i), y = load<4>(g + b * ldg + j);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += x.x[r] * y.x[c];
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
      f(i + r, j, add(before[r], {{sum[r][0], sum[r][1], sum[r][2], sum[r][3]}}));
  } else {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, t = lane % 4;
    const int top = warp % 4 * 16 + lane / 4 * 2, left = warp / 4 * 32;
    if (warp % 4 * 16 >= tall || left >= width) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) before[i] = f.before(top + i / 2, left + 8 * t + i % 2 * kFour);
    float sum[4][4] = {};
    const A* rows = a + t * lda + top;
    const float* columns = g + t * ldg + left + lane / 4 * 4;
#pragma unroll
    for (int b = 0; b < Rows; b += M == Math::bf16 ? 16 : 8) {
      const auto x_of = [&](int i) { return load<2>(rows + (b + 4 * i) * lda); };
      const auto y_of = [&](int i) { return load<kFour>(columns + (b + 4 * i) * ldg); };
      if constexpr (M == Math::bf16) {
        const Pack<A, 2> x0 = x_of(0), x1 = x_of(1), x2 = x_of(2), x3 = x_of(3);
        const Four<float> y0 = y_of(0), y1 = y_of(1), y2 = y_of(2), y3 = y_of(3);
        const uint32_t x[4] = {pack_bf16(x0.x[0], x1.x[0]), pack_bf16(x0.x[1], x1.x[1]),
                               pack_bf16(x2.x[0], x3.x[0]), pack_bf16(x2.x[1], x3.x[1])};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t y[2] = {pack_bf16(y0.x[j], y1.x[j]), pack_bf16(y2.x[j], y3.x[j])};
          mma_bf16(sum[j], x, y);
        }
      } else {
        const Pack<A, 2> x0 = x_of(0), x1 = x_of(1);
        const Four<float> y0 = y_of(0), y1 = y_of(1);
        const float x[4] = {x0.x[0], x0.x[1], x1.x[0], x1.x[1]};
        add_tf32<M == Math::tf32x3>(sum, x, y0.x, y1.x);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      f(top + i / 2, left + 8 * t + i % 2 * kFour,
        add(before[i], {{sum[0][i], sum[1][i], sum[2][i], sum[3][i]}}));
  }
}

}  // namespace htf::gpu::tree
