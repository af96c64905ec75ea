// A step of GroupRMSprop on the device (the formula: group_rmsprop.h), for operators and for steps
// that are fused with what gives the gradients. Nothing here waits for the device or allocates.
//
//   d = g + weight_decay p
//   v <- alpha v + (1 - alpha) sum of |d|^2,  t <- t + 1        v rounded to its dtype
//   p <- p - lr / (sqrt(v / (1 - alpha^t)) + eps) d
#pragma once

#include <vector>

#include "cuda/launch.h"
#include "group_rmsprop/begin.h"

namespace htf::gpu {

struct Parameter {
  void* values = nullptr;      // written
  const void* grad = nullptr;  // contiguous, of the same dtype
  int64_t size = 0;
  double lr = 0;
  double weight_decay = 0;
  const void* lr_at = nullptr;  // a factor of lr, read when the kernel runs; null: 1
  bool lr_double = false;       // whether that is float64, else float32
};

struct GroupRMSprop {
  std::vector<Parameter> parameters;  // of one dtype
  ScalarType dtype = ScalarType::Float;
  double alpha = 0, eps = 0;
  void* average = nullptr;  // v: float64 with float64 parameters, else float32
  double* count = nullptr;  // t
  double* begun = nullptr;  // [3], of the step alone
};

// What there is to do, but for the gradients and `begun`; sentences of errors begin with op.
// Lists have an entry for each parameter, lr_at may be empty, and so may be its tensors (see
// group_rmsprop_cuda.cu).
GroupRMSprop group_rmsprop_step(const char* op, const std::vector<Tensor>& params,
                                const Tensor& average, const Tensor& count,
                                const std::vector<double>& lr, const std::vector<Tensor>& lr_at,
                                const std::vector<double>& weight_decay, double alpha, double eps);

// For a kernel before move_parameters: what it begins the step with, see begin.h.
Begin begin_of(const GroupRMSprop& step);

// How many partial sums sum_squares leaves.
int64_t squares_count(const GroupRMSprop& step);

// partials[i] = a part of the sum of |d|^2, squares_count of them. Begins the step.
void sum_squares(const Current& current, const GroupRMSprop& step, double* partials);

// Where there are so many partial sums that not every block should read all of them: fewer of the
// same sum, behind them, by one launch; else these. Partials have room for partials_room(count).
struct Partials {
  const double* sums;
  int64_t count;
};
int64_t partials_room(int64_t count);
Partials folded(const Current& current, double* partials, int64_t count);

// The new v, t and p, after the step has begun. The partial sums may come from anywhere: every
// block adds all of them up in the same order, so there is no launch in between. One launch for up
// to 48 parameters.
void move_parameters(const Current& current, const GroupRMSprop& step, const Partials& partials);

}  // namespace htf::gpu
