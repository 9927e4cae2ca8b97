// Tensor-level state in C++: what lopt/rule/tensor_lstm.py does with torch, over plain arrays, for the optimizer on the CPU
// (`advance` below) and on the GPU (cuda/advance.cu), and for the unroll engine.
//
// Between accumulate and apply: losses and statistics -> LSTM -> what the per-parameter MLP is conditioned on; first what
// all tensors share (`advance_shared`), then one tensor after the other (`advance_row`). Function and variable names
// are those of lopt/rule/tensor_lstm.py, which is the definition; the tests compare the two step by step. Float32, no allocation.
// Source: arXiv:2009.11243, appendix C, and its author's port.
//
// Note [Team]
// What has a `Team` is computed by one CPU thread (OneThread), or by all threads of a CUDA block together. Thread `rank()` of
// `size()` takes the indices rank, rank + size, ...; results are there for the others after `sync()`.
#pragma once

#include <cmath>
#include <cstdint>

#include "rule/theta_view.h"

namespace lopt {
namespace {  // compiled once per instruction set: no function may be shared between them

LOPT_HD bool is_finite(float x) { return x - x == 0.0f; }

// State of a loss, [mean, var, updates, last, first, lowest] (lopt.rule.tensor_lstm.next_loss and its readers).
LOPT_HD float correction(const float* state, double decay) {
  return 1.0f / (1.0f - ::powf(static_cast<float>(decay), state[2]) + 1e-8f);
}

LOPT_HD float corrected_mean(const float* state, double decay) {
  return state[2] > 0 ? state[0] * correction(state, decay) : 0.0f;
}

LOPT_HD void next_loss(float* state, float loss, double decay) {
  const float keep = static_cast<float>(decay), rest = static_cast<float>(1.0 - decay);
  state[0] = keep * state[0] + rest * loss;
  state[1] = keep * state[1] + rest * (state[0] - loss) * (state[0] - loss);
  state[2] += 1;
  state[3] = loss;
  const float now = corrected_mean(state, decay);
  if (state[2] == 1) state[4] = state[5] = now;
  state[5] = ::fminf(state[5], now);
}

LOPT_HD float loss_spread(const float* state, double decay) { return ::sqrtf(state[1] * correction(state, decay)); }

// How much of what was gained is lost again, as a logarithm.
LOPT_HD float loss_rise(const float* state, double decay, float spread = 0.0f) {
  constexpr float kTiny = 1e-30f;  // TINY
  const float above = corrected_mean(state, decay) - state[5], gained = state[4] - state[5];
  return ::fminf(::log1pf(100.0f * above / (gained + spread + kTiny)), 5.0f);
}

LOPT_HD float standardise_loss(const float* state, float loss, double decay) {
  const float c = correction(state, decay);
  return clamp_of((loss - state[0] * c) / ::sqrtf(state[1] * c + 1e-8f), -5.0f, 5.0f);
}

// A training loss joins the others since the last step, [sum, number]; a non-finite one counts as none.
LOPT_HD void observe_pending(float* pending, float loss) {
  if (!is_finite(loss)) return;
  pending[0] += loss;
  pending[1] += 1;
}

LOPT_HD float mean_pending(const float* pending) { return pending[1] > 0 ? pending[0] / pending[1] : NAN; }

// State that all tensors share; see AdvanceParams.
struct Globals {
  int64_t* step;
  float *train_loss, *valid_loss, *clip, *from_lstm;

  LOPT_HD float clip_limit(const Spec& s) const {
    return clip[1] / (1.0f - ::powf(static_cast<float>(s.clip_decay), clip[0])) * s.clip_multiplier;
  }
  LOPT_HD void observe_train(const Spec& s, float loss) const {
    const bool given = is_finite(loss);
    if (given || train_loss[2] > 0) next_loss(train_loss, given ? loss : train_loss[3], s.train_loss_decay);
  }
  LOPT_HD void observe_valid(const Spec& s, float loss) const {
    if (!is_finite(loss)) return;
    if (!s.paper_inputs && valid_loss[2] > 0) loss = ::fminf(loss, valid_loss[4]);  // at most the first one
    next_loss(valid_loss, loss, s.valid_loss_decay);
    *step += s.valid_advances_step;
  }
};

// What all tensors of one step share beside Globals.
struct Shared {
  float mean_grad_square, mean_scale;
  float losses[4];  // inputs of the LSTM, of which the paper has two
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

// See Note [Team].
struct OneThread {
  LOPT_HD int rank() const { return 0; }
  LOPT_HD int size() const { return 1; }
  LOPT_HD void sync() const {}

