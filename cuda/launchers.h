// What a feature set and a dtype of the state (enum Dtype) have kernels of their own for. Each is defined where its kernel
// is, and instantiated there, for all combinations or for the one that a translation unit is compiled for (LOPT_FEATURES,
// LOPT_STATE; see CMakeLists.txt): all kernels in one take the compiler minutes.
#pragma once

#include "api/backend.h"

namespace lopt {

template <class Features, Dtype kState>
void launch_accumulate(const AccumulateParams& params, const Target& target);

// By the precision of the MLP: in plain float, and on tensor cores. False for a width that has no kernels.
template <class Features, Dtype kState>
bool launch_apply(const ApplyParams& params, int width, const Target& target);
template <class Features, Dtype kState>
bool launch_apply_mma(const ApplyParams& params, int width, const Target& target);
template <class Features, Dtype kState>
bool launch_sweep(const AccumulateParams& accumulating, const ApplyParams& applying, int width, const Target& target);
template <class Features, Dtype kState>
bool launch_sweep_mma(const AccumulateParams& accumulating, const ApplyParams& applying, int width,
                      const Target& target);

#ifdef LOPT_OWN_FEATURES  // a library of one set, for one dtype of the state
#define LOPT_FEATURES OwnFeatures
#endif
#ifdef LOPT_FEATURES
#define LOPT_INSTANTIATE(returns, launcher, ...) template returns launcher<LOPT_FEATURES, LOPT_STATE>(__VA_ARGS__);
#else
#define LOPT_INSTANTIATE(returns, launcher, ...)                      \
  template returns launcher<PaperFeatures, kFloat32>(__VA_ARGS__);    \
  template returns launcher<PaperFeatures, kBFloat16>(__VA_ARGS__);   \
  template returns launcher<PaperFeatures, kInt8>(__VA_ARGS__);       \
  template returns launcher<CompactFeatures, kFloat32>(__VA_ARGS__);  \
  template returns launcher<CompactFeatures, kBFloat16>(__VA_ARGS__); \
  template returns launcher<CompactFeatures, kInt8>(__VA_ARGS__);
#endif

}  // namespace lopt
