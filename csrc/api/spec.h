// Plain structs at tensor level that Python builds as NumPy records (lopt/kernels/structs.py).
#pragma once

#include <cstdint>

#include "api/kernels.h"

namespace lopt {

// ThetaSpec (lopt/rule/theta.py) as plain numbers; lopt/kernels/structs.py writes it.
struct Spec {
  int32_t feature_set, width, lstm_width, from_mlp, lstm_to_mlp, from_lstm;
  int32_t linear_skip, step_control, tensor_inputs, horizon_input, valid_advances_step, unused;
  double train_loss_decay, valid_loss_decay, clip_decay;  // 1 - decay is formed in double, as in Python
  float step_multiplier, magnitude_rate, time_limit, clip_multiplier;
  float feature_clip;  // +inf: none
  float mom_decay[kMaxDecays], rms_decay[kMaxDecays];
  float unused_too;

  // Defined in rule/inputs.h.
  LOPT_HD int num_time() const;
  LOPT_HD int num_facts() const;
  LOPT_HD int num_constant() const;
  LOPT_HD int num_lstm_input() const;
};

// Facts about one tensor that never change.
struct TensorShape {
  int64_t numel;
  float log_dims[4];  // ln(dim) - 1, padded with ones
  int32_t is_scalar;  // rank 0
  int32_t is_matrix;  // rank >= 2
};

// Addresses and numbers of begin, advance and finish for one list of tensors; arrays over the T tensors are row-major.
// `spec` lies in host memory, everything else on the device of the tensors. With T = 0, begin only takes the losses.
struct AdvanceParams {
  const Spec* spec;
  const float* theta;         // [P] flat
  const TensorShape* shapes;  // [T]
  int64_t num_tensors;
  // Global state, read and written (lopt.rule.tensor_lstm.Globals).
  int64_t* step;
  float* train_loss;    // [LossState::kCount], see rule/losses.h
  float* valid_loss;    // [LossState::kCount]
  float* clip;          // [2] count, running root mean square of gradients
  float* from_lstm;     // [from_lstm]
  float* pending_loss;  // [2] sum and number of losses observed since the last step; zero afterwards
  int64_t* nonfinite;   // gradient elements counted so far
  // State of every tensor, read and written (lopt.rule.tensor_lstm.Rows).
  float* h;              // [T, lstm_width]
  float* c;              // [T, lstm_width]
  float* feedback;       // [T, from_mlp], written by finish
  float* initial_scale;  // [T], 0 before the first step
  float* updates;        // [T]
  // Inputs.
  const float* stats;        // [T, S]
  const float* lr;           // [T]
  const float* decay;        // [T] weight decay
  const float* total_steps;  // [1] 0: unknown
  const float* hidden;       // [T, width] from apply, read by finish
  const float* new_train;    // [1] a training loss for begin, or null: then it is train_value, NaN for none
  const float* new_valid;    // [1] a validation loss, likewise
  float train_value, valid_value;
  // Written: by begin for accumulate and apply, by advance for apply.
  float* clip_limit;  // [T]
  float* scale;       // [T, columns]
  float* shift;       // [T, columns]
  float* bias;        // [T, width]
  float* step_size;   // [T]
  float* keep;        // [T]
  // Scratch of the CUDA kernel.
  float* to_lstm;      // [T, from_lstm]
  uint32_t* finished;  // [1] zero before and after
};

}  // namespace lopt
