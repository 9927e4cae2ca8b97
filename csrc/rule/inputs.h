// Input sets: what the LSTM sees of one tensor, and the MLP beside its columns, one struct per set.
//
// A set names its inputs and fills them by these names; lopt/rule/inputs.py has the same names in the same order, and is the
// definition. The LSTM's input is [shared LSTM output, MLP feedback, scalars] and, where kLstmSeesConstants, [facts, time];
// the MLP's per-tensor input is [time, facts, LSTM output]. Of the time inputs the first kUntold do not need the number of
// steps planned.
// Source: arXiv:2009.11243, appendix C.2 to C.4, and the author's port (`PaperInputs`).
#pragma once

#include "api/kernels.h"
#include "rule/losses.h"

namespace lopt {
namespace {  // compiled once per instruction set: no function may be shared between them

// State that all tensors share; see AdvanceParams.
struct Globals {
  int64_t* step;
  float *train_loss, *valid_loss, *clip, *from_lstm;
};

// Inputs about losses, of which a set may use some.
struct LossInput {
  LOPT_ENUM(Name, kCount, train_loss, valid_loss, train_rise, valid_rise, train_fall);
};

// What all tensors of one step share beside Globals.
struct Shared {
  float mean_grad_square, mean_scale;
  float losses[LossInput::kCount];
};

// What the inputs of one tensor are computed from.
struct Seen {
  const Spec& spec;
  const Shared& shared;
  const TensorShape& shape;
  int num_tensors;
  const float* stats;        // [S]
  const float* corrections;  // [num_mom + num_rms], from bias_corrections
  const float& scale;        // initial scale of the parameters
  float rank;                // of the last orthogonalised direction

  LOPT_HD float numel() const { return static_cast<float>(shape.numel); }
};

LOPT_HD float log_magnitude(float x) { return clamp_of(::logf(kEpsilon + ::fabsf(x)), -kInputBound, kInputBound); }
LOPT_HD float sign_of(float x) { return static_cast<float>((x > 0) - (x < 0)); }

// Of values >= 0, infinity included.
LOPT_HD float log_ratio(float above, float below) {
  const float ratio = (::fminf(above, kLargestFloat) + kTiny) / (::fminf(below, kLargestFloat) + kTiny);
  return clamp_of(0.5f * ::logf(ratio), -kInputBound, kInputBound);
}

// The sine of angles up to 1e6 and more, for which sinf would use local memory on the GPU.
LOPT_HD float sine(float x) {
#ifdef __CUDA_ARCH__
  return static_cast<float>(::sinpi(static_cast<double>(x) * 0.318309886183790672));
#else
  return ::sinf(x);
#endif
}

// Magnitudes and signs as they are, sinusoids of the step.
struct PaperInputs {
  static constexpr const char* kName = "paper";
  LOPT_ENUM(Scalar, kNumScalars, grad_norm, is_scalar, mom_mean, mom_mean_sign, rms_mean, rms_mean_sign, param_mean,
            param_mean_sign, param_norm, log_dim0, log_dim1, log_dim2, log_dim3, train_loss, valid_loss, mom_var,
            rms_var, param_var);
  LOPT_ENUM(Time, kNumTime, wave0, wave1, wave2, wave3, wave4, wave5, wave6, wave7, wave8, wave9, wave10);
  LOPT_ENUM(Fact, kNumFacts, log_tensors, log_param_norm, log_numel);
  static constexpr int kUntold = kNumTime;
  static constexpr bool kLstmSeesConstants = false;
  static constexpr bool kRobust = false;
  static constexpr bool kNatural = false;

  template <class Features>
  LOPT_HD static void scalars(const Seen& seen, float* x) {
    const float* stats = seen.stats;
    x[grad_norm] = log_magnitude(::sqrtf(stats[Stat::grad_square] * seen.numel()));
    x[is_scalar] = seen.shape.is_scalar ? 1.0f : -1.0f;
    x[mom_mean] = log_magnitude(stats[Stat::mom_mean]);
    x[mom_mean_sign] = sign_of(stats[Stat::mom_mean]);
    x[rms_mean] = log_magnitude(stats[Stat::rms_mean]);
    x[rms_mean_sign] = sign_of(stats[Stat::rms_mean]);
    x[param_mean] = log_magnitude(stats[Stat::param_mean]);
    x[param_mean_sign] = sign_of(stats[Stat::param_mean]);
    x[param_norm] = log_magnitude(::sqrtf(stats[Stat::param_square] * seen.numel()));
    for (int i = 0; i < 4; ++i) x[log_dim0 + i] = seen.shape.log_dims[i];
    x[train_loss] = seen.shared.losses[LossInput::train_loss];
    x[valid_loss] = seen.shared.losses[LossInput::valid_loss];
    x[mom_var] = log_magnitude(stats[Stat::mom_var]);
    x[rms_var] = log_magnitude(stats[Stat::rms_var]);
    x[param_var] = log_magnitude(stats[Stat::param_var]);
  }

