// primitives: a matrix product by what cuda/device.h gives, so that it can be tested by itself.
//
//   primitives(a [M, K], b [K, N], which) -> a b, [M, N]
//   which   0: float32 in TF32   1: bfloat16 rounded from float32   2: float64, all by mma
//   M, N and K at most 64, padded here to what the instructions take
//
// One block; b goes through asynchronous copies, the sum over K is split over two warps that add
// theirs by a warp's shuffles and an arrival.
#include "cuda/launch.h"

namespace htf::gpu {
namespace {

constexpr int kSide = 64;
constexpr int kThreads = 128;

struct Product {
  const void* a;
  const void* b;
  void* out;
  int* arrived;
  int m, n, k;
};

template <class T>
__device__ T at(const void* p, int rows, int cols, int i, int j) {
  return i < rows && j < cols ? static_cast<const T*>(p)[i * cols + j] : T{0};
}

__global__ void __launch_bounds__(kThreads) product_f32(Product p, int which) {
  float* b = shared_memory<float>();  // [kSide][kSide]
  for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
    const int row = i / kSide, col = i % kSide;
    const bool there = row < p.k && col < p.n;
    copy_async<4>(b + i, static_cast<const float*>(p.b) + (there ? row * p.n + col : 0), there);
  }
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int depth = which == 0 ? 8 : 16;
  for (int col = 0; col < kSide; col += 8) {
    float d[4] = {0, 0, 0, 0};
    for (int k = 0; k < kSide; k += depth) {
      uint32_t x[4], y[2];
      const auto a = [&](int i, int j) {
        return at<float>(p.a, p.m, p.k, warp * 16 + g + i, k + j);
      };
      const auto w = [&](int i) { return b[(k + i) * kSide + col + g]; };
      if (which == 0) {
        for (int i = 0; i < 4; ++i) x[i] = to_tf32(a(i % 2 * 8, t + i / 2 * 4));
        for (int i = 0; i < 2; ++i) y[i] = to_tf32(w(t + i * 4));
        mma_tf32(d, x, y);
      } else {
        for (int i = 0; i < 4; ++i) {
          const int j = 2 * t + i / 2 * 8;
          x[i] = pack_bf16(a(i % 2 * 8, j), a(i % 2 * 8, j + 1));
        }
        for (int i = 0; i < 2; ++i) y[i] = pack_bf16(w(2 * t + i * 8), w(2 * t + i * 8 + 1));
        mma_bf16(d, x, y);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + g + i / 2 * 8, j = col + 2 * t + i % 2;
      if (row < p.m && j < p.n) static_cast<float*>(p.out)[row * p.n + j] = d[i];
    }
  }
}

// A block for each half of the sum; the one that comes last adds both.
__global__ void __launch_bounds__(kThreads) product_f64(Product p, double* parts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int half = blockIdx.x * (kSide / 2);
  for (int tile = warp; tile < kSide * kSide / 64; tile += kThreads / kWarp) {
    const int row = tile / 8 * 8, col = tile % 8 * 8;
    double d[2] = {0, 0};
    for (int k = half; k < half + kSide / 2; k += 4)
      mma_f64(d, at<double>(p.a, p.m, p.k, row + g, k + t),
              at<double>(p.b, p.k, p.n, k + t, col + g));
    for (int i = 0; i < 2; ++i)
      parts[(blockIdx.x * kSide + row + g) * kSide + col + 2 * t + i] = d[i];
  }
  if (!last_to_arrive(p.arrived, 2)) return;
  for (int i = threadIdx.x; i < p.m * p.n; i += kThreads) {
    const int at = i / p.n * kSide + i % p.n;
    static_cast<double*>(p.out)[i] = __ldcg(parts + at) + __ldcg(parts + kSide * kSide + at);
  }
}

Tensor primitives(const Tensor& a, const Tensor& b, int64_t which) {
  const ScalarType dtype = which == 2 ? ScalarType::Double : ScalarType::Float;
  check(which >= 0 && which <= 2, "primitives: which must be 0, 1 or 2, got ", which);
  const auto fits = [&](const Tensor& t) {
    return on_device(t) && t.scalar_type() == dtype && t.dim() == 2 && t.is_contiguous() &&
           t.size(0) <= kSide && t.size(1) <= kSide;
  };
  check(fits(a) && fits(b) && a.size(1) == b.size(0),
        "primitives: a [M, K] and b [K, N] must be contiguous, of dtype ", toString(dtype),
        " and at most 64 wide, got ", describe(a), " and ", describe(b));
  const Current current(a);
  Tensor out = device_tensor(current, a, {a.size(0), b.size(1)}, dtype);
  const Tensor arrived = device_zeros(current, a, {1}, ScalarType::Int);
  const Product p{a.const_data_ptr(),          b.const_data_ptr(),
                  out.mutable_data_ptr(),      static_cast<int*>(arrived.mutable_data_ptr()),
                  static_cast<int>(a.size(0)), static_cast<int>(b.size(1)),
                  static_cast<int>(a.size(1))};
  if (which == 2) {
    const Tensor parts = device_tensor(current, a, {2 * kSide * kSide}, dtype);
    launch<product_f64>("product_f64", current, 2, kThreads, 0, p,
                        static_cast<double*>(parts.mutable_data_ptr()));
  } else {
    launch<product_f32>("product_f32", current, 1, kThreads, kSide * kSide * sizeof(float), p,
                        static_cast<int>(which));
  }
  return out;
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) { m.def("primitives(Tensor a, Tensor b, int which) -> Tensor"); }
HTF_CUDA_KERNELS(m) { m.impl("primitives", TORCH_BOX(&htf::gpu::primitives)); }
