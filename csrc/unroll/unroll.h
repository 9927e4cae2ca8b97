// Whole inner training runs of small networks under the learned optimizer, for meta-training.
//
// A run is one theta, one problem, one stream of minibatches. Many runs are continued at once, each by a CPU thread or a CUDA
// block; a run keeps everything between two calls in its state buffer, so windows of any length give the same numbers.
#pragma once

#include <cstdint>

#include "api/backend.h"

namespace lopt {

constexpr int kMaxLayers = 64;

// What a layer makes of the rows it is given. Layers that have parameters keep them in this order, one layer after the
// other: weight [in, out], bias [out]; gain [out], bias [out]; table [rows, width]; kernel [out, in, 3, 3], bias [out].
enum LayerKind : int64_t {
  kDense,        // x W + b; option: whether there is a bias
  kActivation,   // option: enum Activation
  kNorm,         // of a place, with a gain; option: enum Norm
  kBranch,       // nothing; what is here is added at the next join without a branch of its own in between
  kJoin,         // x + what was at the branch
  kEmbedding,    // symbols -> rows of a table, one after the other; first of all layers; option: number of symbols
  kPositions,    // x + the row of a table for each place
  kConvolution,  // 3 x 3 over a square of places, with zeros around it, and a bias
  kPool,         // 2 x 2 places become one; option: enum Pool
  kMean,         // of all places
  kFlatten,      // all places in one row: the places of the first channel, then those of the second, ...
  kAttention,    // queries, keys and values [3 out] -> out; a place sees those up to itself; option: number of heads
};
enum Activation : int64_t { kRelu, kTanh, kGelu };
enum Norm : int64_t { kLayerNorm, kRmsNorm };  // the former with a bias
enum Pool : int64_t { kMaxPool, kMeanPool };
enum Loss : int64_t { kSoftmax, kSquaredError };  // means over rows, and over rows and outputs
enum Split { kTrain, kInnerValid, kOuterValid, kNumSplits };

// A network and its data. A row of data is `places` times `inputs` numbers, or with `tokens` a window of so many symbols of
// a stream; the last layer then predicts the next symbol, after every place that it has.
using PerLayer = int64_t[kMaxLayers];
using PerSplit = int64_t[kNumSplits];
using Keys = uint64_t[kNumSplits];
#define LOPT_PROBLEM(FIELD)                                                                      \
  FIELD(int64_t, num_layers)                                                                     \
  FIELD(PerLayer, kinds) /* enum LayerKind */                                                    \
  FIELD(PerLayer, options)                                                                       \
  FIELD(PerLayer, outputs) /* numbers of a place after the layer */                              \
  FIELD(int64_t, tokens)                                                                         \
  FIELD(int64_t, places)                                                                         \
  FIELD(int64_t, inputs)                                                                         \
  FIELD(int64_t, loss) /* enum Loss */                                                           \
  FIELD(int64_t, batch)                                                                          \
  FIELD(int64_t, shapes)   /* address of TensorShape [tensors] */                                \
  FIELD(PerSplit, rows)    /* that a minibatch draws from; of tokens where a window can begin */ \
  FIELD(PerSplit, data)    /* addresses of float [rows, places, inputs], or int64 [symbols] */   \
  FIELD(PerSplit, targets) /* addresses of int64 [rows] labels, or float [rows, outputs]; of tokens unused */
struct Problem {
  LOPT_PROBLEM(LOPT_MEMBER)
};

#define LOPT_RUN(FIELD)                                                                                         \
  FIELD(int64_t, problem)       /* row of the problem table */                                                  \
  FIELD(int64_t, theta)         /* row of the theta matrix */                                                   \
  FIELD(int64_t, state)         /* address of state_floats(...) floats */                                       \
  FIELD(Keys, keys)             /* of the minibatch streams */                                                  \
  FIELD(int64_t, steps)         /* how many to run now */                                                       \
  FIELD(int64_t, valid_every)   /* steps between validation losses for the optimizer; 0 for none */             \
  FIELD(int64_t, valid_batches) /* minibatches that a validation loss is the mean over */                       \
  FIELD(int64_t, loss_every)    /* steps between outer_valid losses */                                          \
  FIELD(int64_t, averaged)      /* whether these are losses of the average of the iterates */                   \
  FIELD(double, total_steps)    /* told to the optimizer; 0: unknown */                                         \
  FIELD(int64_t,                                                                                                \
        outer_losses) /* address of float [steps / loss_every], written: after the update; NaN once diverged */ \
  FIELD(int64_t, train_losses) /* address of float [steps], written: before the update; NaN once diverged */
struct Run {
  LOPT_RUN(LOPT_MEMBER)
};

// Row `i` of minibatch `step` of a stream, among `rows`: a counter-based generator (splitmix64's finaliser), so that any
// minibatch can be had without the ones before. lopt/tasks/seeds.py computes the same.
LOPT_HD int64_t minibatch_row(uint64_t key, uint64_t step, uint64_t batch, uint64_t i, uint64_t rows) {
  uint64_t x = key + (step * batch + i + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  return static_cast<int64_t>(((x >> 32) * rows) >> 32);
}

// Writes the state before the first step (init: [parameters]) and returns its size in floats; with a null state it only
// returns the size. -1 when no kernel is compiled for the spec. The same for all back ends.
int64_t start_run_cpu(const Spec& spec, const Problem& problem, const float* theta, const float* init, float* state);

// Continues all runs. On a GPU addresses are the device's, but for `spec` and those tables that say otherwise, in which the
// addresses of shapes are the host's; it is asynchronous.
struct UnrollCall {
  const Spec& spec;
  const Problem* problems;
  const Problem* host_problems;
  const Run* runs;
  const Run* host_runs;
  int64_t num_runs;
  const float* theta;  // [*, theta_stride]
  int64_t theta_stride;
  float* scratch;  // [num_runs, scratch_stride]
  int64_t scratch_stride;
};

// The loss of minibatch `step` of a stream, and its gradient [parameters]; addresses likewise.
struct GradientCall {
  const Problem* problem;
  const Problem& host_problem;
  int64_t split;
  uint64_t key;
  int64_t step;
  const float* param;
  float* loss;     // [1]
  float* grad;     // [parameters]
  float* scratch;  // [scratch_stride]
};

// The engine of a back end. The first returns how many floats of scratch a run of any of these problems needs, beside what a
// multiprocessor has itself; a null spec is for a gradient. False, or -1, when no kernel is compiled for the spec. Throw
// std::runtime_error.
struct UnrollEngine {
  int64_t (*scratch)(const Spec* spec, const Problem* host_problems, int64_t num_problems, const Target& target);
  bool (*unroll)(const UnrollCall& call, const Target& target);
  void (*loss_and_gradient)(const GradientCall& call, const Target& target);
};

const UnrollEngine& cpu_engine();   // of the selected instruction set
const UnrollEngine& cuda_engine();  // of unroll.cu, whether nvcc compiled it or, for `sim`, the C++ compiler

// The engine of this name in this module (bindings.cpp, sim.cpp); null where the module has none.
const UnrollEngine* find_engine(const std::string& name);

}  // namespace lopt
