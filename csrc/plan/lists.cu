// plan_columns, plan_group, plan_starts: what an index plan needs beside its pairs, on the device.
// No kernel waits for the host, and the host for none.
//
//   plan_columns(indices [B, N] int64, dims, bad) -> [N, B] int32
//     The indices mode by mode. bad[m], INT32_MAX before, becomes the first sample whose index of
//     mode m is not in 0 .. dims[m] - 1; 0 stands in the place of such an index.
//   plan_group(ids [n] int32 each, buckets) -> every start [buckets + 1], then every order [n]
//     The positions of id k, ascending, are order[start[k] .. start[k + 1] - 1].
//   plan_starts(ids [n] int32 each, buckets) -> every start [buckets + 1]; the ids ascend.
//
// columns: 8 bytes read and 4 written per index. A block turns a tile of up to 32 modes (a power
// of two) and 4096 entries in 17 KB of shared memory: neighbouring threads read what lies together,
// modes or samples, and write neighbouring samples. A tile's rows are 32 / modes words longer than
// its samples, so that neither way two threads of a warp meet in a bank. It is launched once for
// each 32 modes, whose dims are arguments.
//
// group: a stable radix sort of the ids with their positions, over as many bits as the last bucket
// has: 16 bytes per id and 16 for each 8 bits, and start. Short lists are sorted together, up to 32
// of 2^22 ids in all, with the list's number above the bits of its ids: launches are what short
// ones cost.
//
// starts: each entry by a search of the sorted ids; the threads of a warp share most steps of it.
// That writes 4 bytes per bucket at full width however the ids are spread. 32 lists in a launch.
#include <algorithm>
#include <bit>
#include <climits>
#include <utility>
#include <vector>

#include "plan/device_sort.h"

namespace htf::gpu {
namespace {

constexpr int kListThreads = 256;
constexpr int kListEach = 4;
constexpr int kModes = 32;
constexpr int kEntries = 4096;  // of a tile
constexpr int kLists = 32;      // in a launch
constexpr int64_t kTogether = int64_t{1} << 22;

struct Columns {
  const int64_t* indices;
  int64_t by_sample, by_mode, samples;  // strides; B
  int32_t* out;                         // of the first mode
  int* bad;
  int modes, log_modes;  // log_modes: of the tile
  bool samples_together;
  int dims[kModes];
};

__global__ void __launch_bounds__(kListThreads) columns(__grid_constant__ const Columns c) {
  int32_t* tile = shared_memory<int32_t>();
  const int wide = 1 << c.log_modes, tall = kEntries >> c.log_modes;
  const int log_tall = 12 - c.log_modes, pitch = tall + kModes / wide;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tall;
#pragma unroll 4
  for (int e = threadIdx.x; e < kEntries; e += kListThreads) {
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
  for (int e = threadIdx.x; e < kEntries; e += kListThreads) {
    const int mode = e >> log_tall, row = e & (tall - 1);
    const int64_t sample = first + row;
    if (mode < c.modes && sample < c.samples)
      c.out[mode * c.samples + sample] = tile[mode * pitch + row];
  }
}

struct List {
  const int32_t* ids;
  int64_t n, from;  // from: of its keys
  uint32_t prefix;  // of its keys, above the bits of ids
};

struct Lists {
  List at[kLists];
};

__global__ void __launch_bounds__(kListThreads)
    number_ids(__grid_constant__ const Lists lists, uint32_t* keys, int32_t* positions) {
  const List& list = lists.at[blockIdx.y];
#pragma unroll
  for (int j = 0; j < kListEach; ++j) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * (kListThreads * kListEach) +
                      j * kListThreads + threadIdx.x;
    if (i >= list.n) continue;
    keys[list.from + i] = list.prefix | static_cast<uint32_t>(list.ids[i]);
    positions[list.from + i] = static_cast<int32_t>(i);
  }
}

struct Search {
  const uint32_t* sorted;
  int64_t n, buckets;
  int32_t* start;
  uint32_t prefix;
};

struct Searches {
  Search at[kLists];
};

// start[k]: the first position whose id is k or more.
__global__ void __launch_bounds__(kListThreads) starts(__grid_constant__ const Searches searches) {
  const Search& s = searches.at[blockIdx.y];
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kListThreads + threadIdx.x;
  if (k > s.buckets) return;
  const int64_t key = s.prefix + k;
  int64_t at = 0;
  for (int64_t left = s.n; left > 0;) {
    const int64_t half = left / 2;
    if (s.sorted[at + half] < key) {
      at += half + 1;
      left -= half + 1;
    } else {
      left = half;
    }
  }
  s.start[k] = static_cast<int32_t>(at);
}

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

// Of the numbers 0 .. n - 1.
int bits_below(int64_t n) {
  return n > 1 ? static_cast<int>(std::bit_width(static_cast<uint64_t>(n - 1))) : 0;
}

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
    c.log_modes = bits_below(c.modes);
    for (int i = 0; i < c.modes; ++i) c.dims[i] = static_cast<int>(dims[m + i]);
    const int wide = 1 << c.log_modes;
    launch<columns>("columns", current, blocks(n, kEntries / wide), kListThreads,
                    (kEntries + kModes) * sizeof(int32_t), c);
  }
  return out;
}

