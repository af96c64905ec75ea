// plan_columns, plan_group, plan_starts: what an index plan needs beside its pairs, on the device.
// No kernel waits for the host, and the host for none.
//
//   plan_columns(indices [B, N] int64, dims, bad) -> [N, B] int32
//     The indices mode by mode. bad[m], INT32_MAX before, becomes the first sample whose index of
//     mode m is not in 0 .. dims[m] - 1; 0 stands in the place of such an index.
//   plan_group(ids [n] int32, buckets) -> [start [buckets + 1], order [n]], int32
//     The positions of id k, ascending, are order[start[k] .. start[k + 1] - 1].
//   plan_starts(ids [n] int32, buckets) -> start [buckets + 1]; the ids ascend.
//
// columns: 8 bytes read and 4 written per index. A block turns a tile of up to 32 modes (a power
// of two) and 4096 entries in 17 KB of shared memory: neighbouring threads read what lies together,
// modes or samples, and write neighbouring samples. A tile's rows are 32 / modes words longer than
// its samples, so that neither way two threads of a warp meet in a bank. It is launched once for
// each 32 modes, whose dims are arguments.
//
// group: a stable radix sort of the ids with their positions, over as many bits as the last bucket
// has: 16 bytes per id and 16 for each 8 bits, and start.
//
// start: each entry by a search of the sorted ids; the threads of a warp share most steps of it.
// That writes 4 bytes per bucket at full width however the ids are spread.
#include <algorithm>
#include <bit>
#include <climits>

#include "plan/device_sort.h"

namespace htf::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;
constexpr int kModes = 32;
constexpr int kEntries = 4096;  // of a tile

struct Columns {
  const int64_t* indices;
  int64_t by_sample, by_mode, samples;  // strides; B
  int32_t* out;                         // of the first mode
  int* bad;
  int modes, log_modes;  // log_modes: of the tile
  bool samples_together;
  int dims[kModes];
};

__global__ void __launch_bounds__(kThreads) columns(__grid_constant__ const Columns c) {
  int32_t* tile = shared_memory<int32_t>();
  const int wide = 1 << c.log_modes, tall = kEntries >> c.log_modes;
  const int log_tall = 12 - c.log_modes, pitch = tall + kModes / wide;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tall;
#pragma unroll 4
  for (int e = threadIdx.x; e < kEntries; e += kThreads) {
    const int mode = c.samples_together ? e >> log_tall : e & (wide - 1);
    const int row = c.samples_together ? e & (tall - 1) : e >> c.log_modes;
    const int64_t sample = first + row;
    if (mode >= c.modes || sample >= c.samples) continue;
    int64_t index = c.indices[sample * c.by_sample + mode * c.by_mode];
    if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(c.dims[mode])) {
      atomicMin(c.bad + mode, static_cast<int>(sample));
      index = 0;
    }
    tile[mode * pitch + row] = static_cast<int32_t>(index);
  }
  __syncthreads();
#pragma unroll 4
  for (int e = threadIdx.x; e < kEntries; e += kThreads) {
    const int mode = e >> log_tall, row = e & (tall - 1);
    const int64_t sample = first + row;
    if (mode < c.modes && sample < c.samples)
      c.out[mode * c.samples + sample] = tile[mode * pitch + row];
  }
}

__global__ void __launch_bounds__(kThreads)
    number(const int32_t* ids, int64_t n, uint32_t* keys, int32_t* positions) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t i =
        static_cast<int64_t>(blockIdx.x) * (kThreads * kEach) + j * kThreads + threadIdx.x;
    if (i >= n) continue;
    keys[i] = static_cast<uint32_t>(ids[i]);
    positions[i] = static_cast<int32_t>(i);
  }
}

// start[k]: the first position whose id is k or more.
__global__ void __launch_bounds__(kThreads)
    starts(const uint32_t* sorted, int64_t n, int64_t buckets, int32_t* start) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k > buckets) return;
  int64_t at = 0;
  for (int64_t left = n; left > 0;) {
    const int64_t half = left / 2;
    if (sorted[at + half] < k) {
      at += half + 1;
      left -= half + 1;
    } else {
      left = half;
    }
  }
  start[k] = static_cast<int32_t>(at);
}

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