  // start + value(0) + ... + value(count - 1), in every thread.
  template <class Value>
  LOPT_HD float sum(float start, int count, Value value) const {
    for (int i = 0; i < count; ++i) start += value(i);
    return start;
  }

  // out[j] = bias[j] + sum_i x[i] w[i, j]
  LOPT_HD void linear(const float* x, int inputs, const float* w, const float* bias, int outputs, float* out) const {
    for (int j = 0; j < outputs; ++j) out[j] = bias[j];
    for (int i = 0; i < inputs; ++i) {
      const float value = x[i];
      const float* row = w + int64_t{i} * outputs;
      for (int j = 0; j < outputs; ++j) out[j] += value * row[j];
    }
  }
};

// lopt.rule.tensor_lstm.loss_inputs
LOPT_HD void loss_inputs(const Spec& s, const Globals& g, float* x) {
  for (int i = 0; i < 4; ++i) x[i] = 0;
  if (!(g.train_loss[2] > 0)) return;
  x[0] = standardise_loss(g.train_loss, g.train_loss[3], s.train_loss_decay);
  x[2] = loss_rise(g.train_loss, s.train_loss_decay);
  if (!s.paper_inputs && !(g.valid_loss[2] > 0)) return;
  x[1] = standardise_loss(g.train_loss, corrected_mean(g.valid_loss, s.valid_loss_decay), s.train_loss_decay);
  x[3] = loss_rise(g.valid_loss, s.valid_loss_decay, loss_spread(g.train_loss, s.train_loss_decay));
}

LOPT_HD float log_magnitude(float x) { return clamp_of(::logf(1e-8f + ::fabsf(x)), -5.0f, 5.0f); }
LOPT_HD float sign_of(float x) { return static_cast<float>((x > 0) - (x < 0)); }

// The sine of angles up to 1e6 and more, for which sinf would use local memory on the GPU.
LOPT_HD float sine(float x) {
#ifdef __CUDA_ARCH__
  return static_cast<float>(::sinpi(static_cast<double>(x) * 0.318309886183790672));
#else
  return ::sinf(x);
#endif
}

template <class Team>
LOPT_HD void time_inputs(const Team& team, const Spec& s, int64_t step, float total_steps, float* time) {
  constexpr float kPi = 3.14159265358979f, kScale = 8.0f;  // LOG_TIME_SCALE
  const float steps = static_cast<float>(step);
  if (s.paper_inputs) {
    for (int i = team.rank(); i < 11; i += team.size()) {
      const float decade = i < 2 ? 1.0f : i < 4 ? 10.0f : i < 6 ? 1e2f : i < 8 ? 1e3f : i < 10 ? 1e4f : 1e5f;
      time[i] = sine(steps / ((i % 2 ? 3.0f * decade : decade) * kPi));  // 1, 3, 10, 30, ... 1e5
    }
    return;
  }
  if (team.rank() != 0) return;
  time[0] = ::log1pf(::fminf(steps, s.time_limit)) / kScale;
  if (!s.horizon_input) return;
  const bool known = total_steps > 0;
  const float done = known ? ::fminf(steps / ::fmaxf(total_steps, 1.0f), 1.0f) : 0.0f;
  time[1] = known;
  time[2] = done;
  time[3] = ::logf(1.0f - 0.99f * done);
  time[4] = ::log1pf(::fminf(total_steps, s.time_limit)) / kScale;
  time[5] = known ? time[0] : 0.0f;
}

// Facts about one tensor among the MLP's inputs (lopt.rule.tensor_lstm.tensor_facts).
LOPT_HD void tensor_facts(const Spec& s, const TensorLevel& level, int t, const float* stats, float* facts) {
  const float numel = static_cast<float>(level.shapes[t].numel);
  if (s.paper_inputs) {
    facts[0] = ::logf(static_cast<float>(level.num_tensors)) - 1.0f;
    facts[1] = ::logf(::sqrtf(stats[Stat::param_square] * numel) + 1e-8f);
    facts[2] = ::logf(numel);
  } else {
    facts[0] = static_cast<float>(level.shapes[t].is_matrix);
    facts[1] = ::logf(numel) / 8.0f;  // LOG_TIME_SCALE
  }
}

LOPT_HD float log_ratio(float above, float below) {
  constexpr float kTiny = 1e-30f;  // TINY
  return clamp_of(0.5f * ::logf((above + kTiny) / (below + kTiny)), -5.0f, 5.0f);
}

// 1 - decay_k^updates of mom, then rms.
template <class Features, class Team>
LOPT_HD void bias_corrections(const Team& team, const Spec& s, float updates, float* corrections) {
  for (int k = team.rank(); k < Features::kNumMom + Features::kNumRms; k += team.size()) {
    const float decay = k < Features::kNumMom ? s.mom_decay[k] : s.rms_decay[k - Features::kNumMom];
    corrections[k] = -::expm1f(updates * ::logf(decay));
  }
}

// One row of the LSTM's input (lopt.rule.tensor_lstm.lstm_inputs); corrections: from bias_corrections.
template <class Features, class Team>
LOPT_HD void lstm_input(const Team& team, const Spec& s, const Globals& g, const Shared& shared,
                        const TensorLevel& level, int t, const float* stats, const float* corrections,
                        const float* time, float* x) {
  for (int i = team.rank(); i < s.from_lstm; i += team.size()) x[i] = g.from_lstm[i];
  x += s.from_lstm;
  for (int i = team.rank(); i < s.from_mlp; i += team.size()) x[i] = level.feedback[int64_t{t} * s.from_mlp + i];
  x += s.from_mlp;
  if (team.rank() != 0) return;
  const TensorShape& shape = level.shapes[t];
  const float numel = static_cast<float>(shape.numel);
  if (s.paper_inputs) {
    *x++ = log_magnitude(::sqrtf(stats[Stat::grad_square] * numel));
    *x++ = shape.is_scalar ? 1.0f : -1.0f;
    for (const int mean : {Stat::mom_mean, Stat::rms_mean, Stat::param_mean}) {
      *x++ = log_magnitude(stats[mean]);
      *x++ = sign_of(stats[mean]);
    }
    *x++ = log_magnitude(::sqrtf(stats[Stat::param_square] * numel));
    for (const float log_dim : shape.log_dims) *x++ = log_dim;
  } else if constexpr (Features::kSlow >= 0) {
    const float* moments = stats + kMoments;
    const float scale = level.initial_scale[t], rms_mean = stats[Stat::rms_mean];
    const float slow = moments[Features::Moment::rms1] / corrections[Features::kNumMom + Features::kSlow];
    *x++ = log_ratio(stats[Stat::grad_square], slow);
    for (int k = 0; k < Features::kNumMom; ++k)
      *x++ = log_ratio(moments[Features::Moment::mom0_squared + k] / (corrections[k] * corrections[k]), slow);
    *x++ = log_ratio(stats[Stat::rms_var], rms_mean * rms_mean);
    *x++ = log_ratio(stats[Stat::param_square], scale * scale);
    *x++ = log_ratio(stats[Stat::grad_square], shared.mean_grad_square);
  }
  for (int i = 0; i < (s.paper_inputs ? 2 : 4); ++i) *x++ = shared.losses[i];
  if (s.paper_inputs) {
    for (const int var : {Stat::mom_var, Stat::rms_var, Stat::param_var}) *x++ = log_magnitude(stats[var]);
  } else {
    tensor_facts(s, level, t, stats, x);
    x += s.num_facts();
    for (int i = 0; i < s.num_time(); ++i) *x++ = time[i];
  }
}

// One unit of the LSTM from its four sums (lopt.rule.tensor_lstm.lstm_cell): updates c, returns h.
LOPT_HD float lstm_unit(float i, float g, float f, float o, float& c) {
  c = c / (1.0f + exp_of(-1.0f - f)) + ::tanhf(g) / (1.0f + exp_of(-i));
  return ::tanhf(c) / (1.0f + exp_of(-o));
}

// The sums over the tensors that a step needs. Scales are root mean squares of the parameters.
enum Sum { kSumGradSquare, kSumNonfinite, kSumScale, kSumMatrixScale, kSumMatrices, kNumSums };

LOPT_HD void add_to_sums(const TensorShape& shape, const float* stats, double* sums) {
  const double scale = ::sqrtf(stats[Stat::param_square]);
  sums[kSumGradSquare] += stats[Stat::grad_square];
  sums[kSumNonfinite] += stats[Stat::nonfinite];
  sums[kSumScale] += scale;
  if (!shape.is_matrix) return;
  sums[kSumMatrixScale] += scale;
  sums[kSumMatrices] += 1;
}

// The part of a step that tensors share: loss averages and clipper go on.
LOPT_HD Shared advance_shared(const Spec& s, const Globals& g, const double* sums, int num_tensors, float loss) {
  constexpr float kEmpty = 0.1f;  // EMPTY_SCALE
  Shared shared{};
  g.observe_train(s, loss);
  shared.mean_grad_square = static_cast<float>(sums[kSumGradSquare] / num_tensors);
  const float rms = ::sqrtf(1e-8f + shared.mean_grad_square);
  g.clip[1] = static_cast<float>(s.clip_decay) * g.clip[1] + static_cast<float>(1.0 - s.clip_decay) * rms;
  g.clip[0] += 1;
  shared.mean_scale = static_cast<float>(sums[kSumMatrices] > 0 ? sums[kSumMatrixScale] / sums[kSumMatrices]
                                                                : sums[kSumScale] / num_tensors);
  if (!(shared.mean_scale > 0)) shared.mean_scale = kEmpty;
  loss_inputs(s, g, shared.losses);
  return shared;
}

// lopt.rule.tensor_lstm.tensor_scale of one tensor: its initial scale is set in the first step, the current one returned.
LOPT_HD float tensor_scale(const TensorShape& shape, const float* stats, float mean_scale, float& initial) {
  constexpr float kSmallest = 0.3f;  // SMALLEST_SCALE
  const float scale = ::sqrtf(stats[Stat::param_square]);
  float start = ::fmaxf(scale, kSmallest * mean_scale);
  if (!shape.is_matrix) start = ::fminf(start, mean_scale);
  if (!(initial > 0)) initial = start;
  return clamp_of(scale, 0.5f * initial, 2.0f * initial);
}

// The part of a step that belongs to tensor t, and is its update number `updates`. `level.constant` starts with the time
// inputs; h and c are the tensor's LSTM state, updated in place by lstm(x, h, c), after which the team is in step;
// to_lstm [from_lstm] is written.
template <class Features, class Team, class Lstm>
LOPT_HD void advance_row(const Team& team, const Spec& s, const ThetaView& theta, const Globals& g,
                         const Shared& shared, const TensorLevel& level, int t, float updates, const float* stats,
                         const float* corrections, float* h, float* c, float* to_lstm, const Lstm& lstm) {
  constexpr int kColumns = Features::kNumColumns;
  constexpr float kMaxLogStep = 6.0f, kWarmup = 10.0f;  // MAX_LOG_STEP, WARMUP
  const int hidden = s.lstm_width, inputs = s.num_lstm_input();
  float* const facts = level.constant + s.num_time();
  float& step_size = level.step_size[t];  // until the end, the tensor's scale
  if (team.rank() == 0) {
    step_size = tensor_scale(level.shapes[t], stats, shared.mean_scale, level.initial_scale[t]);
    tensor_facts(s, level, t, stats, facts);
  }
  if (team.rank() == team.size() - 1)
    Features::column_map(stats + kMoments, corrections, level.scale + int64_t{t} * kColumns,
                         level.shift + int64_t{t} * kColumns);
  lstm_input<Features>(team, s, g, shared, level, t, stats, corrections, level.constant, level.x);
  team.sync();
  lstm(level.x, h, c);
  team.linear(h, hidden, theta.lstm_to_lstm_w, theta.lstm_to_lstm_b, s.from_lstm, to_lstm);
  team.linear(h, hidden, theta.lstm_to_mlp_w, theta.lstm_to_mlp_b, s.lstm_to_mlp, facts + s.num_facts());
  team.sync();
  team.linear(level.constant, s.num_constant(), theta.mlp_w1 + kColumns * s.width, theta.mlp_b1, s.width,
              level.bias + int64_t{t} * s.width);
  float log_step = 0.0f;
  if (s.step_control) {
    log_step = team.sum(theta.step_b[0], hidden, [&](int i) { return h[i] * theta.step_w[i]; });
    log_step = team.sum(log_step, inputs, [&](int i) { return level.x[i] * theta.step_w[hidden + i]; });
  }
  if (team.rank() != 0) return;
  const float whole = stats[Stat::grad_square] > 0 ? ::fminf(updates / kWarmup, 1.0f) : 0.0f;  // no gradient, no step
  const float control = whole * exp_of(clamp_of(log_step, -kMaxLogStep, kMaxLogStep));
  step_size = s.step_multiplier * (s.step_control ? step_size * control : 1.0f);
}

// lr = 0 wins over NaN.
LOPT_HD float scaled_step(float step_size, float lr) { return lr > 0 ? step_size * lr : 0.0f; }

// One step of everything at tensor level, by one thread. `lstm` is the cell: lstm(x, h, c) updates h and c of one tensor in
// place. Returns the number of non-finite gradient elements.
template <class Features, class Lstm>
double advance(const Spec& s, const ThetaView& theta, const Globals& g, const TensorLevel& level, float loss,
               float total_steps, const Lstm& lstm) {
  constexpr int kStats = kNumStats<Features>;
  const OneThread team;
  const int tensors = level.num_tensors;
  double sums[kNumSums]{};
  for (int t = 0; t < tensors; ++t) add_to_sums(level.shapes[t], level.stats + int64_t{t} * kStats, sums);
  const Shared shared = advance_shared(s, g, sums, tensors, loss);
  time_inputs(team, s, *g.step, total_steps, level.constant);
  for (int i = 0; i < s.from_lstm; ++i) level.from_lstm[i] = 0;
  float corrections[Features::kNumMom + Features::kNumRms]{}, corrected_for = 0;
  for (int t = 0; t < tensors; ++t) {
    level.updates[t] += 1;
    if (level.updates[t] != corrected_for) {  // mostly the same for all tensors
      corrected_for = level.updates[t];
      bias_corrections<Features>(team, s, corrected_for, corrections);
    }
    float* const to_lstm = level.gates;  // the cell is done with them
    advance_row<Features>(team, s, theta, g, shared, level, t, level.updates[t], level.stats + int64_t{t} * kStats,
                          corrections, level.h + int64_t{t} * s.lstm_width, level.c + int64_t{t} * s.lstm_width,
                          to_lstm, lstm);
    for (int i = 0; i < s.from_lstm; ++i) level.from_lstm[i] += to_lstm[i] / static_cast<float>(tensors);
  }
  for (int i = 0; i < s.from_lstm; ++i) g.from_lstm[i] = level.from_lstm[i];
  *g.step += 1;
  return sums[kSumNonfinite];
}

// MLP weights as apply reads them (MlpLayout), from theta.
template <class Features, int kWidth>
void pack_mlp(const Spec& s, const ThetaView& theta, float* packed) {
  using Layout = MlpLayout<Features::kNumColumns, kWidth>;
  const int outputs = 2 + s.from_mlp;
  for (int i = 0; i < Features::kNumColumns * kWidth; ++i) packed[Layout::kW1 + i] = theta.mlp_w1[i];
  for (int i = 0; i < kWidth * kWidth; ++i) packed[Layout::kW2 + i] = theta.mlp_w2[i];
  for (int i = 0; i < kWidth; ++i) packed[Layout::kB2 + i] = theta.mlp_b2[i];
  for (int i = 0; i < kWidth; ++i)
    for (int o = 0; o < 2; ++o) packed[Layout::kW3 + o * kWidth + i] = theta.mlp_w3[i * outputs + o];
  for (int o = 0; o < 2; ++o) packed[Layout::kB3 + o] = theta.mlp_b3[o];
  for (int i = 0; i < Features::kNumColumns; ++i) packed[Layout::kSkip + i] = s.linear_skip ? theta.skip[i] : 0.0f;
}

// Value o of feedback = mean(hidden) W3[:, 2:] + b3[2:] for one tensor.
LOPT_HD float feedback_of(const Spec& s, const ThetaView& theta, const float* hidden, int o) {
  const int outputs = 2 + s.from_mlp;
  float sum = theta.mlp_b3[2 + o];
  for (int j = 0; j < s.width; ++j) sum += hidden[j] * theta.mlp_w3[j * outputs + 2 + o];
  return sum;
}

inline void next_feedback(const Spec& s, const ThetaView& theta, const float* hidden, float* feedback) {
  for (int o = 0; o < s.from_mlp; ++o) feedback[o] = feedback_of(s, theta, hidden, o);
}

}  // namespace
}  // namespace lopt
