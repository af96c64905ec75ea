// What csrc/cuda/emulate.h promises, by small kernels, right ones and faulty ones. Prints a line
// for each check, "right NAME" or "wrong NAME"; with an argument it runs that one fault alone,
// which ends the program. test_cuda_emulator.py compiles this with csrc/emulated/emulate.cpp.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace {

using namespace htf::gpu;
using htf::emulate::Order;

using Floats = std::vector<float>;

Floats numbers(int count) {
  Floats x(count);
  for (int i = 0; i < count; ++i) x[i] = static_cast<float>(i + 1);
  return x;
}

// Of one order, out of a vector filled with -1.
template <class F>
Floats result(Order order, int size, dim3 grid, dim3 block, std::size_t shared, const F& kernel) {
  Floats out(size, -1);
  htf::emulate::set_order(order);
  htf::emulate::run(grid, block, shared, [&] { kernel(out.data()); });
  htf::emulate::set_order(Order::forward);
  return out;
}

bool same_bytes(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool any_nan(const Floats& x) {
  for (const float v : x)
    if (std::isnan(v)) return true;
  return false;
}

// Whether the two orders of threads give the same, which is what a test of a kernel asks for.
template <class F>
bool agree(int size, dim3 grid, dim3 block, std::size_t shared, const F& kernel) {
  return same_bytes(result(Order::forward, size, grid, block, shared, kernel),
                    result(Order::backward, size, grid, block, shared, kernel));
}

template <class F>
std::string error_of(dim3 block, const F& kernel) {
  try {
    htf::emulate::run(1, block, 0, kernel);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// -- faults that the two orders, or NaN, bring to light -------------------------------------------

constexpr int kThreads = 64;

// Each thread reads what its neighbour wrote.
auto neighbour(bool barrier) {
  return [=](float* out) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    shared[i] = static_cast<float>(i);
    if (barrier) __syncthreads();
    out[i] = shared[(i + 1) % kThreads];
  };
}

// Neighbours of one warp: a barrier of the warp is enough, and needed.
auto in_warp(bool barrier) {
  return [=](float* out) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    shared[i] = static_cast<float>(i);
    if (barrier) __syncwarp();
    out[i] = shared[i ^ 1];
  };
}

// The next tile is written while neighbours may still read this one.
auto overwritten(bool barrier) {
  return [=](float* out) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    float sum = 0;
    for (int tile = 1; tile <= 4; ++tile) {
      shared[i] = static_cast<float>(tile * (i + 1));
      __syncthreads();
      sum += shared[(i + 1) % kThreads] * static_cast<float>(tile);
      if (barrier) __syncthreads();
    }
    out[i] = sum;
  };
}

// Two buffers, copies one tile ahead. `pending`: of copy_wait; `barrier`: after a tile is read.
template <int Pending>
auto pipelined(const Floats& from, bool barrier) {
  return [&from, barrier](float* out) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    const auto copy = [&](int tile) {
      const bool there = tile < 6;
      copy_async<4>(shared + tile % 2 * kThreads + i,
                    from.data() + (there ? tile * kThreads + i : 0), there);
      copy_commit();
    };
    copy(0);
    float sum = 0;
    for (int tile = 0; tile < 6; ++tile) {
      copy(tile + 1);
      copy_wait<Pending>();
      __syncthreads();
      const float* now = shared + tile % 2 * kThreads;
      sum += now[(i + 1) % kThreads] + 2 * now[(i + 33) % kThreads];
      if (barrier) __syncthreads();
    }
    copy_wait<0>();
    out[i] = sum;
  };
}

auto unwaited(const Floats& from) {
  return [&from](float* out) {
    float* shared = shared_memory<float>();
    copy_async<4>(shared + threadIdx.x, from.data() + threadIdx.x);
    copy_commit();
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x];
  };
}

// A block that relies on what the one before left in a global variable.
auto order_of_blocks() {
  return [](float* out) {
    if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x == 0 ? 1 : out[blockIdx.x - 1] + 1;
  };
}

