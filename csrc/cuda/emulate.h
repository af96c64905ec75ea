// CUDA C++ on the CPU: every thread of a block is a fiber, blocks run one after the other.
//
// A fiber runs until it waits for others (__syncthreads, __syncwarp, shuffles, mma) or ends. What a
// GPU leaves open is chosen to bring mistakes to light, by set_order():
//
//   forward   blocks, warps and lanes ascending; asynchronous copies happen when they are waited for
//   backward  descending; asynchronous copies happen at once
//
// A kernel that lacks a barrier, waits for too few copies or overwrites what is still being read
// differs between the two orders, or reads the NaN that fills shared memory beforehand. Dynamic
// shared memory is a malloc of its own for each block, so that an address sanitizer sees accesses
// past its end. Warps must be complete: a collective that leaves out a lane of a warp, and a
// barrier that is never reached, are errors.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static thread_local
#define __constant__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

namespace htf::emulate {

enum class Order { forward, backward };
void set_order(Order order);
Order order();

// A kernel's launch; throws std::runtime_error where its threads wait for each other for ever.
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

struct Place {
  dim3 thread, block, block_size, grid_size;
};
const Place& here();  // of the running fiber
void* shared();

void block_barrier();
int block_or(int predicate);
void warp_barrier();
int lane();

// Eight registers of every lane of the warp, as they were when all had called this. Valid until the
// next but one call.
struct Registers {
  uint32_t r[8];
};
const Registers* exchange(const Registers& mine);

void copy_async(void* to, const void* from, std::size_t bytes, bool valid);
void copy_commit();
void copy_wait(int pending);

template <class T>
Registers packed(const T& x) {
  static_assert(sizeof(T) <= sizeof(Registers) && std::is_trivially_copyable_v<T>);
  Registers r{};
  std::memcpy(&r, &x, sizeof(T));
  return r;
}
template <class T>
T unpacked(const Registers& r) {
  T x;
  std::memcpy(&x, &r, sizeof(T));
  return x;
}

}  // namespace htf::emulate

#define threadIdx (::htf::emulate::here().thread)
#define blockIdx (::htf::emulate::here().block)
#define blockDim (::htf::emulate::here().block_size)
#define gridDim (::htf::emulate::here().grid_size)

inline void __syncthreads() { ::htf::emulate::block_barrier(); }
inline int __syncthreads_or(int predicate) { return ::htf::emulate::block_or(predicate); }
inline void __syncwarp(unsigned = ~0u) { ::htf::emulate::warp_barrier(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Of whole warps only.
template <class T>
T __shfl_sync(unsigned, T x, int source, int width = 32) {
  const int lane = ::htf::emulate::lane();
  const auto* all = ::htf::emulate::exchange(::htf::emulate::packed(x));
  return ::htf::emulate::unpacked<T>(all[(lane & ~(width - 1)) + (source & (width - 1))]);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask, int = 32) {
  const int lane = ::htf::emulate::lane();
  const auto* all = ::htf::emulate::exchange(::htf::emulate::packed(x));
  return ::htf::emulate::unpacked<T>(all[lane ^ mask]);
}
template <class T>
T __shfl_down_sync(unsigned, T x, int delta, int width = 32) {
  const int lane = ::htf::emulate::lane();
  const auto* all = ::htf::emulate::exchange(::htf::emulate::packed(x));
  const bool inside = (lane & (width - 1)) + delta < width;
  return inside ? ::htf::emulate::unpacked<T>(all[lane + delta]) : x;
}
template <class T>
T __shfl_up_sync(unsigned, T x, int delta, int width = 32) {
  const int lane = ::htf::emulate::lane();
  const auto* all = ::htf::emulate::exchange(::htf::emulate::packed(x));
  return (lane & (width - 1)) >= delta ? ::htf::emulate::unpacked<T>(all[lane - delta]) : x;
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const auto* all = ::htf::emulate::exchange(::htf::emulate::packed(predicate != 0 ? 1u : 0u));
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) found |= all[i].r[0] << i;
  return found;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}

template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p = static_cast<T>(before + x);
  return before;
}
template <class T>
T atomicExch(T* p, T x) {
  const T before = *p;
  *p = x;
  return before;
}
template <class T>
T atomicMax(T* p, T x) {
  const T before = *p;
  if (x > before) *p = x;
  return before;
}
template <class T>
T atomicMin(T* p, T x) {
  const T before = *p;
  if (x < before) *p = x;
  return before;
}
template <class T>
T atomicOr(T* p, T x) {
  const T before = *p;
  *p = before | x;
  return before;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : 1 + std::countr_zero(static_cast<unsigned>(x)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

namespace htf::gpu {

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulate::shared());
}

template <int Bytes>
void copy_async(void* to, const void* from, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulate::copy_async(to, from, Bytes, valid);
}
inline void copy_commit() { emulate::copy_commit(); }
template <int Pending>
void copy_wait() {
  emulate::copy_wait(Pending);
}

inline int add_acquire_release(int* p, int x) { return atomicAdd(p, x); }

inline float rounded_sum(float a, float b) { return a + b; }
inline double rounded_sum(double a, double b) { return a + b; }

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_f64(double (&d)[2], double a, double b);

}  // namespace htf::gpu
