// plan_pairs: the distinct pairs (left_ids[i], right_ids[i]) of n samples, on the device, for many
// pairs of lists.
//
//   plan_pairs(left_ids [n] each, left_rows, right_ids [n] each, right_rows, limit, counts, at)
//     -> for each ids [n], left [m], right [m], all int32, m = min(limit, left_rows right_rows)
//   counts[at + i] = the number of distinct pairs. Where it is at most the limit, so many entries
//   of left and right are the pairs, sorted by (left, right), and ids is each sample's pair; else
//   the three are not written. Ids are 0 .. rows - 1; that is for the caller to know.
//
// Nothing waits for the device: pairs are counted there, the later kernels read the count and stop
// where it is above the limit, and left and right have room for as many as there may be.
//
// A pair is a cell, left_id * right_rows + right_id, of left_rows * right_rows.
//
// By table, for at most 64 n + 2^20 and 2 * 10^8 cells: a bit for each cell, in units of 16 bytes:
// 96 bits, then the number of pairs in the units before, so that a look-up is one access.
//   mark    sets a sample's bit; it reads first, so that samples of one pair do not queue for it
//   count   adds up the bits of a tile of 256 units; the block that comes last sums over the tiles
//   number  again a tile in each block: the pairs before each unit, and the pairs themselves
//   find    each sample's number: the pairs before its unit and below its bit
// 20 bytes of memory traffic per sample and 2/3 per cell, at most 63 per sample. mark and find also
// hit a random unit each, in 32 MB at most, which stay in an H100's L2 of 50 MB. Of few cells all
// units would be in few slices of the L2, and samples queue there: a table of up to 32 KB is
// therefore marked and read in shared memory, in as many blocks as fit the device at once.
//
// By sorting, else: cells are the keys (32 bits where they fit) and sample numbers the values of a
// stable radix sort over as many bits as a cell has; equal keys lie together then.
//   pack    keys and sample numbers
//   heads   counts keys that differ from the one before, as count does
//   unpack  numbers them; each sample's number goes where the sample is, and each head is divided
//           into its pair
// Per sample 32 bytes, 16 for each 8 bits of the sort, and 32 for a scattered sector: 128 for keys
// of 32 bits, more than twice the table's. Keys of 64 bits: 80 bytes and 24 for each 8 bits.
//
// Launches: 4 and a memset of the tables, for 32 requests together (blockIdx.y is the request); by
// sorting, for each request 3, a memset and CUB's (a histogram, a sum, one for each 8 bits). Shared
// memory: 32 bytes, the sums of warps, or a table. Kernels follow one another; within one, blocks
// meet in count's and heads' last block and in the bits they set with atomicOr.
#include <algorithm>
#include <bit>

#include "plan/device_sort.h"

namespace htf::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr std::size_t kScan = kWarps * sizeof(int);  // shared memory
constexpr int kEach = 4;                             // samples of a thread
constexpr int kHeads = 8;                            // keys of a thread
constexpr int kTile = kThreads * kHeads;
constexpr unsigned kUnit = 96;  // cells
constexpr int64_t kMostCells = int64_t{kUnit} << 21;
constexpr int kFew = 2048;     // units of a table in shared memory
constexpr int kAtOnce = 4096;  // samples that are worth a block with such a table
constexpr int kProblems = 32;  // in a launch
constexpr int64_t kMostWords = int64_t{1} << 26;  // of their tables, where there are several

struct Samples {
  const int32_t* left;
  const int32_t* right;
  int64_t n, right_rows;
};

struct Count {
  int* tiles;    // pairs of each tile, then those of the tiles before it
  int* arrived;  // 0
  int* total;
  int64_t limit;
  __device__ bool too_many() const { return __ldcg(total) > limit; }
};

struct Found {
  int32_t* ids;
  int32_t* left;
  int32_t* right;
};

struct Problem {
  Samples samples;
  Count count;
  Found found;
  uint32_t* table;
  int units;
};

struct Problems {
  Problem at[kProblems];
};

// The sum of x over the threads before this one; all is the whole block's.
__device__ __forceinline__ int sum_before(int x, int& all) {
  int* warps = shared_memory<int>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = x;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  all = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? warps[w] : 0;
    all += warps[w];
  }
  __syncthreads();  // the next sum may overwrite them
  return before + sum - x;
}

