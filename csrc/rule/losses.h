// State of a loss, and what the tensor level sees of it; lopt/rule/losses.py is the definition.
#pragma once

#include <cmath>
#include <cstdint>

#include "rule/constants.h"
#include "rule/maths.h"

namespace lopt {

// Fields of a loss' state, all zero before the first: running mean and variance with the bias of their start at zero,
// number of losses, the last one, first and lowest mean without bias, and two slower means with their bias.
struct LossState {
  LOPT_ENUM(Field, kCount, mean, var, updates, last, first, lowest, middle, slow);
};

// Of the gradient clipper: steps (starts at 1), running root mean square of gradients with the bias of its start.
struct ClipState {
  LOPT_ENUM(Field, kCount, steps, rms);
};

// Of the training losses since the last step.
struct PendingLoss {
  LOPT_ENUM(Field, kCount, sum, number);
};

namespace {  // compiled once per instruction set: no function may be shared between them

LOPT_HD bool is_finite(float x) { return x - x == 0.0f; }

LOPT_HD bool any_loss(const float* state) { return state[LossState::updates] > 0; }

LOPT_HD float correction(const float* state, double decay) {
  return 1.0f / (1.0f - ::powf(static_cast<float>(decay), state[LossState::updates]) + kEpsilon);
}

LOPT_HD float corrected_mean(const float* state, double decay) {
  return any_loss(state) ? state[LossState::mean] * correction(state, decay) : 0.0f;
}

LOPT_HD float loss_spread(const float* state, double decay) {
  return ::sqrtf(state[LossState::var] * correction(state, decay));
}

// robust: a loss far from the mean counts as one at ten standard deviations, and in the mean as that mean.
LOPT_HD void next_loss(float* state, float loss, double decay, bool robust = false) {
  const float keep = static_cast<float>(decay), rest = static_cast<float>(1.0 - decay);
  float &mean = state[LossState::mean], &var = state[LossState::var], &lowest = state[LossState::lowest];
  float center = loss;
  if (robust && any_loss(state)) {
    const float middle = corrected_mean(state, decay), reach = kLossOutlier * (loss_spread(state, decay) + kEpsilon);
    const float near = clamp_of(loss, middle - reach, middle + reach);
    if (near != loss) center = middle;
    loss = near;
  }
  mean = keep * mean + rest * center;
  var = keep * var + rest * (mean - loss) * (mean - loss);
  state[LossState::middle] += kMiddleShare * (center - state[LossState::middle]);
  state[LossState::slow] += kSlowShare * (center - state[LossState::slow]);
  state[LossState::updates] += 1;
  state[LossState::last] = loss;
  const float now = corrected_mean(state, decay);
  if (state[LossState::updates] == 1) state[LossState::first] = lowest = now;
  lowest = ::fminf(lowest, now);
}

// How far the losses fell over the last thousand, in their standard deviations, as a logarithm with the sign of the fall.
LOPT_HD float loss_fall(const float* state, double decay) {
  const auto unbiased = [&](float mean, float share) LOPT_INLINE {
    return mean / (1.0f - ::powf(1.0f - share, state[LossState::updates]) + kEpsilon);
  };
  const float fall = (unbiased(state[LossState::slow], kSlowShare) - unbiased(state[LossState::middle], kMiddleShare)) /
                     (loss_spread(state, decay) + kEpsilon);
  const float size = ::fminf(::log1pf(kFallScale * ::fabsf(fall)), kInputBound);
  return fall < 0 ? -size : size;
}

// How much of what was gained is lost again, as a logarithm.
LOPT_HD float loss_rise(const float* state, double decay, float spread = 0.0f) {
  const float lowest = state[LossState::lowest];
  const float above = ::fmaxf(corrected_mean(state, decay) - lowest, 0.0f), gained = state[LossState::first] - lowest;
  return ::fminf(::log1pf(kRiseScale * above / (gained + spread + kTiny)), kInputBound);
}

LOPT_HD float standardise_loss(const float* state, float loss, double decay) {
  const float c = correction(state, decay);
  return clamp_of((loss - state[LossState::mean] * c) / ::sqrtf(state[LossState::var] * c + kEpsilon), -kInputBound,
                  kInputBound);
}

// A loss so small that its square is finite.
LOPT_HD float bounded_loss(float loss) { return clamp_of(loss, -kLargest, kLargest); }

// A training loss joins the others since the last step; a non-finite one counts as none.
LOPT_HD void observe_pending(float* pending, float loss) {
  if (!is_finite(loss)) return;
  pending[PendingLoss::sum] += bounded_loss(loss);
  pending[PendingLoss::number] += 1;
}

LOPT_HD float mean_pending(const float* pending) {
  return pending[PendingLoss::number] > 0 ? pending[PendingLoss::sum] / pending[PendingLoss::number] : NAN;
}

}  // namespace
}  // namespace lopt
