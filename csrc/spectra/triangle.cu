// triangle: what a tall matrix X comes down to, the triangular factor T of X = Q T.
//
//   X    [rows, n], n <= 128: x [x_rows, n], or where there is a y [y_rows, n] the Khatri-Rao
//        product of both, row (i, j) = x_i * y_j, which is never stored
//   T    [n, n], each column divided by a power of two that brings its largest entry to between a
//        half and 1; the exponents are x's + y's + these
//   mode 0: X itself, of any size, with its columns scaled alike
//        1: T
//        2: the identity [n, n]
//
// Rows are taken into T, which is zero before, a chunk at a time: 128 rows, or 256 where every
// block has a multiprocessor to itself. Shared memory holds the chunk A and T. [T; A] = Q [T'; 0]
// by Householder's reflections, eight columns at a time.
//
//   strip    a thread for each row of A keeps its eight entries in registers. Column by column:
//            dots of the column with all eight, over the warp by nine shuffles that transpose
//            while they add, over the warps through shared memory (one barrier); every thread then
//            knows the reflection and updates its row. The vectors V replace the strip in A.
//   rest     Y = V^T A, Z = F^T (Y + V's part in T), A -= V Z on the tensor cores (mma_f64), F the
//            8 x 8 triangle of I - V F V^T. All operands come from shared memory without bank
//            conflicts. Four barriers a strip beside the eight.
//
// The product of two triangular factors has its row (i, j) begin at column max(i, j). Rows are
// taken from the back, by strips of first columns, and none touches columns that are zero in it:
// n^4 / 3 operations instead of 2 n^4. T is kept as strips too, without what is below the diagonal:
// at n = 64 two blocks fit on a multiprocessor (95 KB each), at n = 128 one (215 KB). Where shared
// memory is less (163 KB on compute capability 8.0) chunks have 64 rows.
//
// A level of few nodes gives each several blocks. In modes 0 and 2 they share the columns. In mode
// 1 block p takes the chunks p, p + parts .. into a triangle of its own; the block that comes last
// takes all of these into the first, in their order whoever it is. At n = 64 a chunk of 128 rows is
// 1 Mflop and eight strips, each of about 5000 cycles by count, most of them the eight columns'
// chain of shuffles, barrier, root and quotient: the two blocks of a multiprocessor fill each
// other's gaps. A pair's 4096 rows are 120 such strips on one block, and about 40, or 100 us, on
// four.
//
// A matrix with something that is no number in it gives such a triangle; nothing loops for that.
#include <algorithm>

#include "spectra/steps.cuh"

namespace htf::gpu {
namespace {

constexpr int kStrip = 8;
constexpr int kWarps = kThreads / kWarp;

// T [n8, n8] by strips of eight rows, each from its diagonal on.
__host__ __device__ __forceinline__ int strip_at(int n8, int column) {
  const int s = column / kStrip;
  return kStrip * (n8 * s - kStrip / 2 * s * (s - 1));
}

struct Shared {
  double *t, *chunk, *y, *dots, *fresh, *f, *top;
  int ld, ldy, rows;  // rows of a chunk, and how far they and those of y lie apart

  __host__ __device__ static int64_t size(int n8, int ld, int rows) {
    return strip_at(n8, n8) + static_cast<int64_t>(rows) * ld + kStrip * ld + 2 * kWarps * kStrip +
           2 * kStrip * kStrip + kStrip;
  }
  __device__ Shared(double* memory, int n8, int ld, int rows) : ld(ld), ldy(ld), rows(rows) {
    t = memory;
    chunk = t + strip_at(n8, n8);
    y = chunk + rows * ld;
    dots = y + kStrip * ld;
    fresh = dots + 2 * kWarps * kStrip;
    f = fresh + kStrip * kStrip;
    top = f + kStrip * kStrip;
  }
};

// The sums over the warp of eight numbers of every lane: lane l has that of number l % 8.
__device__ __forceinline__ double transposed_sums(double (&v)[kStrip], int lane) {
#pragma unroll
  for (int half = kStrip / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const double sent = upper ? v[j] : v[j + half], kept = upper ? v[j + half] : v[j];
      v[j] = kept + __shfl_xor_sync(~0u, sent, half);
    }
  }
  double sum = v[0];
  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 16);
  return sum;
}

