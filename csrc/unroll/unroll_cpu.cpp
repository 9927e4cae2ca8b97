// The unroll engine on the CPU. One inner step of a run is
//   every valid_every steps: the optimizer observes the mean loss of some inner_valid minibatches
//   loss, grad = forward and backward on a train minibatch
//   accumulate (accumulate_block.h), advance (tensor_lstm.h), apply (apply_block.h) for every tensor
//   every loss_every steps: the loss of an outer_valid minibatch, after the update
// exactly as lopt/meta/unroll.py does with torch. Memory is laid out once per call and thread; a step allocates nothing.
// Compiled once per instruction set; cpu_dispatch.cpp picks.
#include <algorithm>
#include <vector>

#include "api/step.h"
#include "cpu/accumulate_block.h"
#include "cpu/apply_block.h"
#include "cpu/lstm_cell.h"
#include "cpu/threads.h"
#include "unroll/dense.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// What a run keeps between calls.
struct RunState {
  Globals globals;
  float *param, *mom, *rms;                           // [P], [num_mom, P], [num_rms, P]
  float *h, *c, *feedback, *initial_scale, *updates;  // see AdvanceParams
  int64_t size;

  RunState(const Spec& s, int num_mom, int num_rms, int64_t num_params, int tensors, float* base) {
    Arena arena{base};
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
    mom = arena.take(num_mom * num_params);
    rms = arena.take(num_rms * num_params);
    size = arena.used;
  }
};

int64_t num_params(const Problem& p) {
  int64_t count = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) count += (p.sizes[l] + 1) * p.sizes[l + 1];
  return count;
}

// Scratch memory of the perceptron: forward, loss, backward of one minibatch.
struct Perceptron {
  const Problem& p;
  float* activation[kMaxLayers + 1];  // [batch, padded(size)]; the last holds outputs, then their gradient
  float* slope[kMaxLayers + 1];       // [batch, padded(size)] derivative of the activation
  float* weight[kMaxLayers];          // [in, padded(out)]
  float* bias;                        // [padded(out)]
  float* transposed;                  // [out, padded(in)]
  float* product_out;                 // [in, padded(out)] or [batch, padded(in)]
  float* target;                      // [batch, padded(outputs)]
  int64_t* label;                     // [batch]

  Perceptron(const Problem& problem, Arena& arena) : p(problem) {
    int64_t largest = 0;
    for (int64_t l = 0; l <= p.num_layers; ++l) {
      activation[l] = arena.take(p.batch * padded(p.sizes[l]));
      slope[l] = arena.take(p.batch * padded(p.sizes[l]));
      largest = std::max(largest, p.batch * padded(p.sizes[l]));
    }
    int64_t widest = 0, longest = 0;
    for (int64_t l = 0; l < p.num_layers; ++l) {
      weight[l] = arena.take(p.sizes[l] * padded(p.sizes[l + 1]));
      longest = std::max({longest, p.sizes[l] * padded(p.sizes[l + 1]), p.sizes[l + 1] * padded(p.sizes[l])});
      widest = std::max(widest, padded(p.sizes[l + 1]));
    }
    bias = arena.take(widest);
    transposed = arena.take(longest);
    product_out = arena.take(std::max(longest, largest));
    target = arena.take(p.batch * padded(p.sizes[p.num_layers]));
    label = reinterpret_cast<int64_t*>(arena.take(2 * p.batch));
  }