  LOPT_HD static void facts(const Seen& seen, float* x) {
    x[log_tensors] = ::logf(static_cast<float>(seen.num_tensors)) - 1.0f;
    x[log_param_norm] =
        ::logf(::sqrtf(::fminf(seen.stats[Stat::param_square] * seen.numel(), kLargestFloat)) + kEpsilon);
    x[log_numel] = ::logf(seen.numel());
  }

  // No validation loss is a validation loss of 0.
  LOPT_HD static bool knows_valid_loss(const Globals&) { return true; }

  template <class Team>
  LOPT_HD static void time(const Team& team, const Spec&, int64_t step, float, float* x) {
    constexpr float kPi = 3.14159265358979f;
    for (int i = team.rank(); i < kNumTime; i += team.size()) x[i] = sine(static_cast<float>(step) / (wave(i) * kPi));
  }
};

// Ratios that do not change when gradients or parameters are rescaled, losses and their rises, logarithmic time.
struct RelativeInputs {
  static constexpr const char* kName = "relative";
  LOPT_ENUM(Scalar, kNumScalars, grad_over_slow, mom0_over_slow, mom1_over_slow, mom2_over_slow, rms_spread,
            param_growth, grad_share, train_loss, valid_loss, train_rise, valid_rise);
  LOPT_ENUM(Time, kNumTime, log_step, told, done, log_left, log_total, log_step_told);
  LOPT_ENUM(Fact, kNumFacts, is_matrix, log_numel);
  static constexpr int kUntold = 1;
  static constexpr bool kLstmSeesConstants = true;
  static constexpr bool kRobust = true;
  static constexpr bool kNatural = false;

  template <class Features>
  LOPT_HD static void scalars(const Seen& seen, float* x) {
    if constexpr (Features::kRelative) {
      static_assert(Features::kNumMom == rms_spread - mom0_over_slow, "an input for every momentum");
      const float* stats = seen.stats;
      const float* moments = stats + kMoments;
      const float* corrections = seen.corrections;
      const float rms = stats[Stat::rms_mean];
      const float slow = moments[Features::kSlowMean] / corrections[Features::kNumMom + Features::kSlow];
      x[grad_over_slow] = log_ratio(stats[Stat::grad_square], slow);
      for (int k = 0; k < Features::kNumMom; ++k)
        x[mom0_over_slow + k] =
            log_ratio(moments[Features::Moment::mom0_squared + k] / (corrections[k] * corrections[k]), slow);
      x[rms_spread] = log_ratio(stats[Stat::rms_var], rms * rms);
      x[param_growth] = log_ratio(stats[Stat::param_square], seen.scale * seen.scale);
      x[grad_share] = log_ratio(stats[Stat::grad_square], seen.shared.mean_grad_square);
      for (int i = 0; i <= LossInput::valid_rise; ++i) x[train_loss + i] = seen.shared.losses[i];
    }
  }

  LOPT_HD static void facts(const Seen& seen, float* x) {
    x[is_matrix] = static_cast<float>(seen.shape.is_matrix);
    x[log_numel] = ::logf(seen.numel()) / kLogTimeScale;
  }

  LOPT_HD static bool knows_valid_loss(const Globals& g) { return any_loss(g.valid_loss); }

