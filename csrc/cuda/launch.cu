#include "cuda/launch.h"

#ifndef HTF_EMULATE
#include <dlfcn.h>
#endif

#include <cstdlib>

namespace htf::gpu {
namespace {

bool poisoned() {
  static const bool set = [] {
    const char* value = std::getenv("HTF_POISON");
    return value != nullptr && *value != '\0' && *value != '0';
  }();
  return set;
}

std::size_t bytes_of(const Tensor& t) {
  return static_cast<std::size_t>(t.numel()) * static_cast<std::size_t>(t.element_size());
}

#ifndef HTF_EMULATE

// PyTorch's current stream. The function is in its CUDA library, which a PyTorch without CUDA
// lacks: looked up, and not linked, so that this module loads there.
cudaStream_t current_stream(int device) {
  using Get = int32_t(int32_t, void**);
  static Get* const get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get*>(found);
  }();
  check(get != nullptr, "htfkernels: this PyTorch is one without CUDA");
  void* stream = nullptr;
  check(get(device, &stream) == 0, "htfkernels: PyTorch does not tell its current stream");
  return static_cast<cudaStream_t>(stream);
}

Device properties(int index) {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static std::atomic<bool> there[kDevices];
  if (index < kDevices && there[index].load(std::memory_order_acquire)) return known[index];
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index), "the device's properties");
    return value;
  };
  Device d;
  d.index = index;
  d.processors = attribute(cudaDevAttrMultiProcessorCount);
  d.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  d.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                 attribute(cudaDevAttrComputeCapabilityMinor);
  if (index < kDevices && !there[index].load()) {
    known[index] = d;  // every thread writes the same
    there[index].store(true, std::memory_order_release);
  }
  return d;
}

#endif

}  // namespace

#ifdef HTF_EMULATE

// An H100's, so that kernels are launched as there.
Current::Current(const Tensor&) : device_{0, 132, 232448, 90} {}

void set_bytes(const Current&, void* to, int value, std::size_t bytes) {
  std::memset(to, value, bytes);
}

#else

Current::Current(const Tensor& t)
    : guard_(t.get_device_index()),
      device_(properties(t.get_device_index())),
      stream_(current_stream(device_.index)) {}

void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, "htfkernels: ", what, ": CUDA says: ", cudaGetErrorString(error));
}

void set_bytes(const Current& current, void* to, int value, std::size_t bytes) {
  check_cuda(cudaMemsetAsync(to, value, bytes, current.stream()), "filling memory");
}

#endif

Tensor device_tensor(const Current& current, const Tensor& like, const std::vector<int64_t>& sizes,
                     ScalarType dtype) {
  Tensor made = torch::stable::new_empty(like, sizes, dtype);
  if (poisoned() && made.numel() > 0) set_bytes(current, made.data_ptr(), 0xff, bytes_of(made));
  return made;
}

Tensor device_zeros(const Current& current, const Tensor& like, const std::vector<int64_t>& sizes,
                    ScalarType dtype) {
  Tensor made = torch::stable::new_empty(like, sizes, dtype);
  if (made.numel() > 0) set_bytes(current, made.data_ptr(), 0, bytes_of(made));
  return made;
}

}  // namespace htf::gpu