void half_a_shuffle() {
  if (threadIdx.x < 16) __shfl_sync(~0u, 1, 0);
}

void half_an_mma() {
  double d[2] = {0, 0};
  if (threadIdx.x % 2 == 0) mma_f64(d, 1, 1);
}

// -- what right kernels rely on -------------------------------------------------------------------

// Whether right(thread) is true in every thread of a block, in both orders.
template <class F>
bool for_lanes(int threads, const F& right) {
  bool all = true;
  for (const Order order : {Order::forward, Order::backward}) {
    const Floats found = result(order, threads, 1, threads, 0, [&](float* out) {
      out[threadIdx.x] = right(static_cast<int>(threadIdx.x));
    });
    for (const float x : found) all = all && x == 1;
  }
  return all;
}

bool shuffles() {
  return for_lanes(96, [](int i) {
    const int lane = i % 32, warp = i - lane;
    bool right = __shfl_sync(~0u, i, 5) == warp + 5;
    right &= __shfl_sync(~0u, i, lane + 1) == warp + (lane + 1) % 32;
    right &= __shfl_sync(~0u, i, 3, 8) == i - i % 8 + 3;
    for (int mask : {1, 2, 4, 8, 16, 31}) right &= __shfl_xor_sync(~0u, i, mask) == (i ^ mask);
    for (int d : {1, 2, 5, 16, 31}) {
      right &= __shfl_up_sync(~0u, i, d) == (lane >= d ? i - d : i);
      right &= __shfl_down_sync(~0u, i, d) == (lane + d < 32 ? i + d : i);
    }
    right &= __shfl_up_sync(~0u, i, 1, 8) == (lane % 8 >= 1 ? i - 1 : i);
    right &= __shfl_down_sync(~0u, i, 3, 16) == (lane % 16 + 3 < 16 ? i + 3 : i);
    right &= __shfl_xor_sync(~0u, i + 0.5, 1) == (i ^ 1) + 0.5;  // of 8 bytes
    return right;
  });
}

// Lanes that run ahead must not overwrite what others have yet to read; warps take their own time.
bool shuffles_in_a_row() {
  return for_lanes(128, [](int i) {
    int x = i, expected = i;
    for (int turn = 0; turn < 20 + i / 32; ++turn) {
      x = __shfl_xor_sync(~0u, x, 1 + turn % 31);
      expected ^= 1 + turn % 31;
      if (turn % 7 == 6) __syncwarp();
    }
    __syncthreads();
    return x == expected;
  });
}

bool votes() {
  return for_lanes(64, [](int i) {
    const int lane = i % 32, warp = i / 32;
    bool right = __ballot_sync(~0u, lane % 3 == warp) == (warp == 0 ? 0x49249249u : 0x92492492u);
    right &= __any_sync(~0u, i == 40) == warp && __all_sync(~0u, i < 32) == (warp == 0);
    right &= __syncthreads_or(i == 63) != 0;
    right &= __syncthreads_or(0) == 0;
    right &= __syncthreads_or(i == 0 ? 16 : 0) != 0;
    return right;
  });
}

bool sums_of_warps() {
  return for_lanes(64, [](int i) {
    return warp_sum(i) == (i < 32 ? 496 : 1520) && warp_sum(0.25 * i) == (i < 32 ? 124 : 380);
  });
}

bool arrival() {
  for (const Order order : {Order::forward, Order::backward}) {
    int counter = 0;
    const Floats found = result(order, 8, 5, 64, 0, [&](float* out) {
      if (threadIdx.x == 7) out[blockIdx.x] = static_cast<float>(blockIdx.x);
      if (!last_to_arrive(&counter, 5)) return;
      if (threadIdx.x == 0) out[5] = static_cast<float>(blockIdx.x);
      if (threadIdx.x == 63) out[6] = out[0] + out[1] + out[2] + out[3] + out[4];
    });
    if (counter != 0 || found[5] != (order == Order::forward ? 4 : 0) || found[6] != 10)
      return false;
  }
  return true;
}

