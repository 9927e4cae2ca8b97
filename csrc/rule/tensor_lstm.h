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

#include "rule/means.h"
#include "rule/theta_view.h"

namespace lopt {
namespace {  // compiled once per instruction set: no function may be shared between them

LOPT_HD bool is_robust(const Spec& s) {
  return with_inputs(s, [](auto inputs) LOPT_INLINE { return decltype(inputs)::kRobust; });
}
LOPT_HD bool is_natural(const Spec& s) {
  return with_inputs(s, [](auto inputs) LOPT_INLINE { return decltype(inputs)::kNatural; });
}

// Whether a tensor takes no part in a step: a parameter or an accumulator is not finite.
LOPT_HD bool rests(const float* stats) {
  return !is_finite(stats[Stat::param_square] + stats[Stat::grad_square] + stats[Stat::mom_mean] +
                    stats[Stat::rms_mean]);
}

LOPT_HD float clip_limit(const Spec& s, const Globals& g) {
  const float unbiased =
      g.clip[ClipState::rms] / (1.0f - ::powf(static_cast<float>(s.clip_decay), g.clip[ClipState::steps]));
  return ::fminf(unbiased * s.clip_multiplier, kLargest);
}

LOPT_HD void observe_train(const Spec& s, const Globals& g, float loss) {
  const bool given = is_finite(loss);
  if (!given && !any_loss(g.train_loss)) return;
  loss = given ? bounded_loss(loss) : g.train_loss[LossState::last];
  next_loss(g.train_loss, loss, s.train_loss_decay, is_robust(s));
}

LOPT_HD void observe_valid(const Spec& s, const Globals& g, float loss) {
  if (!is_finite(loss)) return;
  loss = bounded_loss(loss);
  if (is_robust(s) && any_loss(g.valid_loss)) loss = ::fminf(loss, g.valid_loss[LossState::first]);
  next_loss(g.valid_loss, loss, s.valid_loss_decay, is_robust(s));
  *g.step += s.valid_advances_step;
}

// What `advance` reads and writes for the T tensors; see AdvanceParams.
struct TensorLevel {
  int num_tensors;
  const int64_t* rows;  // [num_tensors] of what follows; null: all of them
  const TensorShape* shapes;
  float *h, *c, *feedback, *initial_scale, *updates, *rank;
  const float* stats;
  const float *lr, *decay;  // null: 1 and 0
  ApplyInputs inputs;       // written
  // Scratch:
  float* x;           // [num_lstm_input]
  float* from_lstm;   // [from_lstm]
  float* gates;       // [4 lstm_width, or from_lstm if more, and padding]
  float* constant;    // [num_constant]
  float* activation;  // [lstm_width and padding]

  LOPT_HD int64_t row(int i) const { return rows ? rows[i] : i; }
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

