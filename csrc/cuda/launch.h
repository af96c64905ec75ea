// What the host side of a CUDA operation needs: the device and stream of its tensors, memory, and
// launches whose errors are seen.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <initializer_list>
#include <mutex>
#include <vector>

#include "check.h"
#include "cuda/device.h"

// The operators' namespace and the key of their kernels: HTF_CUDA_LIBRARY(m) { m.def(...); },
// HTF_CUDA_KERNELS(m) { m.impl(...); }.
#ifdef HTF_EMULATE
#define HTF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels_emulated, m)
#define HTF_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(htfkernels_emulated, CPU, m)
using cudaStream_t = void*;
#else
#define HTF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_FRAGMENT(htfkernels_cuda, m)
#define HTF_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(htfkernels_cuda, CUDA, m)
#endif

namespace htf::gpu {

struct Device {
  int index = 0;
  int processors = 0;    // streaming multiprocessors
  int shared_bytes = 0;  // of shared memory that a block can have
  int capability = 0;    // 90 for 9.0
};

// While it lives, the device of a tensor is the current one.
class Current {
 public:
  explicit Current(const Tensor& t);
  const Device& device() const { return device_; }
  cudaStream_t stream() const { return stream_; }  // PyTorch's current one

 private:
#ifndef HTF_EMULATE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Device device_;
  cudaStream_t stream_ = nullptr;
};

// Whether tensors of these kernels are where they should be: on the GPU, in an emulation the CPU.
inline bool on_device(const Tensor& t) {
#ifdef HTF_EMULATE
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

// Uninitialised (NaN or -1 where HTF_POISON is set), on the device and in PyTorch's allocator.
Tensor device_tensor(const Current& current, const Tensor& like, const std::vector<int64_t>& sizes,
                     ScalarType dtype);
// All zero.
Tensor device_zeros(const Current& current, const Tensor& like, const std::vector<int64_t>& sizes,
                    ScalarType dtype);
void set_bytes(const Current& current, void* to, int value, std::size_t bytes);

#ifndef HTF_EMULATE
// Throws with CUDA's own words.
void check_cuda(cudaError_t error, const char* what);

template <auto kernel>
void allow_shared(int device, std::size_t bytes, const char* name) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  constexpr int kDevices = 64;
  static std::atomic<std::size_t> allowed[kDevices];
  const auto enough = [&] { return device < kDevices && bytes <= allowed[device].load(); };
  if (bytes <= kWithoutAsking || enough()) return;
  static std::mutex asking;  // a thread that needs less must not take back what another got
  const std::lock_guard<std::mutex> lock(asking);
  if (enough()) return;
  check_cuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      name);
  if (device < kDevices) allowed[device].store(bytes);
}
#endif

// How many kernels this process has launched.
inline std::atomic<int64_t> launches{0};

// kernel<<<grid, block, shared_bytes, the current stream>>>(args...). No waiting; an empty grid
// launches nothing. name is what errors call the kernel.
template <auto kernel, class... Args>
void launch(const char* name, const Current& current, dim3 grid, dim3 block,
            std::size_t shared_bytes, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check(shared_bytes <= static_cast<std::size_t>(current.device().shared_bytes),
        "htfkernels: ", name, " needs ", shared_bytes,
        " bytes of shared memory, and a block of this device has ", current.device().shared_bytes);
  launches.fetch_add(1, std::memory_order_relaxed);
#ifdef HTF_EMULATE
  emulate::run(grid, block, shared_bytes, [&] { kernel(args...); });
#else
  allow_shared<kernel>(current.device().index, shared_bytes, name);
  kernel<<<grid, block, shared_bytes, current.stream()>>>(args...);
  check_cuda(cudaGetLastError(), name);
#endif
}

}  // namespace htf::gpu