// Column K of a strip: a reflection I - gamma v v^T with v = (top, a_K) sends T's diagonal and A's
// column to (beta, 0).
template <int K>
__device__ __forceinline__ void strip_column(const Shared& s, double (&a)[kStrip],
                                             const double* diagonal, int length, int warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double* all = s.dots + K % 2 * kWarps * kStrip;
  if (warp < warps) {
    double product[kStrip];
#pragma unroll
    for (int j = 0; j < kStrip; ++j) product[j] = a[K] * a[j];
    const double sum = transposed_sums(product, lane);
    if (lane < kStrip) all[warp * kStrip + lane] = sum;
  }
  __syncthreads();
  if (warp >= warps) return;
  double dot[kStrip] = {};
#pragma unroll 2
  for (int w = 0; w < warps; ++w)
#pragma unroll
    for (int j = 0; j < kStrip; j += 2) {
      const double2 two = *reinterpret_cast<const double2*>(all + w * kStrip + j);
      dot[j] += two.x, dot[j + 1] += two.y;
    }
  const double alpha = diagonal[K * length + K];
  double beta = alpha, top = 0, gamma = 0;
  // Squares of what is negligible beside the matrix may underflow.
  if (!(dot[K] <= 1e-280)) {
    const double root = sqrt(alpha * alpha + dot[K]);
    beta = alpha > 0 ? -root : root;
    top = alpha - beta;
    gamma = 1 / (beta * (beta - alpha));
  }
  double row[kStrip];
#pragma unroll
  for (int j = 0; j < kStrip; ++j) {
    row[j] = 0;
    if (j <= K) continue;
    const double old = diagonal[K * length + j];
    const double z = gamma * (top * old + dot[j]);
    row[j] = old - top * z;
    a[j] -= a[K] * z;
  }
  if (warp != 0) return;
  row[K] = beta;
  if (lane == 0) {
    s.top[K] = top;
#pragma unroll
    for (int j = 0; j < kStrip; ++j) s.fresh[K * kStrip + j] = row[j];
  }
  // Column K of F; lane j has row j of it and reads what it wrote itself.
  if (lane <= K) {
    double sum = 0;
#pragma unroll
    for (int l = 0; l < K; ++l)
      if (l >= lane) sum += s.f[l * kStrip + lane] * dot[l];
    s.f[K * kStrip + lane] = lane == K ? gamma : -gamma * sum;
  }
}

template <int K>
__device__ __forceinline__ void strip_columns(const Shared& s, double (&a)[kStrip],
                                              const double* diagonal, int length, int warps) {
  strip_column<K>(s, a, diagonal, length, warps);
  if constexpr (K + 1 < kStrip) strip_columns<K + 1>(s, a, diagonal, length, warps);
}

// What is right of a strip: Y = V^T A, a tile of eight columns for each warp.
__device__ __forceinline__ void products(const Shared& s, int column, int rest, int rows) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int j = threadIdx.x / kWarp * 8; j < rest; j += blockDim.x / kWarp * 8) {
    const double* v = s.chunk + t * s.ld + column + g;
    const double* b = v + kStrip + j;
    double d[4][2] = {};  // four sums, so that an instruction need not wait for the one before
    int k = 0;
    for (; k + 16 <= rows; k += 16)
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_f64(d[i], v[(k + 4 * i) * s.ld], b[(k + 4 * i) * s.ld]);
    for (; k < rows; k += 4) mma_f64(d[0], v[k * s.ld], b[k * s.ld]);
    double* out = s.y + g * s.ldy + j + 2 * t;
    out[0] = (d[0][0] + d[1][0]) + (d[2][0] + d[3][0]);
    out[1] = (d[0][1] + d[1][1]) + (d[2][1] + d[3][1]);
  }
}

