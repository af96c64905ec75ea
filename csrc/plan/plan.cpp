// The loops over samples behind htfkernels/schedule/index_plan.py: NumPy arrays in and out, no
// PyTorch. The GIL is released, and results are the same for any number of threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../interrupt.inl"

namespace py = pybind11;

namespace {

using Array32 = py::array_t<int32_t, py::array::c_style>;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
constexpr int64_t kWorthThreads = 1 << 15;  // entries for each thread
constexpr int64_t kEntry = 64;              // multiply-adds in the time of an entry
constexpr int kDigit = 11;                  // bits of a radix digit: its counters stay in L1

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory that is not written before it is used. Large pieces in huge pages: to take memory from the
// system page by page would cost more than the loops that fill it.
template <class T>
struct Buffer {
  std::unique_ptr<T[], Free> data;
  int64_t size = 0;

  Buffer() = default;
  explicit Buffer(int64_t n) : size(n) {
    constexpr std::size_t kHuge = std::size_t{1} << 21;
    const std::size_t bytes = std::max<std::size_t>(n * sizeof(T), 1);
    void* p = nullptr;
    if (bytes < 2 * kHuge) {
      p = std::malloc(bytes);
    } else if (posix_memalign(&p, kHuge, bytes) != 0) {
      p = nullptr;
    }
    if (p == nullptr) throw std::bad_alloc();
#ifdef __linux__
    if (bytes >= 2 * kHuge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    data.reset(static_cast<T*>(p));
  }
  T* get() const { return data.get(); }
  T& operator[](int64_t i) const { return data[i]; }
};
using Ints = Buffer<int32_t>;

py::array_t<int32_t> to_numpy(Ints ints) {
  const int64_t size = ints.size;
  int32_t* data = ints.data.release();
  py::capsule owner(data, [](void* p) { std::free(p); });
  return py::array_t<int32_t>(size, data, owner);
}

int useful_threads(int64_t n, int64_t threads) {
  return static_cast<int>(std::clamp<int64_t>(std::min(threads, n / kWorthThreads), 1, 64));
}

// f(chunk, begin, end) for `chunks` pieces of 0 .. n-1, each in a thread of its own.
template <class F>
void in_chunks(int64_t n, int chunks, const F& f) {
  htf::Crew crew;
  const auto run = [&](int c, bool caller) {
    crew.run(caller, [&] { f(c, n * c / chunks, n * (c + 1) / chunks); });
  };
  {
    struct Joined {
      std::vector<std::thread> threads;
      ~Joined() {
        for (std::thread& t : threads) t.join();
      }
    } others;
    others.threads.reserve(chunks);
    for (int c = 1; c < chunks; ++c) {
      try {
        others.threads.emplace_back([&run, c] { run(c, false); });
      } catch (const std::system_error&) {  // no more threads to be had
        run(c, true);
      }
    }
    run(0, true);
  }
  crew.finish();
}

// f(i) for i = begin .. end-1, which a signal can end.
template <class F>
void each(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kTogether = 4096;
  for (int64_t from = begin; from < end; from += kTogether) {
    const int64_t to = std::min(from + kTogether, end);
    for (int64_t i = from; i < to; ++i) f(i);
    htf::worked(kEntry * (to - from));
  }
}

// Without the instruction, which the baseline of x86-64 lacks, std::popcount calls a function.
inline int32_t popcount(uint64_t x) {
  x -= (x >> 1) & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int32_t>((x * 0x0101010101010101u) >> 56);
}

// Sets bit position(i) for every i. The number of bits set, or something above the limit.
template <class F>
int64_t mark(std::vector<uint64_t>& bits, int64_t n, int64_t limit, int chunks, const F& position) {
  std::atomic<int64_t> total{0};
  in_chunks(n, chunks, [&](int, int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end && total.load() <= limit; from += 4096) {
      int64_t fresh = 0;
      each(from, std::min(from + 4096, end), [&](int64_t i) {
        const uint64_t at = position(i), bit = uint64_t{1} << (at & 63);
        uint64_t* word = &bits[at >> 6];
        if (__atomic_load_n(word, __ATOMIC_RELAXED) & bit) return;
        if (chunks > 1) {
          fresh += !(__atomic_fetch_or(word, bit, __ATOMIC_RELAXED) & bit);
        } else {
          *word |= bit;
          ++fresh;
        }
      });
      total += fresh;
    }
  });
  return total;
}

// Sorts by the lowest bits of the key, stable: least significant digit first.
template <class Item>
void radix_sort(Buffer<Item>& items, int bits, int chunks) {
  const int64_t n = items.size;
  const int passes = (bits + kDigit - 1) / kDigit;
  if (passes == 0) return;
  const int width = (bits + passes - 1) / passes;
  const int64_t buckets = int64_t{1} << width;
  Buffer<Item> other(n);
  std::vector<std::vector<int64_t>> counts(chunks);
  for (int pass = 0; pass < passes; ++pass) {
    const auto digit = [&](const Item& item) {
      return static_cast<int64_t>(item.key >> (pass * width)) & (buckets - 1);
    };
    in_chunks(n, chunks, [&](int c, int64_t begin, int64_t end) {
      std::vector<int64_t> count(buckets, 0);
      each(begin, end, [&](int64_t i) { ++count[digit(items[i])]; });
      counts[c] = std::move(count);
    });
    int64_t at = 0;
    for (int64_t d = 0; d < buckets; ++d)
      for (int c = 0; c < chunks; ++c) at += std::exchange(counts[c][d], at);
    in_chunks(n, chunks, [&](int c, int64_t begin, int64_t end) {
      int64_t* to = counts[c].data();
      each(begin, end, [&](int64_t i) { other[to[digit(items[i])]++] = items[i]; });
    });
    std::swap(items, other);
  }
}

// start[k] .. start[k+1]-1 are the i with id(i) == k, where id ascends.
template <class F>
Ints starts_of(int64_t n, int64_t buckets, int chunks, const F& id) {
  Ints start(buckets + 1);
  in_chunks(n, chunks, [&](int, int64_t begin, int64_t end) {
    each(begin, end, [&](int64_t i) {
      for (int64_t k = i > 0 ? id(i - 1) + 1 : 0; k <= id(i); ++k)
        start[k] = static_cast<int32_t>(i);
    });
  });
  for (int64_t k = n > 0 ? id(n - 1) + 1 : 0; k <= buckets; ++k) start[k] = static_cast<int32_t>(n);
  return start;
}

struct Pairs {
  Ints ids, left, right;
};

class DistinctPairs {
 public:
  DistinctPairs(const int32_t* a, int64_t na, const int32_t* b, int64_t nb, int64_t n,
                int64_t limit, int chunks)
      : a_(a), b_(b), na_(na), nb_(nb), n_(n), limit_(limit), chunks_(chunks) {}