// In the first `tiles` blocks; every thread brings its number of pairs.
__device__ __forceinline__ void count_tile(int mine, const Count& count, int tiles) {
  int all;
  sum_before(mine, all);
  if (threadIdx.x == 0) count.tiles[blockIdx.x] = all;
  if (!last_to_arrive(count.arrived, tiles)) return;
  const int each = (tiles + kThreads - 1) / kThreads;
  const int begin = std::min(static_cast<int>(threadIdx.x) * each, tiles),
            end = std::min(begin + each, tiles);
  int sum = 0;
  for (int i = begin; i < end; ++i) sum += __ldcg(count.tiles + i);
  int before = sum_before(sum, all);
  for (int i = begin; i < end; ++i) {
    const int pairs = __ldcg(count.tiles + i);
    count.tiles[i] = before;
    before += pairs;
  }
  if (threadIdx.x == 0) *count.total = all;
}

// -- by table -------------------------------------------------------------------------------------

// The cells of kEach samples, a block apart; ~0 past the last sample.
__device__ __forceinline__ void read_cells(const Samples& s, int64_t first,
                                           uint32_t (&cell)[kEach]) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = first + j * kThreads;
    cell[j] = i < s.n ? static_cast<uint32_t>(s.left[i]) * static_cast<uint32_t>(s.right_rows) +
                            static_cast<uint32_t>(s.right[i])
                      : ~0u;
  }
}

__device__ __forceinline__ int64_t first_sample() {
  return static_cast<int64_t>(blockIdx.x) * (kThreads * kEach) + threadIdx.x;
}

__device__ __forceinline__ uint32_t word_of(uint32_t cell) {
  return cell / kUnit * 4 + cell % kUnit / 32;
}

__device__ __forceinline__ uint32_t bit_of(uint32_t cell) { return 1u << cell % kUnit % 32; }

__global__ void __launch_bounds__(kThreads) mark(__grid_constant__ const Problems problems) {
  const Problem& p = problems.at[blockIdx.y];
  uint32_t cell[kEach], seen[kEach];
  read_cells(p.samples, first_sample(), cell);
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    seen[j] = cell[j] != ~0u ? __ldcg(p.table + word_of(cell[j])) : ~0u;
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if ((seen[j] & bit_of(cell[j])) == 0) atomicOr(p.table + word_of(cell[j]), bit_of(cell[j]));
}

__global__ void __launch_bounds__(kThreads) mark_few(__grid_constant__ const Problems problems) {
  const Problem& p = problems.at[blockIdx.y];
  const int words = p.units * 4;
  uint32_t* mine = shared_memory<uint32_t>();  // [words]
  for (int w = threadIdx.x; w < words; w += kThreads) mine[w] = 0;
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads * kEach);
  for (int64_t first = first_sample(); first < p.samples.n; first += stride) {
    uint32_t cell[kEach];
    read_cells(p.samples, first, cell);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (cell[j] == ~0u) continue;
      uint32_t* word = mine + word_of(cell[j]);
      if ((*word & bit_of(cell[j])) == 0) atomicOr(word, bit_of(cell[j]));
    }
  }
  __syncthreads();
  for (int w = threadIdx.x; w < words; w += kThreads)
    if ((mine[w] & ~__ldcg(p.table + w)) != 0) atomicOr(p.table + w, mine[w]);
}

__device__ __forceinline__ const uint4* units_of(const Problem& p) {
  return reinterpret_cast<const uint4*>(p.table);
}