// T's rows of the strip; y becomes -Z. A thread for each column.
__device__ __forceinline__ void upper_rows(const Shared& s, double* diagonal, int length) {
  for (int j = threadIdx.x; j < length; j += blockDim.x) {
    if (j < kStrip) {
#pragma unroll
      for (int k = 0; k < kStrip; ++k) diagonal[k * length + j] = s.fresh[k * kStrip + j];
      continue;
    }
    double y[kStrip], old[kStrip];
    double* column = s.y + j - kStrip;
#pragma unroll
    for (int k = 0; k < kStrip; ++k) {
      old[k] = diagonal[k * length + j];
      y[k] = column[k * s.ldy] + s.top[k] * old[k];
    }
#pragma unroll
    for (int k = 0; k < kStrip; ++k) {
      double z = 0;
#pragma unroll
      for (int l = 0; l <= k; ++l) z += s.f[k * kStrip + l] * y[l];
      diagonal[k * length + j] = old[k] - s.top[k] * z;
      column[k * s.ldy] = -z;
    }
  }
}

// A -= V Z, eight rows for each warp.
__device__ __forceinline__ void update(const Shared& s, int column, int rest, int rows) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int i = threadIdx.x / kWarp * 8; i < rows; i += blockDim.x / kWarp * 8) {
    double* row = s.chunk + (i + g) * s.ld + column;
    const double v0 = row[t], v1 = row[t + 4];
#pragma unroll 2
    for (int j = 0; j < rest; j += 8) {
      double2* at = reinterpret_cast<double2*>(row + kStrip + j + 2 * t);
      double d[2] = {at->x, at->y};
      mma_f64(d, v0, s.y[t * s.ldy + j + g]);
      mma_f64(d, v1, s.y[(t + 4) * s.ldy + j + g]);
      *at = make_double2(d[0], d[1]);
    }
  }
}

// Takes the chunk's rows, a multiple of 8 and zero before column `first`, into T [n8, n8].
__device__ void absorb(const Shared& s, int first, int n8, int rows) {
  const int r = threadIdx.x, warps = (rows + kWarp - 1) / kWarp;
  for (int c = first; c < n8; c += kStrip) {
    const int length = n8 - c, rest = length - kStrip;
    double* diagonal = s.t + strip_at(n8, c);
    double2* own = reinterpret_cast<double2*>(s.chunk + r * s.ld + c);
    double a[kStrip];
#pragma unroll
    for (int j = 0; j < kStrip / 2; ++j) {
      const double2 two = r < rows ? own[j] : make_double2(0, 0);
      a[2 * j] = two.x, a[2 * j + 1] = two.y;
    }
    strip_columns<0>(s, a, diagonal, length, warps);
    if (r < rows)
#pragma unroll
      for (int j = 0; j < kStrip / 2; ++j) own[j] = make_double2(a[2 * j], a[2 * j + 1]);
    __syncthreads();
    products(s, c, rest, rows);
    __syncthreads();
    upper_rows(s, diagonal, length);
    __syncthreads();
    update(s, c, rest, rows);
    __syncthreads();
  }
}

// Rows of a factor that begin before a column.
__device__ __forceinline__ int begun(int64_t triangular, int rows, int column) {
  if (triangular != 0) return rows < column ? rows : column;
  return column > 0 ? rows : 0;
}

// Fills rows of the chunk from `first` on, a warp for each; row(r) gives a function of the column.
template <class Row>
__device__ __forceinline__ void fill(const Shared& s, int first, int n, int n8, int rows,
                                     const Row& row) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, all = round_up(rows, 8);
  for (int r = threadIdx.x / kWarp; r < all; r += 2 * warps) {
    const int other = r + warps;  // both are under way at once
    const auto at = row(r < rows ? r : 0), at_other = row(other < rows ? other : 0);
    for (int c = first + lane; c < n8; c += kWarp) {
      const double x = r < rows && c < n ? at(c) : 0.0;
      const double y = other < rows && c < n ? at_other(c) : 0.0;
      s.chunk[r * s.ld + c] = x;
      if (other < all) s.chunk[other * s.ld + c] = y;
    }
  }
  __syncthreads();
}

