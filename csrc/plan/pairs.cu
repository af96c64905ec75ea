// plan_pairs: the distinct pairs (left_ids[i], right_ids[i]) of n samples, on the device.
//
//   plan_pairs(left_ids [n], left_rows, right_ids [n], right_rows, limit, counts, at)
//     -> [ids [n], left [m], right [m]], all int32, m = min(limit, left_rows right_rows)
//   counts[at] = the number of distinct pairs. Where it is at most the limit, so many entries of
//   left and right are the pairs, sorted by (left, right), and ids is each sample's pair; else the
//   three are not written. Ids are 0 .. rows - 1; that is for the caller to know.
//
// Nothing waits for the device: pairs are counted there, the later kernels read the count and stop
// where it is above the limit, and left and right have room for as many as there may be.
//
// A pair is a cell, left_id * right_rows + right_id, of left_rows * right_rows.
//
// By table, for at most 64 n + 2^20 and 2^28 cells: a bit for each cell, in sectors of 32 bytes:
// 224 bits, then the number of pairs in the sectors before, so that a look-up costs one access.
//   mark    sets a sample's bit; it reads first, so that samples of one pair do not queue for it
//   count   adds up the bits of a tile of 4 KB; the block that comes last sums over the tiles
//   number  again a tile in each block: the pairs before each sector, and the pairs themselves
//   find    each sample's number: the pairs before its sector and below its bit
// 20 bytes of memory traffic per sample and 4/7 per cell, at most 57 per sample (mark and find also
// hit a random sector each, of 38 MB at most, which stay in an H100's L2 of 50).
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
// Launches: 4 and a memset of the table, or 3, a memset and CUB's (a histogram, a sum, one for each
// 8 bits). Shared memory: 32 bytes, the sums of warps.
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
constexpr unsigned kSectorCells = 224;
constexpr int64_t kMostCells = int64_t{1} << 28;

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

// Every thread brings its number of pairs.
__device__ __forceinline__ void count_tile(int mine, const Count& count) {
  int all;
  sum_before(mine, all);
  if (threadIdx.x == 0) count.tiles[blockIdx.x] = all;
  const int tiles = static_cast<int>(gridDim.x);
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

__global__ void __launch_bounds__(kThreads) mark(Samples samples, uint32_t* table) {
  uint32_t cell[kEach], seen[kEach];
  read_cells(samples, first_sample(), cell);
  const auto word = [&](uint32_t c) {
    return table + (c / kSectorCells * 8 + c % kSectorCells / 32);
  };
#pragma unroll
  for (int j = 0; j < kEach; ++j) seen[j] = cell[j] != ~0u ? __ldcg(word(cell[j])) : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const uint32_t bit = 1u << (cell[j] % kSectorCells % 32);
    if (cell[j] != ~0u && (seen[j] & bit) == 0) atomicOr(word(cell[j]), bit);
  }
}

// Half a sector; in the second half the last word is no bits.
__device__ __forceinline__ uint4 read_half(const uint32_t* table, int64_t half, int64_t halves) {
  uint4 bits = make_uint4(0, 0, 0, 0);
  if (half < halves) bits = reinterpret_cast<const uint4*>(table)[half];
  if (half % 2 != 0) bits.w = 0;
  return bits;
}

__device__ __forceinline__ int pairs_of(const uint4& bits) {
  return __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
}

__global__ void __launch_bounds__(kThreads) count(const uint32_t* table, int64_t halves, Count c) {
  const int64_t half = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  count_tile(pairs_of(read_half(table, half, halves)), c);
}

__global__ void __launch_bounds__(kThreads)
    number(uint32_t* table, int64_t halves, Count c, uint32_t right_rows, Found found) {
  if (c.too_many()) return;
  const int64_t half = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const uint4 bits = read_half(table, half, halves);
  int all;
  int row = c.tiles[blockIdx.x] + sum_before(pairs_of(bits), all);
  const int of_sector = __shfl_sync(~0u, row, threadIdx.x % kWarp & ~1u);
  if (half < halves && half % 2 != 0) table[half * 4 + 3] = static_cast<uint32_t>(of_sector);
  const uint32_t first = static_cast<uint32_t>(half / 2 * kSectorCells + half % 2 * 128);
  const auto write = [&](uint32_t word, uint32_t cell) {
    for (; word != 0; word &= word - 1, ++row) {
      const uint32_t at = cell + (__ffs(static_cast<int>(word)) - 1);
      found.left[row] = static_cast<int32_t>(at / right_rows);
      found.right[row] = static_cast<int32_t>(at % right_rows);
    }
  };
  write(bits.x, first);
  write(bits.y, first + 32);
  write(bits.z, first + 64);
  write(bits.w, first + 96);
}

__global__ void __launch_bounds__(kThreads)
    find(Samples samples, const uint32_t* table, Count c, int32_t* ids) {
  if (c.too_many()) return;
  uint32_t cell[kEach];
  read_cells(samples, first_sample(), cell);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (cell[j] == ~0u) continue;
    const uint32_t sector = cell[j] / kSectorCells, within = cell[j] % kSectorCells;
    const uint4* halves = reinterpret_cast<const uint4*>(table) + int64_t{2} * sector;
    const uint4 low = halves[0], high = halves[1];
    const uint32_t words[7] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z};
    int row = static_cast<int>(high.w);