__device__ __forceinline__ uint4 read_unit(const Problem& p, int unit) {
  return unit < p.units ? units_of(p)[unit] : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ int pairs_of(const uint4& unit) {
  return __popc(unit.x) + __popc(unit.y) + __popc(unit.z);
}

__global__ void __launch_bounds__(kThreads) count(__grid_constant__ const Problems problems) {
  const Problem& p = problems.at[blockIdx.y];
  const int tile = blockIdx.x * kThreads, tiles = (p.units + kThreads - 1) / kThreads;
  if (tile < p.units)
    count_tile(pairs_of(read_unit(p, tile + static_cast<int>(threadIdx.x))), p.count, tiles);
}

__global__ void __launch_bounds__(kThreads) number(__grid_constant__ const Problems problems) {
  const Problem& p = problems.at[blockIdx.y];
  const int tile = blockIdx.x * kThreads, at = tile + static_cast<int>(threadIdx.x);
  if (tile >= p.units || p.count.too_many()) return;
  const uint4 unit = read_unit(p, at);
  int all;
  int row = p.count.tiles[blockIdx.x] + sum_before(pairs_of(unit), all);
  if (at < p.units) p.table[int64_t{4} * at + 3] = static_cast<uint32_t>(row);
  const auto right_rows = static_cast<uint32_t>(p.samples.right_rows);
  const auto write = [&](uint32_t word, uint32_t first) {
    for (; word != 0; word &= word - 1, ++row) {
      const uint32_t cell = first + (__ffs(static_cast<int>(word)) - 1);
      p.found.left[row] = static_cast<int32_t>(cell / right_rows);
      p.found.right[row] = static_cast<int32_t>(cell % right_rows);
    }
  };
  const uint32_t first = static_cast<uint32_t>(at) * kUnit;
  write(unit.x, first);
  write(unit.y, first + 32);
  write(unit.z, first + 64);
}

__device__ __forceinline__ int32_t row_of(uint32_t cell, const uint4& unit) {
  const uint32_t word = cell % kUnit / 32, below = bit_of(cell) - 1;
  return static_cast<int32_t>(unit.w) + __popc(unit.x & (word > 0 ? ~0u : below)) +
         __popc(unit.y & (word > 1    ? ~0u
                          : word == 1 ? below
                                      : 0)) +
         __popc(unit.z & (word == 2 ? below : 0));
}

__global__ void __launch_bounds__(kThreads) find(__grid_constant__ const Problems problems) {
  const Problem& p = problems.at[blockIdx.y];
  if (p.count.too_many()) return;
  uint32_t cell[kEach];
  read_cells(p.samples, first_sample(), cell);
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (cell[j] != ~0u)
      p.found.ids[first_sample() + j * kThreads] = row_of(cell[j], units_of(p)[cell[j] / kUnit]);
}

__global__ void __launch_bounds__(kThreads) find_few(__grid_constant__ const Problems problems) {
  const Problem& p = problems.at[blockIdx.y];
  if (p.count.too_many()) return;
  uint4* mine = shared_memory<uint4>();  // [units]
  for (int u = threadIdx.x; u < p.units; u += kThreads) mine[u] = units_of(p)[u];
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads * kEach);
  for (int64_t first = first_sample(); first < p.samples.n; first += stride) {
    uint32_t cell[kEach];
    read_cells(p.samples, first, cell);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (cell[j] != ~0u)
        p.found.ids[first + j * kThreads] = row_of(cell[j], mine[cell[j] / kUnit]);
  }
}

// -- by sorting -----------------------------------------------------------------------------------

template <class Key>
__global__ void __launch_bounds__(kThreads) pack(Samples samples, Key* keys, int32_t* values) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = first_sample() + j * kThreads;
    if (i >= samples.n) continue;
    keys[i] = static_cast<Key>(samples.left[i]) * static_cast<Key>(samples.right_rows) +
              static_cast<Key>(samples.right[i]);
    values[i] = static_cast<int32_t>(i);
  }
}

template <class Key>
__device__ __forceinline__ bool is_head(const Key* keys, int64_t i, int64_t n) {
  return i < n && (i == 0 || keys[i] != keys[i - 1]);
}

template <class Key>
__global__ void __launch_bounds__(kThreads) heads(const Key* keys, int64_t n, Count c) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  int mine = 0;
#pragma unroll
  for (int j = 0; j < kHeads; ++j) mine += is_head(keys, first + j * kThreads, n);
  count_tile(mine, c, static_cast<int>(gridDim.x));
}

