// Matrix products of one block of 256 threads on operands in shared memory, at most 64 wide.
//
//   Product<M, Stored, Rows, false>   [Rows, K] times W [K, N]      W as it is stored, rows of N
//   Product<M, Stored, Rows, true>    [Rows, K] times W^T           W [N, K]
//   outer<M, Stored, Rows>            [Rows, I]^T times [Rows, J]   I, J up to 64
//
// Widths are padded to multiples of 16, the padding zero in what is summed over. Results go to a
// function f<V>(row, col, values of V columns), each to one thread, the same one for equal places,
// and always summed in the same order.
//
// fma (float32, float64): 8 warps are 4 bands of rows times 2 halves of 32 columns. In a warp 8
// lanes lie along the columns, 4 along K: a thread has Rows / 4 rows and 4 columns of a quarter of
// the sum, so that 64 multiply-adds (Rows = 16) take 8 reads of 16 bytes, free of bank conflicts
// (8 lanes read 128 bytes in a row, or, transposed, 8 rows of W, which start 4 banks apart); the
// quarters are then added across lanes, each lane keeping a quarter of the rows. With 4 rows
// (batches of a few samples) the bands split K as well: every weight is read from shared memory
// once, and the bands' sums are added through it.
//
// tf32, tf32x3, bf16: mma.sync; a warp has 8 columns and 16 rows, or 16 columns and half the rows.
#pragma once

#include <type_traits>

#include "cuda/device.h"

namespace htf::gpu::tree {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSide = 64;  // the widest operand, and the rows of a chunk of weights

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
  *reinterpret_cast<Pack<T, V>*>(p) = values;
}

__device__ __forceinline__ int padded(int width) { return (width + 15) / 16 * 16; }

// An operand's numbers by (i, k), k the index that is summed over: [i][k], or Across [k][i].
template <class T, bool Across>
struct View {
  const T* p;
  int ld;
  __device__ __forceinline__ float one(int i, int k) const {
    return static_cast<float>(Across ? p[k * ld + i] : p[i * ld + k]);
  }
  // k and k + 1 in bfloat16
  __device__ __forceinline__ uint32_t pair(int i, int k) const {
    if constexpr (Across) {
      return pack_bf16(p[k * ld + i], p[(k + 1) * ld + i]);
    } else {
      const auto both = load<2>(p + i * ld + k);
      return pack_bf16(both.x[0], both.x[1]);
    }
  }
};

template <Math M, int Tall, int Wide, class A, class B>
__device__ __forceinline__ void multiply(float (&sum)[Tall][Wide][4], A a, B b, int depth) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  if constexpr (M == Math::bf16) {
    for (int k = 0; k < depth; k += 16) {
      uint32_t x[Tall][4], y[Wide][2];
#pragma unroll
      for (int m = 0; m < Tall; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][i] = a.pair(16 * m + g + i % 2 * 8, k + 2 * t + i / 2 * 8);
#pragma unroll
      for (int n = 0; n < Wide; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) y[n][i] = b.pair(8 * n + g, k + 2 * t + i * 8);
#pragma unroll
      for (int m = 0; m < Tall; ++m)
#pragma unroll
        for (int n = 0; n < Wide; ++n) mma_bf16(sum[m][n], x[m], y[n]);
    }
  } else {
    constexpr bool kSplit = M == Math::tf32x3;
    const auto rest = [](float x, uint32_t high) { return to_tf32(x - __uint_as_float(high)); };
#pragma unroll 2
    for (int k = 0; k < depth; k += 8) {
      uint32_t x[Tall][4], y[Wide][2], x_rest[Tall][4], y_rest[Wide][2];
#pragma unroll
      for (int m = 0; m < Tall; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = a.one(16 * m + g + i % 2 * 8, k + t + i / 2 * 4);
          x[m][i] = to_tf32(value);
          if constexpr (kSplit) x_rest[m][i] = rest(value, x[m][i]);
        }
#pragma unroll
      for (int n = 0; n < Wide; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = b.one(8 * n + g, k + t + i * 4);
          y[n][i] = to_tf32(value);
          if constexpr (kSplit) y_rest[n][i] = rest(value, y[n][i]);
        }
#pragma unroll
      for (int m = 0; m < Tall; ++m)
#pragma unroll
        for (int n = 0; n < Wide; ++n) {
          if constexpr (kSplit) {
            // None onto the long sum: tensor cores cut off, and would take half a unit in its last
            // place each time, always towards zero. Additions round.
            float part[4] = {}, small[4] = {};
            mma_tf32(small, x_rest[m], y[n]);
            mma_tf32(small, x[m], y_rest[n]);
            mma_tf32(part, x[m], y[n]);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[m][n][e] += part[e] + small[e];
          } else {
            mma_tf32(sum[m][n], x[m], y[n]);
          }
        }
    }
  }
}

template <Math M, class Stored, int Rows, bool Transposed>
struct Product {
  static constexpr int kDown = Rows == 16 ? 1 : 2;  // warps above each other
  static constexpr int kTall = Rows / 16 / kDown, kWide = kDown;
  float sum[kTall][kWide][4];

  __device__ __forceinline__ static int top() { return threadIdx.x / kWarp % kDown * 16 * kTall; }
  __device__ __forceinline__ static int left() { return threadIdx.x / kWarp / kDown * 8 * kWide; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTall * kWide * 4; ++i) sum[i / 4 / kWide][i / 4 % kWide][i % 4] = 0;
  }

  template <class A>
  __device__ __forceinline__ void add(const A* a, int lda, const Stored* w, int ldw, int depth,
                                      int width) {
    if (left() >= width) return;
    const Stored* columns = w + (Transposed ? left() * ldw : left());
    multiply<M>(sum, View<A, false>{a + top() * lda, lda}, View<Stored, !Transposed>{columns, ldw},
                depth);
  }

  template <class F>
  __device__ __forceinline__ void finish(int width, float*, F f) const {
    if (left() >= width) return;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < kTall; ++m)
