// The unroll engine on the CPU: a thread for every run (run.h). Memory is laid out once per call and thread; a step allocates
// nothing. Compiled once per instruction set; cpu_dispatch.cpp picks.
#include <algorithm>
#include <vector>

#include "cpu/alone.h"
// It comes first: see Note [Teams] in layers.h.
#include "api/step.h"
#include "cpu/accumulate_block.h"
#include "cpu/apply_block.h"
#include "cpu/orthogonal.h"
#include "cpu/threads.h"
#include "unroll/run.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// Everything one thread needs for a run.
template <class Features, int kWidth>
struct Engine {
  static constexpr int kColumns = Features::kNumColumns, kStats = kNumStats<Features>;
  const Alone team{};
  const Spec& s;
  int tensors;
  Size params;
  Layer layers[kMaxLayers];
  Network<Alone> model;
  float *grad, *stats, *scratch_stats, *packed, *hidden;
  const TensorShape* shapes;
  Orthogonal<Alone> orthogonal;
  float* direction;  // of the largest matrix that is treated as a whole
  TensorLevel level{};
  ThetaView theta;

  Engine(const Spec& spec, const Problem& problem, Arena& arena)
      : s(spec),
        tensors(num_tensors(problem)),
        params(num_params(problem)),
        model(team, problem, layers, arena),
        shapes(reinterpret_cast<const TensorShape*>(problem.shapes)),
        orthogonal(team, sizes_of_whole(), arena) {
    int64_t largest = 0;
    for (int t = 0; t < tensors; ++t) largest = whole(t) ? std::max(largest, shapes[t].numel) : largest;
    direction = arena.take(largest);
    grad = arena.take(params);
    stats = scratch_stats = arena.take(int64_t{tensors} * kStats);
    packed = arena.take(MlpLayout<kColumns, kWidth>::kSize);
    hidden = arena.take(int64_t{tensors} * kWidth);
    level.num_tensors = tensors;
    level.shapes = shapes;
#define LOPT_TAKE(Type, name) level.inputs.name = arena.take(int64_t{tensors} * std::max(kColumns, kWidth));
    LOPT_APPLY_INPUTS(LOPT_TAKE)
#undef LOPT_TAKE
    take_scratch(s, level, arena);
  }

  bool whole(int t) const { return s.newton_schulz > 0 && shapes[t].whole; }

  OrthogonalSizes sizes_of_whole() const {
    OrthogonalSizes sizes;
    for (int t = 0; t < tensors; ++t)
      if (whole(t)) sizes.include(shapes[t].rows, shapes[t].numel / shapes[t].rows);
    return sizes;
  }

  // The phases of one step (api/step.h).
  struct Step {
    Engine& engine;
    const RunState& state;
    float loss, total_steps;

    // f(t, first parameter, number of parameters) for every tensor
    template <class Function>
    void for_tensors(const Function& f) const {
      int64_t offset = 0;
      for (int t = 0; t < engine.tensors; offset += engine.shapes[t].numel, ++t) f(t, offset, engine.shapes[t].numel);
    }

    void begin() const {
      std::fill_n(engine.level.inputs.clip_limit, engine.tensors, clip_limit(engine.s, state.globals));
    }

    void accumulate() const {
      for_tensors([&](int t, int64_t offset, int64_t numel) {
        double total[kStats];
        const Accumulator<Features> accumulator{engine.s.mom_decay,
                                                engine.s.rms_decay,
                                                engine.level.inputs.clip_limit[t],
                                                {state.param + offset},
                                                {engine.grad + offset},
                                                {{state.mom + offset}, engine.params},
                                                {{state.rms + offset}, engine.params}};
        accumulator.run(numel, total);
        finish_stats<Features, double>(total, static_cast<double>(numel), engine.stats + int64_t{t} * kStats);
      });
    }

    void advance() const {
      int64_t nonfinite[2]{};  // nobody asks
      const LstmCell cell{engine.theta, engine.s.num_lstm_input(), engine.s.lstm_width, engine.level.gates,
                          engine.level.activation};
      lopt::advance<Features>(engine.s, engine.theta, state.globals, engine.level, loss, total_steps, cell, nonfinite);
    }

    // Of matrices that are treated as a whole, also what follows: one direction is there at a time.
    void apply() const {
      for_tensors([&](int t, int64_t offset, int64_t numel) {
        double total[kWidth];
        const bool whole = engine.whole(t);
        const Applier<Features, kWidth> applier{{state.param + offset},
                                                {engine.grad + offset},
                                                {whole ? engine.direction : state.param + offset},
                                                {{state.mom + offset}, engine.params},
                                                {{state.rms + offset}, engine.params},
                                                TensorInputs(engine.level.inputs, t, kColumns, kWidth, whole),
                                                engine.packed,
                                                engine.s.magnitude_rate,
                                                engine.s.feature_clip};
        applier.run(numel, total);
        for (int j = 0; j < kWidth; ++j)
          engine.hidden[t * kWidth + j] = static_cast<float>(total[j] / static_cast<double>(numel));
        if (whole) write(t, state.param + offset, numel);
      });
    }

