// Tensor-level state in C++: what lopt/tensor_lstm.py does with torch, over plain arrays, for the optimizer on the CPU and
// for the unroll engine.
//
// One call of `advance` per step, between accumulate and apply: losses and statistics -> LSTM -> what the per-parameter
// MLP is conditioned on. Function and variable names are those of lopt/tensor_lstm.py, which is the definition;
// the tests compare the two step by step. Scalar code, float32, no allocation.
// Source: arXiv:2009.11243, appendix C, and its author's port.
#pragma once

#include <cmath>
#include <cstdint>

#include "spec.h"

namespace lopt {
namespace {  // compiled once per instruction set: no function may be shared between them

// Where the tensors of theta start in the flat vector, in the order of ThetaSpec.shapes().
struct ThetaView {
  const float *initial_from_lstm, *initial_from_mlp, *initial_h, *initial_c;
  const float *lstm_w, *lstm_b, *to_mlp_w, *to_mlp_b, *to_lstm_w, *to_lstm_b;
  const float *w1, *b1, *w2, *b2, *w3, *b3, *skip, *step_w, *step_b;
  int64_t size;

  ThetaView(const Spec& s, int columns, const float* theta) : size(0) {
    auto take = [&](int64_t count) {
      const float* at = theta + size;
      size += count;
      return at;
    };
    const int hidden = s.lstm_width, outputs = 2 + s.from_mlp;
    initial_from_lstm = take(s.from_lstm);
    initial_from_mlp = take(s.from_mlp);
    initial_h = take(hidden);
    initial_c = take(hidden);
    lstm_w = take(int64_t{4} * hidden * (s.num_lstm_input() + hidden));
    lstm_b = take(4 * hidden);
    to_mlp_w = take(hidden * s.lstm_to_mlp);
    to_mlp_b = take(s.lstm_to_mlp);
    to_lstm_w = take(hidden * s.from_lstm);
    to_lstm_b = take(s.from_lstm);
    w1 = take((columns + s.num_constant()) * s.width);
    b1 = take(s.width);
    w2 = take(s.width * s.width);
    b2 = take(s.width);
    w3 = take(s.width * outputs);
    b3 = take(outputs);
    skip = take(s.linear_skip ? columns : 0);
    step_w = take(s.step_control ? hidden + s.num_lstm_input() : 0);
    step_b = take(s.step_control ? 1 : 0);
  }
};

// State of a loss, [mean, var, updates, last, first, lowest] (lopt.tensor_lstm.next_loss and its readers).
inline float correction(const float* state, double decay) {
  return 1.0f / (1.0f - std::pow(static_cast<float>(decay), state[2]) + 1e-8f);
}

inline float corrected_mean(const float* state, double decay) {
  return state[2] > 0 ? state[0] * correction(state, decay) : 0.0f;
}

inline void next_loss(float* state, float loss, double decay) {
  const float keep = static_cast<float>(decay), rest = static_cast<float>(1.0 - decay);
  state[0] = keep * state[0] + rest * loss;
  state[1] = keep * state[1] + rest * (state[0] - loss) * (state[0] - loss);
  state[2] += 1;
  state[3] = loss;
  const float now = corrected_mean(state, decay);
  if (state[2] == 1) state[4] = state[5] = now;
  state[5] = std::fmin(state[5], now);
}

// How much of what was gained is lost again, as a logarithm.
inline float loss_rise(const float* state, double decay) {
  constexpr float kTiny = 1e-30f;  // TINY
  const float above = corrected_mean(state, decay) - state[5], gained = state[4] - state[5];
  return std::fmin(std::log1p(100.0f * above / (gained + kTiny)), 5.0f);
}

inline float standardise_loss(const float* state, float loss, double decay) {
  const float c = correction(state, decay);
  return clamp_of((loss - state[0] * c) / std::sqrt(state[1] * c + 1e-8f), -5.0f, 5.0f);
}

// State that all tensors share; see AdvanceParams.
struct Globals {
  int64_t* step;
  float *train_loss, *valid_loss, *clip, *from_lstm;

