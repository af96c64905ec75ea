#include "cpu/memory.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace htf {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kSmall = std::size_t{64} << 10;  // below, malloc does the same
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kMostUnused = std::size_t{1} << 30;

// In front of every block, one cache line long.
struct Header {
  std::size_t bytes;  // of the whole allocation
};
static_assert(sizeof(Header) <= kLine);

struct Pool {
  std::mutex mutex;
  std::list<Header*> unused;  // the longest unused first
  std::size_t bytes = 0;
};

// Never destroyed: tensors may outlive static destructors.
Pool& pool() {
  static Pool* const it = new Pool;
  return *it;
}

Header* allocate(std::size_t bytes) {
  const bool huge = bytes >= kHugePage;
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

std::size_t element_size(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::BFloat16 ? 2 : 4;
}

}  // namespace

void* acquire(std::size_t bytes) {
  std::size_t total = bytes + kLine;
  const std::size_t unit = total >= kHugePage ? kHugePage : total >= kSmall ? kSmall : kLine;
  total = (total + unit - 1) / unit * unit;
  Header* found = nullptr;
  if (total >= kSmall) {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    auto best = p.unused.end();
    for (auto it = p.unused.begin(); it != p.unused.end(); ++it)
      if ((*it)->bytes >= total && (*it)->bytes <= total + total / 4 &&
          (best == p.unused.end() || (*it)->bytes <= (*best)->bytes))
        best = it;
    if (best != p.unused.end()) {
      found = *best;
      p.bytes -= found->bytes;
      p.unused.erase(best);
    }
  }
  if (found == nullptr) found = allocate(total);
  return reinterpret_cast<char*>(found) + kLine;
}

void release(void* block) noexcept {
  auto* header = reinterpret_cast<Header*>(static_cast<char*>(block) - kLine);
  if (header->bytes < kSmall || header->bytes > kMostUnused / 2) {
    std::free(header);
    return;
  }
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  try {
    p.unused.push_back(header);
  } catch (...) {
    std::free(header);
    return;
  }
  p.bytes += header->bytes;
  while (p.bytes > kMostUnused) {
    Header* oldest = p.unused.front();
    p.unused.pop_front();
    p.bytes -= oldest->bytes;
    std::free(oldest);
  }
}

std::size_t release_unused() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const std::size_t bytes = p.bytes;
  for (Header* header : p.unused) std::free(header);
  p.unused.clear();
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
  const std::size_t bytes = static_cast<std::size_t>(numel) * element_size(dtype);
  if (bytes < kSmall) return torch::stable::new_empty(like, sizes, dtype);
  return torch::stable::from_blob(acquire(bytes), sizes, strides, like.device(), dtype, &release);
}

}  // namespace htf
