// completion_loss(predictions [B], targets [B], arrived [1], which) -> (loss [], grad [B])
//
//   which     0: squared   1: absolute   2: Huber's, see loss_cuda.h
//   arrived   int32, 0 before and after
//
// A thread has four samples, a block 4096 or a multiple of that; it writes their gradients and sums
// their losses in float64. Where there are several blocks, the one that comes last adds what they
// left, always in the same order. The paper's 2048 samples, 24 KB, are one block, without arrivals:
// loads, a sum over a block and stores one after the other, 1 to 2 us.
#include "train/loss_cuda.h"

#include <tuple>

#include "cuda/block_sum.h"

namespace htf::gpu {
namespace {

constexpr int kLossThreads = 1024;
constexpr int kLossWarps = kLossThreads / kWarp;
constexpr int kLossEach = 4;  // samples of a thread at a time
constexpr int kLossRound = kLossThreads * kLossEach;
constexpr int kBlocks = 264;

int64_t piece_of(int64_t batch) {
  constexpr int64_t most = int64_t{kLossRound} * kBlocks;
  return (batch + most - 1) / most * kLossRound;
}

template <class T>
__device__ __forceinline__ T sign(T d) {
  return d > 0 ? T(1) : d < 0 ? T(-1) : d;  // NaN stays
}

template <class T, Loss which>
__global__ void __launch_bounds__(kLossThreads)
    mean_loss(const T* predictions, const T* targets, int64_t batch, int64_t piece, T* grad,
              T* loss, double* partials, int* arrived, Begin begin_with) {
  if (begin_with.begun != nullptr && blockIdx.x == 0 && threadIdx.x == kLossThreads - 1)
    begin_step(begin_with);
  double* shared = shared_memory<double>();  // [kLossWarps]
  const int64_t begin = blockIdx.x * piece;
  const int64_t end = begin + piece < batch ? begin + piece : batch;
  const T scale = static_cast<T>((which == Loss::squared ? 2.0 : 1.0) / batch);
  double sum = 0;
  for (int64_t round = begin; round < end; round += kLossRound) {
    T d[kLossEach];
#pragma unroll
    for (int k = 0; k < kLossEach; ++k) {
      const int64_t i = round + k * kLossThreads + threadIdx.x;
      d[k] = i < end ? predictions[i] - targets[i] : T(0);
    }
#pragma unroll
    for (int k = 0; k < kLossEach; ++k) {
      const int64_t i = round + k * kLossThreads + threadIdx.x;
      const T size = d[k] < 0 ? -d[k] : d[k];
      T slope = d[k];
      double value = size;
      if (which == Loss::squared)
        value *= value;
      else if (which == Loss::huber)
        value = value > 1 ? value - 0.5 : 0.5 * value * value;
      if (which == Loss::absolute || (which == Loss::huber && size > 1)) slope = sign(d[k]);
      if (i < end) grad[i] = scale * slope;
      sum += value;
    }
  }
  sum = block_sum<kLossThreads>(sum, shared);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
    if (!last_to_arrive(arrived, gridDim.x)) return;
    sum = 0;
    for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += kLossThreads)
      sum += __ldcg(partials + i);
    sum = block_sum<kLossThreads>(sum, shared);
  }
  if (threadIdx.x == 0) *loss = static_cast<T>(sum / batch);
}

template <class T>
void run(const Current& current, Loss which, const T* predictions, const T* targets, int64_t batch,
         T* grad, T* loss, double* partials, int* arrived, const Begin& begin) {
  const int64_t piece = piece_of(batch);
  const auto with = [&]<Loss kind>() {
    launch<mean_loss<T, kind>>("mean_loss", current,
                               static_cast<unsigned>((batch + piece - 1) / piece), kLossThreads,
                               kLossWarps * sizeof(double), predictions, targets, batch, piece,
                               grad, loss, partials, arrived, begin);
  };
  if (which == Loss::squared) with.template operator()<Loss::squared>();
  if (which == Loss::absolute) with.template operator()<Loss::absolute>();
  if (which == Loss::huber) with.template operator()<Loss::huber>();
}

std::tuple<Tensor, Tensor> completion_loss(const Tensor& predictions, const Tensor& targets,
                                           const Tensor& arrived, int64_t which) {
  const char* op = "completion_loss";
  const ScalarType dtype = predictions.scalar_type();
  const auto fits = [&](const Tensor& t) {
    return on_device(t) && t.scalar_type() == dtype && t.dim() == 1 && t.is_contiguous() &&
           t.numel() == predictions.numel() && t.numel() > 0;
  };
  check((dtype == ScalarType::Float || dtype == ScalarType::Double) && fits(predictions) &&
            fits(targets),
        op, ": predictions and targets must be contiguous [B], B > 0, of one dtype, float32 or ",
        "float64, on the device, got ", describe(predictions), " and ", describe(targets));
  check(on_device(arrived) && arrived.scalar_type() == ScalarType::Int && arrived.numel() == 1, op,
        ": arrived must be one Int on the device, got ", describe(arrived));
  check(which >= 0 && which <= 2, op, ": which must be 0, 1 or 2, got ", which);
  const Current current(predictions);
  const int64_t batch = predictions.numel();
  Tensor loss = device_tensor(current, predictions, {}, dtype);
  Tensor grad = device_tensor(current, predictions, {batch}, dtype);
  const Tensor partials =
      device_tensor(current, predictions, {loss_partials(batch)}, ScalarType::Double);
  mean_loss(current, static_cast<Loss>(which), dtype, predictions.const_data_ptr(),
            targets.const_data_ptr(), batch, grad.mutable_data_ptr(), loss.mutable_data_ptr(),
            static_cast<double*>(partials.mutable_data_ptr()),
            static_cast<int*>(arrived.mutable_data_ptr()));
  return {loss, grad};
}

}  // namespace

int64_t loss_partials(int64_t batch) {
  const int64_t piece = piece_of(batch);
  return (batch + piece - 1) / piece;
}

void mean_loss(const Current& current, Loss which, ScalarType dtype, const void* predictions,
               const void* targets, int64_t batch, void* grad, void* loss, double* partials,
               int* arrived, const Begin& begin) {
  const auto as = [&](auto number) {
    using T = decltype(number);
    run<T>(current, which, static_cast<const T*>(predictions), static_cast<const T*>(targets),
           batch, static_cast<T*>(grad), static_cast<T*>(loss), partials, arrived, begin);
  };
  if (dtype == ScalarType::Double)
    as(double{});
  else
    as(float{});
}

}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def(
      "completion_loss(Tensor predictions, Tensor targets, Tensor(a!) arrived, int which) -> "
      "(Tensor, Tensor)");
}
HTF_CUDA_KERNELS(m) { m.impl("completion_loss", TORCH_BOX(&htf::gpu::completion_loss)); }