#pragma unroll
      for (int n = 0; n < kWide; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          f(top() + 16 * m + lane / 4 + 8 * i, left() + 8 * n + lane % 4 * 2,
            Pack<float, 2>{{sum[m][n][2 * i], sum[m][n][2 * i + 1]}});
  }
};

template <class Stored, int Rows, bool Transposed>
struct Product<Math::fma, Stored, Rows, Transposed> {
  static constexpr bool kBandsSplit = Rows < 16;  // bands have parts of K, not of the rows
  static constexpr int kTall = kBandsSplit ? Rows : Rows / 4;
  Stored sum[kTall][4];

  __device__ __forceinline__ static int left() { return threadIdx.x / kWarp % 2 * 32; }
  __device__ __forceinline__ static int band() { return threadIdx.x / kWarp / 2; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTall * 4; ++i) sum[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ void add(const Stored* a, int lda, const Stored* w, int ldw, int depth,
                                      int width) {
    const int lane = threadIdx.x % kWarp, slice = lane / 8, at = lane % 8;
    if (left() + (Transposed ? at : 4 * at) >= width) return;
    const Stored* rows = a + (kBandsSplit ? 0 : band() * kTall * lda);
    const int first = 4 * slice + (kBandsSplit ? 16 * band() : 0);
    for (int k = first; k < depth; k += kBandsSplit ? 64 : 16) {
      Pack<Stored, 4> x[kTall];
#pragma unroll
      for (int r = 0; r < kTall; ++r) x[r] = load<4>(rows + r * lda + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto y = load<4>(Transposed ? w + (left() + at + 8 * i) * ldw + k
                                          : w + (k + i) * ldw + left() + 4 * at);
#pragma unroll
        for (int r = 0; r < kTall; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if constexpr (Transposed) {
              sum[r][i] += x[r].x[j] * y.x[j];
            } else {
              sum[r][j] += x[r].x[i] * y.x[j];
            }
          }
      }
    }
  }

  // The partner's half of the rows is added to this lane's.
  template <int Tall>
  __device__ __forceinline__ static void fold(const Stored (&from)[Tall][4],
                                              Stored (&to)[Tall / 2][4], bool upper, int partner) {
#pragma unroll
    for (int r = 0; r < Tall / 2; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Stored low = from[r][j], high = from[r + Tall / 2][j];
        to[r][j] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, partner);
      }
  }

  // Contains a barrier where bands split; scratch is [4, Rows, 64], read until the next barrier.
  template <class F>
  __device__ __forceinline__ void finish(int width, Stored* scratch, F f) const {
    const int lane = threadIdx.x % kWarp, at = lane % 8;
    if (left() < width) {
      Stored half[kTall / 2][4], quarter[kTall / 4][4];
      const bool upper = (lane & 16) != 0, odd = (lane & 8) != 0;
      fold(sum, half, upper, 16);
      fold(half, quarter, odd, 8);
      const int top =
          (kBandsSplit ? 0 : band() * kTall) + (upper ? kTall / 2 : 0) + (odd ? kTall / 4 : 0);
#pragma unroll
      for (int r = 0; r < kTall / 4; ++r) {
        if constexpr (kBandsSplit) {
          Stored* to = scratch + (band() * Rows + top + r) * kSide + left();
#pragma unroll
          for (int j = 0; j < 4; ++j) to[Transposed ? at + 8 * j : 4 * at + j] = quarter[r][j];
        } else if constexpr (Transposed) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int col = left() + at + 8 * j;
            if (col < width) f(top + r, col, Pack<Stored, 1>{{quarter[r][j]}});
          }
        } else if (left() + 4 * at < width) {
          f(top + r, left() + 4 * at,
            Pack<Stored, 4>{{quarter[r][0], quarter[r][1], quarter[r][2], quarter[r][3]}});
        }
      }
    }
    if constexpr (kBandsSplit) {
      static_assert(Rows * kSide == kThreads);
      __syncthreads();
      const int row = threadIdx.x / kSide, col = threadIdx.x % kSide;
      if (col >= width) return;
      Stored total = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) total += scratch[b * kThreads + threadIdx.x];
      f(row, col, Pack<Stored, 1>{{total}});
    }
  }
};

// What a product's finish() wants of shared memory, in numbers.
template <Math M, int Rows>
constexpr int scratch_of() {
  return M == Math::fma && Rows < 16 ? 4 * kThreads : 0;
}

template <Math M, class Stored, int Rows, class A, class F>
__device__ __forceinline__ void outer(const A* a, int lda, const ValueOf<Stored>* g, int ldg,
                                      int tall, int width, F f) {
  if constexpr (M == Math::fma) {
    const int i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4;
    if (i >= tall || j >= width) return;
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
      f(i + r, j, Pack<Stored, 4>{{sum[r][0], sum[r][1], sum[r][2], sum[r][3]}});
  } else {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int top = warp % 4 * 16;
    // Two tiles at a time: the widths are multiples of 16.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int left = warp / 4 * 32 + half * 16;
      if (top >= tall || left >= width) return;
      float sum[1][2][4] = {};
      multiply<M>(sum, View<A, true>{a + top, lda}, View<float, true>{g + left, ldg}, Rows);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          f(top + lane / 4 + 8 * i, left + 8 * n + lane % 4 * 2,
            Pack<float, 2>{{sum[0][n][2 * i], sum[0][n][2 * i + 1]}});
    }
  }
}

}  // namespace htf::gpu::tree
