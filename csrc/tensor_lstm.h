// Tensor-level state in C++: what lopt/tensor_lstm.py does with torch, over plain arrays, for the unroll engine.
//
// One call of `advance` per step, between accumulate and apply: losses and statistics -> LSTM -> what the per-parameter
// MLP is conditioned on. Function and variable names are those of lopt/tensor_lstm.py, which is the definition;
// python_tests/test_engine.py compares the two step by step. Scalar code, float32, no allocation.
// Source: arXiv:2009.11243, appendix C, and its author's port.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace lopt {

// ThetaSpec (lopt/theta.py) as plain numbers; lopt/meta/engine.py writes it.
struct Spec {
  int32_t feature_set, width, lstm_width, from_mlp, lstm_to_mlp, from_lstm;
  int32_t linear_skip, step_control, paper_inputs, horizon_input, valid_advances_step, unused;
  double train_loss_decay, valid_loss_decay, clip_decay;  // 1 - decay is formed in double, as in Python
  float step_multiplier, magnitude_rate, time_limit, clip_multiplier;
  float feature_clip;  // +inf: none
  float mom_decay[kMaxDecays], rms_decay[kMaxDecays];
  float unused_too;

  LOPT_HD int num_time() const { return paper_inputs ? 11 : horizon_input ? 5 : 1; }
  LOPT_HD int num_facts() const { return paper_inputs ? 3 : 2; }
  LOPT_HD int num_constant() const { return num_time() + num_facts() + lstm_to_mlp; }
  LOPT_HD int num_lstm_input() const { return from_lstm + from_mlp + (paper_inputs ? 18 : 15 + num_time()); }
};

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
    step_w = take(s.step_control ? hidden + s.num_time() + s.num_facts() : 0);
    step_b = take(s.step_control ? 1 : 0);
  }
};

// Running mean and variance of a loss (lopt.tensor_lstm.next_loss and its readers).
struct LossState {
  float mean = 0, var = 0, updates = 0, last = 0;

  void next(float loss, double decay) {
    const float keep = static_cast<float>(decay), rest = static_cast<float>(1.0 - decay);
    mean = keep * mean + rest * loss;
    var = keep * var + rest * (mean - loss) * (mean - loss);
    updates += 1;
    last = loss;
  }
  float correction(double decay) const { return 1.0f / (1.0f - std::pow(static_cast<float>(decay), updates) + 1e-8f); }
  float corrected_mean(double decay) const { return updates > 0 ? mean * correction(decay) : 0.0f; }
  float standardise(float loss, double decay) const {
    const float c = correction(decay);
    return clamp_of((loss - mean * c) / std::sqrt(var * c + 1e-8f), -5.0f, 5.0f);
  }
};

// Facts about one tensor that never change.
struct TensorShape {
  int64_t numel;
  float log_dims[4];  // ln(dim) - 1, padded with ones
  bool is_scalar, is_matrix;
};

// State of the run that all tensors share.
struct Globals {
  int64_t step = 0;
  LossState train, valid;
  float clip_count = 1, clip_value = 0;
  float* from_lstm;  // [from_lstm]

  float clip_limit(const Spec& s) const {
    return clip_value / (1.0f - std::pow(static_cast<float>(s.clip_decay), clip_count)) * s.clip_multiplier;
  }
  void observe_train(const Spec& s, float loss) {
    if (std::isfinite(loss))
      train.next(loss, s.train_loss_decay);
    else if (train.updates > 0)
      train.next(train.last, s.train_loss_decay);
  }
  void observe_valid(const Spec& s, float loss) {
    if (!std::isfinite(loss)) return;
    valid.next(loss, s.valid_loss_decay);
    step += s.valid_advances_step;
  }
};

// Everything `advance` reads and writes; arrays are row-major over the T tensors.
struct TensorLevel {
  int num_tensors;
  const TensorShape* shapes;  // [T]
  float *h, *c;               // [T, lstm_width]
  float* feedback;            // [T, from_mlp]
  float* initial_scale;       // [T], 0 before the first step
  float updates = 0;          // the same for all tensors of a run
  const float* stats;         // [T, S]
  // Written for apply:
  float *scale, *shift;  // [T, columns]
  float* bias;           // [T, width]
  float* step_size;      // [T]
  // Scratch:
  float* x;           // [T, num_lstm_input]
  float* gates;       // [4 lstm_width + padding]
  float* constant;    // [num_constant]
  float* activation;  // [lstm_width + padding]
};

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
    facts[0] = level.shapes[t].is_matrix;
    facts[1] = std::log(numel) / 8.0f;  // LOG_TIME_SCALE
  }
}

inline float log_ratio(float above, float below) {
  constexpr float kTiny = 1e-30f;  // TINY
  return clamp_of(0.5f * std::log((above + kTiny) / (below + kTiny)), -5.0f, 5.0f);
}