  void gather(Split split, uint64_t key, int64_t step) {
    const int64_t in = p.sizes[0], out = p.sizes[p.num_layers], in_padded = padded(in), out_padded = padded(out);
    const float* inputs = reinterpret_cast<const float*>(p.inputs[split]);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = minibatch_row(key, step, p.batch, b, p.rows[split]);
      std::memcpy(activation[0] + b * in_padded, inputs + row * in, in * sizeof(float));
      if (p.loss == kSoftmax)
        label[b] = reinterpret_cast<const int64_t*>(p.targets[split])[row];
      else
        std::memcpy(target + b * out_padded, reinterpret_cast<const float*>(p.targets[split]) + row * out,
                    out * sizeof(float));
    }
  }

  // Loss of the gathered minibatch; activation[num_layers] becomes its gradient with respect to the outputs.
  float forward(const float* param) {
    for (int64_t l = 0; l < p.num_layers; ++l) {
      const int64_t in = p.sizes[l], out = p.sizes[l + 1], out_padded = padded(out);
      for (int64_t i = 0; i < in; ++i) std::memcpy(weight[l] + i * out_padded, param + i * out, out * sizeof(float));
      std::memset(bias, 0, out_padded * sizeof(float));
      std::memcpy(bias, param + in * out, out * sizeof(float));
      param += (in + 1) * out;
      product(p.batch, out_padded, in, activation[l], padded(in), 1, weight[l], bias, activation[l + 1]);
      if (l + 1 < p.num_layers) activate(p.activation, p.batch * out_padded, activation[l + 1], slope[l + 1]);
    }
    const int64_t out = p.sizes[p.num_layers];
    return p.loss == kSoftmax ? softmax_loss(p.batch, out, padded(out), label, activation[p.num_layers])
                              : squared_loss(p.batch, out, padded(out), target, activation[p.num_layers]);
  }

  // After forward: gradient of the loss with respect to all parameters.
  void backward(float* grad) {
    grad += num_params(p);
    for (int64_t l = p.num_layers - 1; l >= 0; --l) {
      const int64_t in = p.sizes[l], out = p.sizes[l + 1], in_padded = padded(in), out_padded = padded(out);
      const float* delta = activation[l + 1];
      grad -= (in + 1) * out;
      product(in, out_padded, p.batch, activation[l], 1, in_padded, delta, nullptr, product_out);
      for (int64_t i = 0; i < in; ++i) std::memcpy(grad + i * out, product_out + i * out_padded, out * sizeof(float));
      for (int64_t j = 0; j < out; ++j) {
        float sum = 0.0f;
        for (int64_t b = 0; b < p.batch; ++b) sum += delta[b * out_padded + j];
        grad[in * out + j] = sum;
      }
      if (l == 0) return;
      for (int64_t j = 0; j < out; ++j)
        for (int64_t i = 0; i < in_padded; ++i)
          transposed[j * in_padded + i] = i < in ? weight[l][i * out_padded + j] : 0.0f;
      product(p.batch, in_padded, out, delta, out_padded, 1, transposed, nullptr, activation[l]);
      for (int64_t i = 0; i < p.batch * in_padded; i += kLanes)
        store(activation[l] + i, load(activation[l] + i, kLanes) * load(slope[l] + i, kLanes), kLanes);
    }
  }
};

// Everything one thread needs for a run.
template <class Features, int kWidth>
struct Engine {
  static constexpr int kColumns = Features::kNumColumns, kStats = kNumStats<Features>;
  const Spec& s;
  const Problem& p;
  int tensors;
  int64_t params;
  Perceptron perceptron;
  float *grad, *stats, *packed, *hidden;
  TensorShape* shapes;
  TensorLevel level{};

  Engine(const Spec& spec, const Problem& problem, Arena& arena)
      : s(spec),
        p(problem),
        tensors(static_cast<int>(2 * problem.num_layers)),
        params(num_params(problem)),
        perceptron(problem, arena) {
    grad = arena.take(params);
    stats = arena.take(int64_t{tensors} * kStats);
    packed = arena.take(MlpLayout<kColumns, kWidth>::kSize);
    hidden = arena.take(int64_t{tensors} * kWidth);
    shapes =
        reinterpret_cast<TensorShape*>(arena.take(tensors * static_cast<int64_t>(sizeof(TensorShape) / sizeof(float))));
    level.num_tensors = tensors;
    level.shapes = shapes;
    level.stats = stats;
#define LOPT_TAKE(Type, name) level.inputs.name = arena.take(int64_t{tensors} * std::max(kColumns, kWidth));
    LOPT_APPLY_INPUTS(LOPT_TAKE)
#undef LOPT_TAKE
    take_scratch(s, level, arena);
    if (!arena.base) return;
    for (int t = 0; t < tensors; ++t) {
      const int64_t in = p.sizes[t / 2], out = p.sizes[t / 2 + 1];
      const bool matrix = t % 2 == 0;
      const float first = std::log(static_cast<float>(matrix ? in : out)) - 1.0f;
      const float second = matrix ? std::log(static_cast<float>(out)) - 1.0f : -1.0f;
      shapes[t] = {matrix ? in * out : out, {first, second, -1.0f, -1.0f}, 0, matrix};
    }
  }

  // The phases of one step (api/step.h).
  struct Step {
    Engine& engine;
    const ThetaView& theta;
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
      const LstmCell cell{theta, engine.s.num_lstm_input(), engine.s.lstm_width, engine.level.gates,
                          engine.level.activation};
      lopt::advance<Features>(engine.s, theta, state.globals, engine.level, loss, total_steps, cell, nonfinite);
    }

    void apply() const {
      for_tensors([&](int t, int64_t offset, int64_t numel) {
        double total[kWidth];
        const Applier<Features, kWidth> applier{{state.param + offset},
                                                {engine.grad + offset},
                                                {{state.mom + offset}, engine.params},
                                                {{state.rms + offset}, engine.params},
                                                TensorInputs(engine.level.inputs, t, kColumns, kWidth),
                                                engine.packed,
                                                engine.s.magnitude_rate,
                                                engine.s.feature_clip};
        applier.run(numel, total);
        for (int j = 0; j < kWidth; ++j)
          engine.hidden[t * kWidth + j] = static_cast<float>(total[j] / static_cast<double>(numel));
      });
    }

    void sweep() const {}  // lagged statistics: the engine refuses them (lopt/meta/engine.py)

