// evaluate_at_planned on a GPU: entries of a tree's end tensor at a fixed set of indices, and the
// weights' gradients, as kernel launches on raw pointers. For other operations to call: nothing is
// allocated, nothing waits for the device, and everything can be captured in a CUDA graph.
//
//   weights    group g: [F, R_in, R_out], contiguous   float32, float64 or bfloat16
//   result     [B], or [B, out_features]               of the weights' dtype
//   grad       as result; the gradient of something by it
//   gradients  group g: as the weight
//
// What is launched is in a schedule, int64 on the host, made once for a plan, a dtype and precision
// and the groups whose gradients are needed: htfkernels/cuda/planned.py, `schedule(program, table,
// lists, like, precision, needs)`. It gives the tensor that belongs here and the plan's lists (on
// the device), longer than the plan's own where the backward pass needs orders that a plan lacks.
//
// Usage:
//   const Current current(tensor);
//   const PlannedSizes sizes = planned_sizes(schedule, length);
//   PlannedCall call{schedule, weights, lists, frames, workspace};
//   planned_forward(current, call, result);
//   planned_backward(current, call, grad, gradients, squares);
//
// Forward, a plan's level is one launch: its products p W, p gathered and multiplied on load, and
// its inner products where a node has one column. Backward it is two: the gradients of products and
// of weights; then, in fixed order, the sums over the rows that read a row. Sums of parts of a
// weight's gradient join the last launch, and have one of their own only where shared leaves are
// among them. A launch has up to 25 jobs (36 forward), a level with more takes several.
//
// In the paper's setting (order 4, D = 8, R = 512, 2048 samples) that is 2 launches and 3:
//
//   launch                           blocks   multiply-adds  read (from the second level of cache)
//   products of {0, 1} and {2, 3}       128    33.6 million  weights 4 MB, leaves' rows 3 MB
//   2048 inner products                 256     2.1 million  frames 8 MB
//   their gradients, by rows            512     2.1 million  frames 8 MB
//   gradients of products, weights      256    67.1 million  18 MB, each tile as many operations
//   by leaves' rows, the root's weight  136     0.3 million  1 MB
//
// No block has more than 262,144 multiply-adds, a processor of an H100 does 128 in a cycle.
#pragma once

#include "cuda/launch.h"

namespace htf::gpu {

// As the schedule's header says.
struct PlannedSizes {
  int64_t groups = 0;           // of weights
  int64_t batch = 0;            // B
  int64_t outputs = 0;          // out_features
  ScalarType dtype{};           // of weights, result, grad, gradients
  int64_t frame_elements = 0;   // of dtype, that PlannedCall::frames must have
  int64_t workspace_bytes = 0;  // that PlannedCall::workspace must have; 0: no backward pass
  int64_t squares = 0;          // partial sums of squares that a backward pass leaves
  int64_t forward_launches = 0;
  int64_t backward_launches = 0;
};

// Throws where it is no schedule of `length` numbers, made by this version of the package.
PlannedSizes planned_sizes(const int64_t* schedule, int64_t length);

// All pointers but `schedule` and `weights` (the array itself) are the device's.
struct PlannedCall {
  const int64_t* schedule = nullptr;     // on the host
  const void* const* weights = nullptr;  // [groups], on the host; any alignment of dtype, 16 bytes
                                         // for full speed
  const int32_t* lists = nullptr;
  void* frames = nullptr;     // written by the forward pass, read by the backward pass; on 16 bytes
  void* workspace = nullptr;  // of the backward pass alone; on 16 bytes
};

void planned_forward(const Current& current, const PlannedCall& call, void* result);

// gradients [groups], on the host: null where the schedule was made without it. Every element of
// the others is written, in the same order of sums at every run.
//
// squares, or null: [sizes.squares] float64, all of them written; their sum is the sum of the
// squares of all the gradients (as rounded to dtype).
void planned_backward(const Current& current, const PlannedCall& call, const void* grad,
                      void* const* gradients, double* squares = nullptr);

}  // namespace htf::gpu
