// group_rmsprop_ on the device, in two launches: the squares of the gradients, and the step.
//
//   group_rmsprop_(params, grads, average, count, lr, lr_at, weight_decay, alpha, eps)
//
//   params, grads     contiguous tensors of one dtype: float32, float64 or bfloat16
//   average           v, [], float64 for float64 parameters, float32 for the others; written
//   count             t, [], float64; written
//   lr, weight_decay  a number for each parameter
//   lr_at             empty, or a tensor for each parameter: [], float32 or float64 on the device,
//                     a factor of lr that is read when the kernel runs; or [0] for none
//
// A block has a piece of one parameter, of as many elements as every other; the parameters' table
// is the kernel's argument, so that a captured launch needs no memory of the host's. The squares of
// 32 bytes are summed in the parameters' dtype (bfloat16: float32), these sums in float64: a block
// leaves one number. In the second launch every block adds these numbers (at most 560, from
// the L2 cache) in one order while its piece of p and g is on its way into registers, so that no
// launch, no waiting among blocks and no atomic is needed for the norm. What all blocks need of v
// and t the launch before has copied (begin.h), so that a block of this one can write them. (Of
// more than 4096 numbers, from thousands of parameters or from a large backward pass that left
// them, one more launch makes 256.)
//
// Bytes: g once and then g and p read, p written: 4 (5 with a decay) times the parameters, 2.2 MB
// each in the paper's HTF panel, which stay in the L2 cache; 265 blocks, one wave; each launch is
// about as long as a launch takes. No shared memory but for 9 numbers.
#include "group_rmsprop/group_rmsprop_cuda.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "cuda/block_sum.h"

namespace htf::gpu {
namespace {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / kWarp;
constexpr int kTensors = 48;  // of a launch: what arguments of 4 KB hold
constexpr int kPacks = 2;     // 16-byte packs of a thread in a round
constexpr int kRead = 4096;   // partial sums that every block adds up
constexpr int kFolded = 256;  // where there are more, so many are made of them
constexpr int kPieces = 512;  // blocks at most, and one more for each parameter

struct Entry {
  void* values;
  const void* grad;
  const void* lr_at;
  int64_t size;
  double lr, weight_decay;
  int first;  // block
  int lr_double;
};

struct Table {
  Entry entry[kTensors];
  int tensors;
  int64_t piece;  // elements of a block
};

struct State {
  void* average;
  double* count;
  const double* begun;
  const double* partials;
  int partial_count;
  int last;  // whether this launch writes average and count
  double alpha, eps;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

template <class T>
constexpr int kRound = kStepThreads * kPacks * Pack<T>::kSize;

// The block's parameter: the last that begins at or before it. Empty ones begin where the next
// does.
__device__ __forceinline__ int tensor_of(const Table& table, int block) {
  int low = 0, high = table.tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entry[middle].first <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ __forceinline__ bool on_16_bytes(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Elements at .. at + size of memory of `end` elements; what is past its end is left as it is.
template <class T>
__device__ __forceinline__ void load(Pack<T>& to, const T* from, int64_t at, int64_t end,
                                     bool whole) {
  if (whole && at + Pack<T>::kSize <= end) {
    to = *reinterpret_cast<const Pack<T>*>(from + at);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i)
      if (at + i < end) to.x[i] = from[at + i];
  }
}
template <class T>
__device__ __forceinline__ void store(T* to, const Pack<T>& from, int64_t at, int64_t end,
                                      bool whole) {
  if (whole && at + Pack<T>::kSize <= end) {
    *reinterpret_cast<Pack<T>*>(to + at) = from;
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i)
      if (at + i < end) to[at + i] = from.x[i];
  }
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    squares(const __grid_constant__ Table table, const __grid_constant__ Begin begin,
            double* partials) {
  using C = typename Accumulate<T>::type;
  if (begin.begun != nullptr && blockIdx.x == 0 && threadIdx.x == kStepThreads - 1)
    begin_step(begin);
  constexpr int W = Pack<T>::kSize;
  const Entry& e = table.entry[tensor_of(table, blockIdx.x)];
  const T* g = static_cast<const T*>(e.grad);
  const T* p = static_cast<const T*>(e.values);
  const bool whole = on_16_bytes(g) && on_16_bytes(p);
  const C decay = static_cast<C>(e.weight_decay);
  const int64_t from = (blockIdx.x - e.first) * table.piece;
  const int64_t end = from + table.piece < e.size ? from + table.piece : e.size;
  double sum = 0;
  for (int64_t round = from; round < end; round += kRound<T>) {
    Pack<T> grad[kPacks] = {}, values[kPacks] = {};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t at = round + (k * kStepThreads + threadIdx.x) * W;
      load(grad[k], g, at, end, whole);
      if (decay != 0) load(values[k], p, at, end, whole);
    }
    C part = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const C d = static_cast<C>(grad[k].x[i]) + decay * static_cast<C>(values[k].x[i]);
        part += d * d;
      }
    sum += part;
  }
  sum = block_sum<kStepThreads>(sum, shared_memory<double>());
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kStepThreads)
    fold(const double* partials, int64_t count, int64_t piece, double* sums) {
  const int64_t from = blockIdx.x * piece;
  const int64_t end = from + piece < count ? from + piece : count;
  double sum = 0;
  for (int64_t i = from + threadIdx.x; i < end; i += kStepThreads) sum += partials[i];
  sum = block_sum<kStepThreads>(sum, shared_memory<double>());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    move(const __grid_constant__ Table table, const __grid_constant__ State state) {
  using C = typename Accumulate<T>::type;
  constexpr int W = Pack<T>::kSize;
  double* shared = shared_memory<double>();  // [kStepWarps], and lr / denominator
  const Entry& e = table.entry[tensor_of(table, blockIdx.x)];
  const T* g = static_cast<const T*>(e.grad);
  T* p = static_cast<T*>(e.values);
  const bool whole = on_16_bytes(g) && on_16_bytes(p);
  const int64_t from = (blockIdx.x - e.first) * table.piece;
  const int64_t end = from + table.piece < e.size ? from + table.piece : e.size;

  Pack<T> grad[kPacks] = {}, values[kPacks] = {};
  const auto fetch = [&](int64_t round) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t at = round + (k * kStepThreads + threadIdx.x) * W;
      load(grad[k], g, at, end, whole);
      load<T>(values[k], p, at, end, whole);
    }
  };
  fetch(from);

