// The small MLP of one parameter (or one SIMD vector of parameters), after everything constant in the tensor was folded
// into the first bias:
//
//   hidden1 = relu(bias + W1' x)      W1 [columns, width], bias [width] per tensor
//   hidden2 = relu(b2 + W2' hidden1)  W2 [width, width]
//   direction, magnitude = b3 + W3' hidden2 + (skip . x, 0)
//
// which is columns*width + width*width + 2*width multiply-adds (+ columns for the skip). The outputs that feed the LSTM
// are linear in hidden2 and only their tensor mean is used, so kernels reduce hidden2 and never compute them.
#pragma once

#include "maths.h"

namespace lopt {

// Offsets into one packed row of MLP weights, in floats.
template <int kColumns, int kWidth>
struct MlpLayout {
  static constexpr int kW1 = 0;                                 // [columns, width]
  static constexpr int kW2 = kW1 + kColumns * kWidth;           // [width, width]
  static constexpr int kB2 = kW2 + kWidth * kWidth;             // [width]
  static constexpr int kW3 = kB2 + kWidth;                      // [2, width]: direction, magnitude
  static constexpr int kB3 = kW3 + 2 * kWidth;                  // [2]
  static constexpr int kSkip = kB3 + 2;                         // [columns]
  static constexpr int kSize = (kSkip + kColumns + 3) / 4 * 4;  // padded to 16 bytes
};

// out_j = relu(bias_j + sum_i w[i, j] x_i), in blocks of outputs small enough to stay in registers.
template <int kIn, int kOut, class V>
LOPT_HD void relu_layer(const V* x, const float* w, const float* bias, V* out) {
  constexpr int kBlock = kOut < 16 ? kOut : 16;
  LOPT_UNROLL_ON_DEVICE
  for (int first = 0; first < kOut; first += kBlock) {
    V sum[kBlock];
    LOPT_UNROLL
    for (int j = 0; j < kBlock; ++j) sum[j] = V{} + bias[first + j];
    LOPT_UNROLL_ON_DEVICE
    for (int i = 0; i < kIn; ++i) {
      LOPT_UNROLL
      for (int j = 0; j < kBlock; ++j) sum[j] += x[i] * w[i * kOut + first + j];
    }
    LOPT_UNROLL
    for (int j = 0; j < kBlock; ++j) out[first + j] = max_of(sum[j], V{});
  }
}

template <class V>
struct MlpOutput {
  V direction, magnitude;
};

// x: [columns]; weights: one row in MlpLayout; bias: [width]; hidden2: [width], written.
template <int kColumns, int kWidth, class V>
LOPT_HD MlpOutput<V> small_mlp(const V* x, const float* weights, const float* bias, V* hidden2) {
  using Layout = MlpLayout<kColumns, kWidth>;
  V hidden1[kWidth];
  relu_layer<kColumns, kWidth>(x, weights + Layout::kW1, bias, hidden1);
  relu_layer<kWidth, kWidth>(hidden1, weights + Layout::kW2, weights + Layout::kB2, hidden2);
  MlpOutput<V> out{V{} + weights[Layout::kB3], V{} + weights[Layout::kB3 + 1]};
  LOPT_UNROLL
  for (int j = 0; j < kWidth; ++j) {
    out.direction += hidden2[j] * weights[Layout::kW3 + j];
    out.magnitude += hidden2[j] * weights[Layout::kW3 + kWidth + j];
  }
  LOPT_UNROLL
  for (int c = 0; c < kColumns; ++c) out.direction += x[c] * weights[Layout::kSkip + c];
  return out;
}

}  // namespace lopt
