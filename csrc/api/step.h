// The one compiled sequence of a step. `Phases` are those of a back end over an optimizer's tensors (bindings.cpp), or of
// one inner run of the unroll engine (csrc/unroll/run.h). lopt/rule/step.py has the same sequence for phases in Python.
//
//   begin       losses given with this step; the clip limit                              -> clip_limit [R]
//   accumulate  gradients -> accumulators, statistics                                     -> stats [R, S]
//     merge     where tensors are sharded: statistics of shards -> of tensors                stats [R, S]
//   advance     losses, statistics -> LSTM -> what apply is conditioned on                -> scale, shift, bias, ... [R, ...]
//   apply       features -> small MLP -> parameters or directions, mean hidden units      -> hidden [R, width]
//   direction   directions of matrices that are treated as a whole -> parameters          -> rank [R]
//     merge     where tensors are sharded: hidden units of shards -> of tensors              hidden [R, width]
//   finish      what the next LSTM step sees of the MLP                                   -> feedback [R, from_mlp]
//
// On one device nothing lies in the seams `merge`; a step that needs one is driven from Python, phase by phase.
#pragma once

#include "rule/maths.h"

namespace lopt {

// lagged: advance sees the statistics of the step before, so that accumulate and apply are one sweep.
template <class Phases>
LOPT_HD void run_until_direction(Phases& phases, bool lagged = false) {
  phases.begin();
  if (lagged) {
    phases.advance();
    phases.sweep();
  } else {
    phases.accumulate();
    phases.advance();
    phases.apply();
  }
}

template <class Phases>
LOPT_HD void run_step(Phases& phases, bool lagged = false) {
  run_until_direction(phases, lagged);
  phases.direction();
  phases.finish();
}

}  // namespace lopt
