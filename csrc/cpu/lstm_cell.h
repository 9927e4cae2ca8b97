// The LSTM cell of one tensor on SIMD vectors (lopt.rule.tensor_lstm.lstm_cell), and the memory that `advance` needs.
#pragma once

#include <algorithm>

#include "cpu/simd.h"
// simd.h comes first: see there.
#include "rule/tensor_lstm.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

LOPT_HD Vec tanh_of(Vec x) { return 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f); }

// Hands out parts of one buffer, each on a 64-byte boundary; with a null buffer it only counts.
struct Arena {
  float* base;
  int64_t used = 0;

  float* take(int64_t count) {
    float* at = base ? base + used : nullptr;
    used += (count + 15) / 16 * 16;
    return at;
  }
};

// One LSTM row on vectors: z = [x, h] W + b; gates i, g, f, o.
struct LstmCell {
  const ThetaView& theta;
  int inputs, hidden;
  float* gates;       // [padded(4 hidden)]
  float* activation;  // [padded(hidden)]

  // kVectors vectors of z from column `first` on, side by side so that their sums do not wait for each other.
  template <int kVectors>
  void gate_block(const float* x, const float* h, int first, int lanes) const {
    const int width = 4 * hidden;
    const float* w = theta.lstm_w + first;
    Vec z[kVectors];
    LOPT_UNROLL
    for (int v = 0; v < kVectors; ++v) z[v] = load(theta.lstm_b + first + v * kLanes, lanes);
    for (int i = 0; i < inputs + hidden; ++i, w += width) {
      const float value = i < inputs ? x[i] : h[i - inputs];
      LOPT_UNROLL
      for (int v = 0; v < kVectors; ++v) z[v] += value * load(w + v * kLanes, lanes);
    }
    LOPT_UNROLL
    for (int v = 0; v < kVectors; ++v) store(gates + first + v * kLanes, z[v], kLanes);
  }

  void operator()(const float* x, float* h, float* c) const {
    const int width = 4 * hidden;
    int first = 0;
    for (; first + 4 * kLanes <= width; first += 4 * kLanes) gate_block<4>(x, h, first, kLanes);
    for (; first < width; first += kLanes) gate_block<1>(x, h, first, std::min(kLanes, width - first));
    for (int j = 2 * hidden; j < 3 * hidden; ++j) gates[j] += 1.0f;
    for (int j = hidden; j < 2 * hidden; ++j) gates[j] *= 2.0f;  // tanh(g) = 2 sigmoid(2 g) - 1
    for (int j = 0; j < width; j += kLanes) store(gates + j, 1.0f / (1.0f + exp_of(-load(gates + j, kLanes))), kLanes);
    for (int j = 0; j < hidden; ++j) {
      c[j] = gates[2 * hidden + j] * c[j] + gates[j] * (2.0f * gates[hidden + j] - 1.0f);
      activation[j] = c[j];
    }
    for (int j = 0; j < hidden; j += kLanes) store(activation + j, tanh_of(load(activation + j, kLanes)), kLanes);
    for (int j = 0; j < hidden; ++j) h[j] = gates[3 * hidden + j] * activation[j];
  }
};

inline void take_scratch(const Spec& s, TensorLevel& level, Arena& arena) {
  level.x = arena.take(s.num_lstm_input());
  level.from_lstm = arena.take(s.from_lstm);
  level.gates = arena.take(padded(std::max(4 * s.lstm_width, s.from_lstm)));
  level.constant = arena.take(s.num_constant());
  level.activation = arena.take(padded(s.lstm_width));
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
