// The .cu files as one back end: compiled by nvcc `cuda`, by the C++ compiler (csrc/sim) `sim`.
#include "api/backend.h"

namespace lopt {

bool begin_cuda(const AdvanceParams& params, const Target& target);
bool accumulate_cuda(const AccumulateParams& params, int feature_set, const Target& target);
bool advance_cuda(const AdvanceParams& params, const Target& target);
bool apply_cuda(const ApplyParams& params, int feature_set, int width, const Target& target);
bool sweep_cuda(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,
                const Target& target);
bool finish_cuda(const AdvanceParams& params, const Target& target);
void write_words_cuda(int64_t* to, const int64_t* words, int64_t count, const Target& target);

const Backend& cuda_backend() {
  static constexpr Backend backend{begin_cuda, accumulate_cuda, advance_cuda,    apply_cuda,
                                   sweep_cuda, finish_cuda,     write_words_cuda};
  return backend;
}

}  // namespace lopt