// Block `part` of `parts` takes its chunks of a task's rows into T.
__device__ void gather(const Shared& s, const SpectraTask& k, const double* memory, int n, int n8,
                       int part, int parts) {
  const double *x = memory + k.x, *y = k.y < 0 ? nullptr : memory + k.y;
  const int x_rows = static_cast<int>(k.x_rows), y_rows = static_cast<int>(k.y_rows);
  int chunk = 0;
  for (int first = n8 - kStrip; first >= 0; first -= kStrip) {
    const int x0 = begun(k.x_triangular, x_rows, first);
    const int x1 = begun(k.x_triangular, x_rows, first + kStrip);
    const int y0 = begun(k.y_triangular, y_rows, first);
    const int y1 = begun(k.y_triangular, y_rows, first + kStrip);
    // Of the pairs (i, j) those with either new: i < x0 with y0 <= j, then x0 <= i with all j.
    const int before = x0 * (y1 - y0), count = before + (x1 - x0) * y1;
    for (int r0 = 0; r0 < count; r0 += s.rows) {
      if (chunk++ % parts != part) continue;
      const int rows = count - r0 < s.rows ? count - r0 : s.rows;
      fill(s, first, n, n8, rows, [&](int r) {
        const int at = r0 + r, late = at - before, wide = at < before ? y1 - y0 : y1;
        const int i = at < before ? at / wide : x0 + late / wide;
        const int j = at < before ? y0 + at % wide : late % wide;
        const double* xi = x + static_cast<int64_t>(i) * n;
        const double* yj = y == nullptr ? nullptr : y + static_cast<int64_t>(j) * n;
        return [=](int c) { return yj == nullptr ? xi[c] : xi[c] * yj[c]; };
      });
      absorb(s, first, n8, round_up(rows, 8));
    }
  }
}

// T into memory of this block's own; in the block that comes last all of these into the first.
__device__ bool combine(const Shared& s, double* triangles, int64_t size, int* arrived, int n8,
                        int part, int parts) {
  const int own = strip_at(n8, n8);
  for (int i = threadIdx.x; i < own; i += blockDim.x) triangles[part * size + i] = s.t[i];
  if (!last_to_arrive(arrived, parts)) return false;
  for (int i = threadIdx.x; i < own; i += blockDim.x) s.t[i] = __ldcg(triangles + i);
  const int all = (parts - 1) * n8;
  for (int r0 = 0; r0 < all; r0 += s.rows) {
    const int rows = all - r0 < s.rows ? all - r0 : s.rows;
    fill(s, 0, n8, n8, rows, [&](int r) {
      const int i = (r0 + r) % n8, begin = i / kStrip * kStrip;
      const double* at = triangles + (1 + (r0 + r) / n8) * size + strip_at(n8, begin) +
                         i % kStrip * (n8 - begin) - begin;
      return [=](int c) { return c < begin ? 0.0 : __ldcg(at + c); };
    });
    absorb(s, 0, n8, rows);
  }
  return true;
}

// Columns with their largest entry between a half and 1, and the exponents; a warp for each row.
// Block `part` of `parts` writes every parts-th 32 columns. scratch: a row of n for each warp.
template <class Entry>
__device__ __forceinline__ void write_scaled(const SpectraTask& k, const SpectraData& d,
                                             double* scratch, int rows, int n, int part, int parts,
                                             const Entry& entry) {
  constexpr int kAtOnce = 4;  // rows whose reading a write does not hold up
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int j = part * kWarp + lane; j < n; j += parts * kWarp) {
    double most = 0;
    for (int i = warp; i < rows; i += warps) {
      const double x = fabs(entry(i, j));
      most = x > most ? x : most;
    }
    scratch[warp * n + j] = most;
  }
  __syncthreads();
  for (int j = part * kWarp + lane; j < n; j += parts * kWarp) {
    double most = 0;
    for (int w = 0; w < warps; ++w) most = scratch[w * n + j] > most ? scratch[w * n + j] : most;
    const int e = exponent_of(most);
    // In two steps: 2^-e itself may be out of range.
    const double half = ldexp(1.0, -e / 2), rest = ldexp(1.0, -e - -e / 2);
    for (int i0 = warp; i0 < rows; i0 += kAtOnce * warps) {
      double x[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = i0 + u * warps;
        x[u] = i < rows ? entry(i, j) * half * rest : 0.0;
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = i0 + u * warps;
        if (i < rows) d.memory[k.out + static_cast<int64_t>(i) * n + j] = x[u];
      }
    }
    if (warp == 0)
      d.exponents[k.out_exponents + j] = exponent_at(d.exponents, k.x_exponents, j) +
                                         exponent_at(d.exponents, k.y_exponents, j) + e;
  }
}