// A warp has kHeads * 32 keys in a row.
template <class Key>
__global__ void __launch_bounds__(kThreads)
    unpack(const Key* keys, const int32_t* values, int64_t n, Count c, Key right_rows,
           Found found) {
  if (c.too_many()) return;
  int* warps = shared_memory<int>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + warp * (kHeads * kWarp) + lane;
  unsigned heads[kHeads];
  int mine = 0;
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    heads[j] = __ballot_sync(~0u, is_head(keys, first + j * kWarp, n));
    mine += __popc(heads[j]);
  }
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  int row = c.tiles[blockIdx.x] - 1;
  for (int w = 0; w < warp; ++w) row += warps[w];
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    const int64_t i = first + j * kWarp;
    if (i < n) {
      const int here = row + __popc(heads[j] & ((2u << lane) - 1));
      found.ids[values[i]] = here;
      if ((heads[j] >> lane & 1) != 0) {
        const Key key = keys[i];
        found.left[here] = static_cast<int32_t>(key / right_rows);
        found.right[here] = static_cast<int32_t>(key % right_rows);
      }
    }
    row += __popc(heads[j]);
  }
}

// -- the host's side ------------------------------------------------------------------------------

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

// Problems whose tables all fit, or all do not fit, in shared memory.
void by_table(const Current& current, const Tensor& like, const std::vector<Problem>& problems,
              bool few) {
  for (std::size_t begin = 0; begin < problems.size();) {
    Problems these{};
    int count_of = 0, units = 0;
    int64_t words = 0, tiles = 0;
    for (; begin < problems.size() && count_of < kProblems; ++begin, ++count_of) {
      const Problem& next = problems[begin];
      if (count_of > 0 && words + int64_t{4} * next.units > kMostWords) break;
      these.at[count_of] = next;
      words += int64_t{4} * next.units;
      tiles += blocks(next.units, kThreads);
      units = std::max(units, next.units);
    }
    const Tensor room = device_zeros(current, like, {words + tiles + count_of}, ScalarType::Int);
    auto* table = static_cast<uint32_t*>(room.mutable_data_ptr());
    int* counts = static_cast<int*>(room.mutable_data_ptr()) + words;
    for (int i = 0; i < count_of; ++i) {
      Problem& p = these.at[i];
      p.table = table;
      p.count.arrived = counts;
      p.count.tiles = counts + 1;
      table += int64_t{4} * p.units;
      counts += 1 + blocks(p.units, kThreads);
    }
    const auto y = static_cast<unsigned>(count_of);
    const dim3 tiled(blocks(units, kThreads), y);
    const int64_t n = these.at[0].samples.n;
    if (few) {
      // Four blocks of 32 KB are in a multiprocessor at once.
      const unsigned at_once = std::max(4u * current.device().processors / y, 1u);
      const dim3 grid(std::min(blocks(n, kAtOnce), at_once), y);
      const std::size_t bytes = units * sizeof(uint4);
      launch<mark_few>("mark_few", current, grid, kThreads, bytes, these);
      launch<count>("count", current, tiled, kThreads, kScan, these);
      launch<number>("number", current, tiled, kThreads, kScan, these);
      launch<find_few>("find_few", current, grid, kThreads, bytes, these);
    } else {
      const dim3 grid(blocks(n, kThreads * kEach), y);
      launch<mark>("mark", current, grid, kThreads, 0, these);
      launch<count>("count", current, tiled, kThreads, kScan, these);
      launch<number>("number", current, tiled, kThreads, kScan, these);
      launch<find>("find", current, grid, kThreads, 0, these);
    }
  }
}

template <class Key>
void by_sorting(const Current& current, const Tensor& like, const Problem& p, int64_t cells) {
  const int64_t n = p.samples.n;
  Sortable<Key> sortable(current, like, n);
  launch<pack<Key>>("pack", current, blocks(n, kThreads * kEach), kThreads, 0, p.samples,
                    sortable.keys(), sortable.values());
  sort_pairs(current, like, sortable, n,
             static_cast<int>(std::bit_width(static_cast<uint64_t>(cells - 1))));
  const unsigned tiles = blocks(n, kTile);
  const Tensor room = device_tensor(current, like, {1 + int64_t{tiles}}, ScalarType::Int);
  int* counts = static_cast<int*>(room.mutable_data_ptr());
  set_bytes(current, counts, 0, sizeof(int));
  const Count c{counts + 1, counts, p.count.total, p.count.limit};
  launch<heads<Key>>("heads", current, tiles, kThreads, kScan, sortable.keys(), n, c);
  launch<unpack<Key>>("unpack", current, tiles, kThreads, kScan, sortable.keys(), sortable.values(),
                      n, c, static_cast<Key>(p.samples.right_rows), p.found);
}