  double sum = 0, decayed = 0, correction = 1, lr = e.lr;
  if (threadIdx.x == 0) {
    decayed = state.begun[0], correction = state.begun[1];
    if (e.lr_at != nullptr)
      lr *= e.lr_double ? *static_cast<const double*>(e.lr_at)
                        : static_cast<double>(*static_cast<const float*>(e.lr_at));
  }
  for (int i = threadIdx.x; i < state.partial_count; i += kStepThreads) sum += state.partials[i];
  sum = block_sum<kStepThreads>(sum, shared);
  if (threadIdx.x == 0) {
    const C now = static_cast<C>(decayed + (1 - state.alpha) * sum);
    shared[kStepWarps] = lr / (sqrt(now / correction) + state.eps);
    if (state.last && blockIdx.x == 0) {
      *static_cast<C*>(state.average) = now;
      *state.count = state.begun[2];
    }
  }
  __syncthreads();
  const C size = static_cast<C>(-shared[kStepWarps]), decay = static_cast<C>(e.weight_decay);
  for (int64_t round = from; round < end;) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const C x = static_cast<C>(values[k].x[i]);
        values[k].x[i] = static_cast<T>(x + size * (static_cast<C>(grad[k].x[i]) + decay * x));
      }
      store(p, values[k], round + (k * kStepThreads + threadIdx.x) * W, end, whole);
    }
    round += kRound<T>;
    fetch(round);
  }
}

// What the launches have: a piece for a block, so that there are at most kPieces and one more for
// every parameter.
int64_t piece_of(const GroupRMSprop& step, int64_t round) {
  int64_t total = 0;
  for (const Parameter& p : step.parameters) total += p.size;
  return std::max<int64_t>(1, (total + round * kPieces - 1) / (round * kPieces)) * round;
}

int64_t round_of(ScalarType dtype) {
  return kStepThreads * kPacks *
         (dtype == ScalarType::Double  ? 2
          : dtype == ScalarType::Float ? 4
                                       : 8);
}

