// An inner run of the unroll engine, by a team (Note [Teams] in layers.h). One inner step is
//   every valid_every steps: the optimizer observes the mean loss of some inner_valid minibatches
//   loss, grad = forward and backward on a train minibatch
//   accumulate, advance, apply for every tensor (api/step.h); with lagged statistics advance comes first, but in the first step
//   every loss_every steps: the loss of an outer_valid minibatch, after the update, or of the average of the iterates
// exactly as lopt/meta/unroll.py does with torch.
#pragma once

#include "rule/tensor_lstm.h"
#include "unroll/network.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// Hands out parts of one buffer, each on a 64-byte boundary; with a null buffer it only counts.
struct StateArena {
  float* base;
  int64_t used;

  LOPT_BOTH float* take(int64_t count) {
    float* at = base ? base + used : nullptr;
    used += (count + 15) / 16 * 16;
    return at;
  }
};

// What a run keeps between calls: one buffer, of the same layout for all back ends.
struct RunState {
  Globals globals;
  float *param, *mom, *rms;                                  // [P], [num_mom, P], [num_rms, P]
  float *h, *c, *feedback, *initial_scale, *updates, *rank;  // see AdvanceParams
  float* stats;                                              // of the step before, where they lag
  float* average;                                            // [P] of the iterates, where it is asked for; comes last
  int64_t size;

  template <class Features>
  LOPT_BOTH RunState(Features, const Spec& s, int64_t num_params, int tensors, float* base) {
    StateArena arena{base, 0};
    param = arena.take(num_params);  // first: lopt/meta/engine.py reads it
    globals.step = reinterpret_cast<int64_t*>(arena.take(2));
    globals.train_loss = arena.take(LossState::kCount);
    globals.valid_loss = arena.take(LossState::kCount);
    globals.clip = arena.take(ClipState::kCount);
    globals.from_lstm = arena.take(s.from_lstm);
    h = arena.take(int64_t{tensors} * s.lstm_width);
    c = arena.take(int64_t{tensors} * s.lstm_width);
    feedback = arena.take(int64_t{tensors} * s.from_mlp);
    initial_scale = arena.take(tensors);
    updates = arena.take(tensors);
    rank = arena.take(tensors);
    mom = arena.take(Features::kNumMom * num_params);
    rms = arena.take(Features::kNumRms * num_params);
    stats = arena.take(s.lagged ? int64_t{tensors} * kNumStats<Features> : 0);
    average = arena.take(num_params);
    size = arena.used;
  }
};

// lopt/average.py: how much of the average is left in the update after `updates` of them.
LOPT_HD float average_decay(int64_t updates) {
  const float decay = static_cast<float>(updates + 1) / static_cast<float>(updates + 10);
  return decay < 0.998f ? decay : 0.998f;
}

// Takes the parameters after the step into the average, which begins as the first of them.
template <class Team>
LOPT_CALLED void average_iterate(const Team& team, const RunState& state, Size params, int64_t step) {
  if (step == 0) team.copy(params, state.param, state.average);
  const float weight = 1.0f - average_decay(step);
  team.each(params, [&](Size i) LOPT_INLINE { state.average[i] += weight * (state.param[i] - state.average[i]); });
  team.sync();
}

// The optimizer observes validation loss number `count`.
template <class Engine>
LOPT_CALLED void show_valid_loss(Engine& engine, const Run& r, const RunState& state, int64_t count) {
  double sum = 0.0;
  for (int64_t j = 0; j < r.valid_batches; ++j) {
    engine.model.gather(kInnerValid, r.keys[kInnerValid], count * r.valid_batches + j);
    sum += engine.model.forward(state.param);
  }
  if (engine.team.rank() == 0)
    observe_valid(engine.s, state.globals, static_cast<float>(sum / static_cast<double>(r.valid_batches)));
  engine.team.sync();
}

// Continues a run. `engine` has a team, spec `s`, `params`, `tensors`, a Network `model`, `grad`, `stats` with rows of kStats, and
// step(state, loss, total_steps, lagged), a step of the optimizer.
template <class Engine>
LOPT_CALLED void continue_run(Engine& engine, const Run& r, const RunState& state) {
  const auto team = engine.team;
  const Spec& s = engine.s;
  auto& model = engine.model;
  float* outer = reinterpret_cast<float*>(r.outer_losses);
  float* train = reinterpret_cast<float*>(r.train_losses);
  bool alive = true;
  for (int64_t i = 0; i < r.steps; ++i) {
    const int64_t step = static_cast<int64_t>(state.updates[0]);  // training steps so far
    float train_loss = NAN;
    if (alive) {
      if (r.valid_every > 0 && step % r.valid_every == 0) show_valid_loss(engine, r, state, step / r.valid_every);
      model.gather(kTrain, r.keys[kTrain], step);
      train_loss = model.forward(state.param);
      alive = is_finite(train_loss);
      if (alive) {
        model.backward(state.param, engine.grad);
        engine.step(state, train_loss, static_cast<float>(r.total_steps), s.lagged && step > 0);
        if (r.averaged) average_iterate(team, state, engine.params, step);
        if (s.lagged && step == 0) {  // seen in the first step already, as there was nothing before it
          team.each(engine.tensors,
                    [&](Size t) LOPT_INLINE { engine.stats[t * Engine::kStats + Stat::nonfinite] = 0.0f; });
          team.sync();
        }
      }
    }
    if (team.rank() == 0) train[i] = train_loss;
    if ((i + 1) % r.loss_every == 0) {
      float loss = NAN;
      if (alive) {
        model.gather(kOuterValid, r.keys[kOuterValid], step);
        loss = model.forward(r.averaged ? state.average : state.param);
        alive = is_finite(loss);
      }
      if (team.rank() == 0) outer[i / r.loss_every] = loss;
    }
  }
  if (!alive && team.rank() == 0) *state.param = NAN;  // a run that diverged stays so
  team.sync();
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
