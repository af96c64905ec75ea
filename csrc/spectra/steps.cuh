// What the kernels of the spectra on a GPU share: tasks, scale, and products of triangular strips.
//
// The host (htfkernels/cuda/spectra.py) writes the tree down as launches of tasks, once for a
// layout; a task is a row of kTaskFields numbers in a table on the device, and a launch a run of
// rows that do not depend on each other. All matrices of a call are in one piece of memory, row
// after row without padding; each has one power of two for every column, int64, that it is to be
// taken by. Offsets are in elements.
#pragma once

#include <math.h>

#include "cuda/launch.h"

namespace htf::gpu {

struct SpectraTask {
  int64_t x, x_rows, x_triangular;  // x: -1 the identity
  int64_t y, y_rows, y_triangular;  // y: -1 a row of ones
  int64_t columns;
  int64_t mode;  // see the kernels
  int64_t out;
  int64_t x_exponents, y_exponents, out_exponents;  // -1: zeros
  int64_t weight;                                   // -1: ones
  int64_t inner;                                    // columns of x where they are not `columns`
  int64_t unused[2];
};
constexpr int64_t kTaskFields = 16;
static_assert(sizeof(SpectraTask) == kTaskFields * sizeof(int64_t));

constexpr int kWidest = 128;   // columns of what is decomposed
constexpr int kThreads = 256;  // of most blocks

// What a launch of tasks works on.
struct SpectraData {
  const SpectraTask* task;  // of the launch
  double* memory;
  int64_t* exponents;
  const double* weights;
  double* parts;  // triangles of parts of matrices
  int* arrived;   // zero
};

// How a launch is made: tasks, blocks for each, and the largest sizes among them: columns and rows
// of what is decomposed (of a product with weights: columns, and rows of the weight), and columns
// of any factor.
struct SpectraLaunch {
  int64_t first, tasks, parts, columns, rows, widest;
};

void launch_triangles(const Current& current, const SpectraData& data, const SpectraLaunch& l);
void launch_grams(const Current& current, const SpectraData& data, const SpectraLaunch& l);
void launch_multiply(const Current& current, const SpectraData& data, const SpectraLaunch& l);
// Doubles of memory for the parts of a launch.
int64_t triangle_parts(const SpectraLaunch& l);

__host__ __device__ __forceinline__ int round_up(int n, int to) { return (n + to - 1) / to * to; }
// Rows of shared memory that lie this far apart let a warp read the operands of mma_f64 from them
// without bank conflicts, along rows and along columns.
inline int padded_row(int n) { return round_up(n, 16) + 4; }

// The k with 2^(k-1) <= x < 2^k; 0 for zero and for what is no finite number.
__device__ __forceinline__ int exponent_of(double x) {
  int k = 0;
  if (x > 0 && x <= 1.7976931348623157e308) frexp(x, &k);
  return k;
}

__device__ __forceinline__ int64_t exponent_at(const int64_t* exponents, int64_t at, int column) {
  return at < 0 ? 0 : exponents[at + column];
}

}  // namespace htf::gpu
