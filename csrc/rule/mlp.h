// The small MLP of one parameter (or one SIMD vector of parameters), after everything constant in the tensor was folded
// into the first bias:
//
//   hidden1 = relu(bias + W1' x)      W1 [columns, width], bias [width] per tensor
//   hidden2 = relu(b2 + W2' hidden1)  W2 [width, width]
//   direction, magnitude = b3 + W3' hidden2 + (skip . x, 0)
//
// which is columns*width + width*width + 2*width multiply-adds (+ columns for the skip); with one hidden layer, hidden2 is
// hidden1. The outputs that feed the LSTM are linear in hidden2 and only their tensor mean is used, so kernels reduce
// hidden2 and never compute them.
#pragma once

#include <utility>

#include "rule/maths.h"

namespace lopt {

#ifndef LOPT_MLP_LAYERS  // lopt/kernels/own.py also compiles 1
#define LOPT_MLP_LAYERS 2
#endif
constexpr int kMlpLayers = LOPT_MLP_LAYERS;  // hidden ones

// Offsets into one packed row of MLP weights, in floats.
template <int kColumns, int kWidth>
struct MlpLayout {
  static constexpr int kSecond = kMlpLayers == 2 ? kWidth : 0;  // units of the second hidden layer
  static constexpr int kW1 = 0;                                 // [columns, width]
  static constexpr int kW2 = kW1 + kColumns * kWidth;           // [width, second]
  static constexpr int kB2 = kW2 + kWidth * kSecond;            // [second]
  static constexpr int kW3 = kB2 + kSecond;                     // [2, width]: direction, magnitude
  static constexpr int kB3 = kW3 + 2 * kWidth;                  // [2]
  static constexpr int kSkip = kB3 + 2;                         // [columns]
  static constexpr int kSize = (kSkip + kColumns + 3) / 4 * 4;  // padded to 16 bytes
};

// f(0), f(1), .. f(kCount - 1) with indices known to the compiler before it decides which arrays live in registers; a
// loop that it unrolls comes too late for that.
template <int kValue>
struct Index {
  LOPT_HD constexpr operator int() const { return kValue; }
};

template <class Function, int... kValues>
LOPT_HD void for_each_index(std::integer_sequence<int, kValues...>, const Function& f) {
  (f(Index<kValues>{}), ...);
}

template <int kCount, class Function>
LOPT_HD void unrolled(const Function& f) {
  for_each_index(std::make_integer_sequence<int, kCount>{}, f);
}

// relu(bias_j + sum_i w[i, j] x_i) for kRows rows of x [kIn, kRows] at once, so that a weight once loaded serves them all,
// and in blocks of kBlock outputs, whose kRows * kBlock sums stay in registers. finish(j, row, value) takes each of them.
template <int kIn, int kOut, int kRows, int kBlock, class V, class Finish>
LOPT_HD void relu_layer(const V* x, const float* w, const float* bias, const Finish& finish) {
  static_assert(kOut % kBlock == 0, "outputs come in whole blocks");
  LOPT_UNROLL_ON_DEVICE
  for (int first = 0; first < kOut; first += kBlock) {
    V sum[kBlock * kRows];
    unrolled<kBlock * kRows>([&](auto k) LOPT_INLINE { sum[k] = bias[first + k / kRows] - V{}; });
    LOPT_UNROLL_ON_DEVICE
    for (int i = 0; i < kIn; ++i) {
      V row[kRows];
      unrolled<kRows>([&](auto r) LOPT_INLINE { row[r] = x[i * kRows + r]; });
      unrolled<kBlock>([&](auto j) LOPT_INLINE {
        const float weight = w[i * kOut + first + j];
        unrolled<kRows>([&](auto r) LOPT_INLINE { sum[j * kRows + r] += row[r] * weight; });
      });
    }
    unrolled<kBlock * kRows>([&](auto k) LOPT_INLINE { finish(first + k / kRows, k % kRows, max_of(sum[k], V{})); });
  }
}

template <class V>
struct MlpOutput {
  V direction, magnitude;
};

// x: [columns, kRows]; weights: one row in MlpLayout; bias: [width]; written: hidden2 [width, kRows], out [kRows].
template <int kColumns, int kWidth, int kRows, int kBlock, class V>
LOPT_HD void small_mlp_rows(const V* x, const float* weights, const float* bias, V* hidden2, MlpOutput<V>* out) {
  using Layout = MlpLayout<kColumns, kWidth>;
  V direction[kRows], magnitude[kRows];
  unrolled<kRows>([&](auto r) LOPT_INLINE {
    direction[r] = weights[Layout::kB3] - V{};
    magnitude[r] = weights[Layout::kB3 + 1] - V{};
  });
  LOPT_UNROLL_ON_DEVICE
  for (int c = 0; c < kColumns; ++c)
    unrolled<kRows>([&](auto r) LOPT_INLINE { direction[r] += x[c * kRows + r] * weights[Layout::kSkip + c]; });
  const auto last = [&](int j, int r, const V& value) LOPT_INLINE {
    hidden2[j * kRows + r] = value;
    direction[r] += value * weights[Layout::kW3 + j];
    magnitude[r] += value * weights[Layout::kW3 + kWidth + j];
  };
  if constexpr (kMlpLayers == 1) {
    relu_layer<kColumns, kWidth, kRows, kBlock>(x, weights + Layout::kW1, bias, last);
  } else {
    V hidden1[kWidth * kRows];
    relu_layer<kColumns, kWidth, kRows, kBlock>(x, weights + Layout::kW1, bias,
                                                [&](int j, int r, const V& value)
                                                    LOPT_INLINE { hidden1[j * kRows + r] = value; });
    relu_layer<kWidth, kWidth, kRows, kBlock>(hidden1, weights + Layout::kW2, weights + Layout::kB2, last);
  }
  unrolled<kRows>([&](auto r) LOPT_INLINE { out[r] = {direction[r], magnitude[r]}; });
}

// One row.
template <int kColumns, int kWidth, class V>
LOPT_HD MlpOutput<V> small_mlp(const V* x, const float* weights, const float* bias, V* hidden2) {
  MlpOutput<V> out;
  small_mlp_rows < kColumns, kWidth, 1, kWidth<16 ? kWidth : 16>(x, weights, bias, hidden2, &out);
  return out;
}

}  // namespace lopt
