// The CPU kernels as a library of their own, of one feature set and width that are not compiled in: lopt/kernels/own.py writes
// the set as a header (LOPT_OWN_FEATURES, struct OwnFeatures) and compiles this file and the operations with it.
#include <algorithm>

#include "api/backend.h"

namespace lopt {
namespace LOPT_ISA {

bool begin(const AdvanceParams& params, const Target& target);
bool accumulate(const AccumulateParams& params, int feature_set, const Target& target);
bool advance(const AdvanceParams& params, const Target& target);
bool apply(const ApplyParams& params, int feature_set, int width, const Target& target);
bool sweep(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,
           const Target& target);
bool write(const ApplyParams& params, bool orthogonalised, const Target& target);
bool finish(const AdvanceParams& params, const Target& target);

namespace {

void write_words(int64_t* to, const int64_t* words, int64_t count, const Target&) { std::copy_n(words, count, to); }

constexpr Backend kBackend{begin, accumulate, advance, apply, sweep, write, kNativeSide, finish, write_words};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt

extern "C" __attribute__((visibility("default"))) const lopt::Backend* lopt_backend() {
  return &lopt::LOPT_ISA::kBackend;
}

// Floats in one packed row of MLP weights.
extern "C" __attribute__((visibility("default"))) int lopt_packed_weights() {
  return lopt::MlpLayout<lopt::OwnFeatures::kNumColumns, LOPT_OWN_WIDTH>::kSize;
}
