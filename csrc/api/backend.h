// One interface to all back ends: their operations as function pointers of one signature, found by name in one place.
#pragma once

#include <string>

#include "api/kernels.h"

namespace lopt {

// Where an operation runs; a back end reads what concerns it.
struct Target {
  int num_threads;  // of the CPU
  int device;       // index of the GPU
  uint64_t stream;  // a cudaStream_t of that device
};

// Operations return false where no kernel is compiled for the feature set (0 paper, 1 compact) and width (8, 16 or 32).
// On a GPU they are asynchronous, and all addresses but that of the spec are the device's. They throw std::runtime_error.
struct Backend {
  // Before accumulate: takes new losses, and computes the clip limit of this step from the gradients of the steps before.
  bool (*begin)(const AdvanceParams& params, const Target& target);
  bool (*accumulate)(const AccumulateParams& params, int feature_set, const Target& target);
  // Between accumulate and apply: losses and statistics -> LSTM -> what apply is conditioned on.
  bool (*advance)(const AdvanceParams& params, const Target& target);
  bool (*apply)(const ApplyParams& params, int feature_set, int width, const Target& target);
  // accumulate and apply in one sweep, for operands of apply that do not depend on the statistics.
  bool (*sweep)(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,
                const Target& target);
  // Directions of matrices -> parameters. Orthogonalises what it can, where the gate is open; false where something is
  // left, which is written by the next call, with `orthogonalised`.
  bool (*write)(const ApplyParams& params, bool orthogonalised, const Target& target);
  int64_t native_side;  // matrices of at most this shorter side are orthogonalised by `write`
  // After apply: the mean MLP outputs that the next LSTM step sees.
  bool (*finish)(const AdvanceParams& params, const Target& target);
  // to[i] = words[i] for i < count, on the device, as kernel arguments: in a CUDA graph they are constants.
  void (*write_words)(int64_t* to, const int64_t* words, int64_t count, const Target& target);
};

const Backend& cpu_backend();   // the widest instruction set, or the selected one (csrc/cpu/cpu_dispatch.h)
int cuda_driver_version();      // newest CUDA that the driver supports: 1000 major + 10 minor; 0 without one
const Backend& cuda_backend();  // of the .cu files, whether nvcc compiled them or, for `sim`, the C++ compiler

// The back end of this name in this module (bindings.cpp, sim.cpp); null where the module has none.
const Backend* find_backend(const std::string& name);

}  // namespace lopt