// Whether no memory is of two parameters, or of a parameter and another's gradient.
bool disjoint(const GroupRMSprop& step, int64_t width) {
  struct Range {
    const char *begin, *end;
    bool written;
  };
  std::vector<Range> ranges;
  for (const Parameter& p : step.parameters) {
    if (p.size == 0) continue;
    const char* values = static_cast<const char*>(p.values);
    const char* grad = static_cast<const char*>(p.grad);
    ranges.push_back({values, values + p.size * width, true});
    ranges.push_back({grad, grad + p.size * width, false});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::less<const char*>{}(a.begin, b.begin);
  });
  const char *end = nullptr, *written = nullptr;
  for (const Range& r : ranges) {
    if (std::less<const char*>{}(r.begin, r.written ? end : written)) return false;
    end = std::max(end, r.end, std::less<const char*>{});
    if (r.written) written = std::max(written, r.end, std::less<const char*>{});
  }
  return true;
}

// run(table, blocks, first block of all, whether it is the first launch, and the last).
template <class Run>
void for_each_launch(const GroupRMSprop& step, std::size_t tensors, const Run& run) {
  Table table{};
  table.piece = piece_of(step, round_of(step.dtype));
  int blocks = 0;
  int64_t before = 0;
  bool first = true;
  const std::size_t all = step.parameters.size();
  for (std::size_t i = 0; i < all; ++i) {
    const Parameter& p = step.parameters[i];
    table.entry[table.tensors++] = {p.values, p.grad,         p.lr_at, p.size,
                                    p.lr,     p.weight_decay, blocks,  p.lr_double};
    blocks += static_cast<int>((p.size + table.piece - 1) / table.piece);
    const bool last = i + 1 == all;
    if (table.tensors == static_cast<int>(tensors) || last) {
      run(table, blocks, before, first, last);
      before += blocks;
      table.tensors = blocks = 0;
      first = false;
    }
  }
}

template <class F>
void with_number(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float)
    f(float{});
  else if (dtype == ScalarType::Double)
    f(double{});
  else
    f(BFloat16{});
}

constexpr const char* kOp = "group_rmsprop_";

void check_tensor(const char* op, const Tensor& t, const char* name, std::size_t i,
                  ScalarType dtype) {
  check(on_device(t) && t.scalar_type() == dtype && t.is_contiguous(), op, ": ", name, "[", i,
        "] must be a contiguous tensor of dtype ", toString(dtype), " on the device, got ",
        describe(t));
}

void check_number(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  check(on_device(t) && t.numel() == 1 && t.scalar_type() == dtype, op, ": ", name,
        " must be one number of dtype ", toString(dtype), " on the device, got ", describe(t));
}

void group_rmsprop(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const Tensor& average, const Tensor& count, const std::vector<double>& lr,
                   const std::vector<Tensor>& lr_at, const std::vector<double>& weight_decay,
                   double alpha, double eps) {
  GroupRMSprop step =
      group_rmsprop_step(kOp, params, average, count, lr, lr_at, weight_decay, alpha, eps);
  check(grads.size() == params.size(), kOp, ": grads must have an entry for each of the ",
        params.size(), " params, got ", grads.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    check_tensor(kOp, grads[i], "grads", i, step.dtype);
    check(grads[i].numel() == params[i].numel(), kOp, ": grads[", i, "] must be of the shape of ",
          "its parameter ", describe(params[i]), ", got ", describe(grads[i]));
    step.parameters[i].grad = grads[i].const_data_ptr();
  }
  const Current current(params[0]);
  const int64_t parts = squares_count(step);
  const Tensor partials =
      device_tensor(current, params[0], {3 + partials_room(parts)}, ScalarType::Double);
  step.begun = static_cast<double*>(partials.mutable_data_ptr());
  double* sums = step.begun + 3;
  sum_squares(current, step, sums);
  move_parameters(current, step, folded(current, sums, parts));
}

}  // namespace

