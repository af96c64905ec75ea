#include "cpu/memory.h"

#include <pthread.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace htf {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kSmall = std::size_t{2} << 10;  // below, malloc does the same
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kMostUnused = std::size_t{1} << 30;

// In front of every block, one cache line long.
struct Header {
  std::size_t bytes;  // of the whole allocation
  std::size_t bin;
  std::uint64_t released;
};
static_assert(sizeof(Header) <= kLine);

// Blocks come in four sizes for every power of two, a bin of unused ones for each.
constexpr int kSmallestLog = 8;
constexpr std::size_t kBins = 4 * (48 - kSmallestLog);

std::size_t bin_of(std::size_t bytes) {
  const int log = std::bit_width(bytes - 1) - 1;  // 2^log < bytes <= 2^(log + 1)
  const std::size_t quarter = ((bytes - 1) >> (log - 2)) & 3;
  return 4 * static_cast<std::size_t>(log - kSmallestLog) + quarter;
}
std::size_t size_of_bin(std::size_t bin) {
  const std::size_t log = bin / 4 + kSmallestLog;
  return (std::size_t{1} << log) + ((bin % 4 + 1) << (log - 2));
}

struct Pool {
  std::mutex mutex;
  std::vector<Header*> unused[kBins];  // the longest unused first
  std::size_t bytes = 0;
  std::uint64_t releases = 0;
};

// Never destroyed: tensors may outlive static destructors. Nobody holds the mutex while the process
// forks: the child would wait for a thread that it does not have.
Pool& pool() {
  static Pool* const it = [] {
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] { pool().mutex.unlock(); });
    return new Pool;
  }();
  return *it;
}

Header* allocate(std::size_t bytes) {
  const bool huge = bytes >= kHugePage;
  if (huge) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* p = std::aligned_alloc(huge ? kHugePage : kLine, bytes);
  if (p == nullptr) {
    release_unused();
    p = std::aligned_alloc(huge ? kHugePage : kLine, bytes);
    if (p == nullptr) throw std::bad_alloc();
  }
#if defined(__linux__)
  if (huge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  auto* header = static_cast<Header*>(p);
  header->bytes = bytes;
  return header;
}

// For tests: whatever is read before it was written is not a number.
void* handed_out(Header* header) {
  static const bool poison = std::getenv("HTF_POISON") != nullptr;
  char* block = reinterpret_cast<char*>(header) + kLine;
  if (poison) std::memset(block, 0xff, header->bytes - kLine);
  return block;
}

std::size_t element_size(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
      return 2;
    default:
      throw std::logic_error("new_tensor: no such element type is used here");
  }
}

}  // namespace

std::size_t bytes_of(int64_t count, std::size_t each) {
  constexpr auto most = std::numeric_limits<int64_t>::max();
  if (count < 0 || count > most / 2 / static_cast<int64_t>(each)) throw std::bad_alloc();
  return static_cast<std::size_t>(count) * each;
}

#if defined(__SANITIZE_ADDRESS__)
// Blocks of their own, whose ends the sanitizer knows.
void* acquire(std::size_t bytes) {
  const std::size_t end = bytes + kLine, total = (end + kLine - 1) / kLine * kLine;
  auto* header = static_cast<Header*>(std::aligned_alloc(kLine, total));
  if (header == nullptr) throw std::bad_alloc();
  header->bytes = total;
  header->bin = kBins;
  void* block = handed_out(header);
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(header) + end, total - end);
  return block;
}
#else
void* acquire(std::size_t bytes) {
  std::size_t total = (bytes + 2 * kLine - 1) / kLine * kLine, bin = kBins;
  if (total >= kSmall && total <= kMostUnused) {
    bin = bin_of(total);
    total = size_of_bin(bin);
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    auto& unused = p.unused[bin];
    if (!unused.empty()) {
      Header* found = unused.back();
      unused.pop_back();
      p.bytes -= found->bytes;
      return handed_out(found);
    }
  }
  Header* made = allocate(total);
  made->bin = bin;
  return handed_out(made);
}
#endif

void release(void* block) noexcept {
  auto* header = reinterpret_cast<Header*>(static_cast<char*>(block) - kLine);
  if (header->bin == kBins) {
    std::free(header);
    return;
  }
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  try {
    p.unused[header->bin].push_back(header);
  } catch (...) {
    std::free(header);
    return;
  }
  header->released = p.releases++;
  p.bytes += header->bytes;
  while (p.bytes > kMostUnused) {
    std::vector<Header*>* oldest = nullptr;
    for (auto& bin : p.unused)
      if (!bin.empty() && (oldest == nullptr || bin[0]->released < (*oldest)[0]->released))
        oldest = &bin;
    p.bytes -= (*oldest)[0]->bytes;
    std::free((*oldest)[0]);
    oldest->erase(oldest->begin());
  }
}

std::size_t release_unused() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const std::size_t bytes = p.bytes;
  for (auto& bin : p.unused) {
    for (Header* header : bin) std::free(header);
    bin.clear();
  }
  p.bytes = 0;
  return bytes;
}

torch::stable::Tensor new_tensor(const torch::stable::Tensor& like,
                                 std::initializer_list<int64_t> sizes,
                                 torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides[i] = numel;
    numel *= sizes.begin()[i];
  }
  const std::size_t bytes = bytes_of(numel, element_size(dtype));
  if (bytes < kSmall) return torch::stable::new_empty(like, sizes, dtype);
  return torch::stable::from_blob(acquire(bytes), sizes, strides, like.device(), dtype, &release);
}

}  // namespace htf
