// The .cu files as one back end: compiled by nvcc `cuda`, by the C++ compiler (csrc/sim) `sim`.
#include "launchers.h"

namespace lopt {

// Defined in advance.cu.
bool begin_cuda(const AdvanceParams& params, const Target& target);
bool advance_cuda(const AdvanceParams& params, const Target& target);
bool finish_cuda(const AdvanceParams& params, const Target& target);
bool write_cuda(const ApplyParams& params, bool orthogonalised, const Target& target);  // in write.cu
void write_words_cuda(int64_t* to, const int64_t* words, int64_t count, const Target& target);

namespace {

// Calls launch(Features{}, IntConstant<kState>{}), which returns whether there is a kernel for it.
template <class Launch>
bool with_state(int feature_set, Dtype state, Launch&& launch) {
  bool launched = false;
  with_feature_set(feature_set, [&](auto features) {
#ifdef LOPT_OWN_FEATURES
    (void)state;
    launched = launch(features, IntConstant<LOPT_STATE>{});
#else
    launched = state == kFloat32    ? launch(features, IntConstant<kFloat32>{})
               : state == kBFloat16 ? launch(features, IntConstant<kBFloat16>{})
                                    : launch(features, IntConstant<kInt8>{});
#endif
  });
  return launched;
}

bool accumulate(const AccumulateParams& params, int feature_set, const Target& target) {
  return with_state(feature_set, params.state_dtype, [&](auto features, auto state) {
    launch_accumulate<decltype(features), Dtype{decltype(state)::value}>(params, target);
    return true;
  });
}

bool apply(const ApplyParams& params, int feature_set, int width, const Target& target) {
  return with_state(feature_set, params.state_dtype, [&](auto features, auto state) {
    using Features = decltype(features);
    constexpr Dtype kState{decltype(state)::value};
    return params.precision == kExact ? launch_apply<Features, kState>(params, width, target)
                                      : launch_apply_mma<Features, kState>(params, width, target);
  });
}

bool sweep(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,
           const Target& target) {
  return with_state(feature_set, applying.state_dtype, [&](auto features, auto state) {
    using Features = decltype(features);
    constexpr Dtype kState{decltype(state)::value};
    return applying.precision == kExact ? launch_sweep<Features, kState>(accumulating, applying, width, target)
                                        : launch_sweep_mma<Features, kState>(accumulating, applying, width, target);
  });
}

}  // namespace

const Backend& cuda_backend() {
  static constexpr Backend backend{begin_cuda, accumulate, advance_cuda, apply,           sweep,
                                   write_cuda, 0,          finish_cuda,  write_words_cuda};
  return backend;
}

}  // namespace lopt