GroupRMSprop group_rmsprop_step(const char* op, const std::vector<Tensor>& params,
                                const Tensor& average, const Tensor& count,
                                const std::vector<double>& lr, const std::vector<Tensor>& lr_at,
                                const std::vector<double>& weight_decay, double alpha, double eps) {
  const std::size_t number = params.size();
  check(number > 0, op, ": there are no params");
  check(lr.size() == number && weight_decay.size() == number, op,
        ": lr and weight_decay must have an entry for each of the ", number, " params, got ",
        lr.size(), " and ", weight_decay.size());
  check(lr_at.empty() || lr_at.size() == number, op, ": lr_at must be empty or have an entry for ",
        "each of the ", number, " params, got ", lr_at.size());
  check(alpha >= 0 && alpha < 1, op, ": alpha must be in [0, 1), got ", alpha);
  GroupRMSprop step;
  step.dtype = params[0].scalar_type();
  check(step.dtype == ScalarType::Float || step.dtype == ScalarType::Double ||
            step.dtype == ScalarType::BFloat16,
        op, ": params must be float32, float64 or bfloat16, got ", toString(step.dtype));
  check_number(op, "average", average,
               step.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_number(op, "count", count, ScalarType::Double);
  for (std::size_t i = 0; i < number; ++i) {
    check_tensor(op, params[i], "params", i, step.dtype);
    Parameter p{params[i].mutable_data_ptr(), nullptr, params[i].numel(), lr[i], weight_decay[i]};
    if (!lr_at.empty() && lr_at[i].numel() > 0) {
      const ScalarType type = lr_at[i].scalar_type();
      check(on_device(lr_at[i]) && lr_at[i].numel() == 1 &&
                (type == ScalarType::Float || type == ScalarType::Double),
            op, ": lr_at[", i, "] must be one float32 or float64 on the device, got ",
            describe(lr_at[i]));
      p.lr_at = lr_at[i].const_data_ptr();
      p.lr_double = type == ScalarType::Double;
    }
    step.parameters.push_back(p);
  }
  step.alpha = alpha, step.eps = eps;
  step.average = average.mutable_data_ptr();
  step.count = static_cast<double*>(count.mutable_data_ptr());
  return step;
}

int64_t squares_count(const GroupRMSprop& step) {
  const int64_t piece = piece_of(step, round_of(step.dtype));
  int64_t count = 0;
  for (const Parameter& p : step.parameters) count += (p.size + piece - 1) / piece;
  return count;
}

Begin begin_of(const GroupRMSprop& step) {
  return {step.average, step.count,           step.begun,
          step.alpha,   std::log(step.alpha), step.dtype == ScalarType::Double};
}

void sum_squares(const Current& current, const GroupRMSprop& step, double* partials) {
  with_number(step.dtype, [&](auto number) {
    using T = decltype(number);
    for_each_launch(step, kTensors,
                    [&](const Table& table, int blocks, int64_t before, bool first, bool) {
                      // A step begins even where there are no elements.
                      launch<squares<T>>("squares", current, first ? std::max(blocks, 1) : blocks,
                                         kStepThreads, kStepWarps * sizeof(double), table,
                                         first ? begin_of(step) : Begin{}, partials + before);
                    });
  });
}

int64_t partials_room(int64_t count) {
  return count <= kRead ? std::max<int64_t>(count, 1) : count + kFolded;
}

Partials folded(const Current& current, double* partials, int64_t count) {
  if (count <= kRead) return {partials, count};
  const int64_t piece = (count + kFolded - 1) / kFolded, pieces = (count + piece - 1) / piece;
  launch<fold>("fold", current, static_cast<unsigned>(pieces), kStepThreads,
               kStepWarps * sizeof(double), partials, count, piece, partials + count);
  return {partials + count, pieces};
}

void move_parameters(const Current& current, const GroupRMSprop& step, const Partials& partials) {
  State state{
      step.average, step.count, step.begun, partials.sums, static_cast<int>(partials.count), 0,
      step.alpha,   step.eps};
  with_number(step.dtype, [&](auto number) {
    using T = decltype(number);
    // Parameters that share memory change one after the other.
    const std::size_t tensors = disjoint(step, sizeof(T)) ? kTensors : 1;
    for_each_launch(step, tensors, [&](const Table& table, int blocks, int64_t, bool, bool last) {
      state.last = last;
      // Average and count move even where there are no elements.
      if (last) blocks = std::max(blocks, 1);
      launch<move<T>>("move", current, blocks, kStepThreads, (kStepWarps + 1) * sizeof(double),
                      table, state);
    });
  });
}

}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def(
      "group_rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) average, Tensor(c!) count, "
      "float[] lr, Tensor[] lr_at, float[] weight_decay, float alpha, float eps) -> ()");
}
HTF_CUDA_KERNELS(m) { m.impl("group_rmsprop_", TORCH_BOX(&htf::gpu::group_rmsprop)); }
