// Matrix products, activations and losses of small networks on SIMD vectors. Rows are padded to whole vectors, so no loop
// has a tail.
#pragma once

#include "cpu/simd.h"
// simd.h comes first: see there.
#include "cpu/lstm_cell.h"
#include "unroll/unroll.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// A factor of a product: element [m, k] lies at m row_stride + k column_stride; k goes over `segments` pieces of `depth`
// that are segment_stride apart.
struct Factor {
  const float* at;
  int64_t row_stride, column_stride;
  int64_t depth, segments = 1, segment_stride = 0;
};

// kRows rows and kVectors vectors from n on of c[m, n] = start + sum_k a[m, k] b[k, n]; it starts with bias[n], or 0, or with
// kAdd with what is there.
template <int kRows, int kVectors, bool kAdd>
void product_block(int64_t n_padded, int64_t n, const Factor& a, const float* b, const float* bias, float* c) {
  Vec sum[kRows][kVectors];
  LOPT_UNROLL
  for (int r = 0; r < kRows; ++r) LOPT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = n + v * kLanes;
    sum[r][v] = kAdd ? load(c + r * n_padded + at) : bias ? load(bias + at) : Vec{};
  }
  b += n;
  for (int64_t s = 0; s < a.segments; ++s) {
    const float* element = a.at + s * a.segment_stride;
    for (int64_t k = 0; k < a.depth; ++k, element += a.column_stride, b += n_padded) {
      Vec row[kVectors];
      LOPT_UNROLL
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes);
      LOPT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float value = element[r * a.row_stride];
        LOPT_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] += value * row[v];
      }
    }
  }
  LOPT_UNROLL
  for (int r = 0; r < kRows; ++r) LOPT_UNROLL
  for (int v = 0; v < kVectors; ++v) store(c + r * n_padded + n + v * kLanes, sum[r][v]);
}

template <int kRows, bool kAdd>
void product_rows(int64_t n_padded, const Factor& a, const float* b, const float* bias, float* c) {
  constexpr int kVectors = kRows * 2 < kRegisters - 4 ? 2 : 1;
  int64_t n = 0;
  for (; n + kVectors * kLanes <= n_padded; n += kVectors * kLanes)
    product_block<kRows, kVectors, kAdd>(n_padded, n, a, b, bias, c);
  for (; n < n_padded; n += kLanes) product_block<kRows, 1, kAdd>(n_padded, n, a, b, bias, c);
}

// c [rows, n_padded]; b [segments * depth, n_padded]; bias [n_padded] or null.
template <bool kAdd = false>
void product(int64_t rows, int64_t n_padded, Factor a, const float* b, const float* bias, float* c) {
  const auto next = [&](int64_t count) {
    a.at += count * a.row_stride;
    c += count * n_padded;
    rows -= count;
  };
  for (; rows >= 8; next(8)) product_rows<8, kAdd>(n_padded, a, b, bias, c);
  for (; rows >= 2; next(2)) product_rows<2, kAdd>(n_padded, a, b, bias, c);
  for (; rows >= 1; next(1)) product_rows<1, kAdd>(n_padded, a, b, bias, c);
}

inline void product(int64_t rows, int64_t n_padded, int64_t depth, const float* a, int64_t row_stride,
                    int64_t column_stride, const float* b, const float* bias, float* c) {
  product(rows, n_padded, Factor{a, row_stride, column_stride, depth}, b, bias, c);
}

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