void check_pairs(const std::vector<Tensor>& left, const std::vector<int64_t>& left_rows,
                 const std::vector<Tensor>& right, const std::vector<int64_t>& right_rows,
                 int64_t limit, const Tensor& counts, int64_t at) {
  const std::size_t requests = left.size();
  check(requests > 0 && left_rows.size() == requests && right.size() == requests &&
            right_rows.size() == requests,
        "plan_pairs: expected as many ids as rows, left and right, and at least one, got ",
        requests, ", ", left_rows.size(), ", ", right.size(), " and ", right_rows.size());
  const auto fits = [&](const Tensor& t) {
    return on_device(t) && t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.is_contiguous();
  };
  for (std::size_t i = 0; i < requests; ++i) {
    check(fits(left[i]) && fits(right[i]) && left[i].size(0) == left[0].size(0) &&
              right[i].size(0) == left[0].size(0) && left[0].size(0) <= INT32_MAX,
          "plan_pairs: ids must be contiguous Int [n], of fewer than 2^31 samples, got ",
          describe(left[i]), " and ", describe(right[i]));
    const auto few = [](int64_t rows) { return rows >= 1 && rows <= INT32_MAX; };
    check(few(left_rows[i]) && few(right_rows[i]) && limit >= 0 && limit <= INT32_MAX,
          "plan_pairs: rows and limit must be below 2^31, rows positive, got ", left_rows[i], ", ",
          right_rows[i], " and ", limit);
  }
  check(fits(counts) && at >= 0 && at + static_cast<int64_t>(requests) <= counts.size(0),
        "plan_pairs: counts must be contiguous Int with ", requests, " entries from ", at,
        " on, got ", describe(counts));
}

std::vector<Tensor> plan_pairs(const std::vector<Tensor>& left,
                               const std::vector<int64_t>& left_rows,
                               const std::vector<Tensor>& right,
                               const std::vector<int64_t>& right_rows, int64_t limit,
                               const Tensor& counts, int64_t at) {
  check_pairs(left, left_rows, right, right_rows, limit, counts, at);
  const Current current(counts);
  const int64_t n = left[0].size(0);
  int* total = static_cast<int*>(counts.mutable_data_ptr()) + at;
  std::vector<Tensor> out;
  std::vector<Problem> few, many;
  const auto list = [&](int64_t size) {
    out.push_back(device_tensor(current, counts, {size}, ScalarType::Int));
    return static_cast<int32_t*>(out.back().mutable_data_ptr());
  };
  for (std::size_t i = 0; i < left.size(); ++i) {
    const int64_t cells = left_rows[i] * right_rows[i], room = std::min(limit, cells);
    Problem p{};
    p.samples = {static_cast<const int32_t*>(left[i].const_data_ptr()),
                 static_cast<const int32_t*>(right[i].const_data_ptr()), n, right_rows[i]};
    p.count.total = total + i;
    p.count.limit = limit;
    p.found.ids = list(n);
    p.found.left = list(room);
    p.found.right = list(room);
    if (n == 0) {
      set_bytes(current, p.count.total, 0, sizeof(int));
    } else if (cells <= std::min(64 * n + (1 << 20), kMostCells)) {
      p.units = static_cast<int>((cells + kUnit - 1) / kUnit);
      (p.units <= kFew ? few : many).push_back(p);
    } else if (cells <= int64_t{1} << 32) {
      by_sorting<uint32_t>(current, counts, p, cells);
    } else {
      by_sorting<uint64_t>(current, counts, p, cells);
    }
  }
  by_table(current, counts, few, true);
  by_table(current, counts, many, false);
  return out;
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def(
      "plan_pairs(Tensor[] left_ids, int[] left_rows, Tensor[] right_ids, int[] right_rows, int "
      "limit, Tensor(a!) counts, int at) -> Tensor[]");
}
HTF_CUDA_KERNELS(m) { m.impl("plan_pairs", TORCH_BOX(&htf::gpu::plan_pairs)); }
