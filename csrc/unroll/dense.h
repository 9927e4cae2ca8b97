// Dense layers of small perceptrons on SIMD vectors: matrix product, activations, losses. Rows are padded to whole
// vectors, so no loop has a tail.
#pragma once

#include "cpu/simd.h"
// simd.h comes first: see there.
#include "cpu/lstm_cell.h"
#include "unroll/unroll.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// kRows rows of c[m, n] = bias[n] + sum_k a[m row_stride + k column_stride] b[k, n]
template <int kRows>
void product_rows(int64_t n_padded, int64_t depth, const float* a, int64_t row_stride, int64_t column_stride,
                  const float* b, const float* bias, float* c) {
  for (int64_t n = 0; n < n_padded; n += kLanes) {
    Vec sum[kRows];
    LOPT_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = bias ? load(bias + n, kLanes) : Vec{};
    for (int64_t k = 0; k < depth; ++k) {
      const Vec row = load(b + k * n_padded + n, kLanes);
      LOPT_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] += a[r * row_stride + k * column_stride] * row;
    }
    LOPT_UNROLL
    for (int r = 0; r < kRows; ++r) store(c + r * n_padded + n, sum[r], kLanes);
  }
}

// c [rows, n_padded]; b [depth, n_padded]; bias [n_padded] or null.
inline void product(int64_t rows, int64_t n_padded, int64_t depth, const float* a, int64_t row_stride,
                    int64_t column_stride, const float* b, const float* bias, float* c) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8)
    product_rows<8>(n_padded, depth, a + m * row_stride, row_stride, column_stride, b, bias, c + m * n_padded);
  for (; m + 2 <= rows; m += 2)
    product_rows<2>(n_padded, depth, a + m * row_stride, row_stride, column_stride, b, bias, c + m * n_padded);
  for (; m < rows; ++m)
    product_rows<1>(n_padded, depth, a + m * row_stride, row_stride, column_stride, b, bias, c + m * n_padded);
}

// Phi(x), the distribution function of the standard normal.
LOPT_HD Vec normal_cdf(Vec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = 0.5f * (1.0f + std::erf(x[i] * 0.70710678118654752f));
  return x;
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
      const Vec cdf = normal_cdf(z);
      a = z * cdf;
      slope = cdf + z * 0.3989422804014327f * exp_of(-0.5f * z * z);
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
