// The LSTM cell of one tensor on SIMD vectors (lopt.tensor_lstm.lstm_cell), and the memory that `advance` needs.
#pragma once

#include <algorithm>

#include "simd.h"
// simd.h comes first: see there.
#include "tensor_lstm.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

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

  void operator()(const float* x, float* h, float* c) const {
    const int width = 4 * hidden;
    for (int j = 0; j < width; j += kLanes) {
      const int lanes = std::min(kLanes, width - j);
      Vec z = load(theta.lstm_b + j, lanes);
      const float* w = theta.lstm_w + j;
      for (int i = 0; i < inputs; ++i, w += width) z += x[i] * load(w, lanes);
      for (int i = 0; i < hidden; ++i, w += width) z += h[i] * load(w, lanes);
      store(gates + j, z, kLanes);
    }
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
  level.x = arena.take(int64_t{level.num_tensors} * s.num_lstm_input());
  level.gates = arena.take(padded(std::max(4 * s.lstm_width, s.from_lstm)));
  level.constant = arena.take(s.num_constant());
  level.activation = arena.take(padded(s.lstm_width));
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