    void write(int t, float* param, int64_t numel) const {
      const ApplyInputs& inputs = engine.level.inputs;
      const int64_t rows = engine.shapes[t].rows;
      const float step_size = inputs.step_size[t], keep = inputs.keep[t];
      float rank = state.rank[t];
      engine.orthogonal.run(engine.direction, rows, numel / rows, engine.shapes[t].turned != 0, inputs.gate[t],
                            engine.s.newton_schulz, rank);
      if (step_size == step_size && std::isfinite(rank)) state.rank[t] = rank;
      if (!moves(step_size, keep)) return;
      for_vectors(numel, [&](int64_t i, int lanes) {
        store(param + i, next_param(load(param + i, lanes), load(engine.direction + i, lanes), step_size, keep), lanes);
      });
    }

    void direction() const {}

    void sweep() const {
      accumulate();
      apply();
    }

    void finish() const {
      for (int t = 0; t < engine.tensors; ++t)
        next_feedback(engine.s, engine.theta, engine.hidden + t * kWidth, engine.level.inputs.step_size[t],
                      engine.level.feedback + int64_t{t} * engine.s.from_mlp);
    }
  };

  void step(const RunState& state, float loss, float total_steps, bool lagged) {
    Step phases{*this, state, loss, total_steps};
    run_step(phases, lagged);
  }

  void run(const Run& r, const float* theta_row) {
    theta = ThetaView(s, kColumns, theta_row);
    const RunState state(Features{}, s, params, tensors, reinterpret_cast<float*>(r.state));
    level.stats = stats = s.lagged ? state.stats : scratch_stats;
    pack_mlp<Features, kWidth>(OneThread{}, s, theta, packed);
    level.h = state.h;
    level.c = state.c;
    level.feedback = state.feedback;
    level.initial_scale = state.initial_scale;
    level.updates = state.updates;
    level.rank = state.rank;
    continue_run(*this, r, state);
  }
};

}  // namespace

bool unroll(const UnrollCall& call, const Target& target) {
  return with_kernel(call.spec.feature_set, call.spec.width, [&](auto features, auto width_constant) {
    using EngineOf = Engine<decltype(features), decltype(width_constant)::value>;
    int64_t scratch = 0;
    for (int64_t i = 0; i < call.num_runs; ++i) {
      Arena arena{nullptr};
      EngineOf(call.spec, call.problems[call.runs[i].problem], arena);
      scratch = std::max(scratch, arena.used);
    }
#pragma omp parallel num_threads(threads_for(target.num_threads, call.num_runs, 1))
    {
      // Zeros also where rows are padded: inputs and targets of a problem leave their padding untouched.
      std::vector<float> memory(static_cast<size_t>(scratch) + 16);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < call.num_runs; ++i) {
        std::fill(memory.begin(), memory.end(), 0.0f);
        Arena arena{reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63})};
        EngineOf engine(call.spec, call.problems[call.runs[i].problem], arena);
        engine.run(call.runs[i], call.theta + call.runs[i].theta * call.theta_stride);
      }
    }
  });
}

int64_t start_run(const Spec& spec, const Problem& problem, const float* theta_row, const float* init, float* base) {
  int64_t size = -1;
  if (spec.mlp_layers != kMlpLayers) return size;
  with_kernel(spec.feature_set, spec.width, [&](auto features, auto) {
    using Features = decltype(features);
    const int tensors = num_tensors(problem);
    const int64_t params = num_params(problem);
    const RunState state(features, spec, params, tensors, base);
    size = state.size;
    if (!base) return;
    std::memset(base, 0, static_cast<size_t>(size) * sizeof(float));
    const ThetaView theta(spec, Features::kNumColumns, theta_row);
    state.globals.clip[ClipState::steps] = 1.0f;
    state.globals.clip[ClipState::rms] = static_cast<float>(1.0 - spec.clip_decay);
    std::copy_n(theta.initial_from_lstm, spec.from_lstm, state.globals.from_lstm);
    std::copy_n(init, params, state.param);
    for (int t = 0; t < tensors; ++t) {
      state.rank[t] = 1.0f;
      std::copy_n(theta.initial_h, spec.lstm_width, state.h + t * spec.lstm_width);
      std::copy_n(theta.initial_c, spec.lstm_width, state.c + t * spec.lstm_width);
      std::copy_n(theta.initial_from_mlp, spec.from_mlp, state.feedback + t * spec.from_mlp);
    }
  });
  return size;
}

void loss_and_gradient(const GradientCall& call, const Target&) {
  const Problem& problem = *call.problem;
  Layer layers[kMaxLayers];
  Arena counted{nullptr};
  Network<Alone>(Alone{}, problem, layers, counted);
  std::vector<float> memory(static_cast<size_t>(counted.used) + 16);
  Arena arena{reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63})};
  Network<Alone> model(Alone{}, problem, layers, arena);
  model.gather(static_cast<Split>(call.split), call.key, call.step);
  *call.loss = model.forward(call.param);
  model.backward(call.param, call.grad);
}

}  // namespace LOPT_ISA
}  // namespace lopt