#pragma unroll
    for (uint32_t w = 0; w < 7; ++w) {
      const uint32_t below = within / 32 > w ? ~0u : within / 32 == w ? (1u << within % 32) - 1 : 0;
      row += __popc(words[w] & below);
    }
    ids[first_sample() + j * kThreads] = row;
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
  count_tile(mine, c);
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

// Room for a Count, its arrivals 0.
Tensor count_room(const Current& current, const Tensor& like, unsigned tiles) {
  Tensor room = device_tensor(current, like, {1 + int64_t{tiles}}, ScalarType::Int);
  set_bytes(current, room.mutable_data_ptr(), 0, sizeof(int));
  return room;
}

Count count_in(const Tensor& room, int* total, int64_t limit) {
  int* p = static_cast<int*>(room.mutable_data_ptr());
  return {p + 1, p, total, limit};
}

void by_table(const Current& current, const Tensor& like, const Samples& s, int64_t cells,
              int* total, int64_t limit, const Found& found) {
  const int64_t sectors = (cells + kSectorCells - 1) / kSectorCells;
  const Tensor made = device_zeros(current, like, {sectors * 8}, ScalarType::Int);
  uint32_t* table = static_cast<uint32_t*>(made.mutable_data_ptr());
  const unsigned tiles = blocks(2 * sectors, kThreads), each = blocks(s.n, kThreads * kEach);
  const Tensor room = count_room(current, like, tiles);
  const Count c = count_in(room, total, limit);
  launch<mark>("mark", current, each, kThreads, 0, s, table);
  launch<count>("count", current, tiles, kThreads, kScan, table, 2 * sectors, c);
  launch<number>("number", current, tiles, kThreads, kScan, table, 2 * sectors, c,
                 static_cast<uint32_t>(s.right_rows), found);
  launch<find>("find", current, each, kThreads, 0, s, table, c, found.ids);
}

template <class Key>
void by_sorting(const Current& current, const Tensor& like, const Samples& s, int64_t cells,
                int* total, int64_t limit, const Found& found) {
  Sortable<Key> sortable(current, like, s.n);
  launch<pack<Key>>("pack", current, blocks(s.n, kThreads * kEach), kThreads, 0, s, sortable.keys(),
                    sortable.values());
  sort_pairs(current, like, sortable, s.n, std::bit_width(static_cast<uint64_t>(cells - 1)));
  const unsigned tiles = blocks(s.n, kTile);
  const Tensor room = count_room(current, like, tiles);
  const Count c = count_in(room, total, limit);
  launch<heads<Key>>("heads", current, tiles, kThreads, kScan, sortable.keys(), s.n, c);
  launch<unpack<Key>>("unpack", current, tiles, kThreads, kScan, sortable.keys(), sortable.values(),
                      s.n, c, static_cast<Key>(s.right_rows), found);
}

std::vector<Tensor> plan_pairs(const Tensor& left, int64_t left_rows, const Tensor& right,
                               int64_t right_rows, int64_t limit, const Tensor& counts,
                               int64_t at) {
  constexpr int64_t kMost = INT32_MAX;
  const auto fits = [&](const Tensor& t) {
    return on_device(t) && t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.is_contiguous();
  };
  check(fits(left) && fits(right) && left.size(0) == right.size(0) && left.size(0) <= kMost,
        "plan_pairs: ids must be contiguous Int [n], of fewer than 2^31 samples, got ",
        describe(left), " and ", describe(right));
  check(fits(counts) && at >= 0 && at < counts.size(0),
        "plan_pairs: counts must be contiguous Int ", "with an entry ", at, ", got ",
        describe(counts));
  check(left_rows >= 1 && right_rows >= 1 && limit >= 0 && left_rows <= kMost &&
            right_rows <= kMost && limit <= kMost,
        "plan_pairs: rows and limit must be below 2^31, rows positive, got ", left_rows, ", ",
        right_rows, " and ", limit);
  const Current current(left);
  const int64_t n = left.size(0), cells = left_rows * right_rows, room = std::min(limit, cells);
  int* total = static_cast<int*>(counts.mutable_data_ptr()) + at;
  const auto list = [&](int64_t size) {
    return device_tensor(current, left, {size}, ScalarType::Int);
  };
  const std::vector<Tensor> out = {list(n), list(room), list(room)};
  if (n == 0) {
    set_bytes(current, total, 0, sizeof(int));
    return out;
  }
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  const Samples s{static_cast<const int32_t*>(left.const_data_ptr()),
                  static_cast<const int32_t*>(right.const_data_ptr()), n, right_rows};
  const Found found{ints(out[0]), ints(out[1]), ints(out[2])};
  if (cells <= std::min(64 * n + (1 << 20), kMostCells)) {
    by_table(current, left, s, cells, total, limit, found);
  } else if (cells <= int64_t{1} << 32) {
    by_sorting<uint32_t>(current, left, s, cells, total, limit, found);
  } else {
    by_sorting<uint64_t>(current, left, s, cells, total, limit, found);
  }
  return out;
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def(
      "plan_pairs(Tensor left_ids, int left_rows, Tensor right_ids, int right_rows, int limit, "
      "Tensor(a!) counts, int at) -> Tensor[]");
}
HTF_CUDA_KERNELS(m) { m.impl("plan_pairs", TORCH_BOX(&htf::gpu::plan_pairs)); }