  float clip_limit(const Spec& s) const {
    return clip[1] / (1.0f - std::pow(static_cast<float>(s.clip_decay), clip[0])) * s.clip_multiplier;
  }
  void observe_train(const Spec& s, float loss) const {
    const bool given = std::isfinite(loss);
    if (given || train_loss[2] > 0) next_loss(train_loss, given ? loss : train_loss[3], s.train_loss_decay);
  }
  void observe_valid(const Spec& s, float loss) const {
    if (!std::isfinite(loss)) return;
    next_loss(valid_loss, loss, s.valid_loss_decay);
    *step += s.valid_advances_step;
  }
};

// What `advance` reads and writes for the T tensors; see AdvanceParams.
struct TensorLevel {
  int num_tensors;
  const TensorShape* shapes;
  float *h, *c, *feedback, *initial_scale, *updates;
  const float* stats;
  float *scale, *shift, *bias, *step_size;
  // Scratch:
  float* x;           // [num_lstm_input]
  float* from_lstm;   // [from_lstm]
  float* gates;       // [4 lstm_width, or from_lstm if more, and padding]
  float* constant;    // [num_constant]
  float* activation;  // [lstm_width and padding]
};

// lopt.tensor_lstm.loss_inputs
inline void loss_inputs(const Spec& s, const Globals& g, float* x) {
  for (int i = 0; i < 4; ++i) x[i] = 0;
  if (!(g.train_loss[2] > 0)) return;
  x[0] = standardise_loss(g.train_loss, g.train_loss[3], s.train_loss_decay);
  x[2] = loss_rise(g.train_loss, s.train_loss_decay);
  if (!s.paper_inputs && !(g.valid_loss[2] > 0)) return;
  x[1] = standardise_loss(g.train_loss, corrected_mean(g.valid_loss, s.valid_loss_decay), s.train_loss_decay);
  x[3] = loss_rise(g.valid_loss, s.valid_loss_decay);
}

inline float log_magnitude(float x) { return clamp_of(std::log(1e-8f + std::fabs(x)), -5.0f, 5.0f); }
inline float sign_of(float x) { return static_cast<float>((x > 0) - (x < 0)); }

inline void time_inputs(const Spec& s, int64_t step, float total_steps, float* time) {
  constexpr float kPi = 3.14159265358979f, kScale = 8.0f;  // LOG_TIME_SCALE
  const float steps = static_cast<float>(step);
  if (s.paper_inputs) {
    constexpr float kWaves[] = {1, 3, 10, 30, 100, 300, 1e3f, 3e3f, 1e4f, 3e4f, 1e5f};
    for (int i = 0; i < 11; ++i) time[i] = std::sin(steps / (kWaves[i] * kPi));
    return;
  }
  time[0] = std::log1p(std::fmin(steps, s.time_limit)) / kScale;
  if (!s.horizon_input) return;
  const bool known = total_steps > 0;
  const float done = known ? std::fmin(steps / std::fmax(total_steps, 1.0f), 1.0f) : 0.0f;
  time[1] = known;
  time[2] = done;
  time[3] = std::log(1.0f - 0.99f * done);
  time[4] = std::log1p(std::fmin(total_steps, s.time_limit)) / kScale;
  time[5] = known ? time[0] : 0.0f;
}

// out[j] = bias[j] + sum_i x[i] w[i, j]
inline void linear(const float* x, int inputs, const float* w, const float* bias, int outputs, float* out) {
  for (int j = 0; j < outputs; ++j) out[j] = bias[j];
  for (int i = 0; i < inputs; ++i) {
    const float value = x[i];
    const float* row = w + int64_t{i} * outputs;
    for (int j = 0; j < outputs; ++j) out[j] += value * row[j];
  }
}

// Facts about one tensor among the MLP's inputs (lopt.tensor_lstm.tensor_facts).
inline void tensor_facts(const Spec& s, const TensorLevel& level, int t, const float* stats, float* facts) {
  const float numel = static_cast<float>(level.shapes[t].numel);
  if (s.paper_inputs) {
    facts[0] = std::log(static_cast<float>(level.num_tensors)) - 1.0f;
    facts[1] = std::log(std::sqrt(stats[kParamSquare] * numel) + 1e-8f);
    facts[2] = std::log(numel);
  } else {
    facts[0] = static_cast<float>(level.shapes[t].is_matrix);
    facts[1] = std::log(numel) / 8.0f;  // LOG_TIME_SCALE
  }
}

inline float log_ratio(float above, float below) {
  constexpr float kTiny = 1e-30f;  // TINY
  return clamp_of(0.5f * std::log((above + kTiny) / (below + kTiny)), -5.0f, 5.0f);
}

// One row of the LSTM's input (lopt.tensor_lstm.lstm_inputs); corrections[k] = 1 - decay_k^updates of mom, then rms.
template <class Features>
void lstm_input(const Spec& s, const Globals& g, const TensorLevel& level, int t, const float* stats,
                const float* corrections, float mean_grad_square, const float* time, const float* losses, float* x) {
  const TensorShape& shape = level.shapes[t];
  const float numel = static_cast<float>(shape.numel);
  for (int i = 0; i < s.from_lstm; ++i) *x++ = g.from_lstm[i];
  for (int i = 0; i < s.from_mlp; ++i) *x++ = level.feedback[t * s.from_mlp + i];
  if (s.paper_inputs) {
    *x++ = log_magnitude(std::sqrt(stats[kGradSquare] * numel));
    *x++ = shape.is_scalar ? 1.0f : -1.0f;
    for (const int mean : {kMomMean, kRmsMean, kParamMean}) {
      *x++ = log_magnitude(stats[mean]);
      *x++ = sign_of(stats[mean]);
    }
    *x++ = log_magnitude(std::sqrt(stats[kParamSquare] * numel));
  } else if constexpr (Features::kSlow >= 0) {
    const float* moments = stats + kMoments;
    const float scale = level.initial_scale[t], rms_mean = stats[kRmsMean];
    const float slow = moments[Features::kSlowMean] / corrections[Features::kNumMom + Features::kSlow];
    *x++ = log_ratio(stats[kGradSquare], slow);
    for (int k = 0; k < Features::kNumMom; ++k)
      *x++ = log_ratio(moments[Features::kMomSquare + k] / (corrections[k] * corrections[k]), slow);
    *x++ = log_ratio(stats[kRmsVar], rms_mean * rms_mean);
    *x++ = log_ratio(stats[kParamSquare], scale * scale);
    *x++ = log_ratio(stats[kGradSquare], mean_grad_square);
  }
  for (const float log_dim : shape.log_dims) *x++ = log_dim;
  for (int i = 0; i < (s.paper_inputs ? 2 : 4); ++i) *x++ = losses[i];
  if (s.paper_inputs) {
    for (const int var : {kMomVar, kRmsVar, kParamVar}) *x++ = log_magnitude(stats[var]);
  } else {
    tensor_facts(s, level, t, stats, x);
    x += s.num_facts();
    for (int i = 0; i < s.num_time(); ++i) *x++ = time[i];
  }
}

// lopt.tensor_lstm.tensor_scale for all tensors: initial scales are set in the first step, current ones go to `scale`.
inline void tensor_scale(const TensorLevel& level, int num_stats, float* scale) {
  constexpr float kSmallest = 0.3f, kEmpty = 0.1f;  // SMALLEST_SCALE, EMPTY_SCALE
  float matrix_sum = 0, matrix_count = 0, sum = 0;
  for (int t = 0; t < level.num_tensors; ++t) {
    scale[t] = std::sqrt(level.stats[int64_t{t} * num_stats + kParamSquare]);
    sum += scale[t];
    if (!level.shapes[t].is_matrix) continue;
    matrix_sum += scale[t];
    matrix_count += 1;
  }
  float mean = matrix_count > 0 ? matrix_sum / matrix_count : sum / static_cast<float>(level.num_tensors);
  if (!(mean > 0)) mean = kEmpty;
  for (int t = 0; t < level.num_tensors; ++t) {
    float start = std::fmax(scale[t], kSmallest * mean);
    if (!level.shapes[t].is_matrix) start = std::fmin(start, mean);
    if (!(level.initial_scale[t] > 0)) level.initial_scale[t] = start;
    scale[t] = clamp_of(scale[t], 0.5f * level.initial_scale[t], 2.0f * level.initial_scale[t]);
  }
}

// One step of everything at tensor level. `lstm` is the cell: lstm(x, h, c) updates h and c of one tensor in place.
template <class Features, class Lstm>
void advance(const Spec& s, const ThetaView& theta, const Globals& g, const TensorLevel& level, float loss,
             float total_steps, const Lstm& lstm) {
  constexpr int kColumns = Features::kNumColumns, kStats = kNumStats<Features>;
  constexpr float kMaxLogStep = 6.0f;  // MAX_LOG_STEP
  const int tensors = level.num_tensors, hidden = s.lstm_width, num_time = s.num_time(), inputs = s.num_lstm_input();
  g.observe_train(s, loss);
  double grad_square = 0;
  for (int t = 0; t < tensors; ++t) grad_square += level.stats[int64_t{t} * kStats + kGradSquare];
  const float mean_grad_square = static_cast<float>(grad_square / tensors);
  const float rms = std::sqrt(1e-8f + mean_grad_square);
  g.clip[1] = static_cast<float>(s.clip_decay) * g.clip[1] + static_cast<float>(1.0 - s.clip_decay) * rms;
  g.clip[0] += 1;

  tensor_scale(level, kStats, level.step_size);
  float* const constant = level.constant;
  time_inputs(s, *g.step, total_steps, constant);
  float losses[4];
  loss_inputs(s, g, losses);
  for (int i = 0; i < s.from_lstm; ++i) level.from_lstm[i] = 0;
  float corrections[Features::kNumMom + Features::kNumRms]{}, corrected_for = 0;

  for (int t = 0; t < tensors; ++t) {
    const float* stats = level.stats + int64_t{t} * kStats;
    float* h = level.h + int64_t{t} * hidden;
    level.updates[t] += 1;
    if (level.updates[t] != corrected_for) {  // mostly the same for all tensors
      corrected_for = level.updates[t];
      for (int k = 0; k < Features::kNumMom; ++k)
        corrections[k] = -std::expm1(corrected_for * std::log(s.mom_decay[k]));
      for (int k = 0; k < Features::kNumRms; ++k)
        corrections[Features::kNumMom + k] = -std::expm1(corrected_for * std::log(s.rms_decay[k]));
    }
    lstm_input<Features>(s, g, level, t, stats, corrections, mean_grad_square, constant, losses, level.x);
    lstm(level.x, h, level.c + int64_t{t} * hidden);
    linear(h, hidden, theta.to_lstm_w, theta.to_lstm_b, s.from_lstm, level.gates);
    for (int i = 0; i < s.from_lstm; ++i) level.from_lstm[i] += level.gates[i] / static_cast<float>(tensors);

    float* facts = constant + num_time;
    tensor_facts(s, level, t, stats, facts);
    linear(h, hidden, theta.to_mlp_w, theta.to_mlp_b, s.lstm_to_mlp, facts + s.num_facts());
    linear(constant, s.num_constant(), theta.w1 + kColumns * s.width, theta.b1, s.width,
           level.bias + int64_t{t} * s.width);
    float multiplier = 1.0f;
    if (s.step_control) {
      float log_step = theta.step_b[0];
      for (int i = 0; i < hidden; ++i) log_step += h[i] * theta.step_w[i];
      for (int i = 0; i < inputs; ++i) log_step += level.x[i] * theta.step_w[hidden + i];
      multiplier = level.step_size[t] * std::exp(clamp_of(log_step, -kMaxLogStep, kMaxLogStep));
    }
    level.step_size[t] = s.step_multiplier * multiplier;
    Features::column_map(stats + kMoments, corrections, level.scale + int64_t{t} * kColumns,
                         level.shift + int64_t{t} * kColumns);
  }
  for (int i = 0; i < s.from_lstm; ++i) g.from_lstm[i] = level.from_lstm[i];
  *g.step += 1;
}

// MLP weights as apply reads them (MlpLayout), from theta.
template <class Features, int kWidth>
void pack_mlp(const Spec& s, const ThetaView& theta, float* packed) {
  using Layout = MlpLayout<Features::kNumColumns, kWidth>;
  const int outputs = 2 + s.from_mlp;
  for (int i = 0; i < Features::kNumColumns * kWidth; ++i) packed[Layout::kW1 + i] = theta.w1[i];
  for (int i = 0; i < kWidth * kWidth; ++i) packed[Layout::kW2 + i] = theta.w2[i];
  for (int i = 0; i < kWidth; ++i) packed[Layout::kB2 + i] = theta.b2[i];
  for (int i = 0; i < kWidth; ++i)
    for (int o = 0; o < 2; ++o) packed[Layout::kW3 + o * kWidth + i] = theta.w3[i * outputs + o];
  for (int o = 0; o < 2; ++o) packed[Layout::kB3 + o] = theta.b3[o];
  for (int i = 0; i < Features::kNumColumns; ++i) packed[Layout::kSkip + i] = s.linear_skip ? theta.skip[i] : 0.0f;
}

// feedback = mean(hidden) W3[:, 2:] + b3[2:] for one tensor.
inline void next_feedback(const Spec& s, const ThetaView& theta, const float* hidden, float* feedback) {
  const int outputs = 2 + s.from_mlp;
  for (int o = 0; o < s.from_mlp; ++o) {
    float sum = theta.b3[2 + o];
    for (int j = 0; j < s.width; ++j) sum += hidden[j] * theta.w3[j * outputs + 2 + o];
    feedback[o] = sum;
  }
}

}  // namespace
}  // namespace lopt