// Block, warp and lane descend, or ascend.
bool orders() {
  for (const Order order : {Order::forward, Order::backward}) {
    std::vector<int> seen;
    result(order, 1, dim3(2, 2), 64, 0, [&](float*) {
      const int block = static_cast<int>(blockIdx.x + 2 * blockIdx.y);
      seen.push_back(block * 64 + static_cast<int>(threadIdx.x));
    });
    for (int i = 0; i < 256; ++i)
      if (seen.size() != 256 || seen[i] != (order == Order::forward ? i : 255 - i)) return false;
  }
  return true;
}

bool places() {
  const Floats found = result(Order::forward, 512, dim3(2, 1, 2), dim3(4, 8, 4), 0, [](float* out) {
    const unsigned thread = threadIdx.x + 4 * (threadIdx.y + 8 * threadIdx.z);
    const unsigned block = blockIdx.x + 2 * (blockIdx.y + blockIdx.z);
    const bool sizes = blockDim.x == 4 && blockDim.y == 8 && blockDim.z == 4 && gridDim.x == 2 &&
                       gridDim.y == 1 && gridDim.z == 2;
    out[block * 128 + thread] = sizes && htf::emulate::lane() == static_cast<int>(thread % 32);
  });
  for (const float x : found)
    if (x != 1) return false;
  return true;
}

// Every block's shared memory is filled with NaN and begins on a boundary of 128 bytes.
bool fresh_shared_memory() {
  const Floats found = result(Order::forward, 3, 3, 32, 260, [](float* out) {
    const float* shared = shared_memory<float>();
    const bool aligned = reinterpret_cast<std::uintptr_t>(shared) % 128 == 0;
    if (threadIdx.x == 0) {
      bool nan = true;
      for (int i = 0; i < 65; ++i) nan = nan && std::isnan(shared[i]);
      out[blockIdx.x] = aligned && nan;
    }
    __syncthreads();
    shared_memory<float>()[threadIdx.x] = 1;
  });
  return found == Floats{1, 1, 1};
}

bool copies_of_all_sizes() {
  const Floats from = numbers(128);
  return agree(128, 1, 32, 512,
               [&](float* out) {
                 float* shared = shared_memory<float>();
                 const int i = threadIdx.x;
                 alignas(16) float here[4] = {9, 9, 9, 9};
                 std::memcpy(here, from.data() + i, 16);
                 copy_async<16>(shared + 4 * i, here, i % 2 == 0);
                 copy_commit();
                 copy_wait<0>();
                 __syncwarp();
                 for (int j = 0; j < 4; ++j)
                   out[4 * i + j] = shared[4 * i + j] - (i % 2 == 0 ? from[i + j] : 0);
               }) &&
         result(Order::forward, 4, 1, 32, 32, [&](float* out) {
           alignas(8) static const float pair[2] = {3, 4};
           float* shared = shared_memory<float>();
           if (threadIdx.x == 0) {
             copy_async<8>(shared, pair);
             copy_async<4>(shared + 2, pair + 1);
             copy_async<4>(shared + 3, nullptr, false);
             copy_commit();
             copy_wait<0>();
             for (int j = 0; j < 4; ++j) out[j] = shared[j];
           }
         }) == Floats{3, 4, 4, 0};
}

bool atomics() {
  int sum = 0, low = 100, high = -100;
  unsigned bits = 0;
  result(Order::backward, 1, 3, 32, 0, [&](float*) {
    atomicAdd(&sum, 1);
    atomicMin(&low, static_cast<int>(threadIdx.x) - 5);
    atomicMax(&high, static_cast<int>(threadIdx.x));
    atomicOr(&bits, 1u << threadIdx.x);
  });
  const int before = atomicExch(&sum, 7);
  return before == 96 && sum == 7 && low == -5 && high == 31 && bits == ~0u;
}

// -- tensor cores ---------------------------------------------------------------------------------