  std::optional<Pairs> run() {
    check_range(a_, na_);
    check_range(b_, nb_);
    // A bit for every pair there could be, where they stay within the size of the ids themselves.
    if (na_ * nb_ <= 32 * n_ + (1 << 20)) return by_table();
    if (surely_too_many()) return std::nullopt;
    return by_sorting();
  }

 private:
  const int32_t *a_, *b_;
  const int64_t na_, nb_, n_, limit_;
  const int chunks_;

  void check_range(const int32_t* ids, int64_t rows) const {
    std::atomic<bool> bad{false};
    in_chunks(n_, chunks_, [&](int, int64_t begin, int64_t end) {
      uint32_t most = 0;
      each(begin, end, [&](int64_t i) { most = std::max(most, static_cast<uint32_t>(ids[i])); });
      if (begin < end && most >= rows) bad = true;
    });
    if (bad)
      throw std::invalid_argument("distinct_pairs: an id is not in 0 .. " +
                                  std::to_string(rows - 1));
  }

  std::optional<Pairs> by_table() const {
    const int64_t words = (na_ * nb_ + 63) / 64;
    std::vector<uint64_t> bits(words, 0);
    const auto cell = [&](int64_t i) { return static_cast<uint64_t>(a_[i] * nb_ + b_[i]); };
    const int64_t rows = mark(bits, n_, limit_, chunks_, cell);
    if (rows > limit_) return std::nullopt;
    Ints rank(words);  // pairs in the words before
    int32_t before = 0;
    for (int64_t w = 0; w < words; ++w) {
      rank[w] = before;
      before += popcount(bits[w]);
    }
    Pairs out{Ints(n_), Ints(rows), Ints(rows)};
    in_chunks(n_, chunks_, [&](int, int64_t begin, int64_t end) {
      each(begin, end, [&](int64_t i) {
        const uint64_t at = cell(i), below = (uint64_t{1} << (at & 63)) - 1;
        out.ids[i] = rank[at >> 6] + popcount(bits[at >> 6] & below);
      });
    });
    in_chunks(words, chunks_, [&](int, int64_t begin, int64_t end) {
      int64_t row = begin * 64 / nb_;
      each(begin, end, [&](int64_t w) {
        int32_t to = rank[w];
        for (uint64_t left = bits[w]; left != 0; left &= left - 1) {
          const int64_t at = w * 64 + std::countr_zero(left);
          while (at >= (row + 1) * nb_) ++row;
          out.left[to] = static_cast<int32_t>(row);
          out.right[to++] = static_cast<int32_t>(at - row * nb_);
        }
      });
    });
    return out;
  }

