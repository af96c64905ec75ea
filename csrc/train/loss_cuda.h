// The mean loss of predictions and its gradient, in one launch on raw pointers.
//
//   loss = mean of f(p_i - y_i),  grad_i = f'(p_i - y_i) / B
//   squared   f(d) = d^2
//   absolute  f(d) = |d|
//   huber     f(d) = d^2 / 2 where |d| <= 1, else |d| - 1/2
#pragma once

#include "cuda/launch.h"
#include "group_rmsprop/begin.h"

namespace htf::gpu {

enum class Loss { squared, absolute, huber };

// How many partial sums a loss of that many predictions needs.
int64_t loss_partials(int64_t batch);

// All of one dtype, float32 or float64, on the device: predictions, targets, grad [batch], loss one
// number; grad may be the predictions. partials: loss_partials(batch) float64. arrived: 0 before
// and after. begin: of the optimizer's step that comes after it, or nothing.
void mean_loss(const Current& current, Loss which, ScalarType dtype, const void* predictions,
               const void* targets, int64_t batch, void* grad, void* loss, double* partials,
               int* arrived, const Begin& begin = {});

}  // namespace htf::gpu