template <class T, int M, int N, int K>
bool is_product(const T (&d)[M][N], const T (&a)[M][K], const T (&b)[K][N]) {
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      T exact = 0;
      for (int k = 0; k < K; ++k) exact += a[i][k] * b[k][j];
      if (d[i][j] != exact) return false;
    }
  return true;
}

// d = a b of one instruction, from and to matrices, by the fragments that device.h lists.
bool mma_tf32_fragments() {
  float a[16][8], b[8][8], d[16][8];
  for (int i = 0; i < 128; ++i) a[i / 8][i % 8] = static_cast<float>(i % 11 - 4);
  for (int i = 0; i < 64; ++i) b[i / 8][i % 8] = static_cast<float>(i % 7 - 3);
  result(Order::backward, 1, 1, 32, 0, [&](float*) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float sum[4] = {1, 2, 3, 4};
    const uint32_t x[4] = {to_tf32(a[g][t]), to_tf32(a[g + 8][t]), to_tf32(a[g][t + 4]),
                           to_tf32(a[g + 8][t + 4])};
    const uint32_t y[2] = {to_tf32(b[t][g]), to_tf32(b[t + 4][g])};
    mma_tf32(sum, x, y);
    for (int i = 0; i < 4; ++i)
      d[g + i / 2 * 8][2 * t + i % 2] = sum[i] - static_cast<float>(i + 1);
  });
  return is_product(d, a, b);
}

bool mma_bf16_fragments() {
  float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 256; ++i) a[i / 16][i % 16] = static_cast<float>(i % 13 - 6);
  for (int i = 0; i < 128; ++i) b[i / 8][i % 8] = static_cast<float>(i % 9 - 4);
  result(Order::forward, 1, 1, 32, 0, [&](float*) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float sum[4] = {0, 0, 0, 0};
    const auto pair = [&](int row, int col) { return pack_bf16(a[row][col], a[row][col + 1]); };
    const uint32_t x[4] = {pair(g, 2 * t), pair(g + 8, 2 * t), pair(g, 2 * t + 8),
                           pair(g + 8, 2 * t + 8)};
    const uint32_t y[2] = {pack_bf16(b[2 * t][g], b[2 * t + 1][g]),
                           pack_bf16(b[2 * t + 8][g], b[2 * t + 9][g])};
    mma_bf16(sum, x, y);
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = sum[i];
  });
  return is_product(d, a, b);
}

bool mma_f64_fragments() {
  double a[8][4], b[4][8], d[8][8];
  for (int i = 0; i < 32; ++i) a[i / 4][i % 4] = i * 0.5 - 3, b[i / 8][i % 8] = 2 - i * 0.25;
  result(Order::forward, 1, 1, 32, 0, [&](float*) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    double sum[2] = {0, 0};
    mma_f64(sum, a[g][t], b[t][g]);
    d[g][2 * t] = sum[0], d[g][2 * t + 1] = sum[1];
  });
  return is_product(d, a, b);
}

bool rounding_to_tf32() {
  const auto rounded = [](float x) { return __uint_as_float(to_tf32(x)); };
  const float half = 0x1p-11f;  // of the last of 10 bits
  return rounded(1 + half) == 1 + 2 * half && rounded(-1 - half) == -1 - 2 * half &&
         rounded(1 + half - 0x1p-23f) == 1 && rounded(0) == 0 && std::isinf(rounded(INFINITY)) &&
         std::isnan(rounded(NAN));
}

// What is not rounded before is cut off, as the instruction does.
bool unrounded_operands_are_cut() {
  float found = 0;
  result(Order::forward, 1, 1, 32, 0, [&](float*) {
    float sum[4] = {0, 0, 0, 0};
    const uint32_t x = __float_as_uint(threadIdx.x % 4 == 0 ? 1 + 0x1.8p-11f : 0.0f);
    const uint32_t a[4] = {x, 0, 0, 0}, b[2] = {__float_as_uint(1.0f), 0};
    mma_tf32(sum, a, b);
    if (threadIdx.x == 0) found = sum[0];
  });
  return found == 1;
}