  uint64_t key(int64_t i, int right_bits) const {
    return static_cast<uint64_t>(a_[i]) << right_bits | static_cast<uint64_t>(b_[i]);
  }

  // Distinct hashes are distinct pairs: their number is a lower bound, and costs one pass.
  bool surely_too_many() const {
    const int log = std::max(6, static_cast<int>(std::bit_width(static_cast<uint64_t>(8 * n_))));
    std::vector<uint64_t> bits(int64_t{1} << (log - 6), 0);
    const auto hash = [&](int64_t i) {
      return (key(i, 32) * 0x9e3779b97f4a7c15u ^ key(i, 32) >> 29) * 0xbf58476d1ce4e5b9u >>
             (64 - log);
    };
    return mark(bits, n_, limit_, chunks_, hash) > limit_;
  }

  std::optional<Pairs> by_sorting() const {
    struct Item {
      uint64_t key;
      int32_t sample;
    };
    const int right_bits = std::bit_width(static_cast<uint64_t>(nb_ - 1));
    const int left_bits = std::bit_width(static_cast<uint64_t>(na_ - 1));
    Buffer<Item> items(n_);
    in_chunks(n_, chunks_, [&](int, int64_t begin, int64_t end) {
      each(begin, end,
           [&](int64_t i) { items[i] = {key(i, right_bits), static_cast<int32_t>(i)}; });
    });
    radix_sort(items, left_bits + right_bits, chunks_);
    const auto is_first = [&](int64_t i) { return i == 0 || items[i].key != items[i - 1].key; };
    std::vector<int64_t> before(chunks_, 0);
    in_chunks(n_, chunks_, [&](int c, int64_t begin, int64_t end) {
      each(begin, end, [&](int64_t i) { before[c] += is_first(i); });
    });
    int64_t rows = 0;
    for (int64_t& count : before) rows += std::exchange(count, rows);
    if (rows > limit_) return std::nullopt;
    Pairs out{Ints(n_), Ints(rows), Ints(rows)};
    in_chunks(n_, chunks_, [&](int c, int64_t begin, int64_t end) {
      int64_t row = before[c] - 1;
      each(begin, end, [&](int64_t i) {
        const uint64_t pair = items[i].key;
        if (is_first(i)) {
          ++row;
          out.left[row] = static_cast<int32_t>(pair >> right_bits);
          out.right[row] = static_cast<int32_t>(pair & ((uint64_t{1} << right_bits) - 1));
        }
        out.ids[items[i].sample] = static_cast<int32_t>(row);
      });
    });
    return out;
  }
};

void check_sizes(const char* what, int64_t n, int64_t rows) {
  if (n > kMost || rows < 0 || rows > kMost)
    throw std::invalid_argument(std::string(what) + ": more than 2^31 - 1 samples or rows");
}

py::object distinct_pairs(const Array32& a, int64_t na, const Array32& b, int64_t nb, int64_t limit,
                          int64_t threads) {
  const int64_t n = a.size();
  if (b.size() != n) throw std::invalid_argument("distinct_pairs: lists of different lengths");
  check_sizes("distinct_pairs", n, std::max(na, nb));
  check_sizes("distinct_pairs", n, std::min(na, nb));
  if (n == 0) na = nb = 1;
  std::optional<Pairs> found;
  {
    const int32_t *left = a.data(), *right = b.data();
    py::gil_scoped_release released;
    found = DistinctPairs(left, na, right, nb, n, limit, useful_threads(n, threads)).run();
  }
  if (!found) return py::none();
  return py::make_tuple(to_numpy(std::move(found->ids)), to_numpy(std::move(found->left)),
                        to_numpy(std::move(found->right)));
}

py::tuple group(const Array32& ids, int64_t buckets, int64_t threads) {
  const int64_t n = ids.size();
  check_sizes("group", n, buckets);
  Ints start, order(n);
  {
    const int32_t* id = ids.data();
    py::gil_scoped_release released;
    const int chunks = useful_threads(n, threads);
    struct Item {
      uint32_t key;
      int32_t at;
    };
    Buffer<Item> items(n);
    std::atomic<bool> bad{false};
    in_chunks(n, chunks, [&](int, int64_t begin, int64_t end) {
      bool outside = false;
      each(begin, end, [&](int64_t i) {
        outside |= static_cast<uint32_t>(id[i]) >= buckets;
        items[i] = {static_cast<uint32_t>(id[i]), static_cast<int32_t>(i)};
      });
      if (outside) bad = true;
    });
    if (bad)
      throw std::invalid_argument("group: an id is not in 0 .. " + std::to_string(buckets - 1));
    radix_sort(items, buckets > 0 ? std::bit_width(static_cast<uint64_t>(buckets - 1)) : 0, chunks);
    start = starts_of(n, buckets, chunks,
                      [&](int64_t i) { return static_cast<int64_t>(items[i].key); });
    in_chunks(n, chunks, [&](int, int64_t begin, int64_t end) {
      each(begin, end, [&](int64_t i) { order[i] = items[i].at; });
    });
  }
  return py::make_tuple(to_numpy(std::move(start)), to_numpy(std::move(order)));
}

py::array_t<int32_t> starts(const Array32& ids, int64_t buckets, int64_t threads) {
  const int64_t n = ids.size();
  check_sizes("starts", n, buckets);
  Ints start;
  {
    const int32_t* id = ids.data();
    py::gil_scoped_release released;
    each(0, n, [&](int64_t i) {
      if (id[i] < (i > 0 ? id[i - 1] : 0) || id[i] >= buckets)
        throw std::invalid_argument("starts: ids must ascend within 0 .. " +
                                    std::to_string(buckets - 1));
    });
    start = starts_of(n, buckets, useful_threads(n, threads),
                      [&](int64_t i) { return static_cast<int64_t>(id[i]); });
  }
  return to_numpy(std::move(start));
}

// Several modes at once: indices lie sample by sample, so that neighbours share a cache line.
py::list columns(const py::array_t<int64_t>& indices, const std::vector<int64_t>& modes,
                 const std::vector<int64_t>& dims, int64_t threads) {
  if (indices.ndim() != 2 || modes.size() != dims.size())
    throw std::invalid_argument("columns: expected indices [B, N] and a dimension for each mode");
  const int64_t n = indices.shape(0);
  const int count = static_cast<int>(modes.size());
  for (int m = 0; m < count; ++m) {
    check_sizes("columns", n, dims[m]);
    if (modes[m] < 0 || modes[m] >= indices.shape(1))
      throw std::invalid_argument("columns: there is no mode " + std::to_string(modes[m]));
  }
  std::vector<Ints> out;
  for (int m = 0; m < count; ++m) out.emplace_back(n);
  const char* base = reinterpret_cast<const char*>(indices.data());
  const int64_t by_row = indices.strides(0), by_mode = indices.strides(1);
  const auto at = [&](int64_t i, int64_t mode) {
    return *reinterpret_cast<const int64_t*>(base + i * by_row + mode * by_mode);
  };
  std::vector<std::atomic<bool>> bad(count);
  {
    py::gil_scoped_release released;
    in_chunks(n, useful_threads(n, threads), [&](int, int64_t begin, int64_t end) {
      constexpr int64_t kBlock = 512;  // 8 modes of it fit in L1
      for (int64_t from = begin; from < end; from += kBlock) {
        const int64_t to = std::min(from + kBlock, end);
        for (int m = 0; m < count; ++m) {
          bool outside = false;
          for (int64_t i = from; i < to; ++i) {
            const int64_t index = at(i, modes[m]);
            outside |= static_cast<uint64_t>(index) >= static_cast<uint64_t>(dims[m]);
            out[m][i] = static_cast<int32_t>(index);
          }
          if (outside) bad[m] = true;
        }
        htf::worked(kEntry * count * (to - from));
      }
    });
  }
  for (int m = 0; m < count; ++m)
    for (int64_t i = 0; bad[m] && i < n; ++i)
      if (const int64_t index = at(i, modes[m]);
          static_cast<uint64_t>(index) >= static_cast<uint64_t>(dims[m]))
        throw py::index_error("index " + std::to_string(index) + " of mode " +
                              std::to_string(modes[m]) + " is out of range, its dimension is " +
                              std::to_string(dims[m]));
  py::list arrays;
  for (Ints& column : out) arrays.append(to_numpy(std::move(column)));
  return arrays;
}

// A round of XXH64: for either argument alone it is a bijection of the other.
inline uint64_t absorb(uint64_t state, uint64_t word) {
  return std::rotl(state + word * 0xc2b2ae3d27d4eb4fu, 31) * 0x9e3779b185ebca87u;
}

uint64_t hash_of(const char* data, int64_t bytes) {
  constexpr int kLanes = 4;  // independent of each other, so that their rounds overlap
  uint64_t lane[kLanes] = {1, 2, 3, 4}, word[kLanes];
  int64_t at = 0;
  for (; at + static_cast<int64_t>(sizeof word) <= bytes; at += sizeof word) {
    std::memcpy(word, data + at, sizeof word);
    for (int k = 0; k < kLanes; ++k) lane[k] = absorb(lane[k], word[k]);
  }
  for (; at < bytes; at += 8) {
    uint64_t rest = 0;
    std::memcpy(&rest, data + at, std::min<int64_t>(8, bytes - at));
    lane[0] = absorb(lane[0], rest);
  }
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (const uint64_t l : lane) hash = absorb(hash, l);
  return hash;
}

// Another number for other contents of a size: certainly where a single word of 8 bytes differs,
// else but for a chance of 2^-64.
uint64_t fingerprint(const py::array& array, int64_t threads) {
  if (!(array.flags() & py::array::c_style))
    throw std::invalid_argument("fingerprint: expected a contiguous array");
  constexpr int64_t kBlock = 1 << 18;  // bytes: the same blocks for any number of threads
  const char* data = static_cast<const char*>(array.data());
  const int64_t bytes = array.nbytes(), blocks = (bytes + kBlock - 1) / kBlock;
  py::gil_scoped_release released;
  std::vector<uint64_t> hashes(blocks);
  in_chunks(blocks, useful_threads(bytes / 8, threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      hashes[b] = hash_of(data + b * kBlock, std::min(kBlock, bytes - b * kBlock));
  });
  return hash_of(reinterpret_cast<const char*>(hashes.data()), 8 * blocks);
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "The loops over samples behind htfkernels.schedule.index_plan.";
  m.def("distinct_pairs", &distinct_pairs, py::arg("a").noconvert(), py::arg("na"),
        py::arg("b").noconvert(), py::arg("nb"), py::arg("limit"), py::arg("threads") = 1,
        "The distinct pairs (a[i], b[i]), sorted: (ids [B], left [n], right [n]), or None where "
        "there are more than the limit.");
  m.def("group", &group, py::arg("ids").noconvert(), py::arg("buckets"), py::arg("threads") = 1,
        "(start [buckets + 1], order [n]): the positions of id k, ascending, are "
        "order[start[k]:start[k + 1]].");
  m.def("starts", &starts, py::arg("ids").noconvert(), py::arg("buckets"), py::arg("threads") = 1,
        "group's start alone, for ids that ascend.");
  m.def("columns", &columns, py::arg("indices"), py::arg("modes"), py::arg("dims"),
        py::arg("threads") = 1, "Columns of indices [B, N] as int32, checked against dims.");
  m.def("fingerprint", &fingerprint, py::arg("array").noconvert(), py::arg("threads") = 1,
        "64 bits that tell the contents of contiguous arrays of a size apart.");
}