Tensor plan_columns(const Tensor& indices, const std::vector<int64_t>& dims, const Tensor& bad) {
  const auto order = static_cast<int64_t>(dims.size());
  check(on_device(indices) && indices.scalar_type() == ScalarType::Long && indices.dim() == 2 &&
            indices.size(1) == order && indices.size(0) <= INT32_MAX,
        "plan_columns: indices must be Long [B, ", order, "], of fewer than 2^31 samples, got ",
        describe(indices));
  check(on_device(bad) && bad.scalar_type() == ScalarType::Int && bad.dim() == 1 &&
            bad.is_contiguous() && bad.size(0) >= order,
        "plan_columns: bad must be contiguous Int with an entry for each of ", order,
        " modes, got ", describe(bad));
  for (const int64_t dim : dims)
    check(dim >= 1 && dim <= INT32_MAX, "plan_columns: dims must be in 1 .. 2^31 - 1, got ", dim);
  const Current current(indices);
  const int64_t n = indices.size(0);
  Tensor out = device_tensor(current, indices, {order, n}, ScalarType::Int);
  if (n == 0) return out;
  Columns c{};
  c.by_sample = indices.stride(0);
  c.by_mode = indices.stride(1);
  c.samples = n;
  c.samples_together = std::abs(c.by_sample) < std::abs(c.by_mode);
  for (int64_t m = 0; m < order; m += kModes) {
    c.indices = static_cast<const int64_t*>(indices.const_data_ptr()) + m * c.by_mode;
    c.out = static_cast<int32_t*>(out.mutable_data_ptr()) + m * n;
    c.bad = static_cast<int*>(bad.mutable_data_ptr()) + m;
    c.modes = static_cast<int>(std::min<int64_t>(order - m, kModes));
    c.log_modes = std::bit_width(static_cast<unsigned>(c.modes - 1));
    for (int i = 0; i < c.modes; ++i) c.dims[i] = static_cast<int>(dims[m + i]);
    const int wide = 1 << c.log_modes;
    launch<columns>("columns", current, blocks(n, kEntries / wide), kThreads,
                    (kEntries + kModes) * sizeof(int32_t), c);
  }
  return out;
}

void check_ids(const char* op, const Tensor& ids, int64_t buckets) {
  check(on_device(ids) && ids.scalar_type() == ScalarType::Int && ids.dim() == 1 &&
            ids.is_contiguous() && ids.size(0) <= INT32_MAX && buckets >= 0 && buckets <= INT32_MAX,
        op, ": expected contiguous ids Int [n] and fewer than 2^31 of them and of buckets, got ",
        describe(ids), " and ", buckets);
}

Tensor starts_of(const Current& current, const Tensor& like, const void* sorted, int64_t n,
                 int64_t buckets) {
  Tensor start = device_tensor(current, like, {buckets + 1}, ScalarType::Int);
  launch<starts>("starts", current, blocks(buckets + 1, kThreads), kThreads, 0,
                 static_cast<const uint32_t*>(sorted), n, buckets,
                 static_cast<int32_t*>(start.mutable_data_ptr()));
  return start;
}

std::vector<Tensor> plan_group(const Tensor& ids, int64_t buckets) {
  check_ids("plan_group", ids, buckets);
  const Current current(ids);
  const int64_t n = ids.size(0);
  Sortable<uint32_t> sortable(current, ids, n);
  launch<number>("number", current, blocks(n, kThreads * kEach), kThreads, 0,
                 static_cast<const int32_t*>(ids.const_data_ptr()), n, sortable.keys(),
                 sortable.values());
  const auto last = static_cast<uint64_t>(std::max<int64_t>(buckets - 1, 0));
  sort_pairs(current, ids, sortable, n, std::bit_width(last));
  return {starts_of(current, ids, sortable.keys(), n, buckets), sortable.values_tensor()};
}

Tensor plan_starts(const Tensor& ids, int64_t buckets) {
  check_ids("plan_starts", ids, buckets);
  return starts_of(Current(ids), ids, ids.const_data_ptr(), ids.size(0), buckets);
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def("plan_columns(Tensor indices, int[] dims, Tensor(a!) bad) -> Tensor");
  m.def("plan_group(Tensor ids, int buckets) -> Tensor[]");
  m.def("plan_starts(Tensor ids, int buckets) -> Tensor");
}
HTF_CUDA_KERNELS(m) {
  m.impl("plan_columns", TORCH_BOX(&htf::gpu::plan_columns));
  m.impl("plan_group", TORCH_BOX(&htf::gpu::plan_group));
  m.impl("plan_starts", TORCH_BOX(&htf::gpu::plan_starts));
}