    void finish() const {
      for (int t = 0; t < engine.tensors; ++t)
        next_feedback(engine.s, theta, engine.hidden + t * kWidth, engine.level.inputs.step_size[t],
                      engine.level.feedback + int64_t{t} * engine.s.from_mlp);
    }
  };

  void run(const Run& r, const float* theta_row) {
    const ThetaView theta(s, kColumns, theta_row);
    const RunState state(s, Features::kNumMom, Features::kNumRms, params, tensors, reinterpret_cast<float*>(r.state));
    pack_mlp<Features, kWidth>(s, theta, packed);
    level.h = state.h;
    level.c = state.c;
    level.feedback = state.feedback;
    level.initial_scale = state.initial_scale;
    level.updates = state.updates;
    float* outer = reinterpret_cast<float*>(r.outer_losses);
    float* train = reinterpret_cast<float*>(r.train_losses);
    bool alive = true;
    for (int64_t i = 0; i < r.steps; ++i) {
      const int64_t step = static_cast<int64_t>(state.updates[0]);  // training steps so far
      train[i] = NAN;
      if (alive) {
        if (step % r.valid_every == 0) {
          double sum = 0.0;
          for (int64_t j = 0; j < r.valid_batches; ++j) {
            perceptron.gather(kInnerValid, r.keys[kInnerValid], step / r.valid_every * r.valid_batches + j);
            sum += perceptron.forward(state.param);
          }
          observe_valid(s, state.globals, static_cast<float>(sum / static_cast<double>(r.valid_batches)));
        }
        perceptron.gather(kTrain, r.keys[kTrain], step);
        train[i] = perceptron.forward(state.param);
        alive = std::isfinite(train[i]);
        if (alive) {
          perceptron.backward(grad);
          Step step_phases{*this, theta, state, train[i], static_cast<float>(r.total_steps)};
          run_step(step_phases);
        }
      }
      if ((i + 1) % r.loss_every == 0) {
        float& loss = outer[i / r.loss_every];
        loss = NAN;
        if (alive) {
          perceptron.gather(kOuterValid, r.keys[kOuterValid], step);
          loss = perceptron.forward(state.param);
          alive = std::isfinite(loss);
        }
      }
    }
    if (!alive) *state.param = NAN;  // a run that diverged stays so
  }
};

}  // namespace

bool unroll(const Spec& spec, const Problem* problems, const Run* runs, int64_t num_runs, const float* theta,
            int64_t theta_stride, int num_threads) {
  return with_kernel(spec.feature_set, spec.width, [&](auto features, auto width_constant) {
    using EngineOf = Engine<decltype(features), decltype(width_constant)::value>;
    int64_t scratch = 0;
    for (int64_t i = 0; i < num_runs; ++i) {
      Arena arena{nullptr};
      EngineOf(spec, problems[runs[i].problem], arena);
      scratch = std::max(scratch, arena.used);
    }
#pragma omp parallel num_threads(threads_for(num_threads, num_runs, 1))
    {
      // Zeros also where rows are padded: inputs and targets of a problem leave their padding untouched.
      std::vector<float> memory(static_cast<size_t>(scratch) + 16);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_runs; ++i) {
        std::fill(memory.begin(), memory.end(), 0.0f);
        Arena arena{reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63})};
        EngineOf engine(spec, problems[runs[i].problem], arena);
        engine.run(runs[i], theta + runs[i].theta * theta_stride);
      }
    }
  });
}

int64_t start_run(const Spec& spec, const Problem& problem, const float* theta_row, const float* init, float* base) {
  int64_t size = -1;
  with_kernel(spec.feature_set, spec.width, [&](auto features, auto) {
    using Features = decltype(features);
    const int tensors = static_cast<int>(2 * problem.num_layers);
    const int64_t params = num_params(problem);
    const RunState state(spec, Features::kNumMom, Features::kNumRms, params, tensors, base);
    size = state.size;
    if (!base) return;
    std::memset(base, 0, static_cast<size_t>(size) * sizeof(float));
    const ThetaView theta(spec, Features::kNumColumns, theta_row);
    state.globals.clip[ClipState::steps] = 1.0f;
    state.globals.clip[ClipState::rms] = static_cast<float>(1.0 - spec.clip_decay);
    std::copy_n(theta.initial_from_lstm, spec.from_lstm, state.globals.from_lstm);
    std::copy_n(init, params, state.param);
    for (int t = 0; t < tensors; ++t) {
      std::copy_n(theta.initial_h, spec.lstm_width, state.h + t * spec.lstm_width);
      std::copy_n(theta.initial_c, spec.lstm_width, state.c + t * spec.lstm_width);
      std::copy_n(theta.initial_from_mlp, spec.from_mlp, state.feedback + t * spec.from_mlp);
    }
  });
  return size;
}

}  // namespace LOPT_ISA
}  // namespace lopt