// -- the program ----------------------------------------------------------------------------------

using Check = std::function<bool()>;

std::map<std::string, Check> checks() {
  static const Floats from = numbers(6 * kThreads);
  constexpr std::size_t kShared = 2 * kThreads * sizeof(float);
  const auto equal = [](auto kernel) { return agree(kThreads, 1, kThreads, kShared, kernel); };
  const auto nan = [](Order order, auto kernel) {
    return any_nan(result(order, kThreads, 1, kThreads, kShared, kernel));
  };
  const std::string stuck =
      "emulated kernel: a warp waits for lanes that have ended or wait for the block";
  return {
      {"barrier", [=] { return equal(neighbour(true)); }},
      {"missing barrier", [=] { return !equal(neighbour(false)); }},
      {"missing barrier reads NaN", [=] { return nan(Order::forward, neighbour(false)); }},
      {"barrier of a warp", [=] { return equal(in_warp(true)); }},
      {"missing barrier of a warp", [=] { return !equal(in_warp(false)); }},
      {"tiles", [=] { return equal(overwritten(true)); }},
      {"tile overwritten too early", [=] { return !equal(overwritten(false)); }},
      {"pipeline", [=] { return equal(pipelined<1>(from, true)); }},
      {"pipeline without a copy's wait", [=] { return !equal(pipelined<2>(from, true)); }},
      {"pipeline that overwrites", [=] { return !equal(pipelined<1>(from, false)); }},
      {"copy without a wait reads NaN", [=] { return nan(Order::forward, unwaited(from)); }},
      {"copy without a wait", [=] { return !equal(unwaited(from)); }},
      {"order of blocks", [=] { return !agree(4, 4, 32, 0, order_of_blocks()); }},
      {"shuffle of half a warp", [=] { return error_of(32, half_a_shuffle) == stuck; }},
      {"warp that waits for the block's barrier",
       [=] {
         return error_of(64, [] { threadIdx.x == 40 ? __syncthreads() : __syncwarp(); }) == stuck;
       }},
      {"mma of half a warp", [=] { return error_of(32, half_an_mma) == stuck; }},
      {"goes on after an error",
       [=] {
         error_of(64, [] {
           if (threadIdx.x < 40) __syncwarp();
         });
         return equal(neighbour(true)) && shuffles();
       }},
      {"blocks of whole warps",
       [] {
         const auto refused = [](dim3 block) {
           return error_of(block, [] {}).find("must have whole warps") != std::string::npos;
         };
         return refused(33) && refused(0) && refused(1056) && refused(dim3(32, 33)) &&
                !refused(1024) && !refused(dim3(4, 8));
       }},
      {"shuffles", shuffles},
      {"shuffles in a row", shuffles_in_a_row},
      {"votes", votes},
      {"sums of warps", sums_of_warps},
      {"arrival", arrival},
      {"orders", orders},
      {"places", places},
      {"fresh shared memory", fresh_shared_memory},
      {"copies of all sizes", copies_of_all_sizes},
      {"atomics", atomics},
      {"mma tf32", mma_tf32_fragments},
      {"mma bf16", mma_bf16_fragments},
      {"mma f64", mma_f64_fragments},
      {"rounding to tf32", rounding_to_tf32},
      {"unrounded operands are cut", unrounded_operands_are_cut},
  };
}

// Ends the program.
void fault(const std::string& name) {
  static const Floats from = numbers(64);
  htf::emulate::run(1, 32, 32 * sizeof(float), [&] {
    float* shared = shared_memory<float>();
    if (name == "misaligned copy") copy_async<16>(shared + 1, from.data());
    if (name == "write past the end") shared[threadIdx.x + 1] = 1;
  });
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    fault(arguments[1]);
    return 0;
  }
  int wrong = 0;
  for (const auto& [name, check] : checks()) {
    const bool right = check();
    std::printf("%s %s\n", right ? "right" : "wrong", name.c_str());
    wrong += !right;
  }
  return wrong == 0 ? 0 : 1;
}
