// Activations and losses of small networks, by a team (Note [Teams] in layers.h).
#pragma once

#include "unroll/unroll.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// Phi(x), the distribution function of the standard normal, within 2e-7, given e = exp(-x^2 / 2): its tail is e times a
// polynomial in 1 / (1 + .28 |x|), fitted by weighted least squares.
LOPT_HD Vec normal_cdf(Vec x, Vec e) {
  const Vec u = 1.0f / (1.0f + 0.28f * abs_of(x));
  Vec p = splat(-0.105808839f);
  p = p * u + 0.389876455f;
  p = p * u - 0.236997426f;
  p = p * u + 0.268913358f;
  p = p * u + 0.0674954727f;
  p = p * u + 0.116520986f;
  const Vec tail = p * u * e;
  return x < Vec{} ? tail : 1.0f - tail;
}

// z -> a = f(z) in place of `values`; `slopes` gets f'(z).
template <class Team>
LOPT_CALLED void activate(const Team& team, Size activation, Size count, float* values, float* slopes) {
  team.vectors(count, [&](Size i) LOPT_INLINE {
    const Vec z = load(values + i, kLanes);
    Vec a, slope;
    if (activation == kRelu) {
      slope = z > Vec{} ? splat(1.0f) : Vec{};
      a = max_of(z, Vec{});
    } else if (activation == kTanh) {
      a = tanh_of(z);
      slope = 1.0f - a * a;
    } else {
      const Vec e = exp_of(-0.5f * z * z), cdf = normal_cdf(z, e);
      a = z * cdf;
      slope = cdf + z * 0.3989422804014327f * e;
    }
    store(values + i, a, kLanes);
    store(slopes + i, slope, kLanes);
  });
  team.sync();
}

// 1 in those of the lanes from j on that are among the first n.
LOPT_HD Vec mask_of(Size j, Size n) { return lane_mask(n - j < kLanes ? static_cast<int>(n - j) : kLanes); }

// Mean cross-entropy of [batch, n] logits (rows of n_padded floats); in place, logits become its gradient.
template <class Team>
LOPT_CALLED float softmax_loss(const Team& team, Size batch, Size n, Size n_padded, const int64_t* labels,
                               float* logits) {
  double total = 0.0;
  const float share = 1.0f / static_cast<float>(batch);
  team.parts(batch, [&](Size b, const auto& part) LOPT_INLINE {
    float* row = logits + b * n_padded;
    const float at_label = row[labels[b]];
    float highest = row[0];
    part.each(n, [&](Size j) LOPT_INLINE { highest = highest < row[j] ? row[j] : highest; });
    highest = part.largest(highest);
    part.sync();
    double sum = 0.0;
    part.vectors(n_padded, [&](Size j) LOPT_INLINE {
      const Vec e = exp_of(load(row + j, kLanes) - highest) * mask_of(j, n);
      store(row + j, e, kLanes);
      sum += sum_lanes(e);
    });
    sum = part.sum(sum);
    if (part.rank() == 0) total += ::log(sum) + highest - at_label;
    const float scale = share / static_cast<float>(sum);
    part.vectors(n_padded, [&](Size j) LOPT_INLINE { store(row + j, load(row + j, kLanes) * scale, kLanes); });
    part.sync();
    if (part.rank() == 0) row[labels[b]] -= share;
  });
  return static_cast<float>(team.sum(total) / static_cast<double>(batch));
}

// Mean squared error over [batch, n] outputs; in place, outputs become its gradient. targets: [batch, n_padded].
template <class Team>
LOPT_CALLED float squared_loss(const Team& team, Size batch, Size n, Size n_padded, const float* targets,
                               float* outputs) {
  double total = 0.0;
  const float share = 2.0f / static_cast<float>(batch * n);
  team.grid(batch, n_padded, [&](Size b, Size j, int) LOPT_INLINE {
    float* at = outputs + b * n_padded + j;
    const Vec error = (load(at, kLanes) - load(targets + b * n_padded + j, kLanes)) * mask_of(j, n);
    total += sum_lanes(error * error);
    store(at, error * share, kLanes);
  });
  return static_cast<float>(team.sum(total) / static_cast<double>(batch * n));
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