// One row of the LSTM's input (lopt.tensor_lstm.lstm_inputs).
inline void lstm_input(const Spec& s, const Globals& g, const TensorLevel& level, int t, const float* stats,
                       const float* time, float train, float valid, float* x) {
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
  } else {
    const float mom_square = stats[kMomVar] + stats[kMomMean] * stats[kMomMean];
    const float scale = level.initial_scale[t], rms_mean = stats[kRmsMean];
    *x++ = log_ratio(stats[kGradSquare], rms_mean);
    *x++ = log_ratio(mom_square, rms_mean);
    *x++ = log_ratio(stats[kRmsVar], rms_mean * rms_mean);
    *x++ = log_ratio(stats[kParamSquare], scale * scale);
    *x++ = log_ratio(stats[kGradSquare], g.clip_value * g.clip_value);
    *x++ = stats[kMomMean] / std::sqrt(mom_square + 1e-30f);
    *x++ = stats[kParamMean] / std::sqrt(stats[kParamSquare] + 1e-30f);
  }
  for (const float log_dim : shape.log_dims) *x++ = log_dim;
  *x++ = train;
  *x++ = valid;
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
void advance(const Spec& s, const ThetaView& theta, Globals& g, TensorLevel& level, float loss, float total_steps,
             const Lstm& lstm) {
  constexpr int kColumns = Features::kNumColumns, kStats = kNumStats<Features>;
  constexpr float kMaxLogStep = 6.0f;  // MAX_LOG_STEP
  const int tensors = level.num_tensors, hidden = s.lstm_width, num_time = s.num_time(), inputs = s.num_lstm_input();
  level.updates += 1;
  g.observe_train(s, loss);
  double grad_square = 0;
  for (int t = 0; t < tensors; ++t) grad_square += level.stats[int64_t{t} * kStats + kGradSquare];
  const float rms = std::sqrt(1e-8f + static_cast<float>(grad_square / tensors));
  g.clip_value = static_cast<float>(s.clip_decay) * g.clip_value + static_cast<float>(1.0 - s.clip_decay) * rms;
  g.clip_count += 1;

  tensor_scale(level, kStats, level.step_size);
  float* const constant = level.constant;
  time_inputs(s, g.step, total_steps, constant);
  const float train = g.train.updates > 0 ? g.train.standardise(g.train.last, s.train_loss_decay) : 0.0f;
  const float valid =
      g.train.updates > 0 ? g.train.standardise(g.valid.corrected_mean(s.valid_loss_decay), s.train_loss_decay) : 0.0f;
  for (int t = 0; t < tensors; ++t)
    lstm_input(s, g, level, t, level.stats + int64_t{t} * kStats, constant, train, valid,
               level.x + int64_t{t} * inputs);
  for (int i = 0; i < s.from_lstm; ++i) g.from_lstm[i] = 0;
  float corrections[Features::kNumMom + Features::kNumRms];
  for (int k = 0; k < Features::kNumMom; ++k) corrections[k] = -std::expm1(level.updates * std::log(s.mom_decay[k]));
  for (int k = 0; k < Features::kNumRms; ++k)
    corrections[Features::kNumMom + k] = -std::expm1(level.updates * std::log(s.rms_decay[k]));

  for (int t = 0; t < tensors; ++t) {
    const float* stats = level.stats + int64_t{t} * kStats;
    float* h = level.h + int64_t{t} * hidden;
    lstm(level.x + int64_t{t} * inputs, h, level.c + int64_t{t} * hidden);
    linear(h, hidden, theta.to_lstm_w, theta.to_lstm_b, s.from_lstm, level.gates);
    for (int i = 0; i < s.from_lstm; ++i) g.from_lstm[i] += level.gates[i] / static_cast<float>(tensors);

    float* facts = constant + num_time;
    tensor_facts(s, level, t, stats, facts);
    linear(h, hidden, theta.to_mlp_w, theta.to_mlp_b, s.lstm_to_mlp, facts + s.num_facts());
    linear(constant, s.num_constant(), theta.w1 + kColumns * s.width, theta.b1, s.width,
           level.bias + int64_t{t} * s.width);
    float multiplier = 1.0f;
    if (s.step_control) {
      float log_step = theta.step_b[0];
      for (int i = 0; i < hidden; ++i) log_step += h[i] * theta.step_w[i];
      for (int i = 0; i < num_time + s.num_facts(); ++i) log_step += constant[i] * theta.step_w[hidden + i];
      multiplier = level.step_size[t] * std::exp(clamp_of(log_step, -kMaxLogStep, kMaxLogStep));
    }
    level.step_size[t] = s.step_multiplier * multiplier;
    Features::column_map(stats + kMoments, corrections, level.scale + int64_t{t} * kColumns,
                         level.shift + int64_t{t} * kColumns);
  }
  g.step += 1;
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

}  // namespace lopt
