// The CUDA kernels as a library of their own, of one feature set and MLP that are not compiled in: lopt/kernels/own.py
// writes the set as a header (LOPT_OWN_FEATURES, struct OwnFeatures) and compiles this file and the others with it, by
// nvcc, or for `sim` by the C++ compiler.
#include "launchers.h"

extern "C" __attribute__((visibility("default"))) const lopt::Backend* lopt_backend() { return &lopt::cuda_backend(); }

// Floats in one packed row of MLP weights.
extern "C" __attribute__((visibility("default"))) int lopt_packed_weights() {
  return lopt::MlpLayout<lopt::OwnFeatures::kNumColumns, LOPT_OWN_WIDTH>::kSize;
}