  template <class Team>
  LOPT_HD static void time(const Team& team, const Spec& s, int64_t step, float total_steps, float* x) {
    if (team.rank() != 0) return;
    const float steps = static_cast<float>(step);
    x[log_step] = ::log1pf(::fminf(steps, s.time_limit)) / kLogTimeScale;
    if (!s.horizon_input) return;
    const bool known = total_steps > 0;
    x[told] = known;
    x[done] = known ? ::fminf(steps / ::fmaxf(total_steps, 1.0f), 1.0f) : 0.0f;
    x[log_left] = ::logf(1.0f - kLastShare * x[done]);
    x[log_total] = ::log1pf(::fminf(total_steps, s.time_limit)) / kLogTimeScale;
    x[log_step_told] = known ? x[log_step] : 0.0f;
  }
};

// Those of RelativeInputs, growth beyond a share of the natural size, where a tensor started, and what it is.
struct NaturalInputs : RelativeInputs {
  static constexpr const char* kName = "natural";
  LOPT_ENUM(Scalar, kNumScalars, grad_over_slow, mom0_over_slow, mom1_over_slow, mom2_over_slow, rms_spread,
            param_growth, grad_share, train_loss, valid_loss, train_rise, valid_rise, train_fall, matrix_start,
            vector_start, rank);
  LOPT_ENUM(Fact, kNumFacts, is_matrix, log_numel, is_input, is_output, is_table, aspect);
  static constexpr bool kNatural = true;

  template <class Features>
  LOPT_HD static void scalars(const Seen& seen, float* x) {
    RelativeInputs::scalars<Features>(seen, x);
    const float natural = seen.shape.natural * seen.shape.natural, start = seen.scale * seen.scale;
    const float least = kSmallestScale * kSmallestScale * natural;
    x[param_growth] = log_ratio(::fmaxf(seen.stats[Stat::param_square], least), ::fmaxf(start, least));
    x[matrix_start] = seen.shape.is_matrix ? log_ratio(start, natural) : 0.0f;
    x[vector_start] = seen.shape.is_matrix ? 0.0f : log_ratio(start, natural);
    x[rank] = log_ratio(seen.rank, 1.0f);
    x[train_fall] = seen.shared.losses[LossInput::train_fall];
  }

  LOPT_HD static void facts(const Seen& seen, float* x) {
    RelativeInputs::facts(seen, x);
    x[is_input] = static_cast<float>(seen.shape.is_input);
    x[is_output] = static_cast<float>(seen.shape.is_output);
    x[is_table] = static_cast<float>(seen.shape.is_table);
    x[aspect] = log_ratio(seen.shape.aspect, 1.0f);
  }
};

constexpr int kNumInputSets = 3;

// f(Inputs{}) for the input set of the spec, by its position in INPUT_SETS of lopt/rule/inputs.py.
template <class Function>
LOPT_HD auto with_inputs(const Spec& s, const Function& f) {
  return s.tensor_inputs == 0 ? f(PaperInputs{}) : s.tensor_inputs == 1 ? f(RelativeInputs{}) : f(NaturalInputs{});
}

// Inputs about losses, of what was observed so far.
LOPT_HD void loss_inputs(const Spec& s, const Globals& g, float* x) {
  for (int i = 0; i < LossInput::kCount; ++i) x[i] = 0;
  if (!any_loss(g.train_loss)) return;
  x[LossInput::train_loss] = standardise_loss(g.train_loss, g.train_loss[LossState::last], s.train_loss_decay);
  x[LossInput::train_rise] = loss_rise(g.train_loss, s.train_loss_decay);
  x[LossInput::train_fall] = loss_fall(g.train_loss, s.train_loss_decay);
  if (!with_inputs(s, [&](auto inputs) LOPT_INLINE { return decltype(inputs)::knows_valid_loss(g); })) return;
  x[LossInput::valid_loss] =
      standardise_loss(g.train_loss, corrected_mean(g.valid_loss, s.valid_loss_decay), s.train_loss_decay);
  x[LossInput::valid_rise] = loss_rise(g.valid_loss, s.valid_loss_decay, loss_spread(g.train_loss, s.train_loss_decay));
}

}  // namespace

LOPT_HD int Spec::num_time() const {
  return with_inputs(*this, [&](auto inputs) LOPT_INLINE {
    return horizon_input ? int{decltype(inputs)::kNumTime} : decltype(inputs)::kUntold;
  });
}

LOPT_HD int Spec::num_facts() const {
  return with_inputs(*this, [](auto inputs) LOPT_INLINE { return int{decltype(inputs)::kNumFacts}; });
}

LOPT_HD int Spec::num_constant() const { return num_time() + num_facts() + lstm_to_mlp; }

LOPT_HD int Spec::num_lstm_input() const {
  return from_lstm + from_mlp + with_inputs(*this, [&](auto inputs) LOPT_INLINE {
           using Inputs = decltype(inputs);
           return Inputs::kNumScalars + (Inputs::kLstmSeesConstants ? num_facts() + num_time() : 0);
         });
}

}  // namespace lopt
