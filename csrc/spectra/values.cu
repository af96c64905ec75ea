// spectra_values: singular values of the matricizations, M = F E^T of a frame and an environment.
//
//   task: x the frame [x_rows, n], y the environment [y_rows, n], both with their exponents, of at
//   most 128 rows. out: min(x_rows, y_rows) values, descending, the first between a half and
//   1; out_exponents: one power of two for all of them
//
// A block for each node: the product into shared memory by mma_f64, columns of M the shorter side
// (139 KB at 128, 37 KB at 64), then Jacobi (jacobi.cuh).
#include <algorithm>

#include "spectra/jacobi.cuh"

namespace htf::gpu {
namespace {

// a [shorter][ld] = M or its transpose, times 2^-(the result).
__device__ int64_t product(const SpectraTask& k, const SpectraData& d, bool tall, int m, int n,
                           int ld, double* a, int64_t* sums, double* powers) {
  const int inner = static_cast<int>(k.columns);
  for (int i = threadIdx.x; i < inner; i += blockDim.x)
    sums[i] =
        exponent_at(d.exponents, k.x_exponents, i) + exponent_at(d.exponents, k.y_exponents, i);
  __syncthreads();
  int64_t most = sums[0];
  for (int i = 1; i < inner; ++i) most = sums[i] > most ? sums[i] : most;
  for (int i = threadIdx.x; i < inner; i += blockDim.x) {
    const int64_t by = sums[i] - most;
    powers[i] = ldexp(1.0, by < -1100 ? -1100 : static_cast<int>(by));
  }
  __syncthreads();
  const double *longer = d.memory + (tall ? k.x : k.y), *shorter = d.memory + (tall ? k.y : k.x);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int across = (m + 7) / 8, tiles = (n + 7) / 8 * across;
  for (int tile = threadIdx.x / kWarp; tile < tiles; tile += blockDim.x / kWarp) {
    const int j = tile / across * 8 + g, i = tile % across * 8 + g;
    const double* p = shorter + (j < n ? j : 0) * inner;
    const double* q = longer + (i < m ? i : 0) * inner;
    double sum[2] = {};
    for (int c = t; c - t < inner; c += 4) {
      const bool there = c < inner;
      mma_f64(sum, there && j < n ? p[c] * powers[c] : 0.0, there && i < m ? q[c] : 0.0);
    }
    if (j < n)
      *reinterpret_cast<double2*>(a + j * ld + tile % across * 8 + 2 * t) =
          make_double2(sum[0], sum[1]);
  }
  __syncthreads();
  return most;
}

template <int Entries>
__global__ void __launch_bounds__(kLanes * Entries * 4, 1)
    values_kernel(SpectraData d, double* values, int64_t* exponents, int size, int widest) {
  const SpectraTask k = d.task[blockIdx.x];
  const bool tall = k.x_rows >= k.y_rows;
  const int m = static_cast<int>(tall ? k.x_rows : k.y_rows);
  const int n = static_cast<int>(tall ? k.y_rows : k.x_rows), ld = jacobi_ld(m);
  double* a = shared_memory<double>();
  double *s = a + size, *powers = s + kWidest;
  int64_t* sums = reinterpret_cast<int64_t*>(powers + widest);
  int* place = reinterpret_cast<int*>(sums + widest);
  const int64_t most = product(k, d, tall, m, n, ld, a, sums, powers);
  const int e = exponent_of(largest_of(a, m, n, ld, powers));
  scale_down(a, m, n, ld, e);
  to_triangle<Entries>(a, m, n, ld, nullptr);
  jacobi<Entries>(a, n, ld, nullptr, 0);
  lengths(a, n, ld, s, place);
  double first = s[0];
  for (int j = 1; j < n; ++j) first = place[j] == 0 ? s[j] : first;
  const int own = exponent_of(first);
  for (int j = threadIdx.x; j < n; j += blockDim.x) values[k.out + place[j]] = ldexp(s[j], -own);
  if (threadIdx.x == 0) exponents[k.out_exponents] = most + e + own;
}

template <int Entries>
void launch_values(const Current& current, const SpectraData& data, const SpectraLaunch& l,
                   double* values, int64_t* exponents) {
  const int n = static_cast<int>(l.columns), size = n * jacobi_ld(static_cast<int>(l.rows));
  const int widest = std::max(static_cast<int>(l.widest), kWarp);
  launch<values_kernel<Entries>>(
      "spectra's singular values", current, static_cast<unsigned>(l.tasks), jacobi_threads(n),
      (size + 2 * kWidest + 2 * widest) * sizeof(double), data, values, exponents, size, widest);
}

// launches: of each the first task, their number, the most columns and rows of M (rows >= columns),
// and the most columns of a frame.
std::vector<Tensor> spectra_values(const Tensor& memory, const Tensor& exponents,
                                   const Tensor& table, const std::vector<int64_t>& launches,
                                   const std::vector<int64_t>& sizes) {
  constexpr const char* kOp = "spectra_values";
  const auto is = [](const Tensor& t, ScalarType dtype, int64_t dim) {
    return on_device(t) && t.scalar_type() == dtype && t.dim() == dim && t.is_contiguous();
  };
  check(is(memory, ScalarType::Double, 1) && is(exponents, ScalarType::Long, 1), kOp,
        ": memory and exponents must be what spectra_factors returned, got ", describe(memory),
        " and ", describe(exponents));
  check(is(table, ScalarType::Long, 2) && table.size(1) == kTaskFields, kOp,
        ": table must be int64 [tasks, ", kTaskFields, "], got ", describe(table));
  check(sizes.size() == 2 && launches.size() % 5 == 0, kOp,
        ": sizes must be two numbers and launches five for each launch");
  const Current current(memory);
  const Tensor values = device_tensor(current, memory, {sizes[0]}, ScalarType::Double);
  const Tensor powers = device_tensor(current, memory, {sizes[1]}, ScalarType::Long);
  SpectraData data{};
  data.memory = static_cast<double*>(memory.data_ptr());
  data.exponents = static_cast<int64_t*>(exponents.data_ptr());
  const SpectraTask* tasks = static_cast<const SpectraTask*>(table.const_data_ptr());
  for (std::size_t i = 0; i < launches.size(); i += 5) {
    const SpectraLaunch l{launches[i],     launches[i + 1], 1,
                          launches[i + 2], launches[i + 3], launches[i + 4]};
    check(l.first >= 0 && l.tasks >= 0 && l.first + l.tasks <= table.size(0) && l.columns >= 1 &&
              l.columns <= l.rows && l.rows <= kWidest && l.widest >= 1,
          kOp, ": launch ", i / 5, " does not fit the table, or is wider than ", kWidest);
    data.task = tasks + l.first;
    double* to = static_cast<double*>(values.data_ptr());
    int64_t* to_powers = static_cast<int64_t*>(powers.data_ptr());
    if (l.rows <= 16)
      launch_values<2>(current, data, l, to, to_powers);
    else if (l.rows <= 32)
      launch_values<4>(current, data, l, to, to_powers);
    else if (l.rows <= 64)
      launch_values<8>(current, data, l, to, to_powers);
    else
      launch_values<16>(current, data, l, to, to_powers);
  }
  return {values, powers};
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def(
      "spectra_values(Tensor memory, Tensor exponents, Tensor table, int[] launches, int[] sizes) "
      "-> Tensor[]");
}
HTF_CUDA_KERNELS(m) { m.impl("spectra_values", TORCH_BOX(&htf::gpu::spectra_values)); }