void check_ids(const char* op, const std::vector<Tensor>& ids,
               const std::vector<int64_t>& buckets) {
  check(!ids.empty() && ids.size() == buckets.size(), op,
        ": expected as many lists of ids as numbers of buckets, and at least one, got ", ids.size(),
        " and ", buckets.size());
  for (std::size_t i = 0; i < ids.size(); ++i)
    check(on_device(ids[i]) && ids[i].scalar_type() == ScalarType::Int && ids[i].dim() == 1 &&
              ids[i].is_contiguous() && ids[i].size(0) <= INT32_MAX && buckets[i] >= 0 &&
              buckets[i] <= INT32_MAX,
          op, ": expected contiguous ids Int [n] and fewer than 2^31 of them and of buckets, got ",
          describe(ids[i]), " and ", buckets[i]);
}

// Appends each search's start to `out`.
void search(const Current& current, const Tensor& like, std::vector<Search> searches,
            std::vector<Tensor>& out) {
  int64_t entries = 0;
  for (const Search& s : searches) entries += s.buckets + 1;
  Tensor all = device_tensor(current, like, {entries}, ScalarType::Int);
  int64_t from = 0;
  for (Search& s : searches) {
    s.start = static_cast<int32_t*>(all.mutable_data_ptr()) + from;
    out.push_back(torch::stable::narrow(all, 0, from, s.buckets + 1));
    from += s.buckets + 1;
  }
  for (std::size_t begin = 0; begin < searches.size(); begin += kLists) {
    const auto count = std::min<std::size_t>(searches.size() - begin, kLists);
    Searches these{};
    std::copy_n(searches.begin() + begin, count, these.at);
    int64_t most = 0;
    for (std::size_t i = 0; i < count; ++i) most = std::max(most, these.at[i].buckets);
    launch<starts>("starts", current, dim3(blocks(most + 1, kListThreads), count), kListThreads, 0,
                   these);
  }
}

std::vector<Tensor> plan_group(const std::vector<Tensor>& ids,
                               const std::vector<int64_t>& buckets) {
  check_ids("plan_group", ids, buckets);
  const Current current(ids[0]);
  std::vector<Search> searches;
  std::vector<Tensor> orders;
  std::vector<Sortable<uint32_t>> sorted;  // alive until they have been searched
  for (std::size_t begin = 0; begin < ids.size();) {
    Lists these{};
    unsigned count = 0;
    int bits = 0;
    int64_t n = 0, longest = 0;
    for (std::size_t i = begin; i < ids.size() && count < kLists; ++i, ++count) {
      const int64_t size = ids[i].size(0);
      const int wide = std::max(bits, bits_below(buckets[i]));
      if (count > 0 && (n + size > kTogether || wide + bits_below(count + 1) > 32)) break;
      these.at[count] = {static_cast<const int32_t*>(ids[i].const_data_ptr()), size, n, 0};
      bits = wide;
      n += size;
      longest = std::max(longest, size);
    }
    for (unsigned c = 1; c < count; ++c) these.at[c].prefix = c << bits;
    Sortable<uint32_t>& sortable = sorted.emplace_back(current, ids[0], n);
    launch<number_ids>("number_ids", current,
                       dim3(blocks(longest, kListThreads * kListEach), count), kListThreads, 0,
                       these, sortable.keys(), sortable.values());
    sort_pairs(current, ids[0], sortable, n, bits + bits_below(count));
    Tensor values = sortable.values_tensor();
    for (unsigned c = 0; c < count; ++c) {
      const List& list = these.at[c];
      searches.push_back(
          {sortable.keys() + list.from, list.n, buckets[begin + c], nullptr, list.prefix});
      orders.push_back(torch::stable::narrow(values, 0, list.from, list.n));
    }
    begin += count;
  }
  std::vector<Tensor> out;
  search(current, ids[0], std::move(searches), out);
  out.insert(out.end(), orders.begin(), orders.end());
  return out;
}

std::vector<Tensor> plan_starts(const std::vector<Tensor>& ids,
                                const std::vector<int64_t>& buckets) {
  check_ids("plan_starts", ids, buckets);
  const Current current(ids[0]);
  std::vector<Search> searches;
  for (std::size_t i = 0; i < ids.size(); ++i)
    searches.push_back({static_cast<const uint32_t*>(ids[i].const_data_ptr()), ids[i].size(0),
                        buckets[i], nullptr, 0});
  std::vector<Tensor> out;
  search(current, ids[0], std::move(searches), out);
  return out;
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def("plan_columns(Tensor indices, int[] dims, Tensor(a!) bad) -> Tensor");
  m.def("plan_group(Tensor[] ids, int[] buckets) -> Tensor[]");
  m.def("plan_starts(Tensor[] ids, int[] buckets) -> Tensor[]");
}
HTF_CUDA_KERNELS(m) {
  m.impl("plan_columns", TORCH_BOX(&htf::gpu::plan_columns));
  m.impl("plan_group", TORCH_BOX(&htf::gpu::plan_group));
  m.impl("plan_starts", TORCH_BOX(&htf::gpu::plan_starts));
}
