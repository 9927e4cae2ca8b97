// Activations and losses of small networks on SIMD vectors. Rows are padded to whole vectors, so no loop
// has a tail.
#pragma once

#include "cpu/simd.h"
// simd.h comes first: see there.
#include "cpu/lstm_cell.h"
#include "cpu/product.h"
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
inline void activate(int64_t activation, int64_t count, float* values, float* slopes) {
  for (int64_t i = 0; i < count; i += kLanes) {
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
  }
}

// Mean cross-entropy of [batch, n] logits (rows of n_padded floats); in place, logits become its gradient.
inline float softmax_loss(int64_t batch, int64_t n, int64_t n_padded, const int64_t* labels, float* logits) {
  double total = 0.0;
  const float share = 1.0f / static_cast<float>(batch);
  for (int64_t b = 0; b < batch; ++b) {
    float* row = logits + b * n_padded;
    const float at_label = row[labels[b]];
    float highest = row[0];
    for (int64_t j = 1; j < n; ++j) highest = highest < row[j] ? row[j] : highest;
    double sum = 0.0;
    for (int64_t j = 0; j < n_padded; j += kLanes) {
      const Vec e =
          exp_of(load(row + j, kLanes) - highest) * lane_mask(n - j < kLanes ? static_cast<int>(n - j) : kLanes);
      store(row + j, e, kLanes);
      sum += sum_lanes(e);
    }
    total += std::log(sum) + highest - at_label;
    const float scale = share / static_cast<float>(sum);
    for (int64_t j = 0; j < n_padded; j += kLanes) store(row + j, load(row + j, kLanes) * scale, kLanes);
    row[labels[b]] -= share;
  }
  return static_cast<float>(total / static_cast<double>(batch));
}

// Mean squared error over [batch, n] outputs; in place, outputs become its gradient. targets: [batch, n_padded].
inline float squared_loss(int64_t batch, int64_t n, int64_t n_padded, const float* targets, float* outputs) {
  double total = 0.0;
  const float share = 2.0f / static_cast<float>(batch * n);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < n_padded; j += kLanes) {
      float* at = outputs + b * n_padded + j;
      const Vec mask = lane_mask(n - j < kLanes ? static_cast<int>(n - j) : kLanes);
      const Vec error = (load(at, kLanes) - load(targets + b * n_padded + j, kLanes)) * mask;
      total += sum_lanes(error * error);
      store(at, error * share, kLanes);
    }
  return static_cast<float>(total / static_cast<double>(batch * n));
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
