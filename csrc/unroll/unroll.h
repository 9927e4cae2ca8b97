// Whole inner training runs of small perceptrons under the learned optimizer, for meta-training.
//
// A run is one theta, one problem, one stream of minibatches. `unroll_cpu` continues many runs, spread over threads; a run
// keeps everything between two calls in its state buffer, so windows of any length give the same numbers.
#pragma once

#include <cstdint>

#include "api/kernels.h"

namespace lopt {

constexpr int kMaxLayers = 5;  // weight matrices: up to 4 hidden layers

enum Activation : int64_t { kRelu, kTanh, kGelu };
enum Loss : int64_t { kSoftmax, kSquaredError };  // means over rows, and over rows and outputs
enum Split { kTrain, kInnerValid, kOuterValid, kNumSplits };

// A perceptron and its data. Parameters are w0 [in, out], b0 [out], w1, b1, ... in one vector.
using Sizes = int64_t[kMaxLayers + 1];
using PerSplit = int64_t[kNumSplits];
using Keys = uint64_t[kNumSplits];
#define LOPT_PROBLEM(FIELD)                                          \
  FIELD(int64_t, num_layers)                                         \
  FIELD(Sizes, sizes)        /* inputs, hidden widths, outputs */    \
  FIELD(int64_t, activation) /* enum Activation */                   \
  FIELD(int64_t, loss)       /* enum Loss */                         \
  FIELD(int64_t, batch)                                              \
  FIELD(PerSplit, rows)                                              \
  FIELD(PerSplit, inputs)  /* addresses of float [rows, sizes[0]] */ \
  FIELD(PerSplit, targets) /* addresses of int64 [rows] labels, or float [rows, outputs] */
struct Problem {
  LOPT_PROBLEM(LOPT_MEMBER)
};

#define LOPT_RUN(FIELD)                                                                                         \
  FIELD(int64_t, problem)       /* row of the problem table */                                                  \
  FIELD(int64_t, theta)         /* row of the theta matrix */                                                   \
  FIELD(int64_t, state)         /* address of state_floats(...) floats */                                       \
  FIELD(Keys, keys)             /* of the minibatch streams */                                                  \
  FIELD(int64_t, steps)         /* how many to run now */                                                       \
  FIELD(int64_t, valid_every)   /* steps between validation losses for the optimizer */                         \
  FIELD(int64_t, valid_batches) /* minibatches that a validation loss is the mean over */                       \
  FIELD(int64_t, loss_every)    /* steps between outer_valid losses */                                          \
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
// returns the size. -1 when no kernel is compiled for the spec.
int64_t start_run_cpu(const Spec& spec, const Problem& problem, const float* theta, const float* init, float* state);

// Continues all runs; theta: [*, theta_stride]. False when no kernel is compiled for the spec.
bool unroll_cpu(const Spec& spec, const Problem* problems, const Run* runs, int64_t num_runs, const float* theta,
                int64_t theta_stride, int num_threads);

}  // namespace lopt
