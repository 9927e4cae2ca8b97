// The flat vector of meta-parameters, by the names of its tensors.
#pragma once

#include "rule/inputs.h"

namespace lopt {

// TENSOR(name, count) for every tensor of theta, in its order in the flat vector; `s` is the spec, `columns` the number of
// per-parameter inputs. ThetaSpec.shapes() in lopt/rule/spec.py has the same names (with dots) and shapes; they are
// compared when lopt is imported.
#define LOPT_THETA(TENSOR)                                                \
  TENSOR(initial_from_lstm, s.from_lstm)                                  \
  TENSOR(initial_from_mlp, s.from_mlp)                                    \
  TENSOR(initial_h, s.lstm_width)                                         \
  TENSOR(initial_c, s.lstm_width)                                         \
  TENSOR(lstm_w, 4 * s.lstm_width * (s.num_lstm_input() + s.lstm_width))  \
  TENSOR(lstm_b, 4 * s.lstm_width)                                        \
  TENSOR(lstm_to_mlp_w, s.lstm_width* s.lstm_to_mlp)                      \
  TENSOR(lstm_to_mlp_b, s.lstm_to_mlp)                                    \
  TENSOR(lstm_to_lstm_w, s.lstm_width* s.from_lstm)                       \
  TENSOR(lstm_to_lstm_b, s.from_lstm)                                     \
  TENSOR(mlp_w1, (columns + s.num_constant()) * s.width)                  \
  TENSOR(mlp_b1, s.width)                                                 \
  TENSOR(mlp_w2, s.mlp_layers == 2 ? s.width * s.width : 0)               \
  TENSOR(mlp_b2, s.mlp_layers == 2 ? s.width : 0)                         \
  TENSOR(mlp_w3, s.width * (2 + s.from_mlp))                              \
  TENSOR(mlp_b3, 2 + s.from_mlp)                                          \
  TENSOR(skip, s.linear_skip ? columns : 0)                               \
  TENSOR(step_w, s.step_control ? s.lstm_width + s.num_lstm_input() : 0)  \
  TENSOR(step_b, s.step_control ? 1 : 0)                                  \
  TENSOR(gate_w, s.newton_schulz ? s.lstm_width + s.num_lstm_input() : 0) \
  TENSOR(gate_b, s.newton_schulz ? 1 : 0)                                 \
  TENSOR(gate_step, s.newton_schulz ? 1 : 0)

namespace {  // compiled once per instruction set: no function may be shared between them

// Where the tensors of theta start.
struct ThetaView {
#define LOPT_TENSOR(name, count) const float* name;
  LOPT_THETA(LOPT_TENSOR)
#undef LOPT_TENSOR
  int64_t size;

  ThetaView() = default;
  LOPT_HD ThetaView(const Spec& s, int columns, const float* theta) : size(0) {
#define LOPT_TENSOR(name, count) \
  name = theta + size;           \
  size += int64_t{count};
    LOPT_THETA(LOPT_TENSOR)
#undef LOPT_TENSOR
  }
};

}  // namespace
}  // namespace lopt