__global__ void __launch_bounds__(kThreads)
    triangle_kernel(SpectraData d, int columns8, int ld, int rows) {
  const SpectraTask k = d.task[blockIdx.x];
  const int part = blockIdx.y, parts = gridDim.y;
  const int n = static_cast<int>(k.columns), n8 = round_up(n, kStrip);
  if (k.mode != 1) {
    const double *x = d.memory + k.x, *y = k.y < 0 ? nullptr : d.memory + k.y;
    const int y_rows = static_cast<int>(k.y_rows);
    const int count = k.mode == 2 ? n : static_cast<int>(k.x_rows) * y_rows;
    write_scaled(k, d, shared_memory<double>(), count, n, part, parts, [&](int i, int j) {
      if (k.mode == 2) return i == j ? 1.0 : 0.0;
      const double first = x[static_cast<int64_t>(i / y_rows) * n + j];
      return y == nullptr ? first : first * y[static_cast<int64_t>(i % y_rows) * n + j];
    });
    return;
  }
  const Shared s(shared_memory<double>(), columns8, ld, rows);
  for (int i = threadIdx.x; i < strip_at(n8, n8); i += blockDim.x) s.t[i] = 0;
  __syncthreads();
  gather(s, k, d.memory, n, n8, part, parts);
  if (parts > 1) {
    const int64_t size = strip_at(columns8, columns8);
    double* triangles = d.parts + static_cast<int64_t>(blockIdx.x) * parts * size;
    if (!combine(s, triangles, size, d.arrived + blockIdx.x, n8, part, parts)) return;
  }
  write_scaled(k, d, s.chunk, n, n, 0, 1, [&](int i, int j) {
    const int begin = i / kStrip * kStrip;
    return j < i ? 0.0 : s.t[strip_at(n8, begin) + i % kStrip * (n8 - begin) + j - begin];
  });
}

}  // namespace

int64_t triangle_parts(const SpectraLaunch& l) {
  const int n8 = round_up(static_cast<int>(l.columns), kStrip);
  return l.parts > 1 ? l.tasks * l.parts * strip_at(n8, n8) : 0;
}

void launch_triangles(const Current& current, const SpectraData& data, const SpectraLaunch& l) {
  const int n8 = round_up(static_cast<int>(l.columns), kStrip), ld = padded_row(n8);
  const int most = static_cast<int>(std::min<int64_t>(l.rows, kThreads));
  const bool alone = l.tasks * l.parts <= current.device().processors;
  int rows = std::min(n8 <= 16 ? 64 : n8 <= 32 || !alone ? 128 : 256, round_up(most, kWarp));
  const auto bytes = [&] { return Shared::size(n8, ld, rows) * sizeof(double); };
  while (rows > kWarp && bytes() > static_cast<std::size_t>(current.device().shared_bytes))
    rows = round_up(rows / 2, kStrip);
  const int threads = l.widest <= 16 ? 64 : l.widest <= 32 ? 128 : kThreads;
  const std::size_t scratch = kWarps * static_cast<std::size_t>(l.widest) * sizeof(double);
  launch<triangle_kernel>("spectra's triangles", current,
                          dim3(static_cast<unsigned>(l.tasks), static_cast<unsigned>(l.parts)),
                          std::max(threads, rows), std::max(bytes(), scratch), data, n8, ld, rows);
}

}  // namespace htf::gpu