  // value(0) + ... + value(count - 1), and the largest of them and 0, in every thread.
  template <class Value>
  LOPT_HD double total(int count, Value value) const {
    double sum = 0.0;
    for (int i = 0; i < count; ++i) sum += value(i);
    return sum;
  }
  template <class Value>
  LOPT_HD float largest(int count, Value value) const {
    float most = 0.0f;
    for (int i = 0; i < count; ++i) most = ::fmaxf(most, value(i));
    return most;
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

// The time inputs of a step.
template <class Team>
LOPT_HD void time_inputs(const Team& team, const Spec& s, int64_t step, float total_steps, float* time) {
  with_inputs(s, [&](auto inputs) LOPT_INLINE { decltype(inputs)::time(team, s, step, total_steps, time); });
}

// 1 - decay_k^updates of mom, then rms.
template <class Features, class Team>
LOPT_HD void bias_corrections(const Team& team, const Spec& s, float updates, float* corrections) {
  for (int k = team.rank(); k < Features::kNumMom + Features::kNumRms; k += team.size()) {
    const float decay = k < Features::kNumMom ? s.mom_decay[k] : s.rms_decay[k - Features::kNumMom];
    corrections[k] = -::expm1f(updates * ::logf(decay));
  }
}

// One row of the LSTM's input.
template <class Features, class Team>
LOPT_HD void lstm_input(const Team& team, const Spec& s, const Globals& g, const Seen& seen, const float* feedback,
                        const float* time, const float* facts, float* x) {
  for (int i = team.rank(); i < s.from_lstm; i += team.size()) x[i] = g.from_lstm[i];
  x += s.from_lstm;
  for (int i = team.rank(); i < s.from_mlp; i += team.size()) x[i] = feedback[i];
  x += s.from_mlp;
  if (team.rank() != 0) return;
  with_inputs(s, [&](auto inputs) LOPT_INLINE {
    using Inputs = decltype(inputs);
    Inputs::template scalars<Features>(seen, x);
    if (!Inputs::kLstmSeesConstants) return;
    const int num_time = s.num_time();
    for (int i = 0; i < Inputs::kNumFacts; ++i) x[Inputs::kNumScalars + i] = facts[i];
    for (int i = 0; i < num_time; ++i) x[Inputs::kNumScalars + Inputs::kNumFacts + i] = time[i];
  });
}

// One unit of the LSTM from its four sums (lopt.rule.tensor_lstm.lstm_cell): updates c, returns h.
LOPT_HD float lstm_unit(float i, float g, float f, float o, float& c) {
  c = c / (1.0f + ::expf(-1.0f - f)) + ::tanhf(g) / (1.0f + ::expf(-i));
  return ::tanhf(c) / (1.0f + ::expf(-o));
}

// The sums over the tensors that a step needs; from kSumFinite on numbers of tensors, the last four of each scale_class.
enum Sum { kSumGradSquare, kSumNonfinite, kSumFinite, kSumMoving, kSumScaleClass, kNumSums = kSumScaleClass + 4 };

// Whose parameters say how large parameters are: matrices with a gradient (3), else matrices (2), else what has a gradient
// (1), else all (0); -1 for what is zero or rests.
LOPT_HD int scale_class(const TensorShape& shape, const float* stats) {
  if (rests(stats) || !(stats[Stat::param_square] > 0)) return -1;
  return 2 * (shape.is_matrix != 0) + (stats[Stat::grad_square] > 0);
}

LOPT_HD void add_to_sums(const TensorShape& shape, const float* stats, double* sums) {
  sums[kSumNonfinite] += stats[Stat::nonfinite];
  if (rests(stats)) return;
  sums[kSumGradSquare] += stats[Stat::grad_square];
  sums[kSumFinite] += 1;
  sums[kSumMoving] += stats[Stat::grad_square] > 0;
  const int scales = scale_class(shape, stats);
  for (int k = 0; k < 4; ++k) sums[kSumScaleClass + k] += scales == k;
}

// Tensors that count in the mean of squared gradients.
LOPT_HD double num_with_gradient(const Spec& s, const double* sums) {
  return is_robust(s) ? sums[kSumMoving] : sums[kSumFinite];
}

// shape_of(i) and stats_of(i) are those of tensor i among those that take part.
template <class Team, class StatsOf>
LOPT_HD float mean_grad_square(const Team& team, const Spec& s, int tensors, const StatsOf& stats_of,
                               const double* sums) {
  if (!is_robust(s)) return sums[kSumFinite] > 0 ? static_cast<float>(sums[kSumGradSquare] / sums[kSumFinite]) : 0.0f;
  return bounded_mean(
      team, tensors, sums[kSumMoving], kGradOutlier, [&](int i) { return stats_of(i)[Stat::grad_square]; },
      [&](int i) { return !rests(stats_of(i)) && stats_of(i)[Stat::grad_square] > 0; });
}

// lopt.rule.tensor_lstm.typical_scale
template <class Team, class ShapeOf, class StatsOf>
LOPT_HD float typical_scale(const Team& team, int tensors, const ShapeOf& shape_of, const StatsOf& stats_of,
                            const double* sums) {
  int best = 3;
  while (best > 0 && !(sums[kSumScaleClass + best] > 0)) --best;
  const float mean = bounded_mean(
      team, tensors, sums[kSumScaleClass + best], kScaleOutlier,
      [&](int i) { return ::sqrtf(stats_of(i)[Stat::param_square]); },
      [&](int i) { return scale_class(shape_of(i), stats_of(i)) == best; });
  return mean > 0 ? mean : kEmptyScale;
}

// The part of a step that tensors share: loss averages and clipper go on. mean_scale is only read for new tensors.
LOPT_HD Shared advance_shared(const Spec& s, const Globals& g, const double* sums, float mean_grad_square,
                              float mean_scale, float loss) {
  Shared shared{};
  observe_train(s, g, loss);
  shared.mean_grad_square = mean_grad_square;
  shared.mean_scale = mean_scale;
  if (num_with_gradient(s, sums) > 0) {
    const float rms = ::sqrtf(kEpsilon + shared.mean_grad_square);
    float& value = g.clip[ClipState::rms];
    value = static_cast<float>(s.clip_decay) * value + static_cast<float>(1.0 - s.clip_decay) * rms;
    g.clip[ClipState::steps] += 1;
  }
  loss_inputs(s, g, shared.losses);
  return shared;
}

// lopt.rule.tensor_lstm.tensor_scale of one tensor: its initial scale is set in the first step, the current one returned.
LOPT_HD float tensor_scale(const TensorShape& shape, const float* stats, float mean_scale, float& initial) {
  const float scale = ::sqrtf(stats[Stat::param_square]);
  float start = ::fmaxf(scale, kSmallestScale * mean_scale);
  if (!shape.is_matrix) start = ::fminf(start, mean_scale);
  if (!(initial > 0)) initial = start;
  return clamp_of(scale, initial / kScaleGrowth, kScaleGrowth * initial);
}

// lopt.rule.tensor_lstm.natural_scale of one tensor, likewise.
LOPT_HD float natural_scale(const TensorShape& shape, const float* stats, float& initial) {
  if (!(initial > 0)) initial = ::fmaxf(::sqrtf(stats[Stat::param_square]), 1e-15f);  // the root of kTiny
  return shape.natural;
}

// The part of a step that belongs to tensor t, and is its update number `updates`. `level.constant` starts with the time
// inputs; h and c are the tensor's LSTM state, updated in place by lstm(x, h, c), after which the team is in step;
// to_lstm [from_lstm] is written. A tensor that rests gets a step of NaN, and is left as it is.
template <class Features, class Team, class Lstm>
LOPT_HD void advance_row(const Team& team, const Spec& s, const ThetaView& theta, const Globals& g,
                         const Shared& shared, const TensorLevel& level, int t, float updates, const float* stats,
                         const float* corrections, float* h, float* c, float* to_lstm, const Lstm& lstm) {
  constexpr int kColumns = Features::kNumColumns;
  const int hidden = s.lstm_width, inputs = s.num_lstm_input();
  float* const facts = level.constant + s.num_time();
  float& step_size = level.inputs.step_size[t];  // until the end, the tensor's scale
  if (rests(stats)) {
    if (team.rank() == 0) step_size = NAN, level.inputs.keep[t] = 1.0f, level.inputs.gate[t] = 0.0f;
    return;
  }
  if (team.rank() == 0) {
    step_size = is_natural(s) ? natural_scale(level.shapes[t], stats, level.initial_scale[t])
                              : tensor_scale(level.shapes[t], stats, shared.mean_scale, level.initial_scale[t]);
  }
  const Seen seen{s,     shared,      level.shapes[t],        level.num_tensors,
                  stats, corrections, level.initial_scale[t], level.rank[t]};
  if (team.rank() == 0) with_inputs(s, [&](auto inputs) LOPT_INLINE { decltype(inputs)::facts(seen, facts); });
  if (team.rank() == team.size() - 1)
    Features::column_map(stats + kMoments, corrections, level.inputs.scale + int64_t{t} * kColumns,
                         level.inputs.shift + int64_t{t} * kColumns);
  lstm_input<Features>(team, s, g, seen, level.feedback + int64_t{t} * s.from_mlp, level.constant, facts, level.x);
  team.sync();
  lstm(level.x, h, c);
  team.linear(h, hidden, theta.lstm_to_lstm_w, theta.lstm_to_lstm_b, s.from_lstm, to_lstm);
  team.linear(h, hidden, theta.lstm_to_mlp_w, theta.lstm_to_mlp_b, s.lstm_to_mlp, facts + s.num_facts());
  team.sync();
  team.linear(level.constant, s.num_constant(), theta.mlp_w1 + kColumns * s.width, theta.mlp_b1, s.width,
              level.inputs.bias + int64_t{t} * s.width);
  // start + a linear map of the LSTM's state and inputs
  const auto controlled = [&](float start, const float* w) {
    start = team.sum(start, hidden, [&](int i) { return h[i] * w[i]; });
    return team.sum(start, inputs, [&](int i) { return level.x[i] * w[hidden + i]; });
  };
  const bool whole_direction = s.newton_schulz > 0 && level.shapes[t].whole;
  float log_step = s.step_control ? controlled(theta.step_b[0], theta.step_w) : 0.0f;
  const float gate = whole_direction ? clamp_of(controlled(0.5f + theta.gate_b[0], theta.gate_w), 0.0f, 1.0f) : 0.0f;
  if (team.rank() != 0) return;
  level.inputs.gate[t] = gate;
  if (whole_direction) log_step += theta.gate_step[0] * gate;
  const float whole = stats[Stat::grad_square] > 0 ? ::fminf(updates / kWarmup, 1.0f) : 0.0f;  // no gradient, no step
  const float control = whole * ::expf(clamp_of(log_step, -kMaxLogStep, kMaxLogStep));
  const float lr = level.lr ? level.lr[t] : 1.0f, decay = level.decay ? level.decay[t] : 0.0f;
  step_size = s.step_multiplier * (s.step_control ? step_size * control : 1.0f);
  step_size = lr > 0 ? step_size * lr : 0.0f;  // lr = 0 wins over infinity
  level.inputs.keep[t] = decay > 0 && step_size > 0 ? ::fmaxf(1.0f - step_size * decay, 0.0f) : 1.0f;
}

// One step of everything at tensor level, by one thread. `lstm` is the cell: lstm(x, h, c) updates h and c of one tensor in
// place. Adds to nonfinite [2]; see AdvanceParams.
template <class Features, class Lstm>
void advance(const Spec& s, const ThetaView& theta, const Globals& g, const TensorLevel& level, float loss,
             float total_steps, const Lstm& lstm, int64_t* nonfinite) {
  constexpr int kStats = kNumStats<Features>;
  const OneThread team;
  const int tensors = level.num_tensors;
  double sums[kNumSums]{};
  const auto shape_of = [&](int i) -> const TensorShape& { return level.shapes[level.row(i)]; };
  const auto stats_of = [&](int i) { return level.stats + level.row(i) * kStats; };
  bool first = false;
  for (int i = 0; i < tensors; ++i) {
    add_to_sums(shape_of(i), stats_of(i), sums);
    first = first || !(level.initial_scale[level.row(i)] > 0);
  }
  const float mean_scale = first ? typical_scale(team, tensors, shape_of, stats_of, sums) : 0.0f;
  const float mean_square = mean_grad_square(team, s, tensors, stats_of, sums);
  const Shared shared = advance_shared(s, g, sums, mean_square, mean_scale, loss);
  const float finite = static_cast<float>(sums[kSumFinite]);
  time_inputs(team, s, *g.step, total_steps, level.constant);
  for (int i = 0; i < s.from_lstm; ++i) level.from_lstm[i] = 0;
  float corrections[Features::kNumMom + Features::kNumRms]{}, corrected_for = 0;
  for (int i = 0; i < tensors; ++i) {
    const int t = static_cast<int>(level.row(i));
    const float* stats = stats_of(i);
    level.updates[t] += 1;
    if (level.updates[t] != corrected_for) {  // mostly the same for all tensors
      corrected_for = level.updates[t];
      bias_corrections<Features>(team, s, corrected_for, corrections);
    }
    float* const to_lstm = level.gates;  // the cell is done with them
    advance_row<Features>(team, s, theta, g, shared, level, t, level.updates[t], stats, corrections,
                          level.h + int64_t{t} * s.lstm_width, level.c + int64_t{t} * s.lstm_width, to_lstm, lstm);
    if (rests(stats)) continue;
    for (int j = 0; j < s.from_lstm; ++j) level.from_lstm[j] += to_lstm[j] / finite;
  }
  for (int i = 0; finite > 0 && i < s.from_lstm; ++i) g.from_lstm[i] = level.from_lstm[i];
  *g.step += 1;
  nonfinite[0] += static_cast<int64_t>(sums[kSumNonfinite]);
  nonfinite[1] += tensors - static_cast<int64_t>(sums[kSumFinite]);
}

// MLP weights as apply reads them (MlpLayout), from theta.
template <class Features, int kWidth, class Team>
LOPT_HD void pack_mlp(const Team& team, const Spec& s, const ThetaView& theta, float* packed) {
  using Layout = MlpLayout<Features::kNumColumns, kWidth>;
  const int outputs = 2 + s.from_mlp, first = team.rank(), step = team.size();
  for (int i = first; i < Features::kNumColumns * kWidth; i += step) packed[Layout::kW1 + i] = theta.mlp_w1[i];
  for (int i = first; i < Layout::kSecond * kWidth; i += step) packed[Layout::kW2 + i] = theta.mlp_w2[i];
  for (int i = first; i < Layout::kSecond; i += step) packed[Layout::kB2 + i] = theta.mlp_b2[i];
  for (int i = first; i < 2 * kWidth; i += step)
    packed[Layout::kW3 + i] = theta.mlp_w3[i % kWidth * outputs + i / kWidth];
  for (int o = first; o < 2; o += step) packed[Layout::kB3 + o] = theta.mlp_b3[o];
  for (int i = first; i < Features::kNumColumns; i += step)
    packed[Layout::kSkip + i] = s.linear_skip ? theta.skip[i] : 0.0f;
}

// Value o of feedback = mean(hidden) W3[:, 2:] + b3[2:] for one tensor.
LOPT_HD float feedback_of(const Spec& s, const ThetaView& theta, const float* hidden, int o) {
  const int outputs = 2 + s.from_mlp;
  float sum = theta.mlp_b3[2 + o];
  for (int j = 0; j < s.width; ++j) sum += hidden[j] * theta.mlp_w3[j * outputs + 2 + o];
  return clamp_of(sum, -kLargest, kLargest);
}

// feedback becomes `next`, unless the tensor rested.
LOPT_HD void set_feedback(float step_size, float next, float& feedback) {
  if (step_size == step_size && is_finite(next)) feedback = next;
}

inline void next_feedback(const Spec& s, const ThetaView& theta, const float* hidden, float step_size,
                          float* feedback) {
  for (int o = 0; o < s.from_mlp; ++o) set_feedback(step_size, feedback_of(s, theta, hidden, o), feedback[o]);
}

}  // namespace
}  // namespace lopt
