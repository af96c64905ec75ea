// What kernels are written with, beside CUDA C++ itself: shared memory, asynchronous copies, tensor
// core instructions, arrival. Device code includes this and nothing else of CUDA.
//
// The same sources are compiled twice: by nvcc for GPUs (sm_80 or later), and by the host's
// compiler with HTF_EMULATE, where every thread is a fiber on the CPU (emulate.h). The second is
// how kernels are tested where there is no GPU; it is slow.
//
// Fragments of the mma instructions, g = lane / 4, t = lane % 4:
//   m16n8k8  (tf32)   a: (g, t) (g+8, t) (g, t+4) (g+8, t+4)        b: (t, g) (t+4, g)
//   m16n8k16 (bf16)   a: pairs (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8)
//                     b: pairs (2t, g) (2t+8, g), the lower index in the lower half
//   both              d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
//   m8n8k4   (f64)    a: (g, t)   b: (t, g)   d: (g, 2t) (g, 2t+1)
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#ifdef HTF_EMULATE
#include "cuda/emulate.h"
#else
#include <cuda_runtime.h>
#endif

namespace htf::gpu {

using torch::headeronly::BFloat16;

constexpr int kWarp = 32;

#ifndef HTF_EMULATE

// The block's dynamic shared memory, on a 128-byte boundary.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char htf_shared_memory[];
  return reinterpret_cast<T*>(htf_shared_memory);
}

// Starts copying 4, 8 or 16 bytes, aligned to as many, into shared memory; zeros where not valid.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(target), "l"(from),
                 "n"(Bytes), "r"(bytes)
                 : "memory");
  }
}
// Closes a group of copies of this thread.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until at most Pending of this thread's groups are under way. Other threads' copies are
// there after their wait and a __syncthreads().
template <int Pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// a + b, rounded: never one instruction with a product that a or b is. Which sums nvcc contracts
// differs between instances of a template; with this they give the same bits.
__device__ __forceinline__ float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double rounded_sum(double a, double b) { return __dadd_rn(a, b); }

// Rounds to the 10 explicit bits that tensor cores read of a float; they cut the others off.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(r) : "f"(x));
  return r;
}

// d += a b
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};\n"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

// Adds and returns what was there: all that this thread saw written before is written for who reads
// the sum by the same function, on any multiprocessor.
__device__ __forceinline__ int add_acquire_release(int* p, int x) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;\n"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(p)), "r"(x)
               : "memory");
  return before;
}

#endif

// Two numbers as bfloat16 in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(BFloat16 low, BFloat16 high) {
  return static_cast<uint32_t>(low.x) | static_cast<uint32_t>(high.x) << 16;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return pack_bf16(static_cast<BFloat16>(low), static_cast<BFloat16>(high));
}

// For all threads of a block together, once they have written their part: true in the block that
// comes last of `expected`, which then sees what the others wrote (read it through pointers that
// are not __restrict__ const, or with __ldcg). Which block that is changes from run to run, and so
// must not change what is computed. The counter, 0 before, is 0 again after the last.
__device__ __forceinline__ bool last_to_arrive(int* counter, int expected) {
  __syncthreads();  // what the block wrote is before what its first thread releases
  bool last = false;
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    last = add_acquire_release(counter, 1) == expected - 1;
    if (last) atomicExch(counter, 0);
  }
  return __syncthreads_or(last) != 0;  // and what it acquired before what the block reads
}

// The sum over a warp, in every lane, always in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

}  // namespace htf::gpu
